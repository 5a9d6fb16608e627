"""PASCAL Context: 59 classes on images of VOC 2010, with annotations in one of three layouts."""

import json
from pathlib import Path

import numpy as np
import scipy.io

from simseg_jax.data.testsets.classes import label_set
from simseg_jax.data.testsets.folders import (
    Layout,
    Masks,
    find_folder,
    labels_of,
    numbered,
    png_masks,
    read_list,
)
from simseg_jax.runtime.errors import UserError, reading, require_file

ORIGIN = (
    "unpack VOCtrainval_03-May-2010.tar from host.robots.ox.ac.uk/pascal/VOC/voc2010, in its "
    "folder VOC2010 unpack trainval.tar.gz from cs.stanford.edu/~roozbeh/pascal-context, and set "
    "root to VOC2010"
)

MAX_PIXELS = 1 << 26  # A larger mask is a mistake in the annotations.

# Category ids of the 59 classes among the 459 annotated ones, in label order (alphabetical).
# fmt: off
CATEGORY_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on


def context(root: Path, split: str) -> Layout:
    """PASCAL Context as mmsegmentation converts it, as trainval_merged.json or as *.mat files.

    ImageSets/SegmentationContext/SPLIT.txt lists the images of a split. Without that list, the JSON
    file has its own splits, and for the other layouts the list of VOC 2010 in ImageSets/Main is
    used: all of its train and val images are annotated.
    """
    parts = ("JPEGImages", "VOC2010/JPEGImages", "VOCdevkit/VOC2010/JPEGImages")
    images = find_folder(root, parts, "PASCAL Context folder", ORIGIN)
    root = images.parent
    converted, annotations = root / "SegmentationClassContext", root / "trainval_merged.json"
    if converted.is_dir():
        names = _listed(root, split, ("SegmentationContext", "Main"))
        found = png_masks(converted, ".png", {0: 0} | numbered(range(1, 60)), ORIGIN)
    elif annotations.is_file():
        masks = _read_json(annotations)
        names = _listed(root, split, ("SegmentationContext",))
        names = names or sorted(name for name, mask in masks.items() if mask["phase"] == split)
        found = _json_masks(annotations, masks)
    elif (root / "trainval").is_dir():
        names = _listed(root, split, ("SegmentationContext", "Main"))
        found = _mat_masks(root)
    else:
        raise UserError(
            f"No annotations of PASCAL Context in {root}: looked there for "
            f"SegmentationClassContext, trainval_merged.json and trainval; {ORIGIN}."
        )
    if not names:
        raise UserError(
            f"No list of the images of PASCAL Context's {split!r}: no file {split}.txt in "
            f"{root / 'ImageSets' / 'SegmentationContext'} or in ImageSets/Main; {ORIGIN}."
        )
    return Layout(names, images, found, ORIGIN)


def _listed(root: Path, split: str, folders: tuple[str, ...]) -> list[str]:
    """The names in the first of the split's lists that exists; none if none exists."""
    for folder in folders:
        listing = root / "ImageSets" / folder / f"{split}.txt"
        if listing.is_file():
            return read_list(listing, ".jpg")
    return []


def decode_rle(rle: dict) -> np.ndarray:
    """COCO's run-length encoding {"size": [H, W], "counts": str or list} -> bool [H, W].

    Runs of background and object alternate, column by column. In a string a run length is written
    as characters with five bits each, lowest bits first; the sixth bit is set on all but the last
    character. From the fourth run on, the difference to the run before the previous one is written.
    A ValueError says that the runs do not fill the mask or are not run lengths.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = _run_lengths(counts)
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError("the run lengths do not fill the mask")
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return runs.reshape(width, height).T


def _run_lengths(text: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        code -= 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:  # The sign bit of the last character.
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts


def _read_json(path: Path) -> dict[str, dict]:
    """Image name -> name, phase (train or val), size (height, width), segments in drawing order."""
    try:
        content = json.loads(path.read_bytes())
        masks = {}
        for image in content["images"]:
            size = int(image["height"]), int(image["width"])
            if not 0 < size[0] * size[1] <= MAX_PIXELS:
                raise ValueError(f"an image of {size[1]} x {size[0]} pixels")
            masks[image["image_id"]] = {
                "name": Path(image["file_name"]).stem,
                "phase": image["phase"],
                "size": size,
                "segments": [],
            }
        for segment in content["annos_segmentation"]:
            mask = masks[segment["image_id"]]
            mask["segments"].append((segment["category_id"], segment["segmentation"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Cannot read {path}: {error!r}; download the trainval_merged.json of the PASCAL in "
            "Detail challenge again."
        ) from error
    return {mask["name"]: mask for mask in masks.values()}


def _json_masks(path: Path, masks: dict[str, dict]) -> Masks:
    classes = numbered(CATEGORY_IDS)

    def labels(name: str) -> np.ndarray:
        if name not in masks:
            raise UserError(f"{path} has no annotation of the image {name}.")
        mask = np.zeros(masks[name]["size"], np.uint8)
        for category, rle in masks[name]["segments"]:
            try:
                mask[decode_rle(rle)] = classes.get(category, 0)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise UserError(
                    f"{path}: a segment of {name} is not a run-length encoded mask: {error}."
                ) from error
        return mask

    return Masks(labels, lambda _: (path,))


def _mat_masks(root: Path) -> Masks:
    """Reads trainval/NAME.mat, whose LabelMap has the ids that labels.txt lists with names."""
    listing = root / "labels.txt"
    listing = listing if listing.is_file() else root / "trainval" / "labels.txt"
    with reading(f"the list of classes {listing}", "It must be the list of 459."):
        lines = require_file(listing, "the list of classes", ORIGIN).read_text(encoding="utf-8")
        pairs = [line.split(":") for line in lines.splitlines() if ":" in line]
        # This list writes some names with spaces, the evaluation writes them without.
        ids = {name.replace(" ", ""): int(number) for number, name in pairs}
        table = np.zeros(np.uint16(max(ids.values(), default=0)) + 1, np.int16)
    lost = [name for name in label_set("context") if name not in ids]
    if lost:
        raise UserError(
            f"{listing} does not name the class {lost[0]!r}: it must be the list of 459."
        )
    for label, name in enumerate(label_set("context"), start=1):
        table[ids[name]] = label

    def labels(name: str) -> np.ndarray:
        path = require_file(root / "trainval" / f"{name}.mat", "the mask", ORIGIN)
        with reading(f"the mask {path}", "Unpack it again."):
            found = scipy.io.loadmat(path, variable_names=["LabelMap"])["LabelMap"]
            return labels_of(found.astype(np.int32), table, path)

    return Masks(labels, lambda name: (root / "trainval" / f"{name}.mat", listing))
