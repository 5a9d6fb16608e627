"""The result of segmenting one image, and its forms: overlay, PNG files, COCO's annotations."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from simseg_jax.data.images import Picture, decode_image
from simseg_jax.reports.visualize import index_png, labels_in, legend, overlaid
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.files import appearing

MASK, OVERLAY = "_mask.png", "_overlay.png"
# Metadata that marks our own results: they are left out when folders are searched again.
SOFTWARE = ("Software", "simseg_jax.segment")


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """The result for one image.

    mask: [H, W] at the size of the upright image, uint8, or uint16 for more than 255 words.
    labels: the name of every value in the mask: "background", which is none of the words, then the
    words in their order. drawn: the words above the threshold; with the standard protocol the words
    in the mask. scores: image-text score of every word and contrast word. threshold: of the scores;
    None with the standard protocol. similarity: of every word and contrast word a float32 map
    [h, w], its cosine with every patch (with the standard protocol at every 16th pixel); empty if
    the segmenter makes none. picture: what was segmented. name: of the picture, in messages.
    """

    mask: np.ndarray
    labels: tuple[str, ...]
    drawn: tuple[str, ...]
    scores: dict[str, float]
    threshold: float | None
    similarity: dict[str, np.ndarray]
    picture: Picture = dataclasses.field(repr=False)
    name: str

    @property
    def image(self) -> Image.Image:
        """The upright RGB image, decoded anew: an answer does not keep pixels in memory.

        A `UserError` refuses a file that has changed its size since.
        """
        image = decode_image(self.picture, self.name)
        if (image.height, image.width) != self.mask.shape:
            raise UserError(f"{self.name} was changed after it was segmented.")
        return image

    def record(self) -> dict[str, Any]:
        """What JSON holds of the result: drawn, threshold, scores."""
        return {"drawn": self.drawn, "threshold": self.threshold, "scores": self.scores}

    def overlay(self) -> Image.Image:
        """The image with the mask's colours, above a legend with scores."""
        shown = [
            (label, f"{self.labels[label]} {self.scores[self.labels[label]]:.2f}")
            for label in labels_in(self.mask)
            if label
        ]
        image = self.image
        strip = legend(shown or [(0, "none of the words")], max(image.width, 160))
        return overlaid(image, self.mask, strip)

    def show(self) -> None:
        """Shows the overlay: in a notebook below the cell, elsewhere in an image viewer."""
        notebook = sys.modules.get("IPython")
        if notebook is not None and notebook.get_ipython():
            notebook.display.display(self.overlay())
        else:
            self.overlay().show()

    def save(self, stem: str | Path) -> tuple[Path, Path]:
        """Writes STEM_mask.png and STEM_overlay.png and returns their paths.

        The mask is a palette PNG whose values are positions in `labels`, or 16-bit grey for more
        than 255 words. The folder is made.
        """
        stem = Path(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = stem.with_name(f"{stem.name}{MASK}"), stem.with_name(f"{stem.name}{OVERLAY}")
        for path, image in zip(paths, (index_png(self.mask), self.overlay()), strict=True):
            with appearing(path) as partial:
                _write(image, partial)
        return paths

    def mask_png(self) -> bytes:
        """The content of the file STEM_mask.png."""
        content = io.BytesIO()
        _write(index_png(self.mask), content)
        return content.getvalue()

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """One annotation of COCO's results format for every word in the mask.

        Each has image_id, category_id (the value in the mask), category, segmentation (COCO's
        compressed run lengths, a string), area, bbox (left, top, width, height), iscrowd and score.
        """
        from pycocotools import mask as coco

        annotations = []
        for label in filter(None, labels_in(self.mask)):
            runs: Any = coco.encode(np.asfortranarray(self.mask == label, dtype=np.uint8))
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": label,
                    "category": self.labels[label],
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                    "area": int(coco.area(runs)),
                    "bbox": coco.toBbox(runs).tolist(),
                    "iscrowd": 0,
                    "score": self.scores[self.labels[label]],
                }
            )
        return annotations


def _write(image: Image.Image, target) -> None:
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*SOFTWARE)
    image.save(target, "PNG", pnginfo=mark)
