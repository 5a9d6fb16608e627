"""Results of many images as rows of Parquet files or samples of tar shards."""

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simseg_jax.data.pairs.parquet import import_pyarrow

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
GROUP = 256  # Rows in memory.
# The columns that are files of their own in a tar: their suffixes.
MEMBERS = {"mask": "mask.png", "embedding": "npy"}
Row = dict[str, Any]


def _columns(pa, what: str, masks: str) -> dict[str, Any]:
    """The columns of a Parquet file and their types."""
    text, pixels = pa.string(), pa.int32()
    if what == "embeddings":
        return {"key": text, "embedding": pa.list_(pa.float32()), "error": text}
    return {
        "key": text,
        "height": pixels,
        "width": pixels,
        **({"mask": pa.binary()} if masks == "png" else {"annotations": text}),
        "drawn": pa.list_(text),
        "scores": pa.list_(pa.float32()),
        "threshold": pa.float32(),
        "error": text,
    }


@contextlib.contextmanager
def write_rows(path: Path, to: str, what: str, masks: str) -> Iterator[Callable[[Row], None]]:
    """A function that appends one row to the file `path`; few rows are in memory.

    to: "parquet" or "webdataset". what: "masks" or "embeddings". masks: "png" or "rle".
    """
    if to == "webdataset":
        with tarfile.open(path, "w") as tar:
            yield lambda row: _add_sample(tar, row)
        return
    pa = import_pyarrow()
    schema = pa.schema(_columns(pa, what, masks))
    rows: list[Row] = []
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:

        def add(row: Row) -> None:
            rows.append(row)
            if len(rows) == GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        yield add
        writer.write_table(pa.Table.from_pylist(rows, schema))


def _add_sample(tar: tarfile.TarFile, row: Row) -> None:
    """Adds KEY.json, and KEY.mask.png or KEY.npy; a key has no dots, at which readers split."""
    key = row["key"].replace(".", "_")
    fields = {name: value for name, value in row.items() if name not in MEMBERS}
    files = {"json": json.dumps(fields).encode()}
    for name, suffix in MEMBERS.items():
        value = row.get(name)
        if isinstance(value, np.ndarray):
            np.save(content := io.BytesIO(), value)
            value = content.getvalue()
        if value is not None:
            files[suffix] = value
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
