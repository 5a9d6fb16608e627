"""The classes of every test set: their names in label_sets/*.txt, and their names in prompts.

A line of such a file is `name` or `name: prompt name, prompt name, ...`. Lines are in the order of
the labels, without background. The reported numbers depend on the spelling of the first name, so it
is the spelling of the authors' evaluation.
"""

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from simseg_jax.data.shapes import CATEGORIES
from simseg_jax.runtime.errors import UserError


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


def label_set(name: str) -> tuple[str, ...]:
    """The class names of a label set, such as coco, in label order without background."""
    return tuple(first for first, _ in read_label_set(name))


def class_names(data: str) -> tuple[str, ...]:
    """The names of the labels 0..C-1 of a test set; "background" comes first if it is a label."""
    labels = TEST_SETS[data]
    return ("background",) * labels.background + label_set(labels.label_set)


def prompt_names(data: str, names: str = "original") -> tuple[tuple[str, ...], ...]:
    """The names for the prompts of every label of a test set.

    names: original (the first name of each line), synonyms (the names after the colon, if any) or
    the path of a text file with one line per class, which is read like synonyms. A `UserError` says
    that this file is missing or has another number of classes.
    """
    name, background, _ = TEST_SETS[data]
    if names == "original":
        classes = [(first,) for first in label_set(name)]
    elif names == "synonyms":
        classes = [prompts for _, prompts in read_label_set(name)]
    else:
        classes = [prompts for _, prompts in read_label_file(names, "original, synonyms")]
        if len(classes) != len(label_set(name)):
            raise UserError(
                f"{names} names {len(classes)} classes, but {data} has {len(label_set(name))}: "
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
    return _parse(path.read_text(encoding="utf-8"))


def read_label_set(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """(name, prompt names) of every class of a label set."""
    if name == "shapes":
        return [(category, (category,)) for category in CATEGORIES]
    file = resources.files("simseg_jax.data.testsets") / "label_sets" / f"{name}.txt"
    return _parse(file.read_text(encoding="utf-8"))


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
