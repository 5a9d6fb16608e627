"""AutoAugment (Cubuk et al. 2019) with PIL: used on the host, and the reference for the device.

It follows the implementation that the authors used: grey (128) fill, ten evenly spaced levels of
magnitude, random signs for geometry and enhancement but not for rotation. An operation takes an
image, a level (0..9) and a sign (-1, 1); `autoaugment_jax` does the same on the device.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

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


def draw(rng: np.random.Generator) -> tuple[int, tuple[int, int]]:
    """(number of the sub-policy, sign of each of its operations; 0: the operation is left out)."""
    policy = int(rng.integers(len(IMAGENET_POLICY)))
    uniform, signs = rng.random(2), rng.choice((-1, 1), 2)
    first, second = (
        int(sign) if u < probability else 0
        for u, sign, (probability, *_) in zip(uniform, signs, IMAGENET_POLICY[policy], strict=True)
    )
    return policy, (first, second)


def autoaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Applies a random sub-policy of the ImageNet policy."""
    policy, signs = draw(rng)
    for sign, (_, operation, level) in zip(signs, IMAGENET_POLICY[policy], strict=True):
        if sign:
            image = OPERATIONS[operation](image, level, sign)
    return image


def shear(level: int, sign: int) -> float:
    """The shift along one axis per pixel of the other axis."""
    return sign * 0.3 * level / 9


def translation(level: int, sign: int, side: int) -> float:
    """The translation in pixels along an axis of length `side`."""
    return sign * 150 / 331 * level / 9 * side


def angle(level: int) -> float:
    """The rotation in degrees, counter-clockwise."""
    return 30 * level / 9


def factor(level: int, sign: int) -> float:
    """The factor of an enhancement: 0 gives PIL's degenerate image, 1 the image itself."""
    return 1 + sign * 0.9 * level / 9


def bits(level: int) -> int:
    """The number of bits per channel that posterize keeps."""
    return round(8 - 4 * level / 9)


def solarize_threshold(level: int) -> int:
    """The lowest value that solarize inverts."""
    return math.ceil(256 - 256 * level / 9)


def _affine(image: Image.Image, matrix: tuple[float, ...], filter: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, filter, fillcolor=GREY)


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    return _affine(image, (1, x, 0, y, 1, 0), Image.Resampling.BICUBIC)


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    return _affine(image, (1, 0, x, 0, 1, y), Image.Resampling.NEAREST)


def _enhance(enhancer: Callable) -> Callable:
    return lambda image, level, sign: enhancer(image).enhance(factor(level, sign))


OPERATIONS: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "shearX": lambda image, level, sign: _shear(image, shear(level, sign), 0),
    "shearY": lambda image, level, sign: _shear(image, 0, shear(level, sign)),
    "translateX": lambda i, level, sign: _translate(i, translation(level, sign, i.width), 0),
    "translateY": lambda i, level, sign: _translate(i, 0, translation(level, sign, i.height)),
    "rotate": lambda image, level, _: image.rotate(angle(level), fillcolor=GREY),
    "posterize": lambda image, level, _: ImageOps.posterize(image, bits(level)),
    "solarize": lambda image, level, _: ImageOps.solarize(image, solarize_threshold(level)),
    "autocontrast": lambda image, _level, _sign: ImageOps.autocontrast(image),
    "equalize": lambda image, _level, _sign: ImageOps.equalize(image),
    "invert": lambda image, _level, _sign: ImageOps.invert(image),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "brightness": _enhance(ImageEnhance.Brightness),
}
