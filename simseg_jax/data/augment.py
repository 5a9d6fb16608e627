"""Image decoding, the paper's training augmentation with PIL, and ImageNet normalisation.

AutoAugment follows the implementation that the authors used: grey (128) fill, random signs for
shear and enhancement but not for rotation, magnitudes on ten evenly spaced levels.
"""

import io
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from simseg_jax.errors import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GREY = (128, 128, 128)

# (probability, operation, level) twice per sub-policy: AutoAugment (Cubuk et al. 2019), table 9.
IMAGENET_POLICY = (
    ((0.4, "posterize", 8), (0.6, "rotate", 9)),
    ((0.6, "solarize", 5), (0.6, "autocontrast", 5)),
    ((0.8, "equalize", 8), (0.6, "equalize", 3)),
    ((0.6, "posterize", 7), (0.6, "posterize", 6)),
    ((0.4, "equalize", 7), (0.2, "solarize", 4)),
    ((0.4, "equalize", 4), (0.8, "rotate", 8)),
    ((0.6, "solarize", 3), (0.6, "equalize", 7)),
    ((0.8, "posterize", 5), (1.0, "equalize", 2)),
    ((0.2, "rotate", 3), (0.6, "solarize", 8)),
    ((0.6, "equalize", 8), (0.4, "posterize", 6)),
    ((0.8, "rotate", 8), (0.4, "color", 0)),
    ((0.4, "rotate", 9), (0.6, "equalize", 2)),
    ((0.0, "equalize", 7), (0.8, "equalize", 8)),
    ((0.6, "invert", 4), (1.0, "equalize", 8)),
    ((0.6, "color", 4), (1.0, "contrast", 8)),
    ((0.8, "rotate", 8), (1.0, "color", 2)),
    ((0.8, "color", 8), (0.8, "solarize", 7)),
    ((0.4, "sharpness", 7), (0.6, "invert", 8)),
    ((0.6, "shearX", 5), (1.0, "equalize", 9)),
    ((0.4, "color", 0), (0.6, "equalize", 3)),
    ((0.4, "equalize", 7), (0.2, "solarize", 4)),
    ((0.6, "solarize", 5), (0.6, "autocontrast", 5)),
    ((0.6, "invert", 4), (1.0, "equalize", 8)),
    ((0.6, "color", 4), (1.0, "contrast", 8)),
    ((0.8, "equalize", 8), (0.6, "equalize", 3)),
)


def decode_image(image: bytes | np.ndarray, name: str = "an image") -> Image.Image:
    """Encoded bytes or a uint8 [H, W, 3] array -> an RGB image."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"Cannot decode {name}: {error}. Remove or replace this file.") from error


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Bilinear to a square of `size` pixels, aspect not kept: uint8 [size, size, 3]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def random_resized_crop(
    image: Image.Image,
    size: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> Image.Image:
    """Crop of random area (share of the image) and aspect (width / height), resized to `size`.

    Aspect is log-uniform. After ten draws that do not fit, the largest central crop within the
    aspect range is taken, as in torchvision.
    """
    width, height = image.size
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:
        ratio = np.clip(width / height, *aspect)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
    # Cropping first keeps the filter inside the crop, as the original's crop-then-resize does.
    crop = image.crop((left, top, left + w, top + h))
    return crop.resize((size, size), Image.Resampling.BILINEAR)


def autoaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Applies one random sub-policy of the ImageNet policy."""
    policy = IMAGENET_POLICY[rng.integers(len(IMAGENET_POLICY))]
    for probability, operation, level in policy:
        if rng.random() < probability:
            sign = rng.choice((-1, 1))
            image = OPERATIONS[operation](image, level, sign)
    return image


def _shear_x(image: Image.Image, level: int, sign: int) -> Image.Image:
    matrix = (1, sign * 0.3 * level / 9, 0, 0, 1, 0)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GREY
    )


def _rotate(image: Image.Image, level: int, _sign: int) -> Image.Image:
    return image.rotate(30 * level / 9, fillcolor=GREY)


def _enhance(enhancer: Callable) -> Callable:
    return lambda image, level, sign: enhancer(image).enhance(1 + sign * 0.9 * level / 9)


OPERATIONS: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "shearX": _shear_x,
    "rotate": _rotate,
    "posterize": lambda image, level, _: ImageOps.posterize(image, round(8 - 4 * level / 9)),
    "solarize": lambda image, level, _: ImageOps.solarize(image, math.ceil(256 - 256 * level / 9)),
    "autocontrast": lambda image, _level, _sign: ImageOps.autocontrast(image),
    "equalize": lambda image, _level, _sign: ImageOps.equalize(image),
    "invert": lambda image, _level, _sign: ImageOps.invert(image),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
}


def normalize(images: jax.Array) -> jax.Array:
    """uint8 [..., 3] -> float32 with ImageNet mean and standard deviation. Runs on the device."""
    leading = (None,) * (images.ndim - 1)
    mean, std = jnp.array(MEAN, jnp.float32)[leading], jnp.array(STD, jnp.float32)[leading]
    return (images.astype(jnp.float32) / 255 - mean) / std


def denormalized_uint8(images: np.ndarray) -> np.ndarray:
    """What the original hands to its CRF: normalise, undo it, truncate, all in float32.

    Rounding on the way makes some values one level darker than the input.
    """
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    normalized = (images.astype(np.float32) / np.float32(255) - mean) / std
    return ((normalized * std + mean) * np.float32(255)).astype(np.uint8)
