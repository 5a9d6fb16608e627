"""Random crops of encoded images, several times as fast as with PIL alone.

`read_crop` decodes with libjpeg-turbo and resizes with a SIMD version of PIL's filter. A crop of at
least twice the target size is decoded at reduced resolution. Other crops differ from the result of
`images.crop_and_resize` by at most two grey levels.
"""

import contextlib
import math
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from simseg_jax.data.images import Box, crop_and_resize, decoded, open_image, orientation, turned
from simseg_jax.runtime.errors import one_line

try:
    import cykooz_resizer as simd
except ImportError:  # Some platforms have no wheel; PIL's filter takes three times as long.
    simd = None

JPEG = b"\xff\xd8"


def draw_crop(
    width: int,
    height: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A crop of random area (share of the image), aspect (width / height) and place.

    The aspect is log-uniform. After ten draws that do not fit into the image, the largest central
    crop within the range of aspects is returned, as in torchvision's RandomResizedCrop. The area
    (1, 1) stands for the whole image, whatever its aspect.
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
    """One crop of an image, uint8 [size, size, 3]; decodes no more of the image than needed.

    image: the content of an image file, or a uint8 [H, W, 3] array. draw: maps (width, height) of
    the whole upright image to the crop. A `ValueError` says why an image cannot be decoded, or that
    it has more than `max_pixels`.
    """
    if isinstance(image, np.ndarray):
        return _resize_array(image, draw(image.shape[1], image.shape[0]), size)
    try:
        if image[:2] == JPEG:
            # libjpeg-turbo refuses rare kinds of JPEGs and small faults; PIL then reads them.
            with contextlib.suppress(ValueError):
                height, width = map(int, simplejpeg.decode_jpeg_header(image)[:2])
                if width * height <= max_pixels:
                    return _read_jpeg(image, (width, height), draw, size)
        whole = decoded(image, max_pixels)
        return crop_and_resize(whole, draw(*whole.size), size)
    except Exception as error:  # PIL's decoders raise errors of many kinds.
        raise ValueError(one_line(error)) from error


def _read_jpeg(
    data: bytes, whole: tuple[int, int], draw: Callable[[int, int], Box], size: int
) -> np.ndarray:
    """The crop of a JPEG; whole: its stored size (width, height)."""
    stored = _jpeg_orientation(data)
    box = stored_box(draw(*whole[:: -1 if stored >= 5 else 1]), whole, stored)
    # libjpeg-turbo also scales by n/8, but only powers of two save time.
    factor = next((f for f in (8, 4, 2) if min(box[2:]) >= f * size), 1)
    width, height = (-(-side // factor) for side in whole)
    image = simplejpeg.decode_jpeg(data, min_width=width, min_height=height, min_factor=factor)
    square = _resize_array(image, tuple(x / factor for x in box), size)
    return np.asarray(turned(Image.fromarray(square), stored)) if stored > 1 else square


def _jpeg_orientation(data: bytes) -> int:
    """`orientation` of a JPEG; PIL reads it only if one of the segments may contain it."""
    at = 2  # After two bytes of the file come segments: 0xFF, type, length (2 bytes), content.
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        if data[at + 1] in (0xE1, 0xFF):  # APP1, which contains EXIF and XMP, or padding.
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
    """`crop_and_resize` for uint8 [H, W, 3] and a box whose edges may lie between pixels."""
    left, top, width, height = box
    x, y = math.floor(left), math.floor(top)
    # The crop is cut out first: the filter must not see pixels outside of it.
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
