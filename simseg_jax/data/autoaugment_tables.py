"""Constants of AutoAugment's operations, computed on the host as PIL computes them."""

import functools
from collections.abc import Sequence

import numpy as np

from simseg_jax.data.autoaugment import (
    angle,
    bits,
    factor,
    shear,
    solarize_threshold,
    translation,
)

Variant = tuple[str, int, int]  # operation, level, sign; "" leaves the image as it is


def variant_tables(variants: Sequence[Variant], height: int, width: int) -> dict[str, np.ndarray]:
    """A row per variant (operation, level, sign) of what the device needs, for one image size.

    "table": uint8 [256], a result per value; "products": float32 [511], alpha * (-255 .. 255);
    "matrix": int32 [6], nearest-neighbour map in 16.16 fixed point; "shift", "fraction", "first",
    "last": [max(H, W)], the rows of a shear.
    """
    rows = [_row(*variant, height, width) for variant in variants]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _row(operation: str, level: int, sign: int, height: int, width: int) -> dict[str, np.ndarray]:
    value = np.arange(256)
    table, matrix, alpha, slope = value, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 1.0, 0.0
    if operation == "posterize":
        table = value & ~(2 ** (8 - bits(level)) - 1)
    elif operation == "solarize":
        table = np.where(value < solarize_threshold(level), value, 255 - value)
    elif operation == "invert":
        table = 255 - value
    elif operation == "brightness":
        table = np.clip(np.float32(factor(level, sign)) * value.astype(np.float32), 0, 255)
    elif operation in ("color", "contrast", "sharpness"):
        alpha = factor(level, sign)
    elif operation == "rotate":
        matrix = _rotation(angle(level), height, width)
    elif operation == "translateX":
        matrix = (1.0, 0.0, translation(level, sign, width), 0.0, 1.0, 0.0)
    elif operation == "translateY":
        matrix = (1.0, 0.0, 0.0, 0.0, 1.0, translation(level, sign, height))
    elif operation in ("shearX", "shearY"):
        slope = shear(level, sign)
    differences = np.arange(-255, 256, dtype=np.float32)
    length = height if operation == "shearY" else width
    shift, fraction, first, last = _shear_rows(slope, length, max(height, width))
    return {
        "table": table.astype(np.uint8),
        # Single products: added to an integer they leave a compiler nothing to fuse.
        "products": np.float32(alpha) * differences,
        "matrix": _fixed_point(matrix),
        "shift": shift,
        "fraction": fraction,
        "first": first,
        "last": last,
    }


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """PIL's matrix of a rotation about the centre: target to source."""
    radians = -np.radians(degrees)
    c, s = round(float(np.cos(radians)), 15), round(float(np.sin(radians)), 15)
    x, y = width / 2, height / 2
    return c, s, c * -x + s * -y + x, -s, c, -s * -x + c * -y + y


def _fixed_point(matrix: tuple[float, ...]) -> np.ndarray:
    """int32 [6]: PIL samples nearest neighbours with 16 fractional bits, from pixel centres."""
    a, b, c, d, e, f = matrix
    fixed = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return np.floor(np.array(fixed) * 65536 + 0.5).astype(np.int32)


def _shear_rows(slope: float, length: int, rows: int) -> tuple[np.ndarray, ...]:
    """For every row of a shear: whole shift, its fraction, first and last place inside the source.

    length: places along the row.
    """
    source = slope * (np.arange(rows) + 0.5)  # of place -0.5, in PIL's float64
    places = (np.arange(length) + 0.5)[None] + source[:, None]
    inside = (places >= 0) & (places < length)
    first = np.where(inside.any(1), inside.argmax(1), length)
    last = np.where(inside.any(1), length - 1 - inside[:, ::-1].argmax(1), -1)
    shift = np.floor(source)
    return (
        shift.astype(np.int32),
        (source - shift).astype(np.float32),
        first.astype(np.int32),
        last.astype(np.int32),
    )


@functools.cache
def autocontrast_exceptions() -> np.ndarray:
    """Sorted int32 keys (low, high, value) where PIL's formula gives less than exact division."""
    keys = []
    for low in range(256):
        high, value = np.arange(low + 1, 256)[:, None], np.arange(256)[None]
        scale = 255.0 / (high - low)
        result = np.trunc(value * scale + -low * scale)
        exact = (value - low) * 255 // (high - low)
        row, wrong = np.nonzero((result < exact) & (value >= low) & (value <= high))
        keys.append((low * 256 + high[row, 0]) * 256 + wrong)
    return np.sort(np.concatenate(keys)).astype(np.int32)
