"""The data card of a prepared data set: what is in it and what was left out, as JSON and PNG."""

import json
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from simseg_jax.runtime.files import appearing

SAMPLES, COLUMNS = 12, 6
CELL = 240  # Side of a sample in pixels.
INK, GREY, ACCENT, LIMIT = "#222222", "#767676", "#2a6f97", "#c1121f"


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """card.json; the keys of `card` are described where `prepare` makes it."""
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    with appearing(folder / "card.json") as partial:
        partial.write_text(text, encoding="utf-8")


def summary(counts: Counter[int]) -> dict[str, float]:
    """min, median, mean and max of the values that occur `counts[value]` times; {} without any."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    weights = np.array([counts[int(value)] for value in values])
    median = values[np.searchsorted(np.cumsum(weights), weights.sum() / 2)]
    mean = round(float(values @ weights / weights.sum()), 2)
    return {
        "min": int(values[0]),
        "median": int(median),
        "mean": mean,
        "max": int(values[-1]),
    }


def write_picture(
    path: Path,
    title: str,
    facts: Sequence[str],
    samples: Sequence[tuple[Image.Image, str]],
    words: Counter[int],
    short_side: Counter[int],
    limit: int,
) -> None:
    """card.png: lines of facts, (image, caption) samples, and two histograms.

    words: captions by number of words. short_side: images by their size in pixels before `limit`
    (0: none) bounded it.
    """
    rows = -(-len(samples) // COLUMNS)
    figure = Figure(figsize=(13, 1.1 + 0.24 * len(facts) + 2.75 * rows + 2.6), dpi=110)
    FigureCanvasAgg(figure)
    inch = 1 / figure.get_figheight()
    figure.text(0.03, 1 - 0.22 * inch, title, size=17, weight="bold", color=INK, va="top")
    figure.text(
        0.03,
        1 - 0.62 * inch,
        "\n".join(facts),
        size=10,
        color=GREY,
        va="top",
        linespacing=1.5,
        parse_math=False,
    )
    top = 1 - (0.85 + 0.24 * len(facts)) * inch
    area = {"left": 0.03, "right": 0.97, "bottom": 3.15 * inch, "top": top}
    grid = figure.add_gridspec(rows, COLUMNS, wspace=0.08, hspace=0.32, **area)
    for place, (image, caption) in enumerate(samples):
        axes = figure.add_subplot(grid[divmod(place, COLUMNS)])
        axes.imshow(ImageOps.fit(image, (CELL, CELL)))
        axes.set_axis_off()
        text = "\n".join(textwrap.wrap(caption, 30, max_lines=2, placeholder=" …"))
        below = {"transform": axes.transAxes, "va": "top"}
        axes.text(0, -0.04, text, size=8.5, color=INK, parse_math=False, **below)
    area = {"left": 0.055, "right": 0.97, "bottom": 0.55 * inch, "top": 2.25 * inch}
    charts = figure.add_gridspec(1, 2, **area)
    _histogram(figure.add_subplot(charts[0]), words, "words per caption", "captions")
    axes = figure.add_subplot(charts[1])
    _histogram(axes, short_side, "short side of the images in pixels, before", "images")
    if limit:
        axes.axvline(limit, color=LIMIT, linewidth=1.2)
        label = (limit, 0.93)
        where = ("data", "axes fraction")
        axes.annotate(f" larger ones: {limit}", label, xycoords=where, color=LIMIT, size=8.5)
    with warnings.catch_warnings():
        # Captions may be in a script that the font lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path)


def _histogram(axes, counts: Counter[int], label: str, unit: str) -> None:
    """Bars over at most the 99th percentile, rest in the last bar."""
    if counts:
        values = np.array(sorted(counts))
        weights = np.array([counts[int(value)] for value in values])
        last = int(values[np.searchsorted(np.cumsum(weights), 0.99 * weights.sum())])
        first = int(values[0])
        step = max(1, -(-(last + 1 - first) // 40))
        edges = np.arange(first, last + step + 1, step) - 0.5
        axes.hist(np.minimum(values, last), edges, weights=weights, color=ACCENT, rwidth=0.9)
        tail = f" (last bar: up to {values[-1]})" if values[-1] > last else ""
        axes.set_xlabel(f"{label}{tail}", color=GREY, size=9)
    axes.set_ylabel(unit, color=GREY, size=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=8.5)
    axes.locator_params(integer=True)
