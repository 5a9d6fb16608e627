"""Parquet files of images and captions: the authors' retrieval sets and Hugging Face's layouts.

Parquet has no access to single rows: each file is copied once, in a stream, to an uncompressed
Arrow file in the cache folder, which is then mapped into memory. As a small file may unfold to any
size, what one may hold is bounded by its size on disk: see `_check_size`.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from simseg_jax.data.pairs.cache import cached
from simseg_jax.data.pairs.example import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    NAME_KEYS,
    TEXT_FIELDS,
    Problems,
    choose_captions,
    choose_key,
    group,
    no_pairs,
    read_captions,
    shorten,
)
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, one_line
from simseg_jax.runtime.remote import File

BATCH = 64  # Rows in memory at a time, at most.
BATCH_BYTES = 64 << 20  # Memory for these rows; one row is always read.
# A file may unfold to SMALL bytes, or to RATIO times its size if that is more.
SMALL, RATIO = 64 << 20, 32
BINARY = ("binary", "large_binary", "binary_view")  # Names of Arrow's types.
TEXT = (*BINARY, "string", "large_string", "string_view", "null")
GROUP_KEY = "image_id"  # Rows that share it and have equal images form one example.


class UnfitError(UserError):
    """The columns of a file hold no pairs; other files of its folder may."""


class ParquetSource:
    """Rows with an image (bytes, or Hugging Face's struct of bytes and path) and captions.

    Captions are text, lists of it, records with it (`TEXT_FIELDS`), JSON lists, or columns
    caption_0, caption_1, .... path: what the user named. Files that cannot be read to their end or
    lack the columns are left out.
    """

    def __init__(self, path: str, files: list[File], image_key: str, caption_key: str, cache: Path):
        _, pq = _pyarrow()
        self.problems, self.copies = Problems(), []
        refusal = None
        for file in remote.progress(files, len(files), f"copying {path}"):
            try:
                with remote.open_file(file.path) as opened:
                    table = pq.ParquetFile(opened, buffer_size=1 << 20)
                    keys = _choose_keys(
                        file.path, table.schema_arrow, image_key, caption_key, self.problems
                    )
                    copy, problems = cached(
                        cache,
                        ("parquet", *file, *keys),
                        ".arrow",
                        functools.partial(_copy, file, table, keys),
                    )
            except UnfitError as error:
                refusal = refusal or error
                self.problems.add(str(error))
            # pyarrow raises errors of several kinds for damage.
            except Exception as error:
                if not remote.is_damage(error):
                    raise
                self.problems.add(f"{file.path}: unreadable shard ({one_line(error, 60)})")
            else:
                self.copies.append(copy)
                self.problems.extend(problems)
        if refusal and not self.copies:
            raise refusal
        self.table = _open(self.copies)
        if not self.table.num_rows:
            raise no_pairs(path, self.problems)
        self.order, self.starts = np.empty(0, np.int64), None
        if self.table["group"].null_count < self.table.num_rows:
            owners = self.table["group"].combine_chunks().dictionary_encode().indices
            owners = owners.fill_null(-1).to_numpy().astype(np.int64)
            alone = owners < 0
            owners[alone] = owners.max() + 1 + np.arange(alone.sum())
            self.order, self.starts = group(owners)

    def __len__(self) -> int:
        return self.table.num_rows if self.starts is None else len(self.starts) - 1

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.starts is None:
            rows = [index]
        else:
            rows = self.order[self.starts[index] : self.starts[index + 1]].tolist()
        column = self.table.column
        return {
            "image": column("image")[rows[0]].as_py(),
            "captions": tuple(text for row in rows for text in column("captions")[row].as_py()),
            "name": column("name")[rows[0]].as_py(),
        }

    def __getstate__(self) -> dict:
        return {**self.__dict__, "table": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = {**state, "table": _open(state["copies"])}


def _pyarrow():
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install pyarrow.") from error
    return pyarrow, pyarrow.parquet


def _schema(pa):
    # An image that the file holds before is null: it is stored once per image.
    fields = {
        "image": pa.large_binary(),
        "captions": pa.list_(pa.string()),
        "name": pa.string(),
        "group": pa.string(),
    }
    return pa.schema(fields)


def _choose_keys(
    path: str, schema, image_key: str, caption_key: str, problems: Problems
) -> tuple[str, tuple[str, ...], str, str]:
    """(image, captions, name or '', what to group by or '') of the columns of a file."""
    pa, _ = _pyarrow()
    names = schema.names
    try:
        keys = names, problems
        image = choose_key(path, "column image", image_key, IMAGE_KEYS, *keys)
        captions = choose_captions(path, "column caption", caption_key, CAPTION_KEYS, *keys)
    except UserError as error:
        raise UnfitError(str(error)) from error
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in BINARY:
        raise UnfitError(
            f"{path}: column {image} is of type {kind}, not the bytes of images; download the "
            "images first, for example with img2dataset."
        )
    for caption in captions:
        if not _holds_text(schema.field(caption).type):
            raise UnfitError(
                f"{path}: column {caption} is of type {schema.field(caption).type}, not text, a "
                f"list of it or of records with {' or '.join(TEXT_FIELDS)}: set caption_key."
            )
    # Of two columns with one name neither can be read.
    others = {key.casefold(): key for key in names if names.count(key) == 1}
    name = next((others[key] for key in NAME_KEYS if key in others), "")
    return image, tuple(captions), name, others.get(GROUP_KEY, "")


def _holds_text(kind) -> bool:
    """Whether `read_captions` may find text in values of an Arrow type."""
    types = _pyarrow()[0].types
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _holds_text(kind.value_type)
    if types.is_struct(kind):
        return any(_holds_text(kind.field(key).type) for key in TEXT_FIELDS if key in kind.names)
    return str(kind) in TEXT


def _check_size(file: File, metadata, columns: set[str]) -> int:
    """The largest number of rows to read at a time.

    Raises a ValueError if the file says that it holds more rows than bytes, or that what is read of
    it unfolds to more than `SMALL` or `RATIO` times its size. Images and captions never do.
    """
    if metadata.num_rows > file.size:
        raise ValueError(f"{metadata.num_rows:,} rows in {file.size:,} bytes")
    largest, total = 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if any(f"{chunk.path_in_schema}.".startswith(f"{key}.") for key in columns)
        )
        largest, total = max(largest, size), total + size
    _bounded(file, total)
    # Rows may all repeat the largest value, which is stored once.
    return max(1, min(BATCH, BATCH_BYTES // max(largest, 1)))


def _bounded(file: File, size: int) -> None:
    if size > max(SMALL, RATIO * file.size):
        raise ValueError(f"{file.size:,} bytes unfold to more than {size:,}")


def _rows(batch) -> list[dict | None]:
    """The rows of a batch; None for one whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _copy(file: File, table, keys: tuple[str, tuple[str, ...], str, str], target: Path) -> Problems:
    """Writes the usable rows of a Parquet file in the layout of `_schema`."""
    pa, _ = _pyarrow()
    image_key, caption_keys, name_key, group_key = keys
    columns = {image_key, *caption_keys, name_key, group_key} - {""}
    batch_size = _check_size(file, table.metadata, columns)
    problems, seen, number, addresses, written, waiting = Problems(), set(), 0, 0, 0, 0
    rows = []
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _schema(pa)) as writer:
        for batch in table.iter_batches(batch_size, columns=sorted(columns)):
            for row in _rows(batch):
                name = f"{file.path}, row {number}"
                number += 1
                if row is None:
                    problems.add(f"{name}: text that is not UTF-8")
                    continue
                image = row[image_key]
                if isinstance(image, dict):
                    addresses += bool(not image["bytes"] and image.get("path"))
                    image = image["bytes"]
                values = [row[key] for key in caption_keys]
                captions, wrong = read_captions(
                    [v for value in values for v in (value if isinstance(value, list) else [value])]
                )
                if name_key:
                    name += f", {shorten(str(row[name_key]))}"
                for reason in wrong:
                    problems.add(f"{name}: {reason}")
                if not image or not captions:
                    if not wrong:
                        problems.add(f"{name}: {'empty caption' if image else 'no image'}")
                    continue
                owner = _owner(row[group_key], image) if group_key else None
                stored = None if owner in seen else image
                if owner is not None:
                    seen.add(owner)
                waiting += len(stored or b"") + sum(map(len, captions))
                _bounded(file, written + waiting)
                rows.append({"image": stored, "captions": captions, "name": name, "group": owner})
            if len(rows) >= BATCH or waiting >= BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, _schema(pa)))
                written, waiting, rows = written + waiting, 0, []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, _schema(pa)))
    if addresses and addresses == number:
        raise UnfitError(
            f"{file.path} holds the paths of its images, not their bytes; download the images "
            "first, for example with img2dataset."
        )
    return problems


def _owner(identity: Any, image: bytes) -> str | None:
    """What the rows of one example share: ids may start again in every file, or all be the same."""
    if identity is None:
        return None
    digest = hashlib.blake2b(image, digest_size=16)
    digest.update(str(identity).encode(errors="replace"))
    return digest.hexdigest()


def _open(copies: list[Path]):
    """The Arrow table of all copies, mapped into memory."""
    pa, _ = _pyarrow()
    tables = [_schema(pa).empty_table()]
    for copy in copies:
        # The mapping outlives the file object: no file stays open, there may be thousands.
        with pa.memory_map(str(copy)) as file:
            tables.append(pa.ipc.open_file(file).read_all())
    return pa.concat_tables(tables)
