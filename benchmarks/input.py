"""Training examples per second and core, from JPEG bytes and caption to a batch, against PIL.

    pip install -e ".[bench]"
    python benchmarks/input.py [--root FOLDER_OF_JPEGS] [--vocab vocab.txt] [--rounds 7]

The peer is the original's transform written out: PIL decodes, RandomResizedCrop 224 and AutoAugment
on PIL images, ToTensor and Normalize with PyTorch, the caption through its tokenizer. Ours is what
a thread of the training input does: decode, crop, resize, tokenise; AutoAugment and normalisation
belong to the device (benchmarks/autoaugment.py times them). One thread each, in turns on the same
files: as photographs of 500x375 and re-encoded to a short side of 288 as `prepare` does. Without
--root the photographs are noise with the spectrum of photographs. "Image only" compares our whole
time with the peer's without its caption. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import time
from typing import Any

import numpy as np
from densecrf import photographs
from peers import photos, require
from PIL import Image

from simseg_jax.data import pipeline
from simseg_jax.data.autoaugment import autoaugment
from simseg_jax.data.crops import draw_crop
from simseg_jax.data.pairs import DataSetConfig, Problems
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import whole

with contextlib.suppress(ImportError):  # Said by `require`, once the options are read.
    import torch  # pyright: ignore[reportMissingImports]

SIZE, LENGTH = 224, 25
AREA, ASPECT = (0.6, 1.0), (3 / 4, 4 / 3)
CAPTION = "a picture of a big star next to a moon on the grass with an old wheel"


def jpegs(root: str | None, count: int, size: tuple[int, int], quality: int) -> list[bytes]:
    """`count` JPEG files of `size` (width, height)."""
    if root:
        images = [Image.open(file).convert("RGB") for file in photos(root)[:count]]
    else:
        images = [Image.fromarray(image) for image in photographs(None, count)]
    encoded = []
    for image in images:
        file = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
        encoded.append(file.getvalue())
    return encoded


class Memory:
    """A source whose files lie in memory."""

    def __init__(self, files: list[bytes]):
        self.files, self.problems = files, Problems()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.files[index], "captions": (CAPTION,), "name": str(index)}


class Peer:
    """Image and caption as the original's data loader treats them; `seconds` per stage."""

    def __init__(self, tokenizer):
        self.tokenizer, self.rng, self.seconds = tokenizer, np.random.default_rng(0), {}
        self.vocabulary = list(tokenizer.get_vocab())
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))

    def lap(self, stage: str) -> None:
        began, self.began = self.began, time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0) + self.began - began

    def __call__(self, files: list[bytes]) -> tuple[torch.Tensor, ...]:
        self.began = time.perf_counter()
        rows = [(self.image(file), *self.text(CAPTION)) for file in files]
        batch = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        self.lap("stack")
        return batch

    def image(self, file: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        self.lap("decode")
        left, top, width, height = draw_crop(*image.size, AREA, ASPECT, self.rng)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        self.lap("crop and resize")
        image = autoaugment(image, self.rng)
        self.lap("AutoAugment")
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        tensor = (tensor - self.mean) / self.std
        self.lap("to tensor, normalise")
        return tensor

    def text(self, caption: str) -> tuple[torch.Tensor, ...]:
        words = []
        for piece in self.tokenizer.tokenize(caption):
            draw = random.random() / 0.2
            if draw >= 1:
                words.append(piece)
            elif draw < 0.5:
                words.append("[MASK]")
            elif draw < 0.6:
                words.append(random.choice(self.vocabulary))
        caption = " ".join(words).replace(" ##", "")
        encoded = self.tokenizer(caption, padding="max_length", truncation=True, max_length=LENGTH)
        self.lap("caption")
        return tuple(torch.tensor(encoded[key]) for key in ("input_ids", "attention_mask"))


def ours(files: list[bytes], tokenizer) -> pipeline.Examples:
    """The stream of training examples over `files`."""
    data = pipeline.DataConfig(
        train={"memory": DataSetConfig(path="memory")}, crop_area=AREA, crop_aspect=ASPECT
    )
    pipeline.open_source = lambda _settings, _cache: Memory(files)
    encoder = TextEncoder(tokenizer, LENGTH, data.edit_rate)
    return pipeline.Examples(data, image_size=SIZE, batch_size=32, encoder=encoder, seed=0)


def measure(files: list[bytes], tokenizer, rounds: int) -> dict[str, Any]:
    """Median milliseconds per pair of both sides and the peer's stages."""
    examples = ours(files, tokenizer)
    peer, times = Peer(tokenizer), {"ours": [], "peer": []}
    for number in range(rounds + 1):
        began = time.perf_counter()
        pipeline.stack([examples[number * len(files) + i] for i in range(len(files))])
        times["ours"].append((time.perf_counter() - began) / len(files))
        began = time.perf_counter()
        peer(files)
        times["peer"].append((time.perf_counter() - began) / len(files))
        if number == 0:
            peer.seconds.clear()  # The first round warms up.
    figures: dict[str, Any] = {k: 1e3 * float(np.median(v[1:])) for k, v in times.items()}
    scale = 1e3 / rounds / len(files)
    figures["peer stages"] = {stage: scale * value for stage, value in peer.seconds.items()}
    # What both transforms do to the image alone: the caption costs the peer more than its share.
    figures["peer, image only"] = figures["peer"] - figures["peer stages"]["caption"]
    return figures


@report_user_errors
def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description="The training input against PIL and PyTorch.")
    parser.add_argument("--root", help="folder of JPEG photographs; default: generated images")
    parser.add_argument(
        "--vocab", default="shapes", help="vocab.txt; default: a small built-in one"
    )
    parser.add_argument("--images", type=accepted(whole(1)), default=64)
    parser.add_argument("--rounds", type=accepted(whole(1)), default=7)
    args = parser.parse_args()
    require("torch")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.vocab)
    record: dict[str, Any] = {"benchmark": "input", "hardware": f"{os.cpu_count()} CPU cores"}
    print(f"{'JPEG':>9s}{'KB':>6s}{'ours':>16s}{'peer':>16s}{'ratio':>8s}{'image only':>12s}")
    for size, quality in (((500, 375), 92), ((384, 288), 90)):
        files = jpegs(args.root, args.images, size, quality)
        figures = measure(files, tokenizer, args.rounds)
        mine, peer, image = (figures[k] for k in ("ours", "peer", "peer, image only"))
        figures |= {"ratio": peer / mine, "ratio, image only": image / mine}
        figures["kilobytes"] = sum(map(len, files)) / len(files) / 1e3
        cells = [f"{1e3 / x:.0f}/s {x:.2f} ms" for x in (mine, peer)]
        name = f"{size[0]}x{size[1]}"
        print(
            f"{name:>9s}{figures['kilobytes']:6.0f}{cells[0]:>16s}{cells[1]:>16s}"
            f"{peer / mine:7.2f}x{image / mine:11.2f}x",
            flush=True,
        )
        stages = ", ".join(f"{k} {v:.2f}" for k, v in figures["peer stages"].items())
        print(f"{'':9s}peer, ms: {stages}")
        record[name] = figures
    print(json.dumps(record))


if __name__ == "__main__":
    main()
