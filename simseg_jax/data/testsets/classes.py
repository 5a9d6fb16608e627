"""The classes of every test set: names in label_sets/*.txt, and the names put into prompts.

A line of such a file is `name` or `name: prompt name, prompt name, ...`, in the order of the
labels and without background. The first name is spelled as the authors' evaluation spells it,
which the reported numbers depend on.
"""

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from simseg_jax.data.shapes import CATEGORIES
from simseg_jax.runtime.errors import UserError


class Labels(NamedTuple):
    """The labels of a test set.

    background: whether label 0 is a class "background". top_k: how many class scores set the
    threshold of the paper protocol.
    """

    label_set: str
    background: bool
    top_k: int


# By the data key. The authors take 10 scores on VOC and COCO-Object, where few objects stand before
# a background, and 30 on Context, where every pixel has a class; the others go by what they show.
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
    """Names of the classes of a label set, such as coco, in label order without background."""
    return tuple(first for first, _ in _read(name))


def class_names(data: str) -> tuple[str, ...]:
    """Names of the labels 0..C-1 of a test set; "background" first where it is one of them."""
    labels = TEST_SETS[data]
    return ("background",) * labels.background + label_set(labels.label_set)


def prompt_names(data: str, names: str = "original") -> tuple[tuple[str, ...], ...]:
    """For every label of a test set the names to put into prompts.

    names: original (the first name of each line), synonyms (those after the colon where there are
    some) or the path of a text file of your own with one line per class, read like synonyms.
    Raises a `UserError` if that file is missing or has another number of classes.
    """
    name, background, _ = TEST_SETS[data]
    if names == "original":
        classes = [(first,) for first in label_set(name)]
    elif names == "synonyms":
        classes = [prompts for _, prompts in _read(name)]
    else:
        classes = _read_file(Path(names).expanduser(), data, len(label_set(name)))
    return (("background",),) * background + tuple(classes)


def read_label_file(source: str | Path) -> list[tuple[str, tuple[str, ...]]]:
    """(name, prompt names) of every line of a label set of ours or of a file of the user."""
    if isinstance(source, str):
        return _read(source)
    if not source.is_file():
        raise UserError(f"There is no file of class names at {source}.")
    return _parse(source.read_text(encoding="utf-8"))


def _read(name: str) -> list[tuple[str, tuple[str, ...]]]:
    if name == "shapes":
        return [(category, (category,)) for category in CATEGORIES]
    file = resources.files("simseg_jax.data.testsets") / "label_sets" / f"{name}.txt"
    return _parse(file.read_text(encoding="utf-8"))


def _read_file(path: Path, data: str, count: int) -> list[tuple[str, ...]]:
    if not path.is_file():
        raise UserError(f"names must be original, synonyms or a text file, but {path} is no file.")
    classes = [prompts for _, prompts in _parse(path.read_text(encoding="utf-8"))]
    if len(classes) != count:
        raise UserError(
            f"{path} names {len(classes)} classes, but {data} has {count}: write one line per "
            "class, `name` or `name: synonym, synonym`, without background."
        )
    return classes


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
