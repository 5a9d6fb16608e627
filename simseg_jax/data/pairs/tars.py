"""WebDataset tar shards, read in place: KEY.jpg with KEY.txt or KEY.json, as img2dataset writes.

Indexing reads the headers of a shard once, pairs images with captions by their keys and stores
offsets and sizes, one row per pair. Reading an example is then one read of the shard.
"""

import contextlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from simseg_jax.data.images import IMAGE_SUFFIXES
from simseg_jax.data.pairs.cache import cached
from simseg_jax.data.pairs.example import (
    MAX_TEXT,
    BadExample,
    Problems,
    choose_keys,
    no_pairs,
    read_captions,
    shorten,
    usable_captions,
)
from simseg_jax.data.pairs.tar_members import find_members, read_members
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.remote import File

USUAL = ("jpg", "jpeg", "png", "webp")
# The suffixes of images: of several images with one key the first of these is used.
IMAGES = (*USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*USUAL}))
LOOKED = 8  # Most JSON documents of a shard that are searched for captions when it is indexed.
ROW = np.dtype(
    [
        ("shard", np.uint32),
        ("image", np.int64),  # Offsets and sizes of the contents, in bytes.
        ("image_size", np.int64),
        ("caption", np.int64),
        ("caption_size", np.int64),
        ("fields", np.bool_),  # Whether the caption is in a field of a JSON document.
    ]
)

READ_ERRORS = (OSError, ValueError, TypeError, RecursionError, tarfile.TarError, UserError)


class TarSource:
    """Pairs in tar shards; the index of their offsets is kept in the cache folder.

    path: as in the settings. image_key: the suffix of images, '' for the usual ones. caption_key:
    the suffix of texts, or json.FIELD for a field of KEY.json; '' for KEY.txt, else the usual
    fields of KEY.json (see `choose_keys`). A caption of over 1 MiB is left out.
    """

    def __init__(self, path: str, files: list[File], image_key: str, caption_key: str, cache: Path):
        refuse_compressed(files)
        self.shards = [file.path for file in files]
        self.images = (image_key.lower(),) if image_key else IMAGES
        # The suffixes of captions, and whether these are JSON documents with fields.
        self.texts, self.field = {"txt": False, "json": True}, ""
        if caption_key:
            suffix, _, field = caption_key.partition(".")
            fields = suffix == "json" and field != ""
            self.texts = {"json": True} if fields else {caption_key.lower(): False}
            self.field = field if fields else ""
        self.identity = (self.images, self.texts, self.field)
        # The rows of all shards are in one file: a process may not keep thousands open.
        self.index, self.problems = cached(
            cache,
            ("tars", *files, *self.identity),
            ".npy",
            lambda target: self._index_all(path, files, cache, target),
        )
        self.rows = np.load(self.index, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        shard = self.shards[row["shard"]]
        spans = [(int(row[key]), int(row[f"{key}_size"])) for key in ("image", "caption")]
        name = f"{shard}, byte {spans[0][0]}"
        try:
            (member, image), (_, text) = read_members(shard, spans)
            name = f"{shard}/{member}"
            values = self._fields(text) if row["fields"] else [text]
        except READ_ERRORS as error:
            raise BadExample(name, error) from error
        return {"image": image, "captions": usable_captions(name, *values), "name": name}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "rows": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = {**state, "rows": np.load(state["index"], mmap_mode="r")}

    def _index_all(self, path: str, files: list[File], cache: Path, target: Path) -> Problems:
        """Writes the rows of all shards to `target`; the rows of each shard are cached as well."""

        def index(file: File) -> tuple[Path, Problems]:
            identity = ("tar", *file, *self.identity)
            return cached(cache, identity, ".npy", lambda part: self._index(file.path, part))

        def numbered(shard: int, part: Path) -> np.ndarray:
            rows = np.load(part)
            rows["shard"] = shard
            return rows

        problems, parts = Problems(), []
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(index, files)
            for part, left_out in remote.progress(found, len(files), f"indexing {path}"):
                parts.append(part)
                problems.extend(left_out)
        count = sum(np.load(part, mmap_mode="r").size for part in parts)
        if not count:
            raise no_pairs(path, problems)
        _write(target, count, map(numbered, range(len(parts)), parts))
        return problems

    def _index(self, path: str, target: Path) -> Problems:
        """Writes the rows of one shard to `target`; a file that is no archive has none."""
        problems, suffixes = Problems(), set()
        rows, alone, complete = [], {}, set()
        for key, spans in _scan(path, {*self.images, *self.texts}, suffixes, problems).items():
            present = {suffix: span for suffix, span in spans.items() if span[1]}
            images = [present[suffix] for suffix in self.images if suffix in present]
            texts = [suffix for suffix in self.texts if suffix in present]
            caption = present[texts[0]] if texts else (0, 0)
            if caption[1] > MAX_TEXT:
                alone[key] = f"a caption of {caption[1]:,} bytes"
            elif images and texts:
                rows.append((0, *images[0], *caption, self.texts[texts[0]]))
                complete.add(key)
                for other in texts[1:]:
                    problems.note(f"caption: {texts[0]} taken, {other} left out")
            else:
                alone[key] = "image without caption" if images else "caption without image"
            for _ in images[1:]:
                problems.add(f"{path}/{key[1]}: another image; set image_key to the one meant")
        if complete:
            for key, reason in alone.items():
                # k.seg.png beside k.jpg and k.txt is another field of the pair k.
                if not complete.intersection(_shorter(key)):
                    problems.add(f"{path}/{key[1]}: {reason}")
        elif suffixes or not problems.count:
            ends = some(sorted(suffixes)) or "?"
            reason = shorten(f"{path}: no pair; its files end in {ends}")
            problems.extend(Problems(len(alone) or 1, [reason]))
        rows = self._with_fields(path, np.array(rows, ROW), problems)
        _write(target, len(rows), [rows])
        return problems

    def _with_fields(self, path: str, rows: np.ndarray, problems: Problems) -> np.ndarray:
        """`rows`, without JSON documents if none of the documents looked at has a caption."""
        mine, seen, reason = rows[rows["fields"]], {}, ""
        for row in mine[:: len(mine) // LOOKED + 1]:
            with contextlib.suppress(ValueError, RecursionError):
                seen |= _document(remote.read(path, int(row["caption"]), int(row["caption_size"])))
            try:
                self._choose(path, seen, problems)
                return rows
            except UserError as error:
                reason = f"{str(error).removesuffix('.')} to json.FIELD"
        if reason:
            problems.extend(Problems(len(mine), [shorten(reason)]))
        return rows[~rows["fields"]]

    def _choose(self, where: str, fields: Iterable[str], problems: Problems) -> list[str]:
        return choose_keys(where, "JSON field caption", self.field, fields, problems)

    def _fields(self, text: bytes) -> list:
        """The values of the fields with captions in a JSON document; empty ones if all are."""
        document, where = _document(text), "its document"
        filled = [key for key, value in document.items() if any(read_captions(value))]
        try:
            keys = self._choose(where, filled, Problems())
        except UserError:
            keys = self._choose(where, document, Problems())
        return [document[key] for key in keys]


def refuse_compressed(files: Iterable[File]) -> None:
    """Raises a `UserError` for an archive that is compressed, by its name."""
    for file in files:
        if file.path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise UserError(
                f"{file.path} is compressed, which has no random access: decompress it first."
            )


def tar_images(path: str, image_key: str, problems: Problems) -> Iterator[tuple[str, bytes]]:
    """Streams (key, content) of every image in a shard, in one pass; damage is counted.

    A key ends at the first dot of the file name, as in WebDataset. image_key: the suffix behind it;
    '': every file whose last suffix is one of an image.
    """
    with remote.open_file(path) as file:
        for _, name, member in _files(file, path, problems):
            key, _, suffix = name.name.partition(".")
            last = suffix.rpartition(".")[2]
            if suffix.lower() == image_key.lower() if image_key else last.lower() in IMAGES:
                file.seek(member.offset_data)
                yield str(name.with_name(key)), file.read(member.size)


def _files(file: BinaryIO, path: str, problems: Problems) -> Iterator[tuple]:
    """(number of the archive, name, `TarInfo`) of every regular file that is not hidden."""
    for archive, member in find_members(file, path, problems):
        name = PurePosixPath(member.name)
        if member.isdir():
            continue
        if hidden := next(filter(remote.is_hidden, name.parts), ""):
            problems.note(f"hidden {'._*' if hidden.startswith('._') else hidden} left out")
            continue
        if not member.isreg() or member.issparse():
            problems.add(f"{path}: the member {member.name!r} is not a regular file")
            continue
        yield archive, name, member


def _scan(path: str, wanted: set[str], suffixes: set[str], problems: Problems) -> dict:
    """{(archive, key): {suffix: (offset, size)}} of the wanted suffixes.

    A name consists of a key, which may have dots, and the longest suffix of `wanted`. All suffixes
    of the shard are added to `suffixes`.
    """
    pairs: dict[tuple[int, str], dict] = {}
    with remote.open_file(path) as file:
        for archive, name, member in _files(file, path, problems):
            parts = name.name.split(".")
            suffixes.add(".".join(parts[1:]).lower())
            for cut in range(1, len(parts)):
                suffix = ".".join(parts[cut:]).lower()
                if suffix in wanted:
                    key = archive, str(name.with_name(".".join(parts[:cut])))
                    span = (member.offset_data, member.size)
                    if pairs.setdefault(key, {}).setdefault(suffix, span) != span:
                        problems.add(f"{path}: {member.name!r} occurs twice")
                    break
    return pairs


def _shorter(key: tuple[int, str]) -> list[tuple[int, str]]:
    """The keys that a key may have if some of its dots begin the suffix: a and a.b for a.b.c."""
    archive, name = key
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    return [(archive, folder + slash + ".".join(parts[:cut])) for cut in range(1, len(parts))]


def _write(target: Path, count: int, parts: Iterable[np.ndarray]) -> None:
    """Writes `count` rows as a .npy file, part by part; `np.save` would hide a full disk."""
    header = {"descr": ROW.descr, "fortran_order": False, "shape": (count,)}
    with target.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.tobytes())


def _document(text: bytes) -> dict[str, Any]:
    """The fields of a JSON document; none if it is no object."""
    content = json.loads(text)
    return content if isinstance(content, dict) else {}
