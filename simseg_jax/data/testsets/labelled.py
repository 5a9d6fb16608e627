"""Images with one class each: a folder of class subfolders, a TFDS data set, generated scenes.

A source has `__len__`, `classes` (their names in the data) and, per index, {"image": encoded bytes
or uint8 array, "label": int, "name": str}. Its `content` is a digest of the classes and of the
names and versions of its files.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from grain.sources import ArrayRecordDataSource
from PIL import Image

from simseg_jax.data import shapes
from simseg_jax.data.images import decode_image
from simseg_jax.data.pairs import tf_example
from simseg_jax.data.pairs.example import choose_keys
from simseg_jax.data.pairs.records import INFO, READ_ERRORS, open_shards, tfds_files
from simseg_jax.data.testsets.classes import read_label_file, read_label_set
from simseg_jax.data.testsets.folders import image_files
from simseg_jax.runtime.errors import UserError, one_line, reading, some
from simseg_jax.runtime.files import digest, stamp
from simseg_jax.runtime.remote import is_hidden


def labelled_source(settings):
    """The source that `settings` (data, root, split, size) describes."""
    if settings.data == "shapes":
        return LabelledShapes(settings.size, settings.split)
    root = Path(settings.root).expanduser()
    if not settings.root or not root.is_dir():
        raise UserError(f"There is no folder {str(root)!r}: set root to the folder of the images.")
    if (root / INFO).is_file():
        return LabelledRecords(root, settings.split)
    return LabelledFolder(root / settings.split if settings.split else root)


def loader(source) -> Callable[[int], tuple[Image.Image, int]]:
    """load(index) -> (image, label) of a source."""

    def load(index: int) -> tuple[Image.Image, int]:
        example = source[index]
        return decode_image(example["image"], example["name"]), example["label"]

    return load


def class_prompts(classes: tuple[str, ...], names: str) -> list[tuple[str, ...]]:
    """The names for the prompts of every class.

    names: "auto" (CLIP's names if all classes are ImageNet's synsets such as n01440764, otherwise
    the class names with spaces for underscores) or a text file of `class: name, name` lines.
    """
    if names != "auto":
        known = dict(read_label_file(names, "auto"))
    else:
        known = dict(read_label_set("imagenet"))
        if not set(classes) <= set(known):
            return [(name.replace("_", " "),) for name in classes]
    missing = [name for name in classes if name not in known]
    if missing:
        raise UserError(f"{names} has no line for the classes {some(map(repr, missing))}.")
    return [known[name] for name in classes]


class LabelledFolder:
    """root/CLASS/**/IMAGE, classes in alphabetical order; hidden files and folders do not count."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"There is no folder {root}: set root and split.")
        self.root = root
        folders = [f.name for f in os.scandir(root) if f.is_dir() and not is_hidden(f.name)]
        self.classes = tuple(sorted(folders))
        files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in image_files(root / name)
        ]
        if not files:
            raise UserError(f"{root} holds no subfolders with images, one for each class.")
        self.files = [str(path) for path, _ in files]
        self.labels = np.array([label for _, label in files], np.int64)
        stamps = (f"{path.relative_to(root)} {stamp(path)}" for path, _ in files)
        self.content = digest([self.classes, *stamps])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path = self.files[index]
        label = int(self.labels[index])
        return {"image": Path(path).read_bytes(), "label": label, "name": path}


class LabelledRecords:
    """A split of a TFDS data set of encoded images with an integer `label`."""

    def __init__(self, folder: Path, split: str):
        files, lengths = tfds_files(str(folder), split)
        self.folder = folder
        shards, problems = open_shards(files, Path(), lengths)
        if not shards or problems.count:
            # An incomplete test set would give another result.
            raise UserError(f"{folder} is not complete. {problems}. Prepare it again.")
        self.records: Any = ArrayRecordDataSource(shards)
        with reading(f"the first record of {folder}", "Prepare the data again."):
            first = tf_example.parse(self.records[0])
        [self.image] = choose_keys(str(folder), "feature image", "", first, problems)
        names = folder / "label.labels.txt"
        if "label" not in first or not names.is_file():
            raise UserError(f"{folder} has no feature `label` with its {names.name}.")
        with reading(f"the names of the classes {names}", "Save it as UTF-8."):
            lines = names.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        self.classes = tuple(lines)
        self.content = digest([self.classes, *files])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        name = f"{self.folder}, record {index}"
        try:
            values = tf_example.parse(self.records[index])
            image, label = values[self.image][0], values["label"][0]
            if not isinstance(image, bytes) or label not in range(len(self.classes)):
                raise ValueError(f"no encoded image with a label below {len(self.classes)}")
            return {"image": image, "label": label, "name": name}
        except (*READ_ERRORS, KeyError, IndexError) as error:
            reason = one_line(error)
            raise UserError(f"{name} cannot be read: {reason}. Prepare the data again.") from error


class LabelledShapes:
    """Generated scenes that show a single category."""

    classes = shapes.CATEGORIES

    def __init__(self, size: int, split: str):
        self.split = shapes.check_split(split)
        self.content = shapes.version()
        self.found: list[tuple[int, int]] = []
        index = 0
        while len(self.found) < size:
            kinds = np.unique(shapes.scene(index, split)[1])
            if len(kinds[kinds > 0]) == 1:
                self.found.append((index, int(kinds.max()) - 1))
            index += 1

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict:
        scene, label = self.found[index]
        name = f"scene {scene} of {self.split}"
        return {"image": shapes.scene(scene, self.split)[0], "label": label, "name": name}
