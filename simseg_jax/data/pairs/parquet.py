"""Parquet files of images and captions: the authors' retrieval sets and Hugging Face's layouts.

Parquet has no access to single rows: each file is copied once, in a stream, to an uncompressed
Arrow file in the cache folder, which is then mapped into memory.
"""

import functools
from pathlib import Path

import numpy as np

from simseg_jax.data.pairs import remote
from simseg_jax.data.pairs.example import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    NAME_KEYS,
    Problems,
    choose_key,
    clean_captions,
    group,
    no_pairs,
)
from simseg_jax.data.pairs.remote import File
from simseg_jax.errors import UserError

BATCH = 64  # Rows in memory at a time, as far as the row groups of the file allow.
GROUP_KEY = "image_id"  # Rows of the same image form one example.


class ParquetSource:
    """Rows with an image (bytes, or Hugging Face's struct of bytes and path) and captions.

    path: what the user named. Files that cannot be read to their end are left out.
    """

    def __init__(self, path: str, files: list[File], image_key: str, caption_key: str, cache: Path):
        pa, pq = _pyarrow()
        self.problems, self.copies = Problems(), []
        for file in remote.progress(files, len(files), f"copying {path}"):
            try:
                with remote.open_file(file.path) as opened:
                    table = pq.ParquetFile(opened)
                    keys = _choose_keys(file.path, table.schema_arrow, image_key, caption_key)
                    copy, problems = remote.cached(
                        cache,
                        ("parquet", *file, *keys),
                        ".arrow",
                        functools.partial(_copy, file.path, table, keys),
                    )
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                if not remote.is_damage(error):
                    raise
                self.problems.add(f"{file.path}: unreadable shard ({error})")
            else:
                self.copies.append(copy)
                self.problems.extend(problems)
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


def _choose_keys(path: str, schema, image_key: str, caption_key: str) -> tuple[str, str, str, bool]:
    """(image, caption, name or '', whether to group) of the columns of a file."""
    pa, _ = _pyarrow()
    names = schema.names
    image = choose_key(path, "column image", image_key, IMAGE_KEYS, names)
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{path}: column {image} is of type {kind}, not the bytes of images; download the "
            "images first, for example with img2dataset."
        )
    caption = choose_key(path, "column caption", caption_key, CAPTION_KEYS, names)
    name = next((key for key in NAME_KEYS if key in names), "")
    return image, caption, name, GROUP_KEY in names


def _copy(path: str, table, keys: tuple[str, str, str, bool], target: Path) -> Problems:
    """Writes the usable rows of a Parquet file in the layout of `_schema`."""
    pa, _ = _pyarrow()
    image_key, caption_key, name_key, grouped = keys
    columns = {image_key, caption_key, *([name_key] if name_key else [])}
    columns |= {GROUP_KEY} if grouped else set()
    problems, seen, number, addresses = Problems(), set(), 0, 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _schema(pa)) as writer:
        for batch in table.iter_batches(BATCH, columns=sorted(columns)):
            rows = []
            for row in batch.to_pylist():
                image = row[image_key]
                if isinstance(image, dict):
                    addresses += bool(not image["bytes"] and image.get("path"))
                    image = image["bytes"]
                captions = clean_captions(row[caption_key])
                name = f"{path}, row {number}"
                number += 1
                if name_key:
                    name += f", {row[name_key]}"
                if not image or not captions:
                    problems.add(f"{name}: {'empty caption' if image else 'no image'}")
                    continue
                owner = str(row[GROUP_KEY]) if grouped and row[GROUP_KEY] is not None else None
                stored = None if owner in seen else image
                if owner is not None:
                    seen.add(owner)
                rows.append({"image": stored, "captions": captions, "name": name, "group": owner})
            writer.write_batch(pa.RecordBatch.from_pylist(rows, _schema(pa)))
    if addresses and addresses == number:
        raise UserError(
            f"{path} holds the paths of its images, not their bytes; download the images first, "
            "for example with img2dataset."
        )
    return problems


def _open(copies: list[Path]):
    """The Arrow table of all copies, mapped into memory."""
    pa, _ = _pyarrow()
    tables = [_schema(pa).empty_table()]
    for copy in copies:
        # The mapping outlives the file object: no file stays open, there may be thousands.
        with pa.memory_map(str(copy)) as file:
            tables.append(pa.ipc.open_file(file).read_all())
    return pa.concat_tables(tables)
