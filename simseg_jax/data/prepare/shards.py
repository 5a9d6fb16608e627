"""The unit of work of `prepare`: one output shard, from reading its examples to its statistics.

Every function here takes the job and a number, may run in any process or on any machine that sees
the folders of the job, and leaves its result there as files that appear when they are complete.
"""

import functools
import hashlib
import io
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from simseg_jax.data.images import decode_image, open_image
from simseg_jax.data.pairs import BadExample, PairsConfig, open_source, tf_example
from simseg_jax.runtime.errors import NAMED, UserError, writing
from simseg_jax.runtime.files import appearing
from simseg_jax.runtime.threads import ahead

DROPPED = "dropped.npy"  # In the folder of a job that drops duplicates: positions, sorted.
THREADS = 16  # Per process: remote files answer slowly, and PIL works outside Python's lock.
AHEAD = 64  # Examples in memory per process.
KEPT_FORMATS, KEPT_MODES = ("JPEG", "PNG"), ("RGB", "L")


@dataclass(frozen=True)
class Job:
    """Everything the bytes of the shards depend on.

    source: settings of the data set. content: stands for the versions of its files. examples: its
    length.
    """

    source: dict[str, Any]
    content: str
    examples: int
    name: str
    split_name: str
    shards: int
    short_side: int
    quality: int
    max_pixels: int
    seed: int
    shuffle: bool
    duplicates: str

    def file_name(self, index: int) -> str:
        """The name TFDS gives to shard `index`."""
        return f"{self.name}-{self.split_name}.array_record-{index:05d}-of-{self.shards:05d}"


class Rejected(NamedTuple):
    """Why an example is not written."""

    kind: str
    message: str


class Accepted(NamedTuple):
    """A record and what the statistics need of it; size: upright (width, height) before."""

    record: bytes
    hash: int
    size: tuple[int, int]
    words: list[int]
    counts: dict[str, int]


@dataclass
class Statistics:
    """Counts of one shard or, added up, of all.

    counts: examples read; those written, their captions, re-encoded images and bytes of images
    before and after; unusable examples and corrupt images. first: names of the last two. words:
    captions by number of words; short_side, long_side: images by their size before, in pixels.
    file_size: bytes of the shard.
    """

    counts: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    short_side: Counter[int] = field(default_factory=Counter)
    long_side: Counter[int] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    file_size: int = 0

    def add(self, result: "Accepted | Rejected") -> None:
        """Counts one example."""
        self.counts["examples"] += 1
        if isinstance(result, Rejected):
            self.counts[result.kind] += 1
            self.first[result.kind] = [*self.first.get(result.kind, []), result.message][:NAMED]
            return
        self.counts.update(result.counts)
        self.words.update(result.words)
        self.short_side[min(result.size)] += 1
        self.long_side[max(result.size)] += 1

    def __add__(self, other: "Statistics") -> "Statistics":
        total = Statistics()
        for name in ("counts", "words", "short_side", "long_side"):
            getattr(total, name).update(getattr(self, name))
            getattr(total, name).update(getattr(other, name))
        for kind in {**self.first, **other.first}:
            total.first[kind] = (self.first.get(kind, []) + other.first.get(kind, []))[:NAMED]
        return total

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """What `write_shard` has left at `path`."""
        saved = json.loads(path.read_text())
        words, short_side, long_side = (
            Counter({int(value): count for value, count in saved[name].items()})
            for name in ("words", "short_side", "long_side")
        )
        counts, first = Counter(saved["counts"]), saved["first"]
        return cls(counts, words, short_side, long_side, first, saved["file_size"])


def statistics_path(folder: Path, index: int) -> Path:
    """Where `write_shard` leaves the statistics of a shard: the sign that it is finished."""
    return folder / f"statistics-{index:05d}.json"


def hashes_path(folder: Path, index: int) -> Path:
    """Where the hashes of part `index` are: uint64 [n, 2], position in the source and hash."""
    return folder / f"hashes-{index:05d}.npy"


def write_shard(job: Job, folder: Path, index: int) -> None:
    """Reads, checks, re-encodes and writes the examples of one shard; its statistics come last."""
    source, statistics, hashes = open_once(**job.source), Statistics(), []
    order = _order(job, folder)
    positions = order[_part(len(order), job.shards, index)].tolist()
    final = folder / job.file_name(index)
    advice = "Make room there and run the same command again; finished shards are kept."
    # ArrayRecord raises RuntimeError for whatever the operating system says.
    storing = functools.partial(writing, str(final), lambda: advice, RuntimeError)
    with appearing(final) as path:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        with ThreadPoolExecutor(THREADS) as pool:
            results = ahead(pool, functools.partial(_read, job, source), positions, AHEAD)
            for position, result in zip(positions, results, strict=True):
                statistics.add(result)
                if isinstance(result, Accepted):
                    with storing():
                        writer.write(result.record)
                    hashes.append((position, result.hash))
        with storing():
            writer.close()
        statistics.file_size = path.stat().st_size
    if job.duplicates == "keep":
        _save_hashes(folder, index, hashes)
    with appearing(statistics_path(folder, index)) as path:
        path.write_text(json.dumps(vars(statistics)))


def is_written(job: Job, folder: Path, index: int) -> bool:
    """Whether `write_shard` has left everything of a shard, undamaged as far as can be seen."""
    try:
        size = Statistics.load(statistics_path(folder, index)).file_size
        if (folder / job.file_name(index)).stat().st_size != size:
            return False
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return job.duplicates == "drop" or is_hashed(folder, index)


def is_hashed(folder: Path, index: int) -> bool:
    """Whether the hashes of a part are there and can be read."""
    try:
        return np.load(hashes_path(folder, index)).shape[1:] == (2,)
    except (OSError, ValueError, EOFError):
        return False


def hash_part(job: Job, folder: Path, index: int) -> None:
    """Hashes the examples of one part of the source, in its order, to find duplicates before."""
    source = open_once(**job.source)

    def read(position: int) -> tuple[int, int] | None:
        try:
            pair = source[position]
        except BadExample:
            return None  # `write_shard` counts it.
        return position, _hash(pair)

    positions = range(job.examples)[_part(job.examples, job.shards, index)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(filter(None, ahead(pool, read, positions, AHEAD)))
    _save_hashes(folder, index, found)


def repeated(job: Job, folder: Path) -> np.ndarray:
    """Positions in the source, sorted, of examples that an earlier one equals: int64 [n].

    Read from the hashes of all parts: 64 bits of the image's bytes and the captions.
    """
    found = np.concatenate([np.load(hashes_path(folder, i)) for i in range(job.shards)])
    found = found[np.argsort(found[:, 0])]
    _, first = np.unique(found[:, 1], return_index=True)
    return np.delete(found[:, 0], first).astype(np.int64)


def _read(job: Job, source, position: int) -> Accepted | Rejected:
    try:
        pair = source[int(position)]
    except BadExample as problem:
        return Rejected("unusable", str(problem))
    image, captions, name = pair["image"], pair["captions"], pair["name"]
    if isinstance(image, np.ndarray):
        image = _encode(Image.fromarray(image), "PNG")
    try:
        written, size = _checked(image, name, job)
    except UserError as error:
        return Rejected("corrupt", str(error))
    counts = {
        "written": 1,
        "captions": len(captions),
        "reencoded": int(written is not image),
        "bytes_in": len(image),
        "bytes_out": len(written),
    }
    record = tf_example.serialize({"image": written, "captions": captions, "name": name})
    return Accepted(record, _hash(pair), size, [len(c.split()) for c in captions], counts)


def _checked(image: bytes, name: str, job: Job) -> tuple[bytes, tuple[int, int]]:
    """(bytes to write, upright size before) of an image that decodes to its end."""
    decoded = decode_image(image, name, job.max_pixels)
    if not job.short_side:
        return image, decoded.size
    with open_image(image) as header:
        kept = header.format in KEPT_FORMATS and header.mode in KEPT_MODES
    written, scale = decoded, job.short_side / min(decoded.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in decoded.size]
        written, kept = decoded.resize(size, Image.Resampling.BICUBIC), False
    # A file that is kept byte for byte keeps its EXIF, by which it is read upright.
    return image if kept else _encode(written, "JPEG", quality=job.quality), decoded.size


def _encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _hash(pair: dict[str, Any]) -> int:
    image = pair["image"]
    parts = [image if isinstance(image, bytes) else image.tobytes()]
    parts += [caption.encode() for caption in pair["captions"]]
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # The length keeps two captions apart from one that reads like both.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


@functools.lru_cache(maxsize=1)
def open_once(**settings):
    """The source of a job, once per process; its index lies in the cache folder of the machine."""
    return open_source(PairsConfig(**settings))


def _order(job: Job, folder: Path) -> np.ndarray:
    """Positions in the source of the examples of all shards, one after the other: int64 [n]."""
    order = np.arange(job.examples)
    if job.shuffle:
        order = np.random.default_rng(job.seed).permutation(order)
    if job.duplicates == "drop":
        order = order[~np.isin(order, np.load(folder / DROPPED))]
    return order


def _part(length: int, parts: int, index: int) -> slice:
    return slice(length * index // parts, length * (index + 1) // parts)


def _save_hashes(folder: Path, index: int, hashes: list[tuple[int, int]]) -> None:
    table = np.array(hashes, np.uint64).reshape(-1, 2)
    with appearing(hashes_path(folder, index)) as path, path.open("wb") as file:
        np.save(file, table)
