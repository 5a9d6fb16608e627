"""A folder of images with a table of captions: CSV, COCO's JSON or that of Karpathy's splits."""

import csv
import io
import json
import os
import posixpath
import re
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import PurePosixPath

import numpy as np

from simseg_jax.data.images import IMAGE_SUFFIXES
from simseg_jax.data.pairs.example import (
    CAPTION_KEYS,
    BadExample,
    Problems,
    choose_captions,
    choose_key,
    encoding,
    group,
    no_pairs,
    read_captions,
    shorten,
)
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, reading, some

# The authors' tables (train_anno.csv, valid_anno.csv), open_clip's, Flickr30k's, others'.
IMAGE_COLUMNS = (
    *("image", "filepath", "image_name", "filename", "file_name"),
    *("image_path", "image_file", "path", "file"),
)
SEPARATORS = "\t,;|"
QUOTING = ",;"  # Separators of tables where quotes enclose fields; for others it is found out.
# What puts a field between tabs in quotes, besides a tab: only what must (pandas), also commas
# (Excel) or spaces, or all but numbers.
WRITERS = (r'["\n]', r'[",\n]', r'[",\s]', r"[^\d.]")
UNPAIRED = "a quote without its partner"
TEXT_AFTER = "text after the closing quote of a field: double quotes that are text"
SPAN = 64  # The most lines of a quoted row.
LONGEST = 1 << 17  # Characters of a line: the limit of Python's csv for a field.
TOKEN = re.compile(r"([^\t]+)#\d+\t")  # Flickr8k.token.txt: image#number, caption; no header.
TRIED = 20  # Images looked for before their folder counts as the wrong one.


class TableSource:
    """Images of a folder with the captions of a table: one example is one image.

    table, form: the file and its format. csv: one row per caption under a header (see `_csv_rows`)
    or Flickr8k's token file; coco: the JSON of COCO captions or of Karpathy's splits
    (dataset_flickr30k.json, dataset_coco.json). images: the image folder; the names in the table
    are relative to it and may not lead out of it. split: a text file that lists the images to use,
    one per line, '' for all; of Karpathy's the name of a split, such as test, or several joined by
    +. Both are relative to the table.
    """

    def __init__(
        self, table: str, form: str, images: str, split: str, image_key: str, caption_key: str
    ):
        home = posixpath.dirname(table)
        self.folder, self.problems = remote.join(home, images), Problems()
        data = _read(table, "The caption table")
        if form == "coco":
            content = _parsed(table, data)
            if any(isinstance(i, dict) and "sentences" in i for i in content["images"]):
                rows, split = _karpathy_rows(table, content, split, self.problems), ""
            else:
                rows = _coco_rows(content, self.problems)
        else:
            rows = _csv_rows(table, data, image_key, caption_key, self.problems)
        self.names, self.captions = Texts(), Texts()
        numbers: dict[str, int] = {}
        owners = array("q")
        with reading(f"the caption table {table}", "Save it as UTF-8."):
            for where, name, value in rows:
                self._add(where, name, value, numbers, owners)
        self.order, self.starts = group(np.array(owners, np.int64))
        self.examples = np.arange(len(numbers))
        if split:
            self.examples = self._chosen(numbers, remote.join(home, split))
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

    def _add(self, where: str, name, value, numbers: dict[str, int], owners: array) -> None:
        """Takes the captions of one entry of the table, or counts what is wrong with them."""
        try:
            name = self._inside(name)
        except ValueError as error:
            self.problems.add(f"{where}: {error}")
            return
        captions, wrong = read_captions(value)
        for reason in wrong or ([] if captions else ["empty caption"]):
            self.problems.add(f"{where}, {name}: {reason}")
        if captions and name not in numbers:
            numbers[name] = len(numbers)
            self.names.append(name)
        for caption in captions:
            owners.append(numbers[name])
            self.captions.append(caption)

    def _inside(self, name) -> str:
        """The normalised name of an image relative to the image folder; a ValueError refuses it."""
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise ValueError(f"{shorten(repr(name), 60)} is no name of an image")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError("the name of the image is not UTF-8") from None
        path = posixpath.normpath(name.strip().replace("\\", "/"))
        if path.startswith("/"):
            remotely = remote.is_remote(self.folder)
            path = ".." if remotely else posixpath.relpath(path, os.path.abspath(self.folder))
        if path == ".." or path.startswith("../"):
            raise ValueError(f"{shorten(repr(name), 60)} is outside the image folder; set images")
        return path

    def _chosen(self, numbers: dict[str, int], listing: str) -> np.ndarray:
        """The examples whose images a text file lists, int64 [N], in its order."""
        data = _read(listing, "The list of images")
        with reading(f"the list of images {listing}", "Save it as UTF-8."):
            lines = re.split(r"\r\n|\n|\r", data.decode(encoding(data)))
        chosen: dict[int, None] = {}
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{posixpath.basename(listing)}, line {number}"
                try:
                    name = self._inside(line)
                except ValueError as error:
                    self.problems.add(f"{where}: {error}")
                    continue
                if name not in numbers:
                    self.problems.add(f"{where}: {name!r} has no caption in the table")
                elif numbers[name] in chosen:
                    self.problems.add(f"{where}: {name!r} is listed twice")
                else:
                    chosen[numbers[name]] = None
        return np.array(list(chosen), np.int64)

    def _look_for_images(self) -> None:
        """Raises a `UserError` if the folder of the images seems to be another one.

        A single missing image is a bad example wherever it stands, so several are looked for.
        """
        tried = np.unique(np.linspace(0, len(self) - 1, min(TRIED, len(self))).astype(int))
        paths = [
            remote.join(self.folder, self.names[int(self.examples[index])])
            for index in tried.tolist()
        ]
        if not any(remote.exists(path) for path in paths):
            raise UserError(
                f"None of {len(paths)} training images looked for exists, such as {paths[0]}: set "
                "images to the folder that the names in the table are relative to."
            )


class Texts:
    """A growing list of str in one buffer: no Python object per text."""

    def __init__(self):
        self.buffer, self.ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Adds one text at the end."""
        self.buffer += text.encode()
        self.ends.append(len(self.buffer))

    def __getitem__(self, index: int) -> str:
        return self.buffer[self.ends[index] : self.ends[index + 1]].decode()


def _read(path: str, what: str) -> bytes:
    """The content of the table or list `path`."""
    if not remote.exists(path):
        raise UserError(f"{what} is missing: no file {path}.")
    with reading(f"{what[0].lower()}{what[1:]} {path}"):
        return remote.read(path)


def _csv_rows(
    table: str, data: bytes, image_key: str, caption_key: str, problems: Problems
) -> Iterator:
    """(line, image name, captions) of every row.

    The separator is the most frequent of tab, comma, semicolon and | in the header. Between commas
    and semicolons fields may be quoted (RFC 4180), and quoted fields may hold line ends; otherwise
    see `_quotes_enclose`. Column names are compared without case and outer spaces. A row that is
    ambiguous costs only its own line and is counted: a misplaced quote, more or fewer columns than
    the header, bytes that are not UTF-8. UTF-16 and UTF-32 need their byte order mark.
    """
    # A file of an old Mac has no line feed; in others a lone carriage return is text.
    ending = "\n" if b"\n" in data else "\r"
    lines = io.TextIOWrapper(io.BytesIO(data), encoding(data), "surrogateescape", newline=ending)
    first = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    if TOKEN.match(first):
        for number, fields, _ in _records(lines, "\t", 2, 0, quoting=False):
            if match := TOKEN.match(f"{fields[0]}\t"):
                yield f"line {number}", match[1], fields[1]
            else:
                problems.add(f"line {number}: not of the form `image#number`, tab, caption")
        return
    where = f"{table} must start with a header line such as `image,caption`: its first line"
    if not first or "\0" in first or len(first) > LONGEST:
        odd = "NUL bytes" if "\0" in first else f"{len(first):,} characters without a line end"
        raise UserError(f"{where} has {odd if first else 'no text'}. Save it as UTF-8 text.")
    separator = max(SEPARATORS, key=first.count)
    spaces = f"{separator} " in first
    header = next(csv.reader([first], delimiter=separator, skipinitialspace=spaces), [])
    names = [name.strip() for name in header]
    if any(PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        raise UserError(f"{where} is a row: {shorten(some(names), 120)}. Add the header above it.")
    keys = names, problems
    image_key, caption_key = image_key.strip(), caption_key.strip()
    image = names.index(choose_key(where, "column image", image_key, IMAGE_COLUMNS, *keys))
    chosen = choose_captions(where, "column caption", caption_key, CAPTION_KEYS, *keys)
    captions = [names.index(key) for key in chosen]
    layout = lines, separator, len(names), image
    quoting = separator in QUOTING or first.startswith('"')
    if not quoting and b'"' in data:
        rows = _records(*layout, True, spaces)
        quoting = _quotes_enclose(table, rows, separator, len(names))
        lines.seek(0)
    rows = _records(*layout, quoting, spaces)
    next(rows, None)
    for number, fields, _ in rows:
        if isinstance(fields, str):
            problems.add(f"line {number}: {fields}")
        else:
            yield f"line {number}", fields[image], [fields[key] for key in captions]


def _quotes_enclose(table: str, rows: Iterator, separator: str, columns: int) -> bool:
    """Whether quotes enclose fields between tabs or |, as `WRITERS` use them, or are text.

    A `UserError` names a line of each kind if a table has both.
    """
    shown: list[dict[bool, int]] = [{} for _ in WRITERS]  # The first line that shows an answer.
    for number, fields, lines in islice(rows, 1, None):
        text = "".join(lines).rstrip("\r\n")
        as_text = all(line.count(separator) == columns - 1 for line in lines)
        for seen, special in zip(shown, WRITERS, strict=True):
            # Of the first both answers count, of the others whether they are ever wrong.
            if '"' not in text if seen is shown[0] else False in seen:
                continue
            written = isinstance(fields, list) and separator.join(
                '"' + field.replace('"', '""') + '"'
                if separator in field or re.search(special, field)
                else field
                for field in fields
            )
            # Several lines that are rows as well are no field.
            enclosed = text == written and not (as_text and lines[1:])
            # A row that fits neither way tells nothing.
            if '"' in text if enclosed else as_text:
                seen.setdefault(enclosed, number)
    if any(list(seen) == [True] for seen in shown):
        return True
    if True in shown[0]:
        raise UserError(
            f"{table} can be read in two ways: quotes enclose a field in line {shown[0][True]} but "
            f"are text in line {shown[0][False]}. Save it as CSV, or with all fields in quotes."
        )
    return False


def _records(
    lines: Iterator[str],
    separator: str,
    columns: int,
    image: int,
    quoting: bool,
    spaces: bool = False,
) -> Iterator[tuple[int, list[str] | str, list[str]]]:
    """(number of its first line, its fields or what is wrong with it, its lines) of every row.

    columns: number of fields in a row. image: index of the field with the image's name. spaces:
    whether to drop spaces before a field.
    """
    ahead, number = deque(islice(lines, 1)), 1
    while ahead:
        line, used = ahead[0], 1
        row: list[str] | str = []
        if len(line) > LONGEST:
            row = f"longer than {LONGEST:,} characters"
        elif quoting and '"' in line:
            ahead.extend(islice(lines, SPAN - len(ahead)))
            row, used = _quoted(ahead, separator, columns, image, spaces)
        elif line.strip():
            row = line.rstrip("\r\n").split(separator)
        if isinstance(row, list) and row:
            while len(row) > columns and not row[-1].strip():
                row.pop()
            if len(row) != columns:
                row = f"{len(row)} columns, not {columns} as the header has"
        own = [ahead.popleft() for _ in range(used)]
        if row:
            yield number, row, own
        number += used
        ahead = ahead or deque(islice(lines, 1))


def _quoted(
    ahead: deque[str], separator: str, columns: int, image: int, spaces: bool
) -> tuple[list[str] | str, int]:
    """(the row at the start of `ahead` or what is wrong with it, how many lines it fills)."""
    rows = csv.reader(ahead, strict=True, delimiter=separator, skipinitialspace=spaces)
    try:
        row = next(rows)
    except csv.Error as error:
        after = "expected after" in str(error)
        # Later lines may belong to other rows.
        return TEXT_AFTER if after and rows.line_num == 1 else UNPAIRED, 1
    if rows.line_num > 1:
        # Two quotes without partners look like one field over many lines, with rows in it.
        suffixes = {PurePosixPath(row[min(image, len(row) - 1)]).suffix.lower(), *IMAGE_SUFFIXES}
        for line in islice(ahead, 1, rows.line_num):
            fields = [field.strip(' "\r\n') for field in line.split(separator)]
            inside = len(fields) >= columns and PurePosixPath(fields[image]).suffix.lower()
            if len(row) != columns or inside in suffixes:
                return UNPAIRED, 1
    return row, rows.line_num


def _parsed(table: str, data: bytes) -> dict:
    """The content of a JSON with a list `images`."""
    with reading(
        f"the caption table {table}",
        "JSON Lines are not read: save their images and captions as CSV with a header.",
    ):
        text = data.decode(
            encoding(data), "surrogateescape" if encoding(data) == "utf-8" else "strict"
        )
        content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(
            f"{table} is no JSON of COCO captions or of Karpathy's splits, which have a list "
            "`images`."
        )
    return content


def _karpathy_rows(table: str, content: dict, split: str, problems: Problems) -> Iterator:
    """(place, image name, [caption]) of the images in some splits, '' for all."""
    images = [image if isinstance(image, dict) else {} for image in content["images"]]
    known = dict.fromkeys(str(image["split"]) for image in images if "split" in image)
    wanted = split.split("+") if split else []
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"{table} has no split {unknown[0]!r}, only {some(known)}.")
    for number, image in enumerate(images):
        where = f"image {number}"
        if split and "split" not in image:
            problems.add(f"{where}: no split")
        elif not split or image["split"] in wanted:
            folder, name = image.get("filepath", ""), image.get("filename")
            sentences = image.get("sentences")
            if not isinstance(folder, str) or not isinstance(name, str):
                problems.add(f"{where}: no filename")
            elif not isinstance(sentences, list):
                problems.add(f"{where}, {name}: no sentences")
            else:
                for sentence in sentences or [None]:
                    yield where, posixpath.join(folder, name), [sentence]


def _coco_rows(content: dict, problems: Problems) -> Iterator:
    """(place, image name, [caption]) of every annotation, image by image."""
    names: dict = {}
    shared = set()
    for number, image in enumerate(content["images"]):
        identity, name = _fields(image, "id", "file_name")
        if name is None:
            problems.add(f"image {number}: no id or file_name")
        elif names.setdefault(identity, name) != name:
            problems.add(f"image {number}, {name}: has the id of {names[identity]}")
            shared.add(identity)
    captions: dict = {identity: [] for identity in names}
    annotations = content.get("annotations")
    for number, annotation in enumerate(annotations if isinstance(annotations, list) else ()):
        identity, caption = _fields(annotation, "image_id", "caption")
        if identity not in captions:
            problems.add(f"annotation {number}: no caption of a known image")
        elif identity in shared:
            problems.add(f"annotation {number}: of several images with the id {identity}")
        else:
            captions[identity].append((f"annotation {number}", caption))
    for identity, name in names.items():
        if not captions[identity]:
            problems.add(f"{name}: image without caption")
        for where, caption in captions[identity]:
            yield where, name, [caption]


def _fields(entry, identity: str, other: str) -> tuple:
    """(entry[identity], entry[other]); None for what is missing. `entry` may be anything."""
    if not isinstance(entry, dict) or not isinstance(entry.get(identity), str | int):
        return None, None
    return entry[identity], entry.get(other)
