"""A folder of images with a table of captions: CSV, COCO's JSON or that of Karpathy's splits."""

import csv
import io
import json
import posixpath
from array import array
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from simseg_jax.data.pairs import remote
from simseg_jax.data.pairs.example import BadExample, Problems, choose_key, group, no_pairs
from simseg_jax.errors import UserError

# The authors' tables (train_anno.csv, valid_anno.csv), then open_clip's.
IMAGE_COLUMNS = ("image", "filepath")
CAPTION_COLUMNS = ("caption", "title")


class TableSource:
    """Images of a folder with the captions of a table: one example is one image.

    table, form: the file and its format. csv: with a header, `image,caption` or `filepath,title`,
    separated by commas or tabs, one row per caption; coco: the JSON of COCO captions or of
    Karpathy's splits (dataset_flickr30k.json, dataset_coco.json). images: the folder of the images.
    split: a text file that lists the images to use, one per line, '' for all; of Karpathy's the
    name of a split, such as test, or several joined by +. Both are relative to the table.
    """

    def __init__(
        self, table: str, form: str, images: str, split: str, image_key: str, caption_key: str
    ):
        home = posixpath.dirname(table)
        self.folder, self.problems = remote.join(home, images), Problems()
        _require(table, "The caption table")
        try:
            text = remote.read(table).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read the caption table {table}: {error}.") from error
        if form == "coco":
            content = _parsed(table, text)
            if any("sentences" in image for image in content["images"][:1]):
                rows, split = _karpathy_rows(table, content, split), ""
            else:
                rows = _coco_rows(table, content, self.problems)
        else:
            rows = _csv_rows(table, text, image_key, caption_key)
        self.names, self.captions = Texts(), Texts()
        numbers: dict[str, int] = {}
        owners = array("q")
        for name, caption in rows:
            path = PurePosixPath(name)
            if not name or path.is_absolute() or ".." in path.parts:
                self.problems.add(f"{name!r} is outside the image folder")
            elif not caption or not caption.strip():
                self.problems.add(f"{name}: empty caption")
            else:
                if name not in numbers:
                    numbers[name] = len(numbers)
                    self.names.append(name)
                owners.append(numbers[name])
                self.captions.append(caption.strip())
        self.order, self.starts = group(np.array(owners, np.int64))
        self.examples = np.arange(len(numbers))
        if split:
            self.examples = _chosen(numbers, table, remote.join(home, split))
        if not len(self):
            raise no_pairs(table, self.problems)
        first = self.names[self.examples[0]]
        _require(remote.join(self.folder, first), "The first training image")

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


class Texts:
    """A growing list of str in one buffer: no Python object per text."""

    def __init__(self):
        self.buffer, self.ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Adds one text at the end; what UTF-8 cannot hold becomes a question mark."""
        self.buffer += text.encode(errors="replace")
        self.ends.append(len(self.buffer))

    def __getitem__(self, index: int) -> str:
        return self.buffer[self.ends[index] : self.ends[index + 1]].decode()


def _csv_rows(table: str, text: str, image_key: str, caption_key: str) -> Iterator:
    """(image name, caption) of every row."""
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",")
    try:
        columns = rows.fieldnames or []
        where = f"{table} must start with the header line `image,caption`: it"
        image = choose_key(where, "column image", image_key, IMAGE_COLUMNS, columns)
        caption = choose_key(where, "column caption", caption_key, CAPTION_COLUMNS, columns)
        for row in rows:
            yield row[image] or "", row[caption]
    except csv.Error as error:
        raise UserError(f"{table}, after line {rows.line_num}: {error}.") from error


def _parsed(table: str, text: str) -> dict:
    try:
        content = json.loads(text)
        assert isinstance(content["images"], list)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{table} is no JSON of COCO captions or of Karpathy's splits, which have a list "
            f"`images`: {error!r}."
        ) from error
    return content


def _karpathy_rows(table: str, content: dict, split: str) -> Iterator:
    """(image name, caption) of the sentences of the images in some splits, '' for all."""
    try:
        known = dict.fromkeys(image["split"] for image in content["images"])
        wanted = split.split("+") if split else list(known)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise UserError(f"{table} has no split {unknown[0]!r}, only {', '.join(known)}.")
        for image in content["images"]:
            if image["split"] in wanted:
                name = posixpath.join(image.get("filepath", ""), image["filename"])
                for sentence in image["sentences"]:
                    yield name, sentence["raw"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{table} is no JSON of Karpathy's splits, with images (filename, split, sentences "
            f"with raw): {error!r}."
        ) from error


def _coco_rows(table: str, content: dict, problems: Problems) -> Iterator:
    """(image name, caption) of every annotation, image by image."""
    try:
        captions: dict = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(annotation["caption"])
            else:
                problems.add(f"annotation of the unknown image {annotation['image_id']}")
        for image in content["images"]:
            if not captions[image["id"]]:
                problems.add(f"{image['file_name']}: image without caption")
            for caption in captions[image["id"]]:
                yield image["file_name"], caption
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{table} is no JSON of COCO captions, with images (id, file_name) and annotations "
            f"(image_id, caption): {error!r}."
        ) from error


def _chosen(numbers: dict[str, int], table: str, listing: str) -> np.ndarray:
    """The examples that a text file lists by the names of their images, int64 [N]."""
    _require(listing, "The list of images")
    names = [name.strip() for name in remote.read(listing).decode().split("\n")]
    names = [name for name in names if name]
    lost = [name for name in names if name not in numbers]
    if lost:
        raise UserError(
            f"{listing} lists {len(lost)} images without a caption in {table}, "
            f"the first is {lost[0]!r}."
        )
    return np.array([numbers[name] for name in names], np.int64)


def _require(path: str, what: str) -> None:
    if not remote.exists(path):
        raise UserError(f"{what} is missing: no file {path}.")
