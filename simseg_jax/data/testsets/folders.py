"""The files of the segmentation test sets, and the meaning of the values in their masks.

The function of a test set takes (root, split) and returns a `Layout`. A `UserError` says which file
is missing, where it should be and how to get it. PASCAL Context has its own module.
"""

import collections
import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simseg_jax.data.images import IMAGE_SUFFIXES, open_image
from simseg_jax.runtime.errors import UserError, reading, require_file, some
from simseg_jax.runtime.remote import is_hidden

IGNORE = 255

VOC_ORIGIN = (
    "unpack VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012 and set root "
    "to its folder VOC2012"
)
COCO_ORIGIN = (
    "unpack val2017.zip from images.cocodataset.org/zips into ROOT/images and "
    "stuffthingmaps_trainval2017.zip from github.com/nightrome/cocostuff into ROOT/annotations"
)
ADE20K_ORIGIN = (
    "unpack ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge and set root to "
    "its folder"
)
CITYSCAPES_ORIGIN = (
    "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com "
    "into one folder and set root to it"
)

# Values in stuffthingmaps: COCO's category ids minus 1. Ten of the ids 1..90 are not used.
COCO_THINGS = [i for i in range(90) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82)]
COCO_STUFF = range(91, 182)
RAW, GROUPVIT, CONVERTED = ".png", "_instanceTrainIds.png", "_labelTrainIds.png"
# Cityscapes: the values in labelIds of the 19 evaluated classes, in the order of trainIds.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Masks(NamedTuple):
    """The masks of a split, by the names of their images.

    labels: name -> uint8 [H, W] with 0 for "no class", k for the k-th class and 255 for "ignore".
    files: name -> the files from which these labels are read.
    """

    labels: Callable[[str], np.ndarray]
    files: Callable[[str], tuple[Path, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of one split; the image NAME is the file images/NAMEsuffix.

    origin: how to get the files, the end of messages about missing ones. A `UserError` refuses
    names that occur twice.
    """

    names: Sequence[str]
    images: Path
    masks: Masks
    origin: str
    suffix: str = ".jpg"

    def __post_init__(self) -> None:
        counts = collections.Counter(self.names)
        double = [name for name, count in counts.items() if count > 1]
        if double:
            raise UserError(
                f"The list of images in {self.images} names {some(double)} more than once: every "
                "image counts once, so remove the repeated lines."
            )


def voc(root: Path, split: str) -> Layout:
    """PASCAL VOC 2012: values are labels, 255 is void."""
    parts = ("JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages")
    images = find_folder(root, parts, "VOC folder", VOC_ORIGIN)
    listing = images.parent / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = read_list(require_file(listing, "the list of images", VOC_ORIGIN), ".jpg")
    values = numbered(range(1, 21)) | {0: 0, IGNORE: IGNORE}
    masks = png_masks(images.parent / "SegmentationClass", ".png", values, VOC_ORIGIN)
    return Layout(names, images, masks, VOC_ORIGIN)


def coco_object(root: Path, split: str) -> Layout:
    """The 80 things of COCO; stuff and unlabelled pixels have no class.

    Masks may be raw (stuffthingmaps), or converted for GroupViT (*_instanceTrainIds.png: 0 and
    1..80), by mmsegmentation (*_labelTrainIds.png: things 0..79, stuff 80..170) or by the authors
    of SimSeg (the same file name, but 0 and 1..80).
    """
    images, masks, names = _coco_files(root, split)
    suffix = _present(masks, names[0], (RAW, GROUPVIT, CONVERTED), COCO_ORIGIN)
    converted = {0: 0} | numbered(range(1, 81))
    if suffix == RAW:
        values = numbered(COCO_THINGS) | dict.fromkeys((*COCO_STUFF, IGNORE), 0)
    elif suffix == GROUPVIT:
        values = converted | {IGNORE: IGNORE}
    elif _has_stuff(masks, names):
        values = numbered(range(80)) | dict.fromkeys((*range(80, 171), IGNORE), 0)
    else:
        values = converted
    return Layout(names, images, png_masks(masks, suffix, values, COCO_ORIGIN), COCO_ORIGIN)


def coco_stuff(root: Path, split: str) -> Layout:
    """80 things and 91 stuff classes of COCO-Stuff 164k; 255 is unlabelled.

    Masks may be raw (stuffthingmaps) or converted by mmsegmentation (*_labelTrainIds.png).
    """
    images, masks, names = _coco_files(root, split)
    suffix = _present(masks, names[0], (RAW, CONVERTED), COCO_ORIGIN)
    classes = (*COCO_THINGS, *COCO_STUFF) if suffix == RAW else range(171)
    if suffix == CONVERTED and not _has_stuff(masks, names):
        raise UserError(
            f"The files *{suffix} in {masks} show no stuff: they were converted for coco_object, "
            "so put the raw masks of stuffthingmaps_trainval2017.zip beside them."
        )
    values = numbered(classes) | {IGNORE: IGNORE}
    return Layout(names, images, png_masks(masks, suffix, values, COCO_ORIGIN), COCO_ORIGIN)


def ade20k(root: Path, split: str) -> Layout:
    """The 150 classes of the ADE20K challenge 2016; 0 is every other object.

    255 is refused: it occurs in converted masks, whose labels are smaller by one.
    """
    folder = {"train": "training", "val": "validation"}.get(split, split)
    parts = (f"images/{folder}", f"ADEChallengeData2016/images/{folder}")
    images = find_folder(root, parts, "ADE20K images", ADE20K_ORIGIN)
    masks = images.parents[1] / "annotations" / folder
    found = png_masks(masks, ".png", {0: 0} | numbered(range(1, 151)), ADE20K_ORIGIN)
    return Layout(list_names(images, "*.jpg", ADE20K_ORIGIN), images, found, ADE20K_ORIGIN)


def cityscapes(root: Path, split: str) -> Layout:
    """The 19 evaluated classes of Cityscapes, in gtFine_labelTrainIds or raw gtFine_labelIds."""
    images = find_folder(root, (f"leftImg8bit/{split}",), "Cityscapes images", CITYSCAPES_ORIGIN)
    names = list_names(images, "*/*_leftImg8bit.png", CITYSCAPES_ORIGIN)
    masks = images.parents[1] / "gtFine" / split
    suffixes = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")
    suffix = _present(masks, names[0], suffixes, CITYSCAPES_ORIGIN)
    if suffix == "_gtFine_labelTrainIds.png":
        values = numbered(range(19)) | {IGNORE: IGNORE}
    else:
        values = dict.fromkeys((*range(34), IGNORE), IGNORE) | numbered(CITYSCAPES_IDS)
    found = png_masks(masks, suffix, values, CITYSCAPES_ORIGIN)
    return Layout(names, images, found, CITYSCAPES_ORIGIN, "_leftImg8bit.png")


def numbered(values: Iterable[int]) -> dict[int, int]:
    """The first value -> 1, the second -> 2 and so on."""
    return {value: label for label, value in enumerate(values, start=1)}


def png_masks(folder: Path, suffix: str, values: Mapping[int, int], origin: str) -> Masks:
    """The masks folder/NAMEsuffix; values: every allowed value -> its label."""
    table = np.full(256, -1, np.int16)
    table[list(values)] = list(values.values())

    def labels(name: str) -> np.ndarray:
        path = require_file(folder / f"{name}{suffix}", "the mask", origin)
        return labels_of(read_png(path), table, path)

    return Masks(labels, lambda name: (folder / f"{name}{suffix}",))


def labels_of(
    values: np.ndarray,
    table: np.ndarray,
    path: Path,
    advice: str = "it is another kind of mask, or was converted differently",
    shown: Callable[[int], str] = str,
) -> np.ndarray:
    """table[values] as uint8 [H, W]; a `UserError` counts and names values without a label.

    values: integers [H, W] of the mask `path`. table: labels, negative for a value without one.
    advice ends the message; shown(value) is the value in it.
    """
    inside = (values >= 0) & (values < len(table))
    labels = table[np.where(inside, values, 0)]
    wrong = ~inside | (labels < 0)
    if wrong.any():
        found = np.unique(values[wrong])
        which = "value {}, which does" if len(found) == 1 else "values {}, which do"
        raise UserError(
            f"The mask {path} has the {which.format(some(map(shown, found)))} not belong to this "
            f"test set, at {wrong.sum():,} pixels: {advice}."
        )
    return labels.astype(np.uint8)


def read_png(path: Path, colours: bool = False, advice: str = "") -> np.ndarray:
    """The values [H, W] of a grey or palette image: palette indices, not colours.

    colours: the colours r << 16 | g << 8 | b of an image of any kind, without its transparency.
    advice: ends the message about an image with colours instead of labels.
    """
    with reading(f"the mask {path}", "Unpack it again."), open_image(path) as opened:
        form = opened.format
        values = np.asarray(opened.convert("RGB") if colours else opened)
    if colours:
        values = values.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    if form in ("JPEG", "MPO"):
        raise UserError(f"The mask {path} is a JPEG file, which does not keep labels exactly.")
    if values.ndim != 2 or values.dtype.kind == "f":
        advice = f": {advice}" if advice else ""
        raise UserError(f"{path} is not a palette or grey mask with one label per pixel{advice}.")
    return values


def find_folder(root: Path, parts: Sequence[str], what: str, origin: str) -> Path:
    """The first of `parts` that is a folder under `root`."""
    for part in parts:
        if (root / part).is_dir():
            return root / part
    raise UserError(f"No {what} at {root}: looked there for {' and '.join(parts)}; {origin}.")


def read_list(path: Path, suffix: str, known: Container[str] = ()) -> list[str]:
    """The names in a list with one per line, in its order, without the suffix of their images.

    known: names that may have several words.
    """
    with reading(f"the list of images {path}", "It must be UTF-8 with one name per line."):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    names = [line.strip().removesuffix(suffix) for line in lines if line.strip()]
    columns = [name for name in names if len(name.split()) > 1 and name not in known]
    if columns:
        raise UserError(
            f"{path} has lines of several words, such as {columns[0]!r}: list one name per line "
            "and nothing else."
        )
    return names


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted; hidden ones do not count."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(map(is_hidden, path.relative_to(folder).parts))
        and not path.is_dir()
    ]


def list_names(folder: Path, pattern: str, origin: str) -> list[str]:
    """Sorted paths of the files that match, relative to `folder`, without the text after *."""
    suffix = pattern.rpartition("*")[2]
    paths = (path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    names = sorted(path.removesuffix(suffix) for path in paths)
    if not names:
        raise UserError(f"No images {pattern} in {folder}; {origin}.")
    return names


def _coco_files(root: Path, split: str) -> tuple[Path, Path, list[str]]:
    """(folder of the images, folder of the masks, names of the images)."""
    folder = f"{split}2017" if split in ("train", "val") else split
    parts = (f"images/{folder}", folder)
    images = find_folder(root, parts, "COCO images", COCO_ORIGIN)
    parts = (f"annotations/{folder}", f"stuffthingmaps/{folder}")
    masks = find_folder(root, parts, "COCO-Stuff masks", COCO_ORIGIN)
    return images, masks, list_names(images, "*.jpg", COCO_ORIGIN)


def _present(masks: Path, name: str, suffixes: Sequence[str], origin: str) -> str:
    """The first of `suffixes` for which the mask of `name` exists."""
    for suffix in suffixes:
        if (masks / f"{name}{suffix}").is_file():
            return suffix
    files = " or ".join(f"{name}{suffix}" for suffix in suffixes)
    raise UserError(
        f"The mask of the first image is missing: no file {files} in {masks}; {origin}."
    )


def _has_stuff(masks: Path, names: Sequence[str], count: int = 16) -> bool:
    """Whether *_labelTrainIds.png have mmsegmentation's values 0..170 and 255, not 0..80.

    Hardly any image shows things only, so the first few images suffice.
    """
    paths = [masks / f"{name}{CONVERTED}" for name in names[:count]]
    return any(read_png(path).max() > 80 for path in paths if path.is_file())
