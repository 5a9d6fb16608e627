"""Rows of caption tables: CSV in all its dialects, and Flickr8k's token file.

Quotes are the difficulty: in some tables they enclose fields, which may then contain separators and
line ends; in others they are part of the captions. A row that cannot be read either way is counted
and left out; other rows are still read.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import NamedTuple

from simseg_jax.data.images import IMAGE_SUFFIXES
from simseg_jax.data.pairs.example import Problems, choose_keys, encoding, shorten
from simseg_jax.runtime.errors import UserError, some

# Names in the authors' tables (train_anno.csv, valid_anno.csv), open_clip's, Flickr30k's, others'.
IMAGE_COLUMNS = (
    *("image", "filepath", "image_name", "filename", "file_name"),
    *("image_path", "image_file", "path", "file"),
)
SEPARATORS = "\t,;|"
QUOTING = ",;"  # With these separators quotes always enclose fields.
# Which fields of a table with tabs or | a program encloses in quotes, besides those that contain
# the separator: fields with a quote or a line end only (pandas), also those with commas (Excel) or
# spaces, or all but numbers.
WRITERS = (r'["\n]', r'[",\n]', r'[",\s]', r"[^\d.]")
UNPAIRED = "a quote without its partner"
TEXT_AFTER = "text after the closing quote of a field: double quotes that are text"
SPAN = 64  # Most lines of a quoted row.
LONGEST = 1 << 17  # Most characters of a line: the limit of Python's csv for a field.
TOKEN = re.compile(r"([^\t]+)#\d+\t")  # A line of Flickr8k.token.txt: image#number, tab, caption.


class Layout(NamedTuple):
    """How the lines of a table are split into fields.

    columns: number of fields in a row. image: index of the field with the name of the image.
    spaces: whether spaces before a field are dropped. quoting: whether quotes enclose fields.
    """

    separator: str
    columns: int
    image: int
    spaces: bool
    quoting: bool


def csv_rows(
    table: str, data: bytes, image_key: str, caption_key: str, problems: Problems
) -> Iterator:
    """(line, image name, captions) of every row.

    The separator is the most frequent of tab, comma, semicolon and | in the header. In tables with
    commas or semicolons quotes enclose fields, which may then contain line ends (RFC 4180); for
    other separators see `_quotes_enclose`. Column names are compared without case and outer spaces.
    An ambiguous row is counted and costs only its first line: one with a misplaced quote, with more
    or fewer columns than the header, or with bytes that are not UTF-8. UTF-16 and UTF-32 need their
    byte order mark.
    """
    # Files of old Macs end lines with \r and have no \n; in other files a lone \r is text.
    ending = "\n" if b"\n" in data else "\r"
    lines = io.TextIOWrapper(io.BytesIO(data), encoding(data), "surrogateescape", newline=ending)
    first = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    if TOKEN.match(first):
        yield from _token_rows(lines, problems)
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
    image_key, caption_key = image_key.strip(), caption_key.strip()
    [image] = choose_keys(where, "column image", image_key, names, problems, IMAGE_COLUMNS)
    captions = choose_keys(where, "column caption", caption_key, names, problems)
    layout = Layout(separator, len(names), names.index(image), spaces, quoting=True)
    if separator not in QUOTING and not first.startswith('"'):
        enclosed = b'"' in data and _quotes_enclose(table, _records(lines, layout), layout)
        layout = layout._replace(quoting=enclosed)
        lines.seek(0)
    for number, fields, _ in islice(_records(lines, layout), 1, None):
        if isinstance(fields, str):
            problems.add(f"line {number}: {fields}")
        else:
            texts = [fields[names.index(key)] for key in captions]
            yield f"line {number}", fields[layout.image], texts


def _token_rows(lines: Iterator[str], problems: Problems) -> Iterator:
    """As `csv_rows`, for a token file, whose lines are image#number, tab, caption."""
    for number, fields, _ in _records(lines, Layout("\t", 2, 0, spaces=False, quoting=False)):
        if match := TOKEN.match(f"{fields[0]}\t"):
            yield f"line {number}", match[1], fields[1]
        else:
            problems.add(f"line {number}: not of the form `image#number`, tab, caption")


def _quotes_enclose(table: str, rows: Iterator, layout: Layout) -> bool:
    """Whether quotes enclose fields in a table with tabs or |; otherwise they are part of the text.

    They enclose if one of `WRITERS` would have written every row with a quote exactly as it is.
    They are text if the lines of a row have the right number of separators even when quotes are
    ignored. A `UserError` names a line of each kind if a table has both.

    rows: what `_records` yields for `layout`, with quoting.
    """
    # For each writer: the first line that shows that it wrote the table (True) or did not (False).
    shown: list[dict[bool, int]] = [{} for _ in WRITERS]
    separator = layout.separator
    for number, fields, lines in islice(rows, 1, None):
        text = "".join(lines).rstrip("\r\n")
        as_text = all(line.count(separator) == layout.columns - 1 for line in lines)
        for seen, special in zip(shown, WRITERS, strict=True):
            # The message needs both answers of the first writer; for the others a False decides.
            known = '"' not in text if seen is shown[0] else False in seen
            if known:
                continue
            written = isinstance(fields, list) and separator.join(
                '"' + field.replace('"', '""') + '"'
                if separator in field or re.search(special, field)
                else field
                for field in fields
            )
            # Several lines that are rows by themselves are not one field.
            enclosed = text == written and not (as_text and lines[1:])
            # A row that can be read in neither way says nothing about the writer.
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
    lines: Iterator[str], layout: Layout
) -> Iterator[tuple[int, list[str] | str, list[str]]]:
    """(number of the first line, the fields or what is wrong with them, the lines) of every row."""
    ahead, number = deque(islice(lines, 1)), 1
    while ahead:
        line, used = ahead[0], 1
        row: list[str] | str = []
        if len(line) > LONGEST:
            row = f"longer than {LONGEST:,} characters"
        elif layout.quoting and '"' in line:
            ahead.extend(islice(lines, SPAN - len(ahead)))
            row, used = _quoted(ahead, layout)
        elif line.strip():
            row = line.rstrip("\r\n").split(layout.separator)
        if isinstance(row, list) and row:
            while len(row) > layout.columns and not row[-1].strip():
                row.pop()
            if len(row) != layout.columns:
                row = f"{len(row)} columns, not {layout.columns} as the header has"
        own = [ahead.popleft() for _ in range(used)]
        if row:
            yield number, row, own
        number += used
        ahead = ahead or deque(islice(lines, 1))


def _quoted(ahead: deque[str], layout: Layout) -> tuple[list[str] | str, int]:
    """(the fields of the row at the start of `ahead` or what is wrong, its number of lines)."""
    separator, image = layout.separator, layout.image
    rows = csv.reader(ahead, strict=True, delimiter=separator, skipinitialspace=layout.spaces)
    try:
        row = next(rows)
    except csv.Error as error:
        after = "expected after" in str(error)
        # Only the first line counts as wrong: the next ones may be good rows.
        return TEXT_AFTER if after and rows.line_num == 1 else UNPAIRED, 1
    if rows.line_num > 1:
        # Two quotes without partners seem to enclose one field with all the rows between them.
        suffixes = {PurePosixPath(row[min(image, len(row) - 1)]).suffix.lower(), *IMAGE_SUFFIXES}
        for line in islice(ahead, 1, rows.line_num):
            fields = [field.strip(' "\r\n') for field in line.split(separator)]
            inside = len(fields) >= layout.columns and PurePosixPath(fields[image]).suffix.lower()
            if len(row) != layout.columns or inside in suffixes:
                return UNPAIRED, 1
    return row, rows.line_num
