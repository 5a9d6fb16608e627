"""Constants of AutoAugment's operations, computed on the host as PIL computes them."""

import functools
from collections.abc import Sequence

import numpy as np

from simseg_jax.data.autoaugment import angle, bits, factor, shear, solarize_threshold, translation

Variant = tuple[str, int, int]  # operation, level, sign; "" leaves the image as it is


def variant_tables(variants: Sequence[Variant], height: int, width: int) -> dict[str, np.ndarray]:
    """The constants of V variants that the device needs for images of one size.

    "table": uint8 [V, 256], the result for each value. "products": float32 [V, 511], the factor of
    an enhancement times -255 .. 255. "matrix": int32 [V, 6], nearest-neighbour map in 16.16 fixed
    point. "shift", "fraction", "first", "last": [V, max(H, W)], see `_shear_rows`.
    """
    rows = [_row(*variant, height, width) for variant in variants]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _row(operation: str, level: int, sign: int, height: int, width: int) -> dict[str, np.ndarray]:
    value = np.arange(256)
    table, matrix, alpha, slope = value, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 1.0, 0.0  # No change.
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
    rows = _shear_rows(slope, length, max(height, width))
    return {
        "table": table.astype(np.uint8),
        # The products are stored, so that a compiler cannot fuse them with the sums that follow.
        "products": np.float32(alpha) * differences,
        "matrix": _fixed_point(matrix),
        **dict(zip(("shift", "fraction", "first", "last"), rows, strict=True)),
    }


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """PIL's matrix for a rotation about the centre, from target to source."""
    radians = -np.radians(degrees)
    c, s = round(float(np.cos(radians)), 15), round(float(np.sin(radians)), 15)
    x, y = width / 2, height / 2
    return c, s, c * -x + s * -y + x, -s, c, -s * -x + c * -y + y


def _fixed_point(matrix: tuple[float, ...]) -> np.ndarray:
    """int32 [6]: the map of pixel centres, with 16 fractional bits as PIL samples neighbours."""
    a, b, c, d, e, f = matrix
    fixed = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return np.floor(np.array(fixed) * 65536 + 0.5).astype(np.int32)


def _shear_rows(slope: float, length: int, rows: int) -> tuple[np.ndarray, ...]:
    """For every row of a shear: whole shift, its fraction, first and last place inside the source.

    length: number of places (pixels) along a row.
    """
    source = slope * (np.arange(rows) + 0.5)  # Source of place -0.5, in float64 as PIL computes.
    places = (np.arange(length) + 0.5)[None] + source[:, None]
    inside = (places >= 0) & (places < length)
    first = np.where(inside.any(1), inside.argmax(1), length)
    last = np.where(inside.any(1), length - 1 - inside[:, ::-1].argmax(1), -1)
    shift = np.floor(source)
    fraction = (source - shift).astype(np.float32)
    return shift.astype(np.int32), fraction, first.astype(np.int32), last.astype(np.int32)


@functools.cache
def autocontrast_exceptions() -> np.ndarray:
    """Sorted int32 keys of (low, high, value) for which PIL gives less than exact division.

    The key is (low * 256 + high) * 256 + value.
    """
    keys = []
    for low in range(256):
        high, value = np.arange(low + 1, 256)[:, None], np.arange(256)[None]
        scale = 255.0 / (high - low)
        result = np.trunc(value * scale + -low * scale)
        exact = (value - low) * 255 // (high - low)
        row, wrong = np.nonzero((result < exact) & (value >= low) & (value <= high))
        keys.append((low * 256 + high[row, 0]) * 256 + wrong)
    return np.sort(np.concatenate(keys)).astype(np.int32)
