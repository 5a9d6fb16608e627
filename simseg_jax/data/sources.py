"""Random-access sources of training pairs and of segmentation benchmarks.

A training source returns {"image": encoded bytes or uint8 array, "captions": tuple of str}; a
segmentation source {"name": str, "image": same, "mask": uint8 [H, W]} with 255 for "ignore".
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from simseg_jax.data import shapes
from simseg_jax.data.classes import SHAPES, VOC
from simseg_jax.data.shapes import ShapesSource
from simseg_jax.errors import UserError


def training_source(data):
    """The source that `config.data` describes."""
    if data.source == "shapes":
        return ShapesSource(data.size, data.split)
    return CaptionFolder(data.root, data.images, data.captions, data.split)


def segmentation_source(settings):
    """The benchmark that an entry of `config.evals.seg` describes."""
    if settings.data == "shapes":
        return ShapesSegmentation(settings.size, settings.split)
    return VOCSegmentation(settings.root, settings.split)


def segmentation_classes(settings) -> tuple[str, ...]:
    """Class names of that benchmark, background first; needs none of its files."""
    return (ShapesSegmentation if settings.data == "shapes" else VOCSegmentation).class_names


class CaptionFolder:
    """A folder of images and a CSV with a header `image,caption`: one row per caption.

    One example is one image with all its captions. `split` names a text file that lists the images
    to use, one per line.
    """

    def __init__(self, root: str, images: str, captions: str, split: str):
        self.folder = Path(root).expanduser() / images
        table = require_file(Path(root).expanduser() / captions, "the caption table")
        by_image: dict[str, list[str]] = {}
        with table.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"image", "caption"} <= set(rows.fieldnames or ()):
                raise UserError(f"{table} must start with the header line `image,caption`.")
            for row in rows:
                if row["caption"] and row["caption"].strip():
                    by_image.setdefault(row["image"], []).append(row["caption"].strip())
        names = list(by_image)
        if split:
            listing = require_file(Path(root).expanduser() / split, "data.split")
            names = listing.read_text(encoding="utf-8").split("\n")
            names = [name.strip() for name in names if name.strip()]
            lost = [name for name in names if name not in by_image]
            if lost:
                raise UserError(
                    f"{listing} lists {len(lost)} images without a caption in {table}, "
                    f"the first is {lost[0]!r}."
                )
        if not names:
            raise UserError(f"{table} holds no captions to train on.")
        require_file(self.folder / names[0], "the first training image")
        self.examples = [(name, tuple(by_image[name])) for name in names]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        name, captions = self.examples[index]
        path = require_file(self.folder / name, "a training image")
        return {"image": path.read_bytes(), "captions": captions, "name": str(path)}


class ShapesSegmentation:
    """Generated scenes with their masks."""

    class_names = SHAPES

    def __init__(self, size: int, split: str):
        self.size, self.split = size, shapes.check_split(split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        image, mask, caption = shapes.scene(int(index), self.split)
        name = f"{self.split}_{index:05d}"
        return {"name": name, "image": image, "mask": mask, "caption": caption}


class VOCSegmentation:
    """PASCAL VOC in its official layout: 20 classes and background, 255 is void."""

    class_names = VOC

    def __init__(self, root: str, split: str):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(
                f"No VOC folder at {self.root}: set root to the folder VOC2012 of the archive "
                "VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012)."
            )
        listing = require_file(
            self.root / "ImageSets" / "Segmentation" / f"{split}.txt", "the list of images"
        )
        self.names = listing.read_text(encoding="utf-8").split()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        image = require_file(self.root / "JPEGImages" / f"{name}.jpg", "the image")
        mask = require_file(self.root / "SegmentationClass" / f"{name}.png", "the mask")
        # The palette index is the label: no conversion to colours.
        with Image.open(mask) as png:
            labels = np.asarray(png)
        if labels.ndim != 2:
            raise UserError(f"{mask} is not a palette or grey mask with one label per pixel.")
        return {"name": name, "image": image.read_bytes(), "mask": labels.astype(np.uint8)}


def require_file(path: Path, what: str) -> Path:
    """`path` if it is a file, else a `UserError` that says what was looked for and where."""
    if not path.is_file():
        raise UserError(f"{what[0].upper()}{what[1:]} is missing: no file {path}.")
    return path
