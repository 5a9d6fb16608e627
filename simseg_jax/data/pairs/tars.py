"""WebDataset tar shards, read in place: KEY.jpg with KEY.txt or KEY.json, as img2dataset writes.

Nothing is unpacked, so members may have any name: absolute, or with "..".
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
from simseg_jax.data.pairs.cache import cached
from simseg_jax.data.pairs.example import (
    MAX_TEXT,
    BadExample,
    Problems,
    no_pairs,
    read_captions,
    shorten,
)
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.remote import File

USUAL = ("jpg", "jpeg", "png", "webp")  # Of several images of a key the first one is used.
IMAGES = (*USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*USUAL}))
CAPTIONS = (("txt", ()), ("json", ("caption", "captions")))  # Suffix, fields of its JSON.
NONE = (0, 0)  # Offset and size of what is missing.
HEADER = tarfile.BLOCKSIZE  # Bytes of the header right before the content of a member.
MAGIC = 257  # Offset of the magic "ustar" in a header.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
TRIES = 10_000  # False headers after which a search ends.
DAMAGES = 20  # Damaged places of a shard after which its rest is left out.
LOOKED = 8  # JSON documents of a shard that indexing searches for a caption.
GAP = 1 << 16  # Bytes between the members of a pair up to which they are read together.
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
            return cached(cache, identity, ".npy", lambda p: self._index(file.path, p))

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
        self.index, self.problems = cached(cache, identity, ".npy", index_all)
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
        """Writes the rows of one shard; a file that is no archive has none."""
        problems, suffixes = Problems(), set()
        wanted = [suffix for suffix, _ in self.captions]
        rows, alone, complete = [], {}, set()
        for key, found in _scan(path, {*self.images, *wanted}, suffixes, problems).items():
            image, *others = [found[s] for s in self.images if found.get(s, NONE)[1]] or [NONE]
            kind, *unread = [k for k, s in enumerate(wanted) if found.get(s, NONE)[1]] or [0]
            caption = found.get(wanted[kind], NONE)
            if image[1] and 0 < caption[1] <= MAX_TEXT:
                rows.append((0, *image, *caption, kind))
                complete.add(key)
                for other in unread:
                    problems.note(f"caption: {wanted[kind]} taken, {wanted[other]} left out")
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
        """`rows` without those of JSON, if none of the documents looked at has a caption field."""
        kind = next((k for k, (_, fields) in enumerate(self.captions) if fields), None)
        mine = rows[rows["kind"] == kind]
        if not mine.size:
            return rows
        fields, seen = self.captions[mine[0]["kind"]][1], {}
        for row in mine[:: len(mine) // LOOKED + 1]:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                seen |= json.loads(remote.read(path, int(row["caption"]), int(row["caption_size"])))
            if present := [field for field in fields if field in seen]:
                if present[1:]:
                    problems.note(f"caption: {present[0]} of JSON taken, {present[1]} left out")
                return rows
        reason = f"{path}: {_no_field(fields, seen)}; set caption_key to json.FIELD"
        problems.extend(Problems(len(mine), [shorten(reason)]))
        return rows[rows["kind"] != kind]


def _scan(path: str, wanted: set[str], suffixes: set[str], problems: Problems) -> dict:
    """{(archive, key): {suffix: (offset, size)}} of the wanted suffixes.

    A name consists of a key, which may have dots, and the longest wanted suffix. `suffixes`
    receives all suffixes of the shard.
    """
    pairs: dict[tuple[int, str], dict] = {}
    with remote.open_file(path) as file:
        for archive, member in _members(file, path, problems):
            name = PurePosixPath(member.name)
            if member.isdir():
                continue
            if hidden := next(filter(remote.is_hidden, name.parts), ""):
                problems.note(f"hidden {'._*' if hidden.startswith('._') else hidden} left out")
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
    """The keys that remain if dots belong to the suffix: a.b and a for a.b.c."""
    archive, name = key
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    return [(archive, folder + slash + ".".join(parts[:cut])) for cut in range(1, len(parts))]


def _members(file: BinaryIO, path: str, problems: Problems) -> Iterator[tuple]:
    """(number of its archive, member) for the concatenated archives of a file.

    After damage it continues with the next header. Keys are unique within an archive only.
    """
    start, number, damages, end = 0, 0, 0, file.seek(0, 2)
    while start < end and damages < DAMAGES:
        rest = start + HEADER
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # tarfile would keep all members in memory.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    if member.size < 0 or tar.offset <= start:
                        break
                    if member.offset_data + member.size > end:
                        rest = member.offset_data
                        break
                    start = tar.offset
                    rest = start + HEADER
                    yield number, member
        # tarfile raises errors of many kinds for hostile headers.
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
    """Writes rows as a .npy file; `np.save` would hide a full disk."""
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
    """("json", (FIELD,)) for json.FIELD; any other key is a suffix without fields."""
    suffix, _, field = key.partition(".")
    return (suffix, (field,)) if suffix == "json" and field else (key.lower(), ())


def _captions(text: bytes, fields: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """`read_captions` of a text, or of the first field of a JSON that has any."""
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
