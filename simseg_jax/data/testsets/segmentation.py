"""Segmentation test sets: images with a label per pixel.

A source has `__len__`, `names` (of its images, all different), `class_names`, `background`, and
`turned`: the files read so far whose masks were turned with their images on trust. Per index it has
{"name": str, "image": encoded bytes or uint8 array, "mask": uint8 [H, W] of the upright image} and
stamp(index), which changes with the files of image and mask. Labels are 0..C-1; 255 is "ignore". If
`background` is true, label 0 is the class "background". Otherwise every label is a real class, and
pixels without a class are 255.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from simseg_jax.data import shapes
from simseg_jax.data.images import read_header, turned
from simseg_jax.data.testsets import folders as layouts
from simseg_jax.data.testsets.classes import class_names, classes_of, label_set
from simseg_jax.data.testsets.own import own
from simseg_jax.data.testsets.pascal_context import context
from simseg_jax.runtime.errors import UserError, require_file
from simseg_jax.runtime.files import stamp

# Data key of a test set on disk -> the function of (root, split) that finds its files.
LAYOUTS = {
    "voc": layouts.voc,
    "voc20": layouts.voc,
    "context": context,
    "context59": context,
    "coco_object": layouts.coco_object,
    "coco_stuff": layouts.coco_stuff,
    "ade20k": layouts.ade20k,
    "cityscapes": layouts.cityscapes,
}

# Label, where 0 is "no class" -> label of a test set without background.
WITHOUT_BACKGROUND = np.array([layouts.IGNORE, *range(254), layouts.IGNORE], np.uint8)


def segmentation_source(settings):
    """The test set that an entry of `config.evals.seg` describes."""
    if settings.data == "shapes":
        return ShapesSegmentation(settings.size, settings.split)
    return SegmentationFolder(settings)


class ShapesSegmentation:
    """The generated scenes with their masks."""

    class_names = ("background", *label_set("shapes"))
    background = True
    turned: frozenset[str] = frozenset()

    def __init__(self, size: int, split: str):
        self.split = shapes.check_split(split)
        self.names = [f"{self.split}_{index:05d}" for index in range(size)]
        self.version = shapes.version()

    def __len__(self) -> int:
        return len(self.names)

    def stamp(self, _index: int) -> str:
        """The version of the code that draws the scenes."""
        return self.version

    def __getitem__(self, index: int) -> dict:
        image, mask, caption = shapes.scene(int(index), self.split)
        return {"name": self.names[index], "image": image, "mask": mask, "caption": caption}


class SegmentationFolder:
    """A test set on disk: settings.data is a key of LAYOUTS, or folder.

    A `UserError` names a file that is missing, cannot be read or does not fit.
    """

    def __init__(self, settings):
        classes, root = classes_of(settings), Path(settings.root).expanduser()
        self.class_names = class_names(settings)
        self.background = classes.background
        if settings.data == "folder":
            self.layout = own(root, settings.split, classes)
        else:
            self.layout = LAYOUTS[settings.data](root, settings.split)
        self.names = self.layout.names
        self.turned: set[str] = set()

    def __len__(self) -> int:
        return len(self.names)

    def stamp(self, index: int) -> str:
        """The stamps of the files of image and mask."""
        masks = self.layout.masks.files(self.names[index])
        files = [require_file(path, "the mask", self.layout.origin) for path in masks]
        return " ".join(map(stamp, (self._image(index), *files)))

    def __getitem__(self, index: int) -> dict:
        path = self._image(index)
        image = path.read_bytes()
        mask, trusted = upright_mask(self.layout.masks.labels(self.names[index]), image, path)
        if trusted:
            self.turned.add(path.name)
        if not self.background:
            mask = WITHOUT_BACKGROUND[mask]
        return {"name": Path(self.names[index]).name, "image": image, "mask": mask}

    def _image(self, index: int) -> Path:
        path = self.layout.images / f"{self.names[index]}{self.layout.suffix}"
        return require_file(path, "the image", self.layout.origin)


def upright_mask(mask: np.ndarray, image: bytes, path: Path) -> tuple[np.ndarray, bool]:
    """(upright mask uint8 [H, W] of an encoded image, whether it was turned on trust).

    A mask with the size of the stored image is turned like the image. A mask with the size of the
    upright image is upright already. If both sizes are equal, the mask is turned, trusting that it
    belongs to the stored pixels. A `UserError` refuses any other size. path: of the image.
    """
    try:
        width, height, stored = read_header(image)
    except Exception as error:  # PIL raises errors of many types for damaged files.
        raise UserError(f"{path} is damaged or not an image: unpack it again.") from error
    if mask.shape == (height, width):
        same = stored < 5 or width == height
        return np.asarray(turned(Image.fromarray(mask), stored)), stored > 1 and same
    if stored >= 5 and mask.shape == (width, height):
        return mask, False
    raise UserError(
        f"The mask of {path} has {mask.shape[1]} x {mask.shape[0]} pixels, but the image has "
        f"{width} x {height}{' before it is turned upright' if stored >= 5 else ''}: one of them "
        "was resized, or they do not belong together."
    )
