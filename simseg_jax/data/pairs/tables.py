"""Folders of images with a table of captions: CSV, or the JSON of COCO or of Karpathy's splits."""

import os
import posixpath
import re
from array import array

import numpy as np

from simseg_jax.data.pairs.csv_rows import csv_rows
from simseg_jax.data.pairs.example import (
    BadExample,
    Problems,
    encoding,
    group,
    no_pairs,
    read_captions,
    shorten,
    spread,
)
from simseg_jax.data.pairs.json_rows import json_rows
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, reading

TRIED = 20  # Images that are looked for; if none exists, the folder counts as wrong.


class TableSource:
    """Images of a folder with the captions of a table: one example is one image.

    table: the file. form: csv (one row per caption under a header, see `csv_rows`, or Flickr8k's
    token file) or coco (the JSON of COCO captions or of Karpathy's splits: dataset_flickr30k.json,
    dataset_coco.json). images: the image folder, relative to the table; image names are relative to
    that folder and may not lead out of it. split: a text file, relative to the table, that lists
    the images to use, one per line; for Karpathy's JSON the name of a split, such as test, or
    several joined by +; '' for all images.
    """

    def __init__(
        self, table: str, form: str, images: str, split: str, image_key: str, caption_key: str
    ):
        home = posixpath.dirname(table)
        self.folder, self.problems = remote.join(home, images), Problems()
        data, listing = _read(table, "The caption table"), split
        if form == "coco":
            rows, listing = json_rows(table, data, split, self.problems)
        else:
            rows = csv_rows(table, data, image_key, caption_key, self.problems)
        self.names, self.captions = Texts(), Texts()
        numbers: dict[str, int] = {}  # The number of each image name.
        owners = array("q")  # The number of each caption's image.
        with reading(f"the caption table {table}", "Save it as UTF-8."):
            for where, name, value in rows:
                name, captions = self._usable(where, name, value)
                if captions and name not in numbers:
                    numbers[name] = len(numbers)
                    self.names.append(name)
                for caption in captions:
                    owners.append(numbers[name])
                    self.captions.append(caption)
        self.order, self.starts = group(np.array(owners, np.int64))
        self.examples = np.arange(len(numbers))
        if listing:
            self.examples = self._listed(numbers, remote.join(home, listing))
        if not len(self):
            raise no_pairs(table, self.problems)
        self._look_for_images()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        example = self.examples[index]
        path = remote.join(self.folder, self.names[example])
        rows = self.order[self.starts[example] : self.starts[example + 1]]
        try:
            image = remote.read(path)
        except OSError as error:
            raise BadExample(path, error) from error
        return {"image": image, "captions": tuple(self.captions[r] for r in rows), "name": path}

    def _usable(self, where: str, name, value) -> tuple[str, tuple[str, ...]]:
        """(image name, captions) of an entry of the table; counts what is wrong with it."""
        if not (name := self._inside(where, name)):
            return "", ()
        captions, wrong = read_captions(value)
        for reason in wrong or ([] if captions else ["empty caption"]):
            self.problems.add(f"{where}, {name}: {reason}")
        return name, captions

    def _inside(self, where: str, name) -> str:
        """`_relative` to the image folder; counts a name that is refused and returns ''."""
        try:
            return _relative(self.folder, name)
        except ValueError as error:
            self.problems.add(f"{where}: {error}")
            return ""

    def _listed(self, numbers: dict[str, int], listing: str) -> np.ndarray:
        """The numbers of the images that a text file lists, int64 [N], in its order."""
        data = _read(listing, "The list of images")
        with reading(f"the list of images {listing}", "Save it as UTF-8."):
            lines = re.split(r"\r\n|\n|\r", data.decode(encoding(data)))
        chosen: dict[int, None] = {}
        for number, line in enumerate(lines, 1):
            where = f"{posixpath.basename(listing)}, line {number}"
            if not line.strip() or not (name := self._inside(where, line)):
                continue
            if name not in numbers:
                self.problems.add(f"{where}: {name!r} has no caption in the table")
            elif numbers[name] in chosen:
                self.problems.add(f"{where}: {name!r} is listed twice")
            else:
                chosen[numbers[name]] = None
        return np.array(list(chosen), np.int64)

    def _look_for_images(self) -> None:
        """Raises a `UserError` if the image folder seems to be wrong.

        Single missing images are bad examples, so several are looked for.
        """
        names = [self.names[int(self.examples[i])] for i in spread(len(self), TRIED)]
        paths = [remote.join(self.folder, name) for name in names]
        if not any(remote.exists(path) for path in paths):
            raise UserError(
                f"None of {len(paths)} training images looked for exists, such as {paths[0]}: set "
                "images to the folder that the names in the table are relative to."
            )


class Texts:
    """A growing list of str in one buffer, without a Python object per text."""

    def __init__(self):
        self.buffer, self.ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Adds one text at the end."""
        self.buffer += text.encode()
        self.ends.append(len(self.buffer))

    def __getitem__(self, index: int) -> str:
        return self.buffer[self.ends[index] : self.ends[index + 1]].decode()


def _relative(folder: str, name) -> str:
    """The normalised image name `name`, relative to `folder`; a ValueError refuses it."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{shorten(repr(name), 60)} is no name of an image")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("the name of the image is not UTF-8") from None
    path = posixpath.normpath(name.strip().replace("\\", "/"))
    if path.startswith("/"):
        remotely = remote.is_remote(folder)
        path = ".." if remotely else posixpath.relpath(path, os.path.abspath(folder))
    if path == ".." or path.startswith("../"):
        raise ValueError(f"{shorten(repr(name), 60)} is outside the image folder; set images")
    return path


def _read(path: str, what: str) -> bytes:
    """The content of the file `path`; what: names the file in error messages."""
    if not remote.exists(path):
        raise UserError(f"{what} is missing: no file {path}.")
    with reading(f"{what[0].lower()}{what[1:]} {path}"):
        return remote.read(path)
