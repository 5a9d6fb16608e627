"""Images on the host: decoding, random crop and resize.

Two paths with the same draws: PIL, as the original (`decode_image`, `crop_and_resize`), and a fast
one for training (`read_crop`: libjpeg-turbo and a SIMD version of PIL's filter, several times as
fast). They agree to two grey levels, unless a crop of at least twice the size asked for lets the
JPEG decoder work at half the resolution or less.

Both see an image as a viewer shows it: turned as its EXIF or XMP orientation says, the first frame
of an animation, transparency on white. Grey of more than 8 bits is scaled, see `eight_bits`.
"""

import contextlib
import functools
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from simseg_jax.runtime.errors import UserError, one_line

try:
    import cykooz_resizer as simd
except (
    ImportError
):  # No wheel on some platforms; PIL's filter does the same at a third of the speed.
    simd = None

JPEG = b"\xff\xd8"
# The formats of Pillow that are tried, with their suffixes. A file is read as what it is, not as
# what it is called, so without this list an EPS named .png would start Ghostscript.
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
# What makes an image upright, by its orientation in EXIF; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP = 1 << 20  # Pixels treated at a time where whole images would take much memory.
Box = tuple[int, int, int, int]  # left, top, width, height in pixels
Encoded = bytes | Path  # the content of an image file, or where it is


def decode_image(
    image: Encoded | Image.Image | np.ndarray, name: str = "an image", max_pixels: int | None = None
) -> Image.Image:
    """An upright RGB image; a `UserError` names one that cannot be decoded.

    image: encoded, opened by Pillow, or an array as `from_array` takes it. max_pixels: larger
    images are refused before they take memory; by default those that Pillow takes for bombs.
    """
    try:
        return _decoded(image, max_pixels)
    except Exception as error:  # PIL's decoders raise whatever a damaged file leads them to.
        advice = " Remove or replace this file." if isinstance(image, bytes | Path) else ""
        raise UserError(f"Cannot decode {name}: {one_line(error)}.{advice}") from error


def _decoded(image: Encoded | Image.Image | np.ndarray, max_pixels: int | None) -> Image.Image:
    if isinstance(image, bytes | Path):
        with open_image(image, max_pixels) as opened:
            return _decoded(opened, None)
    if not isinstance(image, Image.Image):
        image = from_array(image)
    check_pixels(image, max_pixels)
    rgb = to_rgb(image)
    return turned(rgb, orientation(image))


def from_array(array: np.ndarray) -> Image.Image:
    """An array [H, W] or [H, W, C] of grey (C = 1), RGB or RGBA values as an image of Pillow.

    uint8; uint16, which lose their low byte; bool; floats in [0, 1]. A ValueError refuses others.
    """
    kind, array = type(array).__name__, np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(
            f"{kind} of shape {array.shape} is not a path, the bytes of a file, an image of Pillow "
            "or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
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

    Raises a ValueError with the reason, or whatever Pillow raises for damaged files.
    """
    if isinstance(image, Path) and not image.is_file():  # Opening a pipe would wait for ever.
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
    """Silences Pillow: damaged EXIF does not concern the pixels, and we bound sizes ourselves."""
    # Filters are global: two threads that overlap could leave them changed.
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_pixels(image: Image.Image, max_pixels: int | None) -> None:
    """Raises a ValueError for an image without pixels or with more than `max_pixels`."""
    width, height = image.size
    if not width * height:
        raise ValueError(f"{width}x{height} are no pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(f"{width}x{height} are more than max_pixels={max_pixels}")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, not turned; transparent parts show white."""
    if image.mode[0] in "IF":
        image = Image.fromarray(eight_bits(image))
    elif image.has_transparency_data:
        # From premultiplied grey Pillow converts to plain alpha only.
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(image: Image.Image) -> np.ndarray:
    """Grey of 16 bits, 32 bits or floats (modes I;16, I, F) -> uint8 [H, W].

    White is the first of 1 (floats only), 255 and 65,535 that no value exceeds, else the largest
    value. 16-bit values lose their low byte, as in 16-bit colour. A ValueError refuses negative
    values and what is no number: what they stand for is not known.
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
            raise ValueError("grey values below 0 or that are no numbers stand for no brightness")
        grey[rows] = strip * scale + offset
        if "transparency" in image.info:  # The value that a PNG declares transparent.
            grey[rows][strip == image.info["transparency"]] = 255
    return grey


def strips(height: int, width: int) -> list[slice]:
    """Slices of rows, each of about STRIP pixels, that make up an image."""
    rows = max(1, STRIP // width)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def orientation(image: Image.Image) -> int:
    """How the pixels of an opened image are stored, 1 to 8 as in EXIF; 1 is upright.

    Ask after the pixels are loaded: a PNG may say it behind them.
    """
    with contextlib.suppress(Exception), _quiet():
        # Pillow turns TIFF images by itself.
        value = image.getexif().get(ExifTags.Base.Orientation) if image.format != "TIFF" else 1
        return value if value in TURNS else 1
    return 1


def turned(image: Image.Image, stored: int) -> Image.Image:
    """The image turned upright; stored: its `orientation`."""
    if stored not in TURNS:
        return image
    image = image.transpose(TURNS[stored])
    image.info.clear()  # Otherwise it could be turned a second time.
    return image


def read_header(image: bytes) -> tuple[int, int, int]:
    """(width, height, orientation) as stored, of the header alone wherever it has them."""
    with open_image(image) as opened:
        # Only a PNG that names one of these has an orientation, perhaps behind its pixels.
        marks = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
        plain = opened.format == "PNG" and not any(mark in image for mark in marks)
        return *opened.size, 1 if plain else orientation(opened)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Bilinear to a square of `size` pixels, aspect not kept: uint8 [size, size, 3]."""
    return crop_and_resize(image, (0, 0, *image.size), size)


def crop_and_resize(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The part of an image in `box`, bilinear (antialiased) to uint8 [size, size, 3]."""
    left, top, width, height = box
    # Cropping first keeps the filter inside the crop, as the original's crop-then-resize does.
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def draw_crop(
    width: int,
    height: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Crop of random area (share of the image) and aspect (width / height), at a random place.

    Aspect is log-uniform. After ten draws that do not fit, the largest central crop within the
    aspect range is taken, as in torchvision's RandomResizedCrop. The area (1, 1) takes all.
    """
    if tuple(area) == (1.0, 1.0):
        return 0, 0, width, height
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    ratio = np.clip(width / height, *aspect)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def read_crop(
    image: bytes | np.ndarray, size: int, draw: Callable[[int, int], Box], max_pixels: int
) -> np.ndarray:
    """Decodes only what a crop needs: uint8 [size, size, 3].

    image: the content of an image file, or a uint8 [H, W, 3] array. draw: (width, height) of the
    whole upright image -> the crop. Raises a `ValueError` with the reason for images that cannot be
    decoded or have more than `max_pixels`.
    """
    if isinstance(image, np.ndarray):
        return _resize_array(image, draw(image.shape[1], image.shape[0]), size)
    try:
        if image[:2] == JPEG:
            # Small faults and rare kinds of JPEG, which only PIL reads, go the other way.
            with contextlib.suppress(ValueError):
                height, width = map(int, simplejpeg.decode_jpeg_header(image)[:2])
                if width * height <= max_pixels:
                    return _read_jpeg(image, (width, height), draw, size)
        whole = _decoded(image, max_pixels)
        return crop_and_resize(whole, draw(*whole.size), size)
    except Exception as error:  # Damaged files lead PIL's decoders into errors of many kinds.
        raise ValueError(one_line(error)) from error


def _read_jpeg(
    data: bytes, whole: tuple[int, int], draw: Callable[[int, int], Box], size: int
) -> np.ndarray:
    """The crop of a JPEG whose stored size (width, height) is known."""
    stored = _jpeg_orientation(data)
    box = stored_box(draw(*whole[:: -1 if stored >= 5 else 1]), whole, stored)
    # Half the resolution or less saves time; reductions between would cost more than they save.
    factor = next((f for f in (8, 4, 2) if min(box[2:]) >= f * size), 1)
    width, height = (-(-side // factor) for side in whole)
    image = simplejpeg.decode_jpeg(data, min_width=width, min_height=height, min_factor=factor)
    square = _resize_array(image, tuple(x / factor for x in box), size)
    return np.asarray(turned(Image.fromarray(square), stored)) if stored > 1 else square


def _jpeg_orientation(data: bytes) -> int:
    """`orientation` of a JPEG; few of them have the segment it would be in."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        if data[at + 1] in (0xE1, 0xFF):  # APP1, of EXIF and XMP, or filling before a segment.
            with contextlib.suppress(Exception), open_image(data) as opened:
                return orientation(opened)
            return 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return 1


def stored_box(box: Box, whole: tuple[int, int], stored: int) -> Box:
    """Where a crop of the upright image lies in the stored one, whose size is `whole`."""
    left, top, width, height = box
    if stored >= 5:
        left, top, width, height = top, left, height, width
    if stored in (2, 3, 7, 8):
        left = whole[0] - left - width
    if stored in (3, 4, 6, 7):
        top = whole[1] - top - height
    return left, top, width, height


def _resize_array(image: np.ndarray, box: tuple[float, ...], size: int) -> np.ndarray:
    """`crop_and_resize` for uint8 [H, W, 3] and a box that may lie between pixels."""
    left, top, width, height = box
    x, y = math.floor(left), math.floor(top)
    # Cut out first: the filter shall not see what lies beyond the crop.
    image = image[y : math.ceil(top + height), x : math.ceil(left + width)]
    left, top = left - x, top - y
    if simd is None or (width, height) == (size, size):
        part = (left, top, left + width, top + height)
        square = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, part)
        return np.asarray(square)
    source = simd.ImageData(image.shape[1], image.shape[0], simd.PixelType.U8x3, image.tobytes())
    target = simd.ImageData(size, size, simd.PixelType.U8x3)
    options = simd.ResizeOptions(
        simd.ResizeAlg.convolution(simd.FilterType.bilinear),
        crop_box=simd.CropBox(left, top, width, height),
        use_alpha=False,
    )
    simd.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)
