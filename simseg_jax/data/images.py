"""Image files of any common format -> upright RGB images on the host.

An image is read as a viewer shows it: turned upright by its EXIF or XMP orientation, the first
frame of an animation, transparency on white. Grey of more than 8 bits is scaled, see `eight_bits`.
"""

import contextlib
import functools
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from simseg_jax.runtime.errors import UserError, one_line

# The formats that Pillow may open, with their suffixes. Pillow recognises them by content, not by
# name: without this list an EPS file named .png would start Ghostscript.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
IMAGE_SUFFIXES = {suffix for suffixes in FORMATS.values() for suffix in suffixes}
# EXIF orientation -> the operation that turns the image upright; orientation 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP = 1 << 20  # Pixels per strip of an image that would take too much memory as a whole.
Box = tuple[int, int, int, int]  # Left, top, width, height in pixels.
Encoded = bytes | Path  # The content of an image file, or its path.
Picture = Encoded | Image.Image | np.ndarray


def decode_image(
    image: Picture, name: str = "an image", max_pixels: int | None = None
) -> Image.Image:
    """An upright RGB image; a `UserError` names an image that cannot be decoded.

    image: encoded, opened by Pillow, or an array as `from_array` takes it. max_pixels: larger
    images are refused before they take memory; None: only Pillow's limit for bombs applies.
    """
    try:
        return decoded(image, max_pixels)
    except Exception as error:  # PIL's decoders raise errors of many kinds.
        advice = " Remove or replace this file." if isinstance(image, bytes | Path) else ""
        raise UserError(f"Cannot decode {name}: {one_line(error)}.{advice}") from error


def decoded(image: Picture, max_pixels: int | None) -> Image.Image:
    """As `decode_image`, but with the errors of Pillow, which may be of any type."""
    if isinstance(image, bytes | Path):
        with open_image(image, max_pixels) as opened:
            return decoded(opened, None)
    if not isinstance(image, Image.Image):
        image = from_array(image)
    check_pixels(image, max_pixels)
    rgb = to_rgb(image)  # Loads the pixels: a PNG may store its orientation behind them.
    return turned(rgb, orientation(image))


def from_array(array: np.ndarray) -> Image.Image:
    """A Pillow image from an array [H, W] or [H, W, C] of grey (C = 1), RGB or RGBA values.

    dtype: uint8, uint16 (loses its low byte), bool, float in [0, 1]. A ValueError refuses others.
    """
    kind, array = type(array).__name__, np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(
            f"{kind} of shape {array.shape} is not a path, the bytes of a file, a Pillow image or "
            "an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        )
    if array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError("an array of floats must have values from 0 to 1")
        array = array * 255 + 0.5
    elif array.dtype == np.uint16:
        array = array >> 8
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"an array of {array.dtype} is not uint8, uint16, bool or floats in [0, 1]"
        )
    return Image.fromarray(array.astype(np.uint8))


def open_image(image: Encoded, max_pixels: int | None = None) -> Image.Image:
    """Opens an image of one of FORMATS and reads its header only; close it, or use `with`.

    Raises a ValueError with the reason, or errors of any type from Pillow for damaged files.
    """
    if isinstance(image, Path) and not image.is_file():  # To open a pipe would block.
        raise ValueError("no file is there")
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    try:
        with _quiet():
            opened = Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        raise ValueError("no image in a known format") from error
    try:
        check_pixels(opened, max_pixels)
    except ValueError:
        opened.close()
        raise
    return opened


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)  # Not every Pillow has AVIF.


_quiet_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Pillow's warnings about damaged EXIF and about sizes, which are limited here."""
    # Filters are global: without a lock, threads could leave them changed.
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_pixels(image: Image.Image, max_pixels: int | None) -> None:
    """Raises a ValueError for an image without pixels or with more than `max_pixels`."""
    width, height = image.size
    if not width * height:
        raise ValueError(f"an image of {width}x{height} has no pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(f"{width}x{height} are more than max_pixels={max_pixels}")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, not turned; transparent parts become white."""
    if image.mode[0] in "IF":
        image = Image.fromarray(eight_bits(image))
    elif image.has_transparency_data:
        # Pillow converts premultiplied grey (La) to LA only.
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(image: Image.Image) -> np.ndarray:
    """Grey of 16 bits, 32 bits or floats (modes I;16, I, F) -> uint8 [H, W].

    White is the first of 1 (for floats only), 255 and 65,535 that no value exceeds, else the
    largest value. 16-bit values lose their low byte, as in 16-bit colour. A ValueError refuses
    negative, infinite and NaN values, which have no defined brightness.
    """
    sixteen = image.mode.startswith("I;16")
    low, high = map(float, (0, 65535) if sixteen else image.getextrema())  # pyright: ignore
    if image.mode == "F" and high <= 1:
        scale, offset = 255, 0.5
    elif high <= 255:
        scale, offset = 1, 0.5
    elif high <= 65535:
        scale, offset = 1 / 256, 0
    else:
        scale, offset = 255 / high, 0.5
    grey = np.empty((image.height, image.width), np.uint8)
    for rows in strips(*grey.shape):
        strip = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
        if not (low >= 0 and np.isfinite(strip).all()):
            raise ValueError("grey values below 0, infinite or NaN have no defined brightness")
        grey[rows] = strip * scale + offset
        if "transparency" in image.info:  # The value that a PNG declares transparent.
            grey[rows][strip == image.info["transparency"]] = 255
    return grey


def strips(height: int, width: int) -> list[slice]:
    """Slices of rows that cover an image, each of about STRIP pixels."""
    rows = max(1, STRIP // width)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 is upright.

    A PNG may store it behind its pixels, so load these first.
    """
    with contextlib.suppress(Exception), _quiet():
        # Pillow turns TIFF images itself.
        value = image.getexif().get(ExifTags.Base.Orientation) if image.format != "TIFF" else 1
        return value if value in TURNS else 1
    return 1


def turned(image: Image.Image, stored: int) -> Image.Image:
    """The image turned upright; stored: its `orientation`."""
    if stored not in TURNS:
        return image
    image = image.transpose(TURNS[stored])
    image.info.clear()  # Pillow keeps the orientation there, and could turn the image again.
    return image


def read_header(image: bytes) -> tuple[int, int, int]:
    """(width, height, orientation) as stored; the pixels are read only where that is needed."""
    with open_image(image) as opened:
        # A PNG has its orientation in one of these chunks, perhaps behind its pixels.
        marks = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
        plain = opened.format == "PNG" and not any(mark in image for mark in marks)
        return *opened.size, 1 if plain else orientation(opened)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """The image, bilinear to uint8 [size, size, 3]; the aspect is not kept."""
    return crop_and_resize(image, (0, 0, *image.size), size)


def crop_and_resize(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The part of an image in `box`, bilinear (antialiased) to uint8 [size, size, 3]."""
    left, top, width, height = box
    # Cropping first keeps the filter inside the crop, as in the original.
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
