"""Pictures of results: palette masks, overlays, legends, similarity maps, contact sheets."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simseg_jax.data.images import decode_image, strips
from simseg_jax.zeroshot.paper import Response

CELL = 128  # Side in pixels of a picture on a contact sheet.
TEXT_HEIGHT = 15
# From dark blue to yellow with increasing lightness, which is readable without colour vision.
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def palette(count: int = 256) -> np.ndarray:
    """The PASCAL VOC colour of every label: uint8 [count, 3]; 0 is black."""
    colours = np.zeros((count, 3), np.uint8)
    labels = np.arange(count)
    for bit in range(8):
        for channel in range(3):
            value = ((labels >> (3 * bit + channel)) & 1) << (7 - bit)
            colours[:, channel] |= value.astype(np.uint8)
    return colours


def index_png(mask: np.ndarray) -> Image.Image:
    """An image whose pixels are the labels [H, W]: with palette, or 16-bit grey for uint16."""
    if mask.dtype == np.uint16:
        return Image.fromarray(mask)
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette().tobytes())
    return image


def overlay(image: np.ndarray, mask: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """uint8 [H, W, 3] blended with the colours of the labels; label 0 keeps the image."""
    colours = palette(int(mask.max()) + 1)
    blended = (1 - strength) * image + strength * colours[mask]
    return np.where(mask[:, :, None] > 0, blended, image).astype(np.uint8)


def overlaid(image: Image.Image, mask: np.ndarray, below: Image.Image) -> Image.Image:
    """The `overlay` of an RGB image and its mask, above another image, both at the left on white.

    It is made in strips, so that a large image needs little memory besides image and result.
    """
    sheet = Image.new("RGB", (max(image.width, below.width), image.height + below.height), "white")
    for rows in strips(*mask.shape):
        part = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
        sheet.paste(Image.fromarray(overlay(part, mask[rows])), (0, rows.start))
    sheet.paste(below, (0, image.height))
    return sheet


def labels_in(mask: np.ndarray) -> list[int]:
    """The labels in an index mask, sorted."""
    return sorted(
        {label for rows in strips(*mask.shape) for label in np.unique(mask[rows]).tolist()}
    )


def heat_map(values: np.ndarray) -> np.ndarray:
    """float [h, w] -> uint8 [h, w, 3]; the smallest value is dark blue, the largest yellow."""
    spread = float(np.ptp(values))
    unit = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    anchors = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(unit, anchors, [colour[i] for colour in HEAT]) for i in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def legend(labels: Sequence[tuple[int, str]], width: int) -> Image.Image:
    """An image `width` pixels wide with a colour square and a name for every (label, name)."""
    size = 18
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, y = [], 4, 4
    for label, name in labels:
        extent = size + round(measure.textlength(name, font=font())) + 12
        if x > 4 and x + extent > width:
            x, y = 4, y + size
        places.append((x, y, label, name))
        x += extent
    strip = Image.new("RGB", (width, y + size + 2), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, label, name in places:
        colour = tuple(int(c) for c in palette(label + 1)[label])
        draw.rectangle((x, y + 1, x + 11, y + 12), fill=colour, outline="black")
        draw.text((x + size - 2, y), name, fill="black", font=font())
    return strip


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Images one below the other, at the left on white."""
    width, height = max(i.width for i in images), sum(i.height for i in images)
    sheet = Image.new("RGB", (width, height), "white")
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height
    return sheet


def write_contact_sheet(path: Path, evaluator, params, indices: Sequence[int]) -> None:
    """Writes a PNG with one row per image of a segmentation test set.

    A row shows the image, the prediction and the ground truth under the caption or name. With the
    paper protocol it also shows s^I2I (similarity of patches and the image's own embedding), and
    s^T2I (of patches and class embedding) with the score of the best classes; * marks those above
    the threshold. All processes must call this together.
    """
    rows, shown = [], set()
    for example, (labels, *_), response in evaluator.predictions(params, indices):
        rows.append(_row(example, labels, response, evaluator.class_names))
        shown |= set(np.unique(labels)) | set(np.unique(example["mask"])) - {0, 255}
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        names = [(label, evaluator.class_names[label]) for label in sorted(shown)]
        stack([*rows, legend(names, max(row.width for row in rows))]).save(path)


def _row(example: dict, labels: np.ndarray, response, names: Sequence[str]) -> Image.Image:
    truth = example["mask"]
    image = np.asarray(decode_image(example["image"], example["name"]))
    cells, title = [("image", image)], "prediction"
    if isinstance(response, Response):
        cells.append(("s^I2I", heat_map(np.asarray(response.self_similarity))))
        for place, label in enumerate(response.classes):
            mark = " *" if response.drawn[place] else ""
            name = f"{names[label]} {response.scores[label]:.2f}{mark}"
            cells.append((name, heat_map(np.asarray(response.similarity[place]))))
        title = f"prediction (> {response.threshold:.2f})"
    cells.append((title, overlay(image, labels, 0.75)))
    cells.append(("ground truth", overlay(image, np.where(truth == 255, 0, truth), 0.75)))
    row = Image.new("RGB", (len(cells) * (CELL + 4), CELL + 2 * TEXT_HEIGHT + 8), "white")
    draw = ImageDraw.Draw(row)
    draw.text((2, 2), example.get("caption", example["name"]), fill="black", font=font())
    for place, (title, picture) in enumerate(cells):
        x = place * (CELL + 4)
        draw.text((x + 2, 2 + TEXT_HEIGHT), title, fill="black", font=font(11))
        cell = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.NEAREST)
        row.paste(cell, (x, 4 + 2 * TEXT_HEIGHT))
    return row


def font(size: int = 12) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all labels, `size` pixels high."""
    return ImageFont.load_default(size)
