"""A test set of the user's own: ROOT/images, ROOT/masks, and a list of its classes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from simseg_jax.data.testsets.classes import Classes
from simseg_jax.data.testsets.folders import (
    IGNORE,
    Layout,
    Masks,
    image_files,
    labels_of,
    read_list,
    read_png,
)
from simseg_jax.runtime.errors import UserError, require_file, some

ORIGIN = "root is a folder with images, masks and the list of classes"


def own(root: Path, split: str, classes: Classes) -> Layout:
    """The mask of images/NAME.jpg is masks/NAME.png or masks/NAME_L.png: one suffix for all.

    split: a folder images/SPLIT with masks/SPLIT, or a list SPLIT.txt; empty: all images.
    """
    images, masks = root / "images", root / "masks"
    listing = root / f"{split.removesuffix('.txt')}.txt"
    if split and listing.is_file() == (images / split).is_dir():
        which = "Both" if listing.is_file() else "Neither"
        raise UserError(
            f"{which} the list {listing} and the folder {images / split} exist: one of them is the "
            f"split {split!r}, and an empty split takes all images (split=)."
        )
    if split and not listing.is_file():
        images, masks = images / split, masks / split
    files = _by_stem(images)
    found = {path.relative_to(masks).as_posix() for path in image_files(_folder(masks))}
    suffix = _mask_suffix(files, sorted(found), masks)
    stems = {name: stem for stem, name in files.items()}
    listed = split and listing.is_file()
    names = _listed(listing, files, images) if listed else sorted(stems)
    bare = [name for name in names if f"{stems[name]}{suffix}" not in found]
    spare = [] if listed else sorted(found - {f"{stem}{suffix}" for stem in files})
    if bare or spare:
        raise UserError(
            f"{images} has {len(bare):,} images without a mask *{suffix} in {masks}{_those(bare)}, "
            f"and there are {len(spare):,} masks without an image{_those(spare)}: add what is "
            f"missing, or list the images that count in {root}/NAME.txt and set split=NAME."
        )
    layout = Layout(names, images, _masks(masks, suffix, stems, classes), ORIGIN, suffix="")
    _require_classes(layout, classes)
    return layout


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"There is no folder {path}: {ORIGIN}.")
    return path


def _those(names: list[str]) -> str:
    return f" ({some(names)})" if names else ""


def _by_stem(images: Path) -> dict[str, str]:
    """Path without suffix -> path, relative to the folder, of all images."""
    files: dict[str, str] = {}
    for path in image_files(_folder(images)):
        name = path.relative_to(images).as_posix()
        stem = name.removesuffix(path.suffix)
        if stem in files:
            raise UserError(
                f"{images} has {files[stem]} and {name}, which would share a mask: rename one."
            )
        files[stem] = name
    if not files:
        raise UserError(f"There are no images in {images}: {ORIGIN}.")
    return files


def _mask_suffix(stems: Mapping[str, str], masks: list[str], folder: Path) -> str:
    """What follows the names of images in those of their masks, such as _L.png."""
    counts = _suffixes(stems, masks)
    if not counts:
        example = f", such as {masks[0]}" if masks else ""
        raise UserError(
            f"No mask in {folder}{example}, begins with the name of an image, such as "
            f"{next(iter(stems))}: the mask of NAME.jpg is NAME.png, or NAME_L.png and the like."
        )
    [(suffix, count)] = counts.most_common(1)
    claimed = {f"{stem}{suffix}" for stem in stems}
    others = _suffixes(stems, [mask for mask in masks if mask not in claimed])
    # A few are masks of missing images: img10.png is no mask of img1.
    if others and 2 * others.most_common(1)[0][1] > count:
        [(other, number)] = others.most_common(1)
        raise UserError(
            f"{folder} has masks *{suffix} of {count:,} images and *{other} of {number:,}: give "
            "all masks one suffix, and keep other files elsewhere."
        )
    return suffix


def _suffixes(stems: Mapping[str, str], masks: Iterable[str]) -> Counter[str]:
    """Suffix -> number of images that have a mask with it."""
    return Counter(
        mask[end:] for mask in masks for end in range(1, len(mask)) if mask[:end] in stems
    )


def _listed(listing: Path, files: Mapping[str, str], images: Path) -> list[str]:
    known = {*files, *files.values()}
    names = read_list(listing, "", known)
    lost = [name for name in names if name not in known]
    if lost:
        raise UserError(
            f"The list {listing} has {len(lost):,} names of no image in {images}: {some(lost)}."
        )
    return [files.get(name, name) for name in names]


def _masks(folder: Path, suffix: str, stems: Mapping[str, str], classes: Classes) -> Masks:
    """stems: of the images, by their names."""
    table = np.full(max(classes.values) + 1, -1, np.int16)
    table[list(classes.values)] = list(classes.values.values())
    advice = f"give it a line in {classes.file}, or correct the mask"
    if not classes.colours:
        known = sorted(value for value, label in classes.values.items() if label != IGNORE)
        advice = f"{classes.file} has classes for {some(known)}; {advice}"

    def labels(name: str) -> np.ndarray:
        path = require_file(folder / f"{stems[name]}{suffix}", "the mask", ORIGIN)
        rgb = f"for colours, begin every line of {classes.file} with r g b"
        values = read_png(path, classes.colours, rgb)
        return labels_of(values, table, path, advice, _colour if classes.colours else str)

    return Masks(labels, lambda name: (folder / f"{stems[name]}{suffix}", classes.file))


def _colour(value: int) -> str:
    return " ".join(map(str, int(value).to_bytes(3, "big")))


def _require_classes(layout: Layout, classes: Classes) -> None:
    """Refuses masks in which all that is not ignored is one class. It usually reads a few masks.

    Masks with 0 and 255 are the reason: there, 255 is likely to be a class.
    """
    seen: set[int] = set()
    for name in layout.names:
        seen.update(np.unique(layout.masks.labels(name)).tolist())
        if len(seen - {IGNORE}) > 1:
            return
    if IGNORE in seen and len(seen) == 2:
        only = min(seen)
        shown = "background" if only == 0 else classes.names[only - 1][0]
        ignored = [value for value, label in classes.values.items() if label == IGNORE]
        values = some(map(_colour if classes.colours else str, ignored))
        raise UserError(
            f"Every pixel of the masks is {shown} or ignored ({values}), so nothing else would be "
            f"evaluated. If an ignored value is a class, as in masks of 0 and 255, begin the lines "
            f"of {classes.file} with values (`0 background`, `255 horse`) and set ignore to "
            "nothing (ignore=)."
        )
