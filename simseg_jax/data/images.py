"""Images on the host: decoding, random crop and resize.

Two paths with the same draws: PIL, as the original (`decode_image`, `crop_and_resize`), and a fast
one for training (`read_crop`: libjpeg-turbo and a SIMD version of PIL's filter, several times as
fast). They agree to two grey levels, unless a crop of at least twice the size asked for lets the
JPEG decoder work at half the resolution or less.
"""

import contextlib
import io
import math
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from simseg_jax.errors import UserError

try:
    import cykooz_resizer as simd
except (
    ImportError
):  # No wheel on some platforms; PIL's filter does the same at a third of the speed.
    simd = None

JPEG = b"\xff\xd8"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Box = tuple[int, int, int, int]  # left, top, width, height in pixels


def decode_image(image: bytes | np.ndarray, name: str = "an image") -> Image.Image:
    """Encoded bytes or a uint8 [H, W, 3] array -> an RGB image; a `UserError` names a bad one."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        return _to_rgb(_open(image))
    except Exception as error:  # PIL's decoders raise whatever a damaged file leads them to.
        raise UserError(f"Cannot decode {name}: {error}. Remove or replace this file.") from error


def _open(image: bytes) -> Image.Image:
    """Reads the header only."""
    try:
        return Image.open(io.BytesIO(image))
    except UnidentifiedImageError as error:
        raise ValueError("no image in a known format") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL's conversion would clip 16-bit grey to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


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

    image: encoded bytes in any format PIL reads, or a uint8 [H, W, 3] array. draw: (width, height)
    of the whole image -> the crop. Raises a `ValueError` with the reason for images that cannot be
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
                    return _read_jpeg(image, (width, height), draw(width, height), size)
        opened = _open(image)
        width, height = opened.size
        if width * height > max_pixels:
            raise ValueError(f"{width}x{height} are more than data.max_pixels={max_pixels}")
        return crop_and_resize(_to_rgb(opened), draw(width, height), size)
    except Exception as error:  # Damaged files lead PIL's decoders into errors of many kinds.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _read_jpeg(data: bytes, whole: tuple[int, int], box: Box, size: int) -> np.ndarray:
    """The crop of a JPEG whose whole size (width, height) is known."""
    # Half the resolution or less saves time; reductions between would cost more than they save.
    factor = next((f for f in (8, 4, 2) if min(box[2:]) >= f * size), 1)
    width, height = (-(-side // factor) for side in whole)
    image = simplejpeg.decode_jpeg(data, min_width=width, min_height=height, min_factor=factor)
    return _resize_array(image, tuple(x / factor for x in box), size)


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
