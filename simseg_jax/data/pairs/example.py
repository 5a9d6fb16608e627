"""What all sources share: bad examples, problems, the usual names of keys, clean captions."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from simseg_jax.errors import UserError

IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "imbytes", "bytes")
CAPTION_KEYS = ("captions", "caption", "captions/text", "text", "txt")
NAME_KEYS = ("name", "image/filename", "key", "__key__", "image_id", "id")
NAMED = 5  # Problems that are described; the others are only counted.


class BadExample(Exception):  # noqa: N818
    """One example cannot be used; the message names it and the reason."""

    def __init__(self, name: str, reason):
        super().__init__(name, reason)

    def __str__(self) -> str:
        return f"{self.args[0]}: {str(self.args[1]).rstrip('.')}."


@dataclass
class Problems:
    """Entries left out while indexing: how many, and the first few in words."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, description: str) -> None:
        """Counts one entry."""
        self.extend(Problems(1, [description]))

    def extend(self, other: "Problems") -> None:
        """Counts the entries of `other` after those of this one."""
        self.count += other.count
        self.first = (self.first + other.first)[:NAMED]

    def __str__(self) -> str:
        if not self.count:
            return "Nothing was left out"
        return f"Left out: {self.count}, first {'; '.join(self.first)}"


def clean_captions(value) -> tuple[str, ...]:
    """Stripped, non-empty captions of a str, bytes or a list of them; anything else has none.

    Bytes are UTF-8; those that are not are dropped.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = (text.decode(errors="ignore") if isinstance(text, bytes) else text for text in values)
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def choose_key(where: str, what: str, wanted: str, usual: Iterable[str], keys) -> str:
    """The key of the image or the captions: `wanted`, or else the first usual one in `keys`."""
    for key in (wanted,) if wanted else usual:
        if key in keys:
            return key
    names = wanted or " or ".join(usual)
    raise UserError(
        f"{where} has no {what} {names}: set {what.split()[-1]}_key to one of {', '.join(keys)}."
    )


def group(owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): the rows of owner i are `order[starts[i] : starts[i + 1]]`, as they came.

    owners: int [N], which of 0 .. max each row belongs to.
    """
    order = np.argsort(owners, kind="stable")
    return order, np.searchsorted(owners[order], np.arange(owners.max(initial=-1) + 2))


def no_pairs(path: str, problems: Problems) -> UserError:
    """The error about data without a single usable example."""
    return UserError(f"{path} holds no usable pair of image and caption. {problems}.")
