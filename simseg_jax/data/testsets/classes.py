"""The classes of every test set: their names in label_sets/*.txt, and their names in prompts.

The data key "folder" is a test set of the user's, whose own file names the classes, see `_own`.

A line of such a file is `name` or `name: prompt name, prompt name, ...`. Lines are in the order of
the labels, without background. The reported numbers depend on the spelling of the first name, so it
is the spelling of the authors' evaluation.
"""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from simseg_jax.data.shapes import CATEGORIES
from simseg_jax.data.testsets.folders import IGNORE
from simseg_jax.runtime.errors import UserError, reading, require_file, some


class Labels(NamedTuple):
    """The labels of a test set.

    background: whether label 0 is a class "background". top_k: the number of class scores from
    which the paper protocol computes its threshold.
    """

    label_set: str
    background: bool
    top_k: int


# By the data key. The authors use 10 scores on VOC and COCO-Object, where few objects stand before
# a background, and 30 on Context, where every pixel has a class. The others follow the same rule.
TEST_SETS = {
    "shapes": Labels("shapes", True, 10),
    "voc": Labels("voc", True, 10),
    "voc20": Labels("voc", False, 10),
    "context": Labels("context", True, 30),
    "context59": Labels("context", False, 30),
    "coco_object": Labels("coco", True, 10),
    "coco_stuff": Labels("coco_stuff", False, 30),
    "ade20k": Labels("ade20k", False, 30),
    "cityscapes": Labels("cityscapes", False, 30),
}


class Classes(NamedTuple):
    """The classes of a test set.

    names: (name, prompt names) of each, in label order without background. background, top_k: as in
    `Labels`. The rest is for "folder" only. values: value in a mask -> label, which is 0 for
    background, k for the k-th class and IGNORE for pixels that do not count. colours: whether these
    values are colours, r << 16 | g << 8 | b. file: the file with the classes.
    """

    names: list[tuple[str, tuple[str, ...]]]
    background: bool
    top_k: int
    values: Mapping[int, int] = {}
    colours: bool = False
    file: Path = Path()


def classes_of(settings) -> Classes:
    """The classes of an entry of `config.evals.seg`."""
    if settings.data == "folder":
        root, file = Path(settings.root).expanduser(), Path(settings.classes).expanduser()
        return _own(root / file, settings.ignore)
    name, background, top_k = TEST_SETS[settings.data]
    return Classes(read_label_set(name), background, top_k)


def label_set(name: str) -> tuple[str, ...]:
    """The class names of a label set, such as coco, in label order without background."""
    return tuple(first for first, _ in read_label_set(name))


def class_names(settings) -> tuple[str, ...]:
    """The names of the labels 0..C-1 of a test set; "background" comes first if it is a label."""
    classes = classes_of(settings)
    return ("background",) * classes.background + tuple(name for name, _ in classes.names)


def prompt_names(settings) -> tuple[tuple[str, ...], ...]:
    """The names for the prompts of every label of a test set (an entry of `config.evals.seg`).

    Its `names` is original (the first name of each line), synonyms (the names after the colon, if
    any) or the path of a text file with one line per class, which is read like synonyms. A
    `UserError` says that this file is missing or has another number of classes.
    """
    known, background, *_ = classes_of(settings)
    names = settings.names
    if names == "original":
        classes = [(first,) for first, _ in known]
    elif names == "synonyms":
        classes = [prompts for _, prompts in known]
    else:
        classes = [prompts for _, prompts in read_label_file(names, "original, synonyms")]
        if len(classes) != len(known):
            raise UserError(
                f"{names} names {len(classes)} classes, but {settings.data} has {len(known)}: "
                "write one line per class, `name` or `name: synonym, synonym`, without background."
            )
    return (("background",),) * background + tuple(classes)


def read_label_file(names: str, choices: str) -> list[tuple[str, tuple[str, ...]]]:
    """(name, prompt names) of every line of a user's text file.

    choices: the other values of the setting `names`, for the `UserError` about a missing file.
    """
    path = Path(names).expanduser()
    if not path.is_file():
        raise UserError(f"names must be {choices} or a text file, but {path} is no file.")
    return _parse(_text(path))


def read_label_set(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """(name, prompt names) of every class of a label set."""
    if name == "shapes":
        return [(category, (category,)) for category in CATEGORIES]
    file = resources.files("simseg_jax.data.testsets") / "label_sets" / f"{name}.txt"
    return _parse(file.read_text(encoding="utf-8"))


WRITE = "write one class per line there, or set root and classes"
# A class behind the value or the colour of its pixels.
VALUED = re.compile(r"(\d{1,5}|\d{1,3}\s+\d{1,3}\s+\d{1,3})\s+(?!\d+\s)(\S.*)")


def _own_lines(file: Path) -> list[tuple[list[int], str, tuple[str, ...]]]:
    """(0, 1 or 3 numbers, name, prompt names) of every line of a user's file, see `_own`."""
    rows = _text(require_file(file, "the list of classes", WRITE)).split("\n")
    rows = [row.strip() for row in rows if row.strip()]
    found = [VALUED.fullmatch(row) for row in rows]
    numbers = [[int(part) for part in match[1].split()] if match else [] for match in found]
    for row, values in zip(rows, numbers, strict=True):
        if len(values) != len(numbers[0]):
            raise UserError(
                f"The lines {rows[0]!r} and {row!r} of {file} differ: begin every line with the "
                "value of the class in masks, or every line with r g b, or none with a number."
            )
        if len(values) == 3 and max(values) > 255:
            raise UserError(f"The line {row!r} of {file} has a colour above 255.")
    texts = "\n".join(match[2] if match else row for match, row in zip(found, rows, strict=True))
    return [(n, *parsed) for n, parsed in zip(numbers, _parse(texts), strict=True)]


def _own(file: Path, ignore: str) -> Classes:
    """The classes in a user's file.

    Its lines are `name`, `value name` or `r g b name`, all alike, each perhaps with `: synonym,
    synonym`. Without values the first line has the value 0, the next one 1 and so on. With values,
    lines of one name are one class. ignore: values and names of classes that do not count.
    """
    lines = _own_lines(file)
    colours = any(len(numbers) == 3 for numbers, *_ in lines)
    names: dict[int, str] = {}
    prompts: dict[str, tuple[str, ...]] = {}
    for index, (numbers, name, words) in enumerate(lines):
        if name.casefold() == "background":
            if words != (name,):
                raise UserError(f"{file} has synonyms of background, which takes none.")
            name, words = "background", ("background",)
        value = int.from_bytes(bytes(numbers), "big") if colours else [*numbers, index][0]
        if value in names:
            raise UserError(f"{file} gives one value to {names[value]!r} and {name!r}.")
        if name in prompts and not numbers:
            raise UserError(
                f"{file} has two lines {name!r}: for one class with several values, begin every "
                "line with its value."
            )
        names[value] = name
        prompts[name] = tuple(dict.fromkeys((*prompts.get(name, ()), *words)))
    ignored = {word.strip() for word in ignore.split(",")} - {""}
    values = _ignored_values(ignored - set(prompts), names, colours, file)
    counted = [name for name in prompts if name not in ignored]
    classes = [name for name in counted if name != "background"]
    if len(counted) < 2 or len(classes) > 254:
        raise UserError(
            f"{file} has {len(counted)} classes that count: a test set has 2 to 254, background "
            "included."
        )
    labels = {"background": 0} | {name: label for label, name in enumerate(classes, start=1)}
    labels |= dict.fromkeys(ignored, IGNORE)
    background = "background" in counted
    return Classes(
        [(name, prompts[name]) for name in classes],
        background,
        10 if background else 30,
        values | {value: labels[name] for value, name in names.items()},
        colours,
        file,
    )


def _ignored_values(
    words: set[str], names: Mapping[int, str], colours: bool, file: Path
) -> dict[int, int]:
    """Value -> IGNORE, for `words` that name no class; names: of the classes, by value."""
    values = {}
    for word in sorted(words):
        if colours and word == str(IGNORE):
            continue  # The default, which fits no colour.
        if colours or not re.fullmatch(r"\d{1,5}", word):
            raise UserError(
                f"ignore has {word!r}, but {file} has only the classes "
                f"{some(dict.fromkeys(names.values()))}."
            )
        if int(word) in names:
            name = names[int(word)]
            raise UserError(
                f"The value {word} is {name!r} in {file}, but ignore has it, too: set ignore to "
                f"the other values (ignore= for none), or to {name} if that class must not count."
            )
        values[int(word)] = IGNORE
    return values


def _text(path: Path) -> str:
    with reading(f"the classes {path}", "Save it as UTF-8."):
        return path.read_text(encoding="utf-8-sig")


def _parse(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """(name, prompt names) of every line that is not blank."""
    classes = []
    for line in filter(str.strip, text.split("\n")):
        name, colon, rest = line.partition(":")
        if "," in name and not colon:
            raise UserError(
                f"The line {line.strip()!r} of class names has a comma but no colon: write "
                f"{name.split(',')[0].strip() + ': ' + name.strip()!r} for synonyms."
            )
        prompts = tuple(word.strip() for word in rest.split(",") if word.strip())
        classes.append((name.strip(), prompts or (name.strip(),)))
    return classes
