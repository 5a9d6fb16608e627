"""What all sources of pairs share: problems, the choice of keys, the reading of captions."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from simseg_jax.runtime.errors import NAMED, UserError, one_line, some

USUAL_KEYS = {
    "image": ("image", "jpg", "jpeg", "png", "imbytes", "bytes"),
    "caption": (
        *("caption", "captions", "captions/text", "title", "text", "txt", "comment"),
        *("sentences", "sentences_raw", "sentence", "raw"),
    ),
}
TEXT_FIELDS = ("caption", "raw", "text")  # Fields with the text of a caption that is a record.
NUMBERED = re.compile(r"(?:captions?|sentences?|texts?|raw)_?(\d{1,9})", re.IGNORECASE)
MISSING = ("nan", "None", "NULL", "N/A", "<NA>")  # Programs write these for a missing value.
LIST = re.compile(r"""\s*\[\s*(["'].*)?\]\s*""", re.DOTALL)  # A text that looks like a list.
NAME_KEYS = ("name", "image/filename", "key", "__key__", "image_id", "id")
SHORT = 240  # Most characters of a description.
NOTE = 80  # Most characters of a note.
ROOM = 300  # Most characters of all descriptions in one message.
MAX_TEXT = 1 << 20  # Most bytes of the text or the JSON of one example.
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # It starts with the mark of UTF-16, so it comes first.
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class BadExample(Exception):  # noqa: N818
    """One example cannot be used; the message names the example and the reason."""

    def __init__(self, name: str, reason):
        super().__init__(name, reason)

    def __str__(self) -> str:
        reason = one_line(self.args[1]) if self.args[1] else "unreadable"
        return f"{shorten(self.args[0])}: {reason.rstrip('.')}."


@dataclass
class Problems:
    """Entries left out while indexing: their number and descriptions of the first few.

    notes: choices between several keys and kinds of hidden files, each with how often it occurred;
    `count` does not include them.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, description: str) -> None:
        """Counts one entry."""
        self.extend(Problems(1, [shorten(description)]))

    def extend(self, other: "Problems") -> None:
        """Counts the entries of `other` after those of this one."""
        self.count += other.count
        self.first = (self.first + other.first)[:NAMED]
        for text, times in other.notes.items():
            self.note(text, times)

    def note(self, text: str, times: int = 1) -> None:
        """Counts a note; beyond the first few they are counted together as "others"."""
        text = shorten(text, NOTE)
        text = text if text in self.notes or len(self.notes) < NAMED else "others"
        self.notes[text] = self.notes.get(text, 0) + times

    def __bool__(self) -> bool:
        return bool(self.count or self.notes)

    def __str__(self) -> str:
        named = self.first[:1]
        for description in self.first[1:]:
            if sum(map(len, named)) + len(description) <= ROOM:
                named.append(description)
        left_out = f"Left out: {self.count}, first {'; '.join(named)}"
        notes = [f"{text} ({times:,})" for text, times in self.notes.items()]
        return "; ".join([left_out if self.count else "Nothing was left out", *notes])


def shorten(text: str, limit: int = SHORT) -> str:
    """`text` in one line; a long one loses its middle, as its ends hold name and reason."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    half = limit // 2 - 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def encoding(data: bytes) -> str:
    """The encoding that the byte order mark at the start of `data` names, else UTF-8."""
    return next((name for mark, name in BOMS if data.startswith(mark)), "utf-8")


def read_captions(*values) -> tuple[tuple[str, ...], list[str]]:
    """(captions, reasons why others are unusable) of the values of one example.

    A value is a str, bytes (UTF-8, or another encoding with its byte order mark), a record with the
    text in one of `TEXT_FIELDS`, the JSON of a list of str, or a list of any of these. Captions are
    stripped. Empty ones and None are dropped without a reason. A text that cannot be decoded is
    reported, never guessed.
    """
    captions, wrong = [], []
    for value in values:
        for entry in value if isinstance(value, list | tuple) else [value]:
            try:
                captions += _texts(entry)
            except UnicodeError:
                wrong.append("a caption that is not UTF-8: recode the file")
            except ValueError as error:
                wrong.append(str(error))
    return tuple(text.strip() for text in captions if text.strip()), wrong


def usable_captions(name: str, *values) -> tuple[str, ...]:
    """`read_captions`, or a `BadExample` called `name` if one is unusable or there is none."""
    captions, wrong = read_captions(*values)
    if wrong or not captions:
        raise BadExample(name, wrong[0] if wrong else "empty caption")
    return captions


def _texts(entry) -> list[str]:
    """The captions in one entry of a value; a ValueError says why there are none."""
    if isinstance(entry, dict):
        entry = next((entry[key] for key in TEXT_FIELDS if key in entry), entry)
    text = entry.decode(encoding(entry)) if isinstance(entry, bytes) else entry
    if text is None:
        return []
    if not isinstance(text, str):
        raise ValueError(f"a caption that is no text but {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"a caption of {len(text):,} characters")
    if "\0" in text:
        raise ValueError("a caption with NUL characters")
    if text.strip() in MISSING:
        raise ValueError(f"caption missing, written {text.strip()}")
    text.encode()  # Fails for lone surrogates, which stand for bytes that are not UTF-8.
    if not LIST.fullmatch(text):
        return [text]
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("a caption that looks like a list but is no JSON") from error
    if not all(isinstance(caption, str) for caption in listed):
        raise ValueError("a caption that is a list of other things than text")
    return listed


def choose_keys(
    where: str,
    what: str,
    wanted: str,
    keys: Iterable[str],
    problems: Problems,
    usual: Sequence[str] = (),
) -> list[str]:
    """The keys of the image or the captions: `wanted`, or else the first usual one in `keys`.

    what: such as "column image". usual: by default those of `USUAL_KEYS`. Keys are compared without
    case, unless several differ in case only. Without a usual key, captions may have numbered ones
    (caption_0, caption_1, ...), which are returned by number. A note names other keys that were
    possible. A `UserError` says that no key fits, or that several have the same name.
    """
    keys, (kind, role) = list(keys), what.rsplit(" ", 1)
    usual = usual or USUAL_KEYS[role]
    numbered = {key: NUMBERED.fullmatch(key) for key in keys if role == "caption"}
    numbered = {key: (int(match[1]), key) for key, match in numbered.items() if match}
    for name in (wanted,) if wanted else usual:
        found = [key for key in keys if key.casefold() == name.casefold()]
        found = [wanted] * found.count(wanted) or found
        if len(found) > 1:
            raise UserError(f"{where} has several {kind}s {name}: rename all but the one meant.")
        if found:
            able = {*usual, *numbered}
            others = [key for key in keys if {key, key.casefold()} & able and key != found[0]]
            if others and not wanted:
                problems.note(f"{role}: {kind} {found[0]} taken, {some(others)} left out")
            return found
    if numbered and not wanted:
        return sorted(numbered, key=numbered.__getitem__)
    present = shorten(some(keys), 120) or "other content"
    raise UserError(
        f"{where} has no {what} named {wanted or some(usual)}, only {present}: rename the one "
        f"meant, or set {role}_key."
    )


def optional_key(keys: Iterable[str], usual: Sequence[str] = NAME_KEYS) -> str:
    """The first usual key in `keys`, compared without case; '' if there is none or it is double."""
    keys = list(keys)
    once = {key.casefold(): key for key in keys if keys.count(key) == 1}
    return next((once[name] for name in usual if name in once), "")


def group(owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): the rows of owner i are `order[starts[i] : starts[i + 1]]`, ascending.

    owners: int [N], the owner of each row, 0 to max.
    """
    order = np.argsort(owners, kind="stable")
    return order, np.searchsorted(owners[order], np.arange(owners.max(initial=-1) + 2))


def fingerprint(pair: dict) -> bytes:
    """The SHA-256 of the image and the captions of an example, wherever it is stored."""
    image = pair["image"]
    content = hashlib.sha256(image if isinstance(image, bytes) else image.tobytes())
    # No caption contains a NUL.
    content.update("\0".join(pair["captions"]).encode(errors="surrogatepass"))
    return content.digest()


def spread(count: int, most: int) -> list[int]:
    """Up to `most` indices spread evenly over range(count), its first and last included."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()


def no_pairs(path: str, problems: Problems) -> UserError:
    """The error about data without a single usable example."""
    return UserError(f"{path} holds no usable pair of image and caption. {problems}.")
