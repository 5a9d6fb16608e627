"""WebDataset tar shards, read in place: KEY.jpg with KEY.txt or KEY.json, as img2dataset writes."""

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from simseg_jax.data.pairs import remote
from simseg_jax.data.pairs.example import BadExample, Problems, clean_captions, no_pairs
from simseg_jax.data.pairs.remote import File
from simseg_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json.caption")
HEADER = tarfile.BLOCKSIZE  # Bytes of the header right before the content of a member.
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
    the suffix of texts, or json.FIELD for a field of KEY.json; '' for txt, else json.caption.
    """

    def __init__(self, path: str, files: list[File], image_key: str, caption_key: str, cache: Path):
        for file in files:
            if file.path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
                raise UserError(
                    f"{file.path} is compressed, which has no random access: decompress it first."
                )
        self.shards = [file.path for file in files]
        self.images = (image_key,) if image_key else IMAGES
        self.captions = (caption_key,) if caption_key else CAPTIONS

        def index(file: File) -> tuple[Path, Problems]:
            identity = ("tar", *file, self.images, self.captions)
            return remote.cached(cache, identity, ".npy", lambda p: self._index(file.path, p))

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
            rows = np.lib.format.open_memmap(target, "w+", ROW, (sum(counts),))
            end = 0
            for shard, (part, count) in enumerate(zip(parts, counts, strict=True)):
                end += count
                rows[end - count : end] = np.load(part)
                rows["shard"][end - count : end] = shard
            rows.flush()
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
            _, field = _suffix_and_field(self.captions[row["kind"]])
            captions = clean_captions(_field(text, field) if field else text)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise BadExample(name, error) from error
        if not captions:
            raise BadExample(f"{shard}/{member}", "empty caption")
        return {"image": image, "captions": captions, "name": f"{shard}/{member}"}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "rows": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = {**state, "rows": np.load(state["index"], mmap_mode="r")}

    def _index(self, path: str, target: Path) -> Problems:
        """Writes the rows of one shard."""
        problems = Problems()
        wanted = [_suffix_and_field(key)[0] for key in self.captions]
        rows = []
        members, suffixes = _scan(path, {*self.images, *wanted}, problems)
        for key, found in members.items():
            image = next((found[suffix] for suffix in self.images if suffix in found), None)
            kind = next((k for k, suffix in enumerate(wanted) if found.get(suffix, (0, 0))[1]), -1)
            if not image or not image[1]:
                problems.add(f"{path}/{key}: caption without image")
            elif kind < 0:
                problems.add(f"{path}/{key}: image without caption")
            else:
                rows.append((0, *image, *found[wanted[kind]], kind))
        if not rows:
            problems.add(f"{path}: no pair; its files end in {', '.join(sorted(suffixes)) or '?'}")
        with target.open("wb") as file:
            np.save(file, np.array(rows, ROW))
        return problems


def _scan(path: str, wanted: set[str], problems: Problems) -> tuple[dict, set[str]]:
    """({key: {suffix: (offset, size)}} of the wanted suffixes, all suffixes) of a tar."""
    pairs: dict[str, dict] = {}
    suffixes: set[str] = set()
    try:
        with remote.open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = file.seek(0, 2)
            file.seek(tar.offset)
            while (member := tar.next()) is not None:
                # It would keep them all.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                name = PurePosixPath(member.name)
                base, _, suffix = name.name.partition(".")
                if member.isdir() or not base:
                    continue
                if name.is_absolute() or ".." in name.parts:
                    problems.add(f"{path}: the member {member.name!r} leads out of the archive")
                elif not member.isreg() or member.issparse():
                    problems.add(f"{path}: the member {member.name!r} is not a regular file")
                elif member.offset_data + member.size > end:
                    break  # Reported below: there is no end mark.
                else:
                    suffixes.add(suffix.lower())
                    if suffix.lower() in wanted:
                        found = pairs.setdefault(str(name.with_name(base)), {})
                        span = (member.offset_data, member.size)
                        if found.setdefault(suffix.lower(), span) != span:
                            problems.add(f"{path}: {member.name!r} occurs twice")
            # tarfile takes anything it cannot read for the end.
            file.seek(tar.offset)
            if file.read(HEADER) != bytes(HEADER):
                problems.add(f"{path}: damaged at byte {tar.offset} of {end}")
    except tarfile.TarError as error:
        problems.add(f"{path}: unreadable from some point on ({error})")
    return pairs, suffixes


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


def _suffix_and_field(key: str) -> tuple[str, str]:
    """("json", FIELD) of json.FIELD; other keys are suffixes without a field."""
    return ("json", key[len("json.") :]) if key.startswith("json.") else (key, "")


def _field(text: bytes, field: str):
    content = json.loads(text)
    if not isinstance(content, dict) or field not in content:
        raise ValueError(f"its JSON has no {field}, only {', '.join(content)}")
    return content[field]
