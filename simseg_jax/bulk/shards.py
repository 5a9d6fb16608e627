"""The images of a data set without captions: folders, tar or Parquet files, cut into shards."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from simseg_jax.data.images import IMAGE_SUFFIXES
from simseg_jax.data.pairs.example import Problems
from simseg_jax.data.pairs.opening import SHARD_NAMES
from simseg_jax.data.pairs.parquet import parquet_images
from simseg_jax.data.pairs.tars import refuse_compressed, tar_images
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.remote import File


class Shard(NamedTuple):
    """The unit of work: some image files, or one file of many images.

    number: counts from 0. form: "images", "webdataset" or "parquet". files: (key, file).
    """

    number: int
    form: str
    files: list[tuple[str, File]]


def find_archives(source: str) -> tuple[str, list[File]]:
    """("webdataset" or "parquet", its files); ("images", []) for a folder without either.

    source: a file, a folder, a pattern or an address, as `PairsConfig.path`.
    """
    found, folders = remote.listing(source)
    found = found if found or folders else remote.find(source)
    for form in ("webdataset", "parquet"):
        files = [file for file in found if re.search(SHARD_NAMES[form], file.path, re.I)]
        if files:
            refuse_compressed(files)
            return form, files
    return "images", []


def remote_images(source: str) -> dict[str, File]:
    """Path below a remote folder -> image file, of the folder and its subfolders."""
    images = {
        path: file
        for path, file in remote.below(source).items()
        if f".{path.lower().rpartition('.')[2]}" in IMAGE_SUFFIXES
    }
    if not images:
        raise UserError(f"{source} holds no images.")
    return images


def cut(form: str, files: Sequence[tuple[str, File]], size: int) -> list[Shard]:
    """All shards of (key, file), each of up to `size` image files or of one other file."""
    size = size if form == "images" else 1
    parts = [list(files[start : start + size]) for start in range(0, len(files), size)]
    return [Shard(number, form, part) for number, part in enumerate(parts)]


def read_shard(
    shard: Shard, image_key: str, problems: Problems
) -> Iterator[tuple[str, str | bytes]]:
    """Streams (key, path or content) of every image of a shard; no key occurs twice in it.

    image_key: the column or the suffix of the image, '' for the usual ones. problems: what is
    damaged between the images.
    """
    seen = set()
    for position, (key, image) in enumerate(_read(shard, image_key, problems)):
        key = f"{key}#{position}" if key in seen else key
        seen.add(key)
        yield key, image
    if not seen and not problems.count:
        problems.add(f"{shard.files[0][1].path}: no image in it")


def _read(shard: Shard, image_key: str, problems: Problems) -> Iterator[tuple[str, str | bytes]]:
    for key, file in shard.files:
        if shard.form == "images":
            yield key, file.path
        elif shard.form == "webdataset":
            yield from tar_images(file.path, image_key, problems)
        else:
            yield from parquet_images(file, image_key, problems)
