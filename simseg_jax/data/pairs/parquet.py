"""Parquet files of images and captions: the authors' retrieval sets and Hugging Face's layouts.

Parquet compresses groups of rows, so single rows cannot be read. Each file is copied once, a few
rows at a time, to an uncompressed Arrow file in the cache folder. Arrow files are mapped into
memory, where reading a row touches only its own bytes.

A hostile or damaged file of a few bytes may decompress to any size. The decompressed size is
therefore limited in proportion to the file: its metadata are checked before reading, the rows while
copying.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simseg_jax.data.pairs.cache import cached
from simseg_jax.data.pairs.example import (
    TEXT_FIELDS,
    Problems,
    choose_keys,
    group,
    no_pairs,
    optional_key,
    read_captions,
    shorten,
)
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, one_line
from simseg_jax.runtime.remote import File

BATCH = 64  # Most rows in memory at a time.
BATCH_BYTES = 64 << 20  # Most bytes of these rows, unless a single one is larger.
# A file may decompress to SMALL bytes or to RATIO times its size, whichever is more.
SMALL, RATIO = 64 << 20, 32
BINARY = ("binary", "large_binary", "binary_view")  # Names of Arrow's types.
TEXT = (*BINARY, "string", "large_string", "string_view", "null")
GROUP_KEY = "image_id"  # Rows with the same id and equal images form one example.


class Columns(NamedTuple):
    """The columns of a file to read; '' for a column that is missing."""

    image: str
    captions: tuple[str, ...]
    name: str
    group: str


class UnfitError(UserError):
    """The columns of a file have no pairs; other files of its folder may have some."""


class ParquetSource:
    """Rows with an image (bytes, or Hugging Face's struct of bytes and path) and captions.

    Captions are texts, lists of texts, records with a text (`TEXT_FIELDS`), JSON lists, or numbered
    columns (see `choose_keys`). path: as in the settings. Files that cannot be read to their end or
    lack the columns are left out.
    """

    def __init__(self, path: str, files: list[File], image_key: str, caption_key: str, cache: Path):
        self.problems, self.copies = Problems(), []
        refusal = None
        for file in remote.progress(files, len(files), f"copying {path}"):
            try:
                self._add(file, image_key, caption_key, cache)
            except UnfitError as error:
                refusal = refusal or error
                self.problems.add(str(error))
            # pyarrow raises errors of several types for damaged files.
            except Exception as error:
                if not remote.is_damage(error):
                    raise
                self.problems.add(f"{file.path}: unreadable shard ({one_line(error, 60)})")
        if refusal and not self.copies:
            raise refusal
        self.table = _open(self.copies)
        if not self.table.num_rows:
            raise no_pairs(path, self.problems)
        # starts is None if every row is an example of its own, which needs no index.
        self.order, self.starts = np.empty(0, np.int64), None
        if self.table["group"].null_count < self.table.num_rows:
            owners = self.table["group"].combine_chunks().dictionary_encode().indices
            owners = owners.fill_null(-1).to_numpy().astype(np.int64)
            alone = owners < 0
            owners[alone] = owners.max() + 1 + np.arange(alone.sum())
            self.order, self.starts = group(owners)

    def _add(self, file: File, image_key: str, caption_key: str, cache: Path) -> None:
        """Copies the usable rows of a file into the cache, unless an earlier run did."""
        with remote.open_file(file.path) as opened:
            table = import_pyarrow().parquet.ParquetFile(opened, buffer_size=1 << 20)
            schema = table.schema_arrow
            columns = _choose_columns(file.path, schema, image_key, caption_key, self.problems)
            copy, problems = cached(
                cache,
                ("parquet", *file, *columns),
                ".arrow",
                functools.partial(_copy, file, table, columns),
            )
        self.copies.append(copy)
        self.problems.extend(problems)

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


def parquet_images(file: File, image_key: str, problems: Problems) -> Iterator[tuple[str, bytes]]:
    """Streams (value of the name column or number of the row, image or b"") of every row.

    Columns are chosen as for `ParquetSource`. Damage is counted and ends the file.
    """
    try:
        with remote.open_file(file.path) as opened:
            table = import_pyarrow().parquet.ParquetFile(opened, buffer_size=1 << 20)
            schema = table.schema_arrow
            image = _image_column(file.path, schema, image_key, problems)
            name = optional_key(schema.names)
            wanted = {image, name} - {""}
            size = _batch_size(file, table.metadata, wanted)
            batches = table.iter_batches(size, columns=sorted(wanted))
            for number, row in enumerate(row for batch in batches for row in _decoded(batch)):
                if row is None:
                    problems.add(f"{file.path}, row {number}: text that is not UTF-8")
                    continue
                content = row[image]
                content = content["bytes"] if isinstance(content, dict) else content
                yield str(row[name]) if name else str(number), content or b""
    # As in `ParquetSource`.
    except Exception as error:
        if not remote.is_damage(error):
            raise
        problems.add(f"{file.path}: unreadable from here on ({one_line(error, 60)})")


def import_pyarrow():
    """The module pyarrow with its Parquet part; a `UserError` if it is missing."""
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install pyarrow.") from error
    return pyarrow


def _schema():
    """The layout of the copies."""
    pa = import_pyarrow()
    fields = {
        "image": pa.large_binary(),  # Null in a row whose group has an earlier row.
        "captions": pa.list_(pa.string()),
        "name": pa.string(),
        "group": pa.string(),
    }
    return pa.schema(fields)


def _choose_columns(
    path: str, schema, image_key: str, caption_key: str, problems: Problems
) -> Columns:
    """The columns of a file; an `UnfitError` if they are missing or of other types."""
    names = schema.names
    image = _image_column(path, schema, image_key, problems)
    try:
        captions = choose_keys(path, "column caption", caption_key, names, problems)
    except UserError as error:
        raise UnfitError(str(error)) from error
    for caption in captions:
        if not _holds_text(schema.field(caption).type):
            raise UnfitError(
                f"{path}: column {caption} is of type {schema.field(caption).type}, not text, a "
                f"list of it or of records with {' or '.join(TEXT_FIELDS)}: set caption_key."
            )
    return Columns(image, tuple(captions), optional_key(names), optional_key(names, [GROUP_KEY]))


def _image_column(path: str, schema, image_key: str, problems: Problems) -> str:
    pa = import_pyarrow()
    try:
        [image] = choose_keys(path, "column image", image_key, schema.names, problems)
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
    return image


def _holds_text(kind) -> bool:
    """Whether `read_captions` may find text in values of an Arrow type."""
    types = import_pyarrow().types
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _holds_text(kind.value_type)
    if types.is_struct(kind):
        return any(_holds_text(kind.field(key).type) for key in TEXT_FIELDS if key in kind.names)
    return str(kind) in TEXT


def _batch_size(file: File, metadata, columns: set[str]) -> int:
    """The number of rows to read at a time, computed from the sizes in a file's metadata.

    A ValueError says that the metadata promise more rows than the file has bytes, or that `columns`
    decompress to too much. Neither is so for real images and captions.
    """
    if metadata.num_rows > file.size:
        raise ValueError(f"{metadata.num_rows:,} rows in {file.size:,} bytes")
    prefixes = tuple(f"{key}." for key in columns)
    sizes = []
    for row_group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(row_group.column, range(row_group.num_columns))
        read = (chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(prefixes))
        sizes.append(sum(chunk.total_uncompressed_size for chunk in read))
    _check_size(file, sum(sizes))
    # Repeated values are stored once, so every row may be as large as its row group.
    return max(1, min(BATCH, BATCH_BYTES // max([1, *sizes])))


def _check_size(file: File, size: int) -> None:
    if size > max(SMALL, RATIO * file.size):
        raise ValueError(f"{file.size:,} bytes decompress to {size:,} or more")


def _copy(file: File, table, columns: Columns, target: Path) -> Problems:
    """Writes the usable rows of a Parquet file to `target`, in the layout of `_schema`."""
    pa = import_pyarrow()
    problems, rows, waiting, written = Problems(), [], 0, 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _schema()) as writer:
        for row in _usable_rows(file, table, columns, problems):
            rows.append(row)
            waiting += len(row["image"] or b"") + sum(map(len, row["captions"]))
            _check_size(file, written + waiting)
            if len(rows) >= BATCH or waiting >= BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, _schema()))
                written, waiting, rows = written + waiting, 0, []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, _schema()))
    return problems


def _usable_rows(file: File, table, columns: Columns, problems: Problems) -> Iterator[dict]:
    """The rows with an image and a caption, in the layout of `_schema`; counts the others."""
    names = {columns.image, *columns.captions, columns.name, columns.group} - {""}
    batches = table.iter_batches(_batch_size(file, table.metadata, names), columns=sorted(names))
    number, paths_only, seen = -1, 0, set()
    for number, row in enumerate(row for batch in batches for row in _decoded(batch)):
        name = f"{file.path}, row {number}"
        if row is None:
            problems.add(f"{name}: text that is not UTF-8")
            continue
        image = row[columns.image]
        if isinstance(image, dict):
            paths_only += bool(not image["bytes"] and image.get("path"))
            image = image["bytes"]
        captions, wrong = read_captions(*(row[key] for key in columns.captions))
        if columns.name:
            name += f", {shorten(str(row[columns.name]))}"
        usable = bool(image and captions)
        for reason in wrong or ([] if usable else ["empty caption" if image else "no image"]):
            problems.add(f"{name}: {reason}")
        if usable:
            owner = _owner(row[columns.group], image) if columns.group else None
            stored = None if owner in seen else image
            seen.update({owner} - {None})
            yield {"image": stored, "captions": captions, "name": name, "group": owner}
    if paths_only and paths_only == number + 1:
        raise UnfitError(
            f"{file.path} holds the paths of its images, not their bytes; download the images "
            "first, for example with img2dataset."
        )


def _decoded(batch) -> list[dict | None]:
    """The rows of a batch; None for one whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in _decoded(batch.slice(i, 1))]


def _owner(identity: Any, image: bytes) -> str | None:
    """A key that the rows of one example share; None for a row without an id.

    It depends on the image as well: ids may start again in every file, or all be the same.
    """
    if identity is None:
        return None
    digest = hashlib.blake2b(image, digest_size=16)
    digest.update(str(identity).encode(errors="replace"))
    return digest.hexdigest()


def _open(copies: list[Path]):
    """The Arrow table of all copies, mapped into memory."""
    pa = import_pyarrow()
    tables = [_schema().empty_table()]
    for copy in copies:
        # The mapping outlives the file object, so that thousands of files need not stay open.
        with pa.memory_map(str(copy)) as file:
            tables.append(pa.ipc.open_file(file).read_all())
    return pa.concat_tables(tables)
