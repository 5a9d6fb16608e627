"""WebDataset tar shards, read in place: KEY.jpg with KEY.txt or KEY.json, as img2dataset writes.

Indexing reads the headers of a shard once, pairs images with captions by their keys and stores a
row of offsets and sizes for each pair. An example is then one read of the shard.
"""

import contextlib
import json
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

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
from simseg_jax.data.pairs.tar_members import find_members, read_members
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.remote import File

USUAL = ("jpg", "jpeg", "png", "webp")  # Of several images of a key the first one is used.
IMAGES = (*USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*USUAL}))
CAPTIONS = (("txt", ()), ("json", ("caption", "captions")))  # Suffix, fields of its JSON.
LOOKED = 8  # JSON documents of a shard that are searched for a caption when it is indexed.
ROW = np.dtype(
    [
        ("shard", np.uint32),
        ("image", np.int64),  # Offsets and sizes of the contents, in bytes.
        ("image_size", np.int64),
        ("caption", np.int64),
        ("caption_size", np.int64),
        ("kind", np.uint8),  # Index of the suffix of the caption.
    ]
)


class TarSource:
    """Pairs of tar shards; the index of their offsets stays in the cache folder.

    path: as in the settings. image_key: the suffix of images, '' for the usual ones. caption_key:
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
        # One file for all shards, besides one for each: a process may not keep thousands open.
        self.index, self.problems = cached(
            cache,
            ("tars", *files, self.images, self.captions),
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

    def _index_all(self, path: str, files: list[File], cache: Path, target: Path) -> Problems:
        """Writes the rows of all shards, from the index of each, which is cached as well."""

        def index(file: File) -> tuple[Path, Problems]:
            identity = ("tar", *file, self.images, self.captions)
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
        """Writes the rows of one shard; a file that is no archive has none."""
        problems, suffixes = Problems(), set()
        texts = [suffix for suffix, _ in self.captions]
        rows, alone, complete = [], {}, set()
        for key, spans in _scan(path, {*self.images, *texts}, suffixes, problems).items():
            present = {suffix: span for suffix, span in spans.items() if span[1]}
            images = [present[suffix] for suffix in self.images if suffix in present]
            kinds = [kind for kind, suffix in enumerate(texts) if suffix in present]
            caption = present[texts[kinds[0]]] if kinds else (0, 0)
            if caption[1] > MAX_TEXT:
                alone[key] = f"a caption of {caption[1]:,} bytes"
            elif images and kinds:
                rows.append((0, *images[0], *caption, kinds[0]))
                complete.add(key)
                for other in kinds[1:]:
                    problems.note(f"caption: {texts[kinds[0]]} taken, {texts[other]} left out")
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


def _write(target: Path, count: int, parts: Iterable[np.ndarray]) -> None:
    """Writes rows as a .npy file, in parts; `np.save` would hide a full disk."""
    header = {"descr": ROW.descr, "fortran_order": False, "shape": (count,)}
    with target.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.tobytes())


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
