"""Random-access sources of training pairs: {"image": encoded bytes or uint8 array, "captions"}."""

import csv
from pathlib import Path

from simseg_jax.data.shapes import ShapesSource
from simseg_jax.errors import UserError


def training_source(data):
    """The source that `config.data` describes."""
    if data.source == "shapes":
        return ShapesSource(data.size, data.split)
    return CaptionFolder(data.root, data.images, data.captions, data.split)


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


def require_file(path: Path, what: str, advice: str = "") -> Path:
    """`path` if it is a file, else a `UserError` that says what was looked for and where.

    advice: how to get the file, the end of the message.
    """
    if not path.is_file():
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{what[0].upper()}{what[1:]} is missing: no file {path}{advice}.")
    return path
