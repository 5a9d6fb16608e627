"""WebDataset tar shards, read in place: KEY.jpg with KEY.txt or KEY.json, as img2dataset writes.

Names of members are only names: nothing is unpacked, so that they may be absolute or lead upwards.
"""

import contextlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from simseg_jax.data.images import IMAGE_SUFFIXES
from simseg_jax.data.pairs import remote
from simseg_jax.data.pairs.example import (
    MAX_TEXT,
    BadExample,
    Problems,
    no_pairs,
    read_captions,
    shorten,
)
from simseg_jax.data.pairs.remote import File
from simseg_jax.errors import UserError, some

USUAL = ("jpg", "jpeg", "png", "webp")  # Of several images of a key the first one is used.
IMAGES = (*USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*USUAL}))
CAPTIONS = (("txt", ()), ("json", ("caption", "captions")))  # Suffix, fields of its JSON.
NONE = (0, 0)  # Offset and size of what is missing.
HEADER = tarfile.BLOCKSIZE  # Bytes of the header right before the content of a member.
MAGIC = 257  # Where a header says that it is one.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
TRIES = 10_000  # Blocks that may look like a header and be none, before a search ends.
DAMAGES = 20  # Places of a shard after which the rest of it is left out.
LOOKED = 8  # Documents of JSON of a shard that are searched for a caption while indexing.
GAP = 1 << 16  # Members of a pair at most so many bytes apart are fetched together.
ROW = np.dtype(
    [
        ("shard", np.uint32),
        ("image", np.int64),
        ("image_size", np.int64),
        ("caption", np.int64),
        ("caption_size", np.int64),
        ("kind", np.uint8),  # Which of the caption keys.
    ]
)


class TarSource:
    """Pairs of tar shards, found once by scanning the headers; the index stays in the cache folder.

    path: what the user named. image_key: the suffix of images, '' for the usual ones. caption_key:
    the suffix of texts, or json.FIELD for a field of KEY.json; '' for txt, else json.caption, else
    json.captions. A caption of over 1 MiB is left out.
    """

    def __init__(self, path: str, files: list[File], image_key: str, caption_key: str, cache: Path):
        for file in files:
            if file.path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
                raise UserError(
                    f"{file.path} is compressed, which has no random access: decompress it first."
                )
        self.shards = [file.path for file in files]
        self.images = (image_key.lower(),) if image_key else IMAGES
        self.captions = (_suffix_and_fields(caption_key),) if caption_key else CAPTIONS

        def index(file: File) -> tuple[Path, Problems]:
            identity = ("tar", *file, self.images, self.captions)
            return remote.cached(cache, identity, ".npy", lambda p: self._index(file.path, p))

        def numbered(shard: int, part: Path) -> np.ndarray:
            rows = np.load(part)
            rows["shard"] = shard
            return rows

        def index_all(target: Path) -> Problems:
            problems = Problems()
            with ThreadPoolExecutor(16) as pool:
                found = remote.progress(pool.map(index, files), len(files), f"indexing {path}")
                parts = []
                for part, left_out in found:
                    parts.append(part)
                    problems.extend(left_out)
            counts = [np.load(part, mmap_mode="r").size for part in parts]
            if not sum(counts):
                raise no_pairs(path, problems)
            # One file for all shards: a process may not keep thousands of them open.
            _write(target, sum(counts), map(numbered, range(len(parts)), parts))
            return problems

        identity = ("tars", *files, self.images, self.captions)
        self.index, self.problems = remote.cached(cache, identity, ".npy", index_all)
        self.rows = np.load(self.index, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        shard = self.shards[row["shard"]]
        spans = [(int(row[key]), int(row[f"{key}_size"])) for key in ("image", "caption")]
        name = f"{shard}, byte {spans[0][0]}"
        try:
            (member, image), (_, text) = _read_members(shard, spans)
            captions, wrong = _captions(text, self.captions[row["kind"]][1])
        except (OSError, ValueError, TypeError, RecursionError, tarfile.TarError) as error:
            raise BadExample(name, error) from error
        if wrong or not captions:
            raise BadExample(f"{shard}/{member}", wrong[0] if wrong else "empty caption")
        return {"image": image, "captions": captions, "name": f"{shard}/{member}"}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "rows": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = {**state, "rows": np.load(state["index"], mmap_mode="r")}

    def _index(self, path: str, target: Path) -> Problems:
        """Writes the rows of one shard, none if it is no archive at all."""
        problems, suffixes = Problems(), set()
        wanted = [suffix for suffix, _ in self.captions]
        rows, alone, complete = [], {}, set()
        for key, found in _scan(path, {*self.images, *wanted}, suffixes, problems).items():
            image, *others = [found[s] for s in self.images if found.get(s, NONE)[1]] or [NONE]
            kind = next((k for k, suffix in enumerate(wanted) if found.get(suffix, NONE)[1]), 0)
            caption = found.get(wanted[kind], NONE)
            if image[1] and 0 < caption[1] <= MAX_TEXT:
                rows.append((0, *image, *caption, kind))
                complete.add(key)
            elif caption[1] > MAX_TEXT:
                alone[key] = f"a caption of {caption[1]:,} bytes"
            else:
                alone[key] = "image without caption" if image[1] else "caption without image"
            for _ in others:
                problems.add(f"{path}/{key[1]}: another image; set image_key to the one meant")
        for key, reason in alone.items() if complete else ():
            if not complete.intersection(_shorter(key)):
                problems.add(f"{path}/{key[1]}: {reason}")
        if not complete and (suffixes or not problems.count):
            ends = some(sorted(suffixes)) or "?"
            reason = shorten(f"{path}: no pair; its files end in {ends}")
            problems.extend(Problems(len(alone) or 1, [reason]))
        rows = self._with_fields(path, np.array(rows, ROW), problems)
        _write(target, len(rows), [rows])
        return problems

    def _with_fields(self, path: str, rows: np.ndarray, problems: Problems) -> np.ndarray:
        """`rows` without those of JSON, if several documents have no caption."""
        kind = next((k for k, (_, fields) in enumerate(self.captions) if fields), None)
        mine = rows[rows["kind"] == kind]
        if not mine.size:
            return rows
        fields, seen = self.captions[mine[0]["kind"]][1], {}
        for row in mine[:: len(mine) // LOOKED + 1]:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                seen |= json.loads(remote.read(path, int(row["caption"]), int(row["caption_size"])))
            if any(field in seen for field in fields):
                return rows
        reason = f"{path}: {_no_field(fields, seen)}; set caption_key to json.FIELD"
        problems.extend(Problems(len(mine), [shorten(reason)]))
        return rows[rows["kind"] != kind]


def _scan(path: str, wanted: set[str], suffixes: set[str], problems: Problems) -> dict:
    """{(archive, key): {suffix: (offset, size)}} of the wanted suffixes; all go to `suffixes`.

    A name is a key and the longest wanted suffix: the key may have dots of its own.
    """
    pairs: dict[tuple[int, str], dict] = {}
    with remote.open_file(path) as file:
        for archive, member in _members(file, path, problems):
            name = PurePosixPath(member.name)
            if member.isdir() or any(remote.is_hidden(part) for part in name.parts):
                continue
            if not member.isreg() or member.issparse():
                problems.add(f"{path}: the member {member.name!r} is not a regular file")
                continue
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
    """What a key may be, with fields of several dots: of a.b.c also a.b and a."""
    archive, name = key
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    return [(archive, folder + slash + ".".join(parts[:cut])) for cut in range(1, len(parts))]


def _members(file: BinaryIO, path: str, problems: Problems) -> Iterator[tuple]:
    """(number of the archive, member) of all archives that follow each other in a file.

    After damage it goes on with the next header. The numbers tell apart the keys of archives.
    """
    start, number, damages, end = 0, 0, 0, file.seek(0, 2)
    while start < end and damages < DAMAGES:
        rest = start + HEADER
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # It would keep them all.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    if member.size < 0 or tar.offset <= start:
                        break
                    if member.offset_data + member.size > end:
                        rest = member.offset_data
                        break
                    start = tar.offset
                    rest = start + HEADER
                    yield number, member
        # tarfile meets hostile headers with errors of many kinds, but only the system's have a
        # number.
        except Exception as error:
            if not remote.is_damage(error):
                raise
        file.seek(start)
        block = file.read(HEADER)
        found, clean = _next_header(file, rest, end)
        if block != bytes(HEADER) or not clean:
            packed = " (it is compressed: decompress it)" if block.startswith(COMPRESSED) else ""
            problems.add(f"{path}: damaged at byte {start} of {end}{packed}")
            damages += 1
        start, number = found, number + (block == bytes(HEADER))
    if start < end:
        problems.add(f"{path}: too much damage, left out from byte {start} on")


def _next_header(file: BinaryIO, start: int, end: int) -> tuple[int, bool]:
    """(offset of the next header from `start` on or the end, whether only zeros come before)."""
    clean, tries = True, 0
    while start < end and tries < TRIES:
        file.seek(start)
        chunk = file.read(GAP + HEADER)
        place = -1
        while (place := chunk.find(b"ustar", place + 1)) >= 0 and tries < TRIES:
            first = place - MAGIC
            try:
                tarfile.TarInfo.frombuf(chunk[max(first, 0) : first + HEADER], "utf-8", "replace")
                return start + first, clean and not chunk[:first].strip(b"\0")
            except (tarfile.HeaderError, ValueError):
                tries += 1
        clean = clean and not chunk[:GAP].strip(b"\0")
        start += GAP
    return end, clean and tries < TRIES


def _write(target: Path, count: int, parts: Iterable[np.ndarray]) -> None:
    """A .npy file of rows; not NumPy's own, which hides a full disk."""
    header = {"descr": ROW.descr, "fortran_order": False, "shape": (count,)}
    with target.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.tobytes())


def _read_members(path: str, spans: list[tuple[int, int]]) -> list[tuple[str, bytes]]:
    """(name, content) of the members whose contents are (offset, size), in one read if close."""
    start = min(offset for offset, _ in spans) - HEADER
    length = max(offset + size for offset, size in spans) - start
    if length > sum(size + HEADER for _, size in spans) + GAP:
        return [member for span in spans for member in _read_members(path, [span])]
    block = remote.read(path, start, length)
    members = []
    for offset, size in spans:
        begin = offset - start
        header = tarfile.TarInfo.frombuf(block[begin - HEADER : begin], "utf-8", "replace")
        if header.size != size:
            raise ValueError("the archive has changed since it was indexed")
        members.append((header.name, block[begin : begin + size]))
    return members


def _suffix_and_fields(key: str) -> tuple[str, tuple[str, ...]]:
    """("json", (FIELD,)) of json.FIELD; other keys are suffixes without a field."""
    suffix, _, field = key.partition(".")
    return (suffix, (field,)) if suffix == "json" and field else (key.lower(), ())


def _captions(text: bytes, fields: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """What `read_captions` finds in a text, or in the first of the fields of a JSON with any."""
    if not fields:
        return read_captions(text)
    content = json.loads(text)
    content = content if isinstance(content, dict) else {}
    present = [key for key in fields if key in content]
    if not present:
        raise ValueError(_no_field(fields, content))
    found = [read_captions(content[key]) for key in present]
    return next((both for both in found if any(both)), found[0])


def _no_field(fields: tuple[str, ...], present: Iterable[str]) -> str:
    return f"its JSON has no {' or '.join(fields)}, only {some(present) or 'other things'}"
