"""Opens training pairs of all formats."""

import dataclasses
import re

from simseg_jax.data import shapes
from simseg_jax.data.pairs.example import Problems
from simseg_jax.data.pairs.parquet import ParquetSource
from simseg_jax.data.pairs.records import INFO, RecordSource, tfds_files
from simseg_jax.data.pairs.tables import TableSource
from simseg_jax.data.pairs.tars import TarSource
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.files import cache_folder, digest, stamp
from simseg_jax.runtime.ranges import SCENES, SHARE, TEXT, number, one_of
from simseg_jax.runtime.settings import setting

# File names by which formats are recognised. A folder with several formats is read as the first of
# these: img2dataset writes Parquet and JSON files with statistics beside its tars.
SHARD_NAMES = {
    "webdataset": r"\.(tar(\.(gz|bz2|xz|zst))?|tgz)$",
    "array_record": r"\.array_?record",
    "parquet": r"\.parquet$",
}
TABLE_NAMES = {"csv": r"\.(csv|tsv|txt|token)$", "coco": r"\.jsonl?$"}
SHARD_SOURCES = {"webdataset": TarSource, "array_record": RecordSource, "parquet": ParquetSource}


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Where image-caption pairs are stored and how they are read."""

    path: str = setting(
        "", "file, folder, pattern ({000..331}, *) or URL (gs://, s3://, hf://) of the data", TEXT
    )
    format: str = setting(
        "auto",
        "format of the data; auto: recognised by the file names",
        one_of("auto", "csv", "coco", "tfds", "array_record", "webdataset", "parquet", "shapes"),
    )
    split: str = setting(
        "",
        "tfds, Karpathy's JSON: name of the split; csv, coco: file that lists the images; '': all",
        TEXT,
    )
    images: str = setting("", "csv, coco: folder of the images, relative to the table", TEXT)
    image_key: str = setting(
        "", "column, feature or suffix (webdataset) of the image; '': the usual names", TEXT
    )
    caption_key: str = setting(
        "",
        "column or feature of the captions; webdataset: suffix or json.FIELD; '': the usual names",
        TEXT,
    )
    size: int = setting(8192, "shapes: number of generated scenes", SCENES)


@dataclasses.dataclass(frozen=True)
class DataSetConfig(PairsConfig):
    """A data set to train on."""

    weight: float = setting(
        1.0, "times an epoch shows this data set; 0.5 shows half of it", number(1e-6, 1000)
    )
    collage: float = setting(
        0.0, "share of examples that join four images in a square, and their captions", SHARE
    )


class ShapesSource:
    """The generated scenes as training pairs, without their masks."""

    def __init__(self, size: int, split: str):
        self.size, self.split, self.problems = size, shapes.check_split(split), Problems()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        image, _, caption = shapes.scene(int(index), self.split)
        return {"image": image, "captions": (caption,), "name": f"scene {index} of {self.split}"}


def open_source(settings: PairsConfig, cache: str = ""):
    """The source of the training pairs that `settings` describes.

    cache: folder for indexes and copies, '' for the default, see `files.cache_folder`.
    """
    form, folder = settings.format, cache_folder(cache)
    keys = settings.image_key, settings.caption_key
    if form == "shapes":
        return ShapesSource(settings.size, settings.split or "train")
    if not settings.path:
        raise UserError("The path of the training data is empty: set it to a file or folder.")
    path = remote.local_path(settings.path)
    try:
        form = _format_of(path) if form == "auto" else form
        if form in TABLE_NAMES:
            return TableSource(path, form, settings.images, settings.split, *keys)
        if form == "tfds":
            version = _tfds_version(path)
            if not version:
                raise UserError(
                    f"{path} is no TFDS data set: neither it nor a version in it has {INFO}."
                )
            files, lengths = tfds_files(version, settings.split)
            return RecordSource(version, files, *keys, folder, lengths)
        found = remote.find(path)
        # Files whose names do not fit the format are read only if no name does.
        files = [file for file in found if re.search(SHARD_NAMES[form], file.path, re.I)] or found
        return SHARD_SOURCES[form](path, files, *keys, folder)
    except OSError as error:
        raise UserError(f"Cannot open the training data {path}: {error}.") from error


def content(settings: PairsConfig, source) -> str:
    """A digest of the names, sizes and modification times of the files of an open source.

    The images of a table are included only if they are local.
    """
    if settings.format == "shapes":
        return shapes.version()
    path = remote.local_path(settings.path)
    files = remote.find(_tfds_version(path) or path)
    if not isinstance(source, TableSource) or remote.is_remote(source.folder):
        return digest(files)
    images = (source.names[int(example)] for example in source.examples)
    return digest([*files, *((name, _stamp(source.folder, name)) for name in images)])


def _stamp(folder: str, name: str) -> str:
    try:
        return stamp(remote.join(folder, name))
    except OSError:
        return "missing"


def _format_of(path: str) -> str:
    """The format of the file `path`, or of the files that a folder has or a pattern matches."""
    for form, pattern in {**TABLE_NAMES, **SHARD_NAMES}.items():
        if re.search(pattern, path, re.I):
            return form
    if _tfds_version(path):
        return "tfds"
    names = [file.path for file in remote.find(path)]
    for form, pattern in SHARD_NAMES.items():
        if any(re.search(pattern, name, re.I) for name in names):
            return form
    raise UserError(
        f"The format of {path} is unknown: no file in it, such as {names[0]}, ends in .tar, "
        ".parquet or .array_record*; set format, or give the path of a .csv, .tsv or .json."
    )


def _tfds_version(path: str) -> str:
    """The folder with dataset_info.json: `path` or its newest version; '' if none has one."""
    folders = [f for f in remote.listing(path)[1] if re.search(r"/\d+\.\d+\.\d+$", f)]
    folders.sort(key=lambda f: [int(n) for n in f.rpartition("/")[2].split(".")], reverse=True)
    present = (f for f in (path, *folders) if remote.exists(remote.join(f, INFO)))
    return next(present, "")
