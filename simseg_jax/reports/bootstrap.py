"""95 % intervals of segmentation results over draws of the images, also of paired differences.

A draw takes as many images as there are, with replacement. All measures of all models are computed
on the same draws, so that a difference varies less than the values that it is made of. Intervals
are between percentiles (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993), moved by
the bias: draws leave out classes that few images show, which changes a mean over classes.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from simseg_jax.evaluators.measures import MEASURES, Quotients

TITLES = dict(zip(MEASURES, ("mIoU", "classes given", "pointing game"), strict=True))
# What needs no model: an empty mask, the image's largest class everywhere, its middle.
NO_MODEL = "no model"


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def estimates(
    models: Mapping[str, Mapping[str, Quotients]], draws: int, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Row -> measure -> estimate; models: name -> measures of the same images.

    The rows are the models and, after every model but the first, "first - NAME": the difference of
    the first model and this one.
    """
    first, *others = models
    once = models[first]["miou"].once
    values: dict = {name: {key: [] for key in MEASURES} for name in models}
    # All images come first: their values are what the intervals are about.
    for weights in itertools.chain([once[None]], _draws(len(once), draws, seed)):
        for name, key in itertools.product(models, MEASURES):
            values[name][key].append(models[name][key].mean(weights))
    values = {n: {key: np.concatenate(v) for key, v in each.items()} for n, each in values.items()}
    rows = {first: values[first]}
    for name in others:
        rows[name] = values[name]
        rows[f"{first} - {name}"] = {
            key: values[first][key] - values[name][key] for key in MEASURES
        }
    return {row: {key: _estimate(v) for key, v in each.items()} for row, each in rows.items()}


def without_one_image(
    models: Mapping[str, Mapping[str, Quotients]], images: Sequence[str], draws: int
) -> dict[str, dict[str, Estimate]]:
    """The differences of `estimates` without the image that adds most to each, by its name.

    It is the image without which the difference in mIoU shrinks most or turns round: where few
    images show a class, one of them can decide. Models of equal mIoU, and a single image, give no
    row.
    """
    first, *others = models
    rows = {}
    for name in others:
        a, b = (models[each]["miou"] for each in (first, name))
        difference = a.mean(a.once) - b.mean(b.once)
        if len(images) > 1 and abs(difference) > 0:
            left = a.mean_without_each() - b.mean_without_each()
            image = int(np.nanargmin(np.sign(difference) * left))
            fewer = {
                each: {key: measure.without(image) for key, measure in models[each].items()}
                for each in (first, name)
            }
            row = f"{first} - {name}"
            rows[f"{row}, without {images[image]}"] = estimates(fewer, draws)[row]
    return rows


def class_intervals(measure: Quotients, draws: int, seed: int = 0) -> Float[np.ndarray, "C 2"]:
    """The 95 % interval of every class over the draws that show it; NaN if none does."""
    parts = [measure.of_classes(weights) for weights in _draws(len(measure.hits), draws, seed)]
    ends = np.full((measure.hits.shape[1], 2), np.nan)
    for row, values in zip(ends, np.concatenate(parts).T, strict=True):
        values = values[np.isfinite(values)]
        if len(values):
            row[:] = np.percentile(values, (2.5, 97.5))
    return ends


def format_estimates(rows: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The rows of `estimates` as aligned text."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {title:>25}" for title in TITLES.values())]
    for name, row in rows.items():
        sign = "+" if " - " in name else ""
        cells = (f"{e.value:{sign}.3f} ({e.low:.3f} to {e.high:.3f})" for e in row.values())
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>25}" for cell in cells))
    return "\n".join(lines)


def _draws(count: int, draws: int, seed: int) -> Iterator[Float[np.ndarray, "R n"]]:
    """How often each of `count` images occurs in each draw, 64 draws at a time to save memory."""
    rng = np.random.default_rng(seed)
    for begin in range(0, draws, 64):
        size = min(64, draws - begin)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def _estimate(values: np.ndarray) -> Estimate:
    """values: that of all images, then those of the draws."""
    value, drawn = float(values[0]), values[1:]
    low, high = np.percentile(drawn, (2.5, 97.5)) - (drawn.mean() - value)
    return Estimate(value, float(low), float(high))
