"""The unit of work of `prepare`: one output shard, from reading its examples to its statistics.

The functions take the job and the number of a shard. They run in any process on any machine that
has access to the folders of the job. Their result is a file, which appears when it is complete.

All shards together are one list of positions in the source: a permutation that depends on the seed,
without the duplicates if they are dropped. A shard is one slice of that list and independent of the
other shards.
"""

import functools
import io
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from simseg_jax.data.images import decode_image, open_image
from simseg_jax.data.pairs import BadExample, PairsConfig, open_source, tf_example
from simseg_jax.data.pairs.example import fingerprint
from simseg_jax.data.pipeline import DataConfig
from simseg_jax.runtime.errors import NAMED, UserError, writing
from simseg_jax.runtime.files import appearing
from simseg_jax.runtime.ranges import FLAG, SEED, TEXT, one_of, whole
from simseg_jax.runtime.settings import inherited, setting
from simseg_jax.runtime.threads import ahead

DROPPED = "dropped.npy"  # Sorted positions of the duplicates, if the job drops them.
THREADS = 16  # Per process: remote files are slow, and PIL releases Python's lock.
AHEAD = 64  # Examples in memory per process.
KEPT_FORMATS, KEPT_MODES = ("JPEG", "PNG"), ("RGB", "L")


@dataclass(frozen=True)
class Job:
    """Everything that the bytes of the shards depend on.

    source: settings of the data set. content: a digest of its files. examples: their number.
    """

    source: dict[str, Any]
    content: str
    examples: int
    name: str
    shards: int
    split_name: str = setting("train", "name of the split to write", TEXT)
    short_side: int = setting(
        288,
        "larger images are re-encoded as JPEG with this short side in pixels, smaller ones are "
        "kept; 0: all keep their bytes",
        whole(0),
    )
    quality: int = setting(90, "quality of the re-encoded JPEGs", whole(1, 100))
    max_pixels: int = inherited(DataConfig, "max_pixels", DataConfig.max_pixels)
    seed: int = setting(0, "seed of the random order", SEED)
    shuffle: bool = setting(True, "random order over all shards; else the source's order", FLAG)
    duplicates: str = setting(
        "keep",
        "keep or drop pairs with the same bytes and captions as an earlier pair; drop reads the "
        "data twice",
        one_of("keep", "drop"),
    )

    def file_name(self, index: int) -> str:
        """The name of shard `index` in TFDS."""
        return f"{self.name}-{self.split_name}.array_record-{index:05d}-of-{self.shards:05d}"


@dataclass
class Statistics:
    """Counts of one example, of a shard or of all shards.

    counts: "examples" read: "unusable" ones (no image or caption), "corrupt" ones (the image cannot
    be decoded) and those "written". Of the written ones: "captions", "reencoded" images, and bytes
    of the images before and after ("bytes_in", "bytes_out"). words: captions by number of words.
    short_side, long_side: images by their original upright size in pixels. first: messages about
    the first unusable and the first corrupt examples. file_size: bytes of the shard.
    """

    counts: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    short_side: Counter[int] = field(default_factory=Counter)
    long_side: Counter[int] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    file_size: int = 0
    HISTOGRAMS: ClassVar = ("words", "short_side", "long_side")

    def add(self, other: "Statistics") -> None:
        """Adds everything but the size of the file."""
        for name in ("counts", *self.HISTOGRAMS):
            getattr(self, name).update(getattr(other, name))
        for kind, messages in other.first.items():
            self.first[kind] = [*self.first.get(kind, []), *messages][:NAMED]

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """The statistics that `write_shard` left at `path`."""
        saved = json.loads(path.read_text())
        saved["counts"] = Counter(saved["counts"])
        for name in cls.HISTOGRAMS:
            saved[name] = Counter({int(value): count for value, count in saved[name].items()})
        return cls(**saved)


class Prepared(NamedTuple):
    """One example: its statistics; also its record and hash, unless it is left out."""

    statistics: Statistics
    record: bytes = b""
    hash: int = 0


def statistics_path(folder: Path, index: int) -> Path:
    """Where `write_shard` saves the statistics of a shard, the sign that the shard is finished."""
    return folder / f"statistics-{index:05d}.json"


def hashes_path(folder: Path, index: int) -> Path:
    """Where the hashes of part `index` are saved: uint64 [n, 2], position in the source, hash."""
    return folder / f"digests-{index:05d}.npy"


def write_shard(job: Job, folder: Path, index: int) -> None:
    """Reads, checks, re-encodes and writes the examples of one shard, and last its statistics."""
    source, statistics, hashes = open_once(**job.source), Statistics(), []
    order = _order(job, folder)
    positions = order[_part(len(order), job.shards, index)].tolist()
    final = folder / job.file_name(index)
    advice = "Make room there and run the same command again; finished shards are kept."
    # ArrayRecord raises RuntimeError for all errors of the operating system.
    storing = functools.partial(writing, str(final), lambda: advice, RuntimeError)
    with appearing(final) as path:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        with ThreadPoolExecutor(THREADS) as pool:
            results = ahead(pool, functools.partial(_prepare, job, source), positions, AHEAD)
            for position, example in zip(positions, results, strict=True):
                statistics.add(example.statistics)
                if example.record:
                    with storing():
                        writer.write(example.record)
                    hashes.append((position, example.hash))
        with storing():
            writer.close()
        statistics.file_size = path.stat().st_size
    if job.duplicates == "keep":
        _save_hashes(folder, index, hashes)
    with appearing(statistics_path(folder, index)) as path:
        path.write_text(json.dumps(vars(statistics)))


def is_written(job: Job, folder: Path, index: int) -> bool:
    """Whether the files of a shard exist, with the right size and readable contents."""
    try:
        size = Statistics.load(statistics_path(folder, index)).file_size
        if (folder / job.file_name(index)).stat().st_size != size:
            return False
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return job.duplicates == "drop" or is_hashed(folder, index)


def is_hashed(folder: Path, index: int) -> bool:
    """Whether the hashes of a part exist and can be read."""
    try:
        return np.load(hashes_path(folder, index)).shape[1:] == (2,)
    except (OSError, ValueError, EOFError):
        return False


def hash_part(job: Job, folder: Path, index: int) -> None:
    """Hashes the examples of one part of the source, to find duplicates before any are written."""
    source = open_once(**job.source)

    def read(position: int) -> tuple[int, int] | None:
        try:
            return position, _hash(source[position])
        except BadExample:
            return None  # `write_shard` counts it.

    positions = range(job.examples)[_part(job.examples, job.shards, index)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(filter(None, ahead(pool, read, positions, AHEAD)))
    _save_hashes(folder, index, found)


def repeated(job: Job, folder: Path) -> np.ndarray:
    """Sorted positions in the source of examples that equal an earlier one: int64 [n].

    Examples are equal if 64 bits of the digests of their image bytes and captions are equal.
    """
    found = np.concatenate([np.load(hashes_path(folder, i)) for i in range(job.shards)])
    found = found[np.argsort(found[:, 0])]
    _, first = np.unique(found[:, 1], return_index=True)
    return np.delete(found[:, 0], first).astype(np.int64)


def _prepare(job: Job, source, position: int) -> Prepared:
    try:
        pair = source[position]
    except BadExample as problem:
        return _left_out("unusable", problem)
    image, captions, name = pair["image"], pair["captions"], pair["name"]
    if isinstance(image, np.ndarray):
        image = _encode(Image.fromarray(image), "PNG")
    try:
        written, size = _checked(image, name, job)
    except UserError as error:
        return _left_out("corrupt", error)
    counts = {
        "examples": 1,
        "written": 1,
        "captions": len(captions),
        "reencoded": int(written is not image),
        "bytes_in": len(image),
        "bytes_out": len(written),
    }
    words = Counter(len(caption.split()) for caption in captions)
    sides = Counter([min(size)]), Counter([max(size)])
    record = tf_example.serialize({"image": written, "captions": captions, "name": name})
    return Prepared(Statistics(Counter(counts), words, *sides), record, _hash(pair))


def _left_out(kind: str, problem: Exception) -> Prepared:
    return Prepared(Statistics(Counter(["examples", kind]), first={kind: [str(problem)]}))


def _checked(image: bytes, name: str, job: Job) -> tuple[bytes, tuple[int, int]]:
    """(bytes to write, original upright size) of an image; a `UserError` if it is damaged."""
    decoded = decode_image(image, name, job.max_pixels)
    if not job.short_side:
        return image, decoded.size
    with open_image(image) as header:
        kept = header.format in KEPT_FORMATS and header.mode in KEPT_MODES
    written, scale = decoded, job.short_side / min(decoded.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in decoded.size]
        written, kept = decoded.resize(size, Image.Resampling.BICUBIC), False
    # An image that keeps its bytes also keeps its EXIF, so it will be turned upright when read.
    return image if kept else _encode(written, "JPEG", quality=job.quality), decoded.size


def _encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _hash(pair: dict[str, Any]) -> int:
    return int.from_bytes(fingerprint(pair)[:8], "little")


@functools.lru_cache(maxsize=1)
def open_once(**settings):
    """The source of a job, opened once per process."""
    return open_source(PairsConfig(**settings))


def _order(job: Job, folder: Path) -> np.ndarray:
    """Positions in the source of the examples of all shards in their order: int64 [n]."""
    order = np.arange(job.examples)
    if job.shuffle:
        order = np.random.default_rng(job.seed).permutation(order)
    if job.duplicates == "drop":
        order = order[~np.isin(order, np.load(folder / DROPPED))]
    return order


def _part(length: int, parts: int, index: int) -> slice:
    """Part `index` of `length` items that are cut into `parts` nearly equal parts."""
    return slice(length * index // parts, length * (index + 1) // parts)


def _save_hashes(folder: Path, index: int, hashes: list[tuple[int, int]]) -> None:
    table = np.array(hashes, np.uint64).reshape(-1, 2)
    with appearing(hashes_path(folder, index)) as path, path.open("wb") as file:
        np.save(file, table)
