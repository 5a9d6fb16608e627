"""Data sets -> mixed, cropped, tokenised batches of one process, ready for the device.

Every example is a pure function of (seed, position in the global stream). Threads, workers and
processes only share the computation, so one number is enough to resume a run: its position.
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
from simseg_jax.data.crops import draw_crop, read_crop
from simseg_jax.data.images import crop_and_resize, decode_image
from simseg_jax.data.mixture import Mixture
from simseg_jax.data.pairs import BadExample, DataSetConfig, open_source
from simseg_jax.data.pairs.example import fingerprint, spread
from simseg_jax.data.text import TextEncoder
from simseg_jax.runtime.errors import NAMED, UserError
from simseg_jax.runtime.ranges import FLAG, SHARE, TEXT, number, one_of, pair, whole
from simseg_jax.runtime.settings import entries, setting

CHUNK = 32  # Examples per task of a thread or worker; larger tasks have less overhead.
ATTEMPTS = 20  # A run stops after so many bad examples in a row.
NAME_BYTES = 200  # Most bytes of the description of a problem, which workers send as an array.
SAMPLE = 64  # Number of examples whose digests identify a data set.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data sets of a run, and how examples are made from them."""

    train: dict[str, DataSetConfig] = entries(DataSetConfig)
    mixture: str = setting(
        "shuffle",
        "shuffle: batches from all data sets; debiased: each batch from one",
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
    flip: float = setting(0.0, "share of images that are mirrored; the paper mirrors none", SHARE)
    autoaugment: bool = setting(True, "AutoAugment, ImageNet policy", FLAG)
    transform: str = setting(
        "fast",
        "fast: libjpeg-turbo, AutoAugment on the device; pil: all on the host, with PIL",
        one_of("fast", "pil"),
    )
    max_bad: float = setting(
        0.1, "stop when more than this share of the examples is damaged", SHARE
    )
    max_pixels: int = setting(
        89_478_485, "larger images count as damaged, as decompression bombs", whole(1)
    )
    threads: int = setting(16, "threads per worker that read and prepare examples", whole(1, 256))
    workers: int = setting(
        0, "worker processes; 0: threads of this one only. One per core is fastest", whole(0, 256)
    )
    prefetch: int = setting(512, "examples that each worker prepares ahead", whole(1, 2**14))
    cache: str = setting(
        "", "folder for indexes, copies, programs; '': $SIMSEG_CACHE or ~/.cache/simseg_jax", TEXT
    )

    @property
    def autoaugment_on_device(self) -> bool:
        """Whether the training step applies AutoAugment."""
        return self.autoaugment and self.transform == "fast"


class Examples:
    """The endless stream of training examples that `config.data` describes.

    image_size: side of the images in pixels. batch_size: of the global batch. groups: whether
    examples say which of them have the same caption.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        image_size: int,
        batch_size: int,
        encoder: TextEncoder,
        seed: int,
        groups: bool = False,
    ):
        if not data.train:
            raise UserError(
                "The configuration names no data set: add one to the file as "
                "config.data.train.NAME = data_set(path=...) (see configs/flickr8k.py)."
            )
        self.data, self.image_size, self.encoder, self.seed = data, image_size, encoder, seed
        self.groups = groups
        self.sources = [open_source(settings, data.cache) for settings in data.train.values()]
        self.collages = [settings.collage for settings in data.train.values()]
        sizes = [len(source) for source in self.sources]
        weights = [settings.weight for settings in data.train.values()]
        self.mixture = Mixture(sizes, weights, data.mixture, batch_size, seed)

    def __len__(self) -> int:
        """The number of examples in an epoch."""
        return len(self.mixture)

    def describe(self) -> list[str]:
        """One line per data set: its size and what was left out."""
        return [
            f"data.train.{name}: {len(source):,} examples"
            + (f"; {source.problems}" if source.problems else "")
            for name, source in zip(self.data.train, self.sources, strict=True)
        ]

    def identity(self) -> dict[str, dict[str, Any]]:
        """Identifies every data set by its content, independent of where it is stored.

        {name: {"examples": their number, "sample": digests of image and captions of `SAMPLE`
        examples}}; the digest of an example that cannot be read is "".
        """
        found = {}
        with ThreadPoolExecutor(min(SAMPLE, self.data.threads)) as pool:
            for name, source in zip(self.data.train, self.sources, strict=True):
                digest = functools.partial(_digest, source)
                sample = list(pool.map(digest, spread(len(source), SAMPLE)))
                found[name] = {"examples": len(source), "sample": sample}
        return found

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The example at a position of the stream.

        "image": uint8 [S, S, 3]; "ids": int32 [T]; "mask": bool [T]; with `groups` "groups": uint32
        [2], equal for captions of equal word pieces; "caption", "name": str;
        "unknown": whether the vocabulary knows no word of the caption; "bad": tuple of str, the
        problems of the examples that this one replaces.
        """
        chosen, index = self.mixture[position]
        source, bad = self.sources[chosen], []
        # A counter-based generator: one per example is cheap and shares no state.
        rng = np.random.Generator(np.random.Philox(key=[self.seed, position]))
        while len(bad) < ATTEMPTS:
            try:
                return {**self._prepare(chosen, index, rng), "bad": tuple(bad)}
            except BadExample as problem:
                bad.append(str(problem))
                index = int(rng.integers(len(source)))
        raise UserError(
            f"{ATTEMPTS} examples in a row of data.train.{list(self.data.train)[chosen]} cannot be "
            f"used, the last one: {bad[-1]} Check the data set with python -m "
            "simseg_jax.data.inspect."
        )

    def _prepare(self, chosen: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        source, collage = self.sources[chosen], self.collages[chosen]
        # The generator draws nothing for a collage unless there are some, so that other runs stay
        # the same.
        if collage and rng.random() < collage:
            indices = [index, *rng.integers(len(source), size=3).tolist()]
            tiles = [self._tile(source[i], self.image_size // 2, rng) for i in indices]
            pictures, captions, names = zip(*tiles, strict=True)
            image = np.vstack([np.hstack(pictures[:2]), np.hstack(pictures[2:])])
            caption, name = ", ".join(captions), " + ".join(names)
        else:
            image, caption, name = self._tile(source[index], self.image_size, rng)
        pieces = self.encoder.pieces(caption)
        ids, mask = self.encoder.layout(pieces, rng)
        example = {
            "image": image,
            "ids": ids,
            "mask": mask,
            "caption": caption,
            "name": name,
            "unknown": self.encoder.unknown(pieces),
        }
        if self.groups:
            content = np.array(pieces, np.int32).tobytes()
            digest = hashlib.blake2b(content, digest_size=8).digest()
            example["groups"] = np.frombuffer(digest, np.uint32)
        return example

    def _tile(
        self, pair: dict[str, Any], side: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, str, str]:
        """(crop [side, side, 3], caption, name) of a pair."""
        try:
            image = self._crop(pair["image"], side, rng)
        except (ValueError, UserError) as error:
            raise BadExample(pair["name"], error) from error
        # Nothing is drawn unless images are to be mirrored, so that other runs stay the same.
        if self.data.flip and rng.random() < self.data.flip:
            image = image[:, ::-1]
        return image, pair["captions"][rng.integers(len(pair["captions"]))], pair["name"]

    def _crop(self, image: bytes | np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
        """A random crop, uint8 [side, side, 3]; with AutoAugment if transform is pil."""
        data = self.data

        def draw(width: int, height: int):
            return draw_crop(width, height, data.crop_area, data.crop_aspect, rng)

        if data.transform == "fast":
            return read_crop(image, side, draw, data.max_pixels)
        whole = decode_image(image, max_pixels=data.max_pixels)
        crop = crop_and_resize(whole, draw(*whole.size), side)
        return np.asarray(autoaugment(decode_image(crop), rng)) if data.autoaugment else crop


class TrainBatches:
    """This process's share of the global batches: {"image": uint8 [b, S, S, 3], "ids", "mask"}.

    With "groups" if the examples have it. The batches never end. Assigning `position` continues
    from there. `waited` is the total time in `next`, in seconds. Bad examples are counted and the
    first few are named; a `UserError` stops the run when their share exceeds `config.data.max_bad`.
    `unknown` counts the captions without a known word.
    """

    def __init__(
        self, examples: Examples, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ):
        self.examples, self.batch_size = examples, batch_size
        self.share = batch_size // process_count
        self.offset = process_index * self.share
        self.position = 0
        self.waited, self.taken, self.bad, self.unknown = 0.0, 0, 0, 0

    @property
    def position(self) -> int:
        """The number of examples of the global stream used so far."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        # A run may continue with another batch size; batches start at its multiples.
        self._position = position // self.batch_size * self.batch_size
        self._iterator = None

    def _start(self):
        data = self.examples.data
        ahead = max(data.threads, -(-data.prefetch // CHUNK))
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead)
        first = self._position // self.batch_size * self.share
        place = functools.partial(_place, self.batch_size, self.share, self.offset)
        chunks = (
            # No training reaches the largest index.
            grain.MapDataset.range(first, 2**62)
            .map(place)
            .map(self.examples.__getitem__)
            .batch(CHUNK, batch_fn=stack)
            .to_iter_dataset(options)
        )
        if data.workers:
            chunks = in_processes(chunks, data.workers)
        batches = grain.experimental.RebatchIterDataset(chunks, self.share)
        # In a thread, joining the chunks overlaps with the training step as well.
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
        self._count_bad(batch.pop("bad"), batch.pop("problem"))
        self.waited += time.monotonic() - began
        return batch

    def _count_unknown(self, count: int) -> None:
        if count and not self.unknown:
            tqdm.write(
                "The vocabulary knows no word of some captions, so the model reads only [UNK]: "
                "metrics.jsonl counts them as data_unknown."
            )
        self.unknown += count

    def _count_bad(self, bad: np.ndarray, problems: np.ndarray) -> None:
        self.taken += len(bad)
        if not bad.any():
            return
        messages = [problem.decode(errors="ignore") for problem in problems[bad > 0]]
        for message in messages[: max(0, NAMED - self.bad)]:
            tqdm.write(f"Replaced by another example: {message}")
        self.bad += int(bad.sum())
        limit = self.examples.data.max_bad
        # The share among the first few examples means nothing.
        if self.bad > max(2 * NAMED, limit * (self.taken + self.bad)):
            raise UserError(
                f"{self.bad} of {self.taken + self.bad} training examples cannot be used, more "
                f"than data.max_bad={limit}; the last one: {messages[-1].rstrip('.')}. Repair the "
                "data (python -m simseg_jax.data.prepare drops damaged examples) or raise max_bad."
            )


def _place(batch_size: int, share: int, offset: int, number: int) -> int:
    """The position in the global stream of example `number` of one process.

    Of every global batch a process takes one contiguous block: `share` examples from `offset` on.
    The global batch is therefore the same for any number of processes.
    """
    batch, index = divmod(number, share)
    return batch * batch_size + offset + index


def stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays of several examples: the inputs of a training step, and what is counted."""
    inputs = [key for key in ("image", "ids", "mask", "groups") if key in examples[0]]
    chunk = {key: np.stack([x[key] for x in examples]) for key in inputs}
    chunk["unknown"] = np.array([x["unknown"] for x in examples])
    chunk["bad"] = np.array([len(x["bad"]) for x in examples], np.int32)
    first = [x["bad"][0].encode() if x["bad"] else b"" for x in examples]
    chunk["problem"] = np.array(first, f"S{NAME_BYTES}")
    return chunk


def in_processes(dataset: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The same elements in the same order, computed by `workers` processes."""
    # Grain's workers read absl's flags, which this package never parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def _digest(source, index: int) -> str:
    try:
        return fingerprint(source[index]).hex()[:8]
    except BadExample:
        return ""
