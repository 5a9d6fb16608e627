"""Data sets -> mixed, cropped, tokenised batches of one process, ready for the device.

Every example is a pure function of (seed, position in the global stream): not of the number of
threads, workers or processes, nor of what was read before. The place to resume is one number.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags
from tqdm import tqdm

from simseg_jax.data.autoaugment import autoaugment
from simseg_jax.data.images import (
    crop_and_resize,
    decode_image,
    draw_crop,
    read_crop,
)
from simseg_jax.data.mixture import Mixture
from simseg_jax.data.pairs import BadExample, DataSetConfig, open_source
from simseg_jax.data.text import TextEncoder
from simseg_jax.runtime.errors import NAMED, UserError
from simseg_jax.runtime.ranges import FLAG, SHARE, TEXT, number, one_of, pair, whole
from simseg_jax.runtime.settings import entries, setting

# Examples that a thread or worker prepares at a time: enough to make the bookkeeping cheap.
CHUNK = 32
# Bad examples are replaced by others of their data set, at most so many times in a row.
ATTEMPTS = 20
NAME_BYTES = 200
SAMPLE = 64  # Examples that identify a data set.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run is trained on and how its examples are made."""

    train: dict[str, DataSetConfig] = entries(DataSetConfig)
    mixture: str = setting(
        "shuffle",
        "shuffle: all data sets together; debiased: each batch from one",
        one_of("shuffle", "debiased"),
    )
    vocab: str = setting(
        "bert-base-uncased", "vocabulary: hub name, vocab.txt, tokenizer folder, shapes", TEXT
    )
    max_length: int = setting(25, "tokens per caption, [CLS] and [SEP] included", whole(3, 2**16))
    edit_rate: float = setting(
        0.2, "share of word pieces masked (50 %), replaced (10 %), deleted (40 %)", SHARE
    )
    crop_area: tuple[float, float] = setting(
        (0.6, 1.0), "RandomResizedCrop: range of the area kept", pair(number(0, 1, above=True))
    )
    crop_aspect: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "RandomResizedCrop: range of width / height", pair(number(0.01, 100))
    )
    autoaugment: bool = setting(True, "AutoAugment, ImageNet policy", FLAG)
    transform: str = setting(
        "fast",
        "fast: libjpeg-turbo, AutoAugment on the device; pil: all on hosts",
        one_of("fast", "pil"),
    )
    max_bad: float = setting(
        0.1, "stop when more than this share of the examples is damaged", SHARE
    )
    max_pixels: int = setting(
        89_478_485, "larger images count as damaged: decompression bombs", whole(1)
    )
    threads: int = setting(
        16, "threads that read and prepare examples, in every worker", whole(1, 256)
    )
    workers: int = setting(
        0, "processes that do so; 0: only this one. One per core feeds most", whole(0, 256)
    )
    prefetch: int = setting(512, "examples prepared ahead, by every worker", whole(1, 2**14))
    cache: str = setting(
        "", "folder for indexes, copies, programs; '': $SIMSEG_CACHE or ~/.cache/simseg_jax", TEXT
    )

    @property
    def autoaugment_on_device(self) -> bool:
        """Whether the training step has to apply AutoAugment itself."""
        return self.autoaugment and self.transform == "fast"


class Examples:
    """The endless stream of training examples that `config.data` describes.

    image_size: side of the images in pixels; batch_size: the global one.
    """

    def __init__(
        self, data: DataConfig, *, image_size: int, batch_size: int, encoder: TextEncoder, seed: int
    ):
        if not data.train:
            raise UserError(
                "The configuration names no data set: add one, as config.data.train.NAME = "
                "data_set(path=...) in the file (see configs/flickr8k.py)."
            )
        self.data, self.image_size, self.encoder, self.seed = data, image_size, encoder, seed
        self.sources = [open_source(settings, data.cache) for settings in data.train.values()]
        sizes = [len(source) for source in self.sources]
        weights = [settings.weight for settings in data.train.values()]
        self.mixture = Mixture(sizes, weights, data.mixture, batch_size, seed)

    def __len__(self) -> int:
        """Examples in an epoch."""
        return len(self.mixture)

    def describe(self) -> list[str]:
        """One line per data set: its size and what had to be left out."""
        lines = []
        for name, source in zip(self.data.train, self.sources, strict=True):
            line = f"data.train.{name}: {len(source):,} examples"
            if source.problems:
                line += f"; {source.problems}"
            lines.append(line)
        return lines

    def identity(self) -> dict[str, dict[str, Any]]:
        """Identifies every data set by its content, wherever it is.

        {name: {"examples": int, "sample": digests of image and captions of `SAMPLE` examples}}; the
        digest of an example that cannot be read is "".
        """
        with ThreadPoolExecutor(min(SAMPLE, self.data.threads)) as pool:
            return {
                name: {
                    "examples": len(source),
                    "sample": list(pool.map(functools.partial(_digest, source), _spread(source))),
                }
                for name, source in zip(self.data.train, self.sources, strict=True)
            }

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Example at a position of the stream.

        {"image": uint8 [S, S, 3], "ids": int32 [T], "mask": bool [T], "caption": str, "name": str,
        "unknown": bool, "bad": tuple of str}: whether the vocabulary knows no word of the caption,
        and what was wrong with the examples that had to be replaced before.
        """
        chosen, index = self.mixture[position]
        source, bad = self.sources[chosen], []
        # A counter-based generator of its own for every example: cheap to make, nothing shared.
        rng = np.random.Generator(np.random.Philox(key=[self.seed, position]))
        while len(bad) < ATTEMPTS:
            try:
                return {**self._prepare(source[index], rng), "bad": tuple(bad)}
            except BadExample as problem:
                bad.append(str(problem))
                index = int(rng.integers(len(source)))
        raise UserError(
            f"{ATTEMPTS} examples in a row of data.train.{list(self.data.train)[chosen]} cannot be "
            f"used, the last one: {bad[-1]}. Check the data set with python -m "
            "simseg_jax.data.inspect."
        )

    def _prepare(self, pair: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        data, name = self.data, pair["name"]

        def draw(width: int, height: int):
            return draw_crop(width, height, data.crop_area, data.crop_aspect, rng)

        try:
            if data.transform == "pil":
                whole = decode_image(pair["image"], name, data.max_pixels)
                image = crop_and_resize(whole, draw(*whole.size), self.image_size)
                if data.autoaugment:
                    image = np.asarray(autoaugment(decode_image(image), rng))
            else:
                image = read_crop(pair["image"], self.image_size, draw, data.max_pixels)
        except (ValueError, UserError) as error:
            raise BadExample(name, error) from error
        caption = pair["captions"][rng.integers(len(pair["captions"]))]
        pieces = self.encoder.pieces(caption)
        ids, mask = self.encoder.layout(pieces, rng)
        unknown = self.encoder.unknown(pieces)
        text = {"ids": ids, "mask": mask, "caption": caption, "unknown": unknown}
        return {"image": image, "name": name, **text}


class Chunks:
    """Chunk number -> its examples, stacked; picklable, for worker processes."""

    def __init__(self, examples: Examples, batch_size: int, process: tuple[int, int]):
        index, count = process
        self.examples, self.batch_size = examples, batch_size
        # One contiguous block of every global batch per process, one part of it per chunk: the
        # global batch is the same whatever the number of processes.
        self.per_batch = -(-batch_size // (count * CHUNK))
        block = np.linspace(0, batch_size // count, self.per_batch + 1).astype(int)
        self.bounds = block + index * (batch_size // count)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        batch, part = divmod(number, self.per_batch)
        start, stop = batch * self.batch_size + self.bounds[part : part + 2]
        examples = [self.examples[int(position)] for position in range(start, stop)]
        chunk = {key: np.stack([x[key] for x in examples]) for key in ("image", "ids", "mask")}
        chunk["unknown"] = np.array([example["unknown"] for example in examples])
        chunk["bad"] = np.array([len(example["bad"]) for example in examples], np.int32)
        first = [example["bad"][0] if example["bad"] else "" for example in examples]
        chunk["problem"] = np.array([x.encode() for x in first], f"S{NAME_BYTES}")
        return chunk


class TrainBatches:
    """Endless batches of this process's share: {"image": uint8 [b, S, S, 3], "ids", "mask"}.

    Assign `position` to continue from there. `waited` sums up the seconds that `next` took. Bad
    examples are counted, the first few are named, and a `UserError` stops the run when their share
    exceeds `config.data.max_bad`. `unknown` counts the captions without a known word.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.examples, self.batch_size = examples, batch_size
        self.chunks = Chunks(examples, batch_size, (process_index, process_count))
        self.position = 0
        self.waited, self.taken, self.bad, self.unknown = 0.0, 0, 0, 0

    @property
    def position(self) -> int:
        """Examples of the global stream taken so far."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        # A run may go on with another batch size; batches start at multiples of it.
        self._position = position // self.batch_size * self.batch_size
        self._iterator = None

    def _start(self):
        data, per_batch = self.examples.data, self.chunks.per_batch
        first = self._position // self.batch_size * per_batch
        ahead = max(data.threads, -(-data.prefetch // CHUNK))
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead)
        # Endless: Python's largest index is out of reach of any training.
        chunks = grain.MapDataset.range(first, 2**62).map(self.chunks).to_iter_dataset(options)
        if data.workers:
            chunks = in_processes(chunks, data.workers)
        batches = chunks.batch(per_batch, batch_fn=_concatenate)
        # Copying the chunks together overlaps with the step, too.
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        began = time.monotonic()
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._position += self.batch_size
        self._count_unknown(int(batch.pop("unknown").sum()))
        self._count(batch.pop("bad"), batch.pop("problem"))
        self.waited += time.monotonic() - began
        return batch

    def _count_unknown(self, count: int) -> None:
        if count and not self.unknown:
            tqdm.write(
                "The vocabulary knows no word of some captions, which are nothing but [UNK] to the "
                "model: metrics.jsonl counts them as data_unknown."
            )
        self.unknown += count

    def _count(self, bad: np.ndarray, problems: np.ndarray) -> None:
        self.taken += len(bad)
        if not bad.any():
            return
        messages = [problem.decode(errors="ignore") for problem in problems[bad > 0]]
        for message in messages[: max(0, NAMED - self.bad)]:
            tqdm.write(f"Replaced by another example: {message}")
        self.bad += int(bad.sum())
        limit = self.examples.data.max_bad
        # Not before there are enough of them for a share.
        if self.bad > max(2 * NAMED, limit * (self.taken + self.bad)):
            raise UserError(
                f"{self.bad} of {self.taken + self.bad} training examples cannot be used, more "
                f"than data.max_bad={limit}; the last one: {messages[-1]}. Repair the "
                "data (python -m simseg_jax.data.prepare drops what is damaged) or raise max_bad."
            )


def _spread(source) -> list[int]:
    """Indices of examples spread evenly over a source, its first and last included."""
    return np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int).tolist()


def _digest(source, index: int) -> str:
    try:
        pair = source[index]
    except BadExample:
        return ""
    image = pair["image"]
    content = hashlib.sha256(image if isinstance(image, bytes) else image.tobytes())
    content.update("\0".join(pair["captions"]).encode(errors="surrogatepass"))
    return content.hexdigest()[:8]


def in_processes(dataset: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The same elements in the same order, made by `workers` processes."""
    # Grain's workers ask for absl's flags, which nobody here parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def _concatenate(chunks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
