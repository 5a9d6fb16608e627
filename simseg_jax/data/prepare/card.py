"""The data card of a prepared data set: what it contains and what was left out, as JSON and PNG."""

import datetime
import json
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from simseg_jax.data.pairs import Problems
from simseg_jax.data.prepare.shards import Job, Statistics
from simseg_jax.runtime.files import appearing

SAMPLES, COLUMNS = 12, 6
CELL = 240  # Side of a sample in pixels.
INK, GREY, ACCENT, LIMIT = "#222222", "#767676", "#2a6f97", "#c1121f"


def facts(job: Job, problems: Problems, total: Statistics, duplicates: int) -> dict[str, Any]:
    """The content of card.json: counts, the first problems of every kind, sizes, the job."""
    counts = total.counts

    def rejected(kind: str) -> dict[str, Any]:
        return {"count": counts[kind], "first": total.first.get(kind, [])}

    return {
        "name": job.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "images": counts["written"],
        "captions": counts["captions"],
        "examples_in": job.examples,
        "left_out_by_the_index": asdict(problems),
        "corrupt_images": rejected("corrupt"),
        "unusable_examples": rejected("unusable"),
        "duplicates": {"count": duplicates, "kept": job.duplicates == "keep"},
        "reencoded_images": counts["reencoded"],
        "bytes_in": counts["bytes_in"],
        "bytes_out": counts["bytes_out"],
        "words_per_caption": summary(total.words),
        "short_side_before": summary(total.short_side),
        "long_side_before": summary(total.long_side),
        "job": asdict(job),
    }


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Writes card.json."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    with appearing(folder / "card.json") as partial:
        partial.write_text(text, encoding="utf-8")


def summary(counts: Counter[int]) -> dict[str, float]:
    """min, median, mean and max of values that occur `counts[value]` times; {} without values."""
    if not counts:
        return {}
    values, weights = np.array(sorted(counts.items())).T
    median = values[np.searchsorted(np.cumsum(weights), weights.sum() / 2)]
    mean = round(float(values @ weights / weights.sum()), 2)
    return {"min": int(values[0]), "median": int(median), "mean": mean, "max": int(values[-1])}


def write_picture(
    path: Path,
    job: Job,
    lines: Sequence[str],
    samples: Sequence[tuple[Image.Image, str]],
    total: Statistics,
) -> None:
    """Writes card.png: lines of text, (image, caption) samples and two histograms of `total`.

    The height depends on the numbers of lines and samples, so positions are computed in inches.
    """
    rows = -(-len(samples) // COLUMNS)
    figure = Figure(figsize=(13, 1.1 + 0.24 * len(lines) + 2.75 * rows + 2.6), dpi=110)
    FigureCanvasAgg(figure)
    inch = 1 / figure.get_figheight()
    figure.text(0.03, 1 - 0.22 * inch, job.name, size=17, weight="bold", color=INK, va="top")
    plain = {"va": "top", "parse_math": False}
    text = "\n".join(lines)
    figure.text(0.03, 1 - 0.62 * inch, text, size=10, color=GREY, linespacing=1.5, **plain)
    top = 1 - (0.85 + 0.24 * len(lines)) * inch
    area = {"left": 0.03, "right": 0.97, "bottom": 3.15 * inch, "top": top}
    grid = figure.add_gridspec(rows, COLUMNS, wspace=0.08, hspace=0.32, **area)
    for place, (image, caption) in enumerate(samples):
        axes = figure.add_subplot(grid[divmod(place, COLUMNS)])
        axes.imshow(ImageOps.fit(image, (CELL, CELL)))
        axes.set_axis_off()
        text = "\n".join(textwrap.wrap(caption, 30, max_lines=2, placeholder=" …"))
        axes.text(0, -0.04, text, size=8.5, color=INK, transform=axes.transAxes, **plain)
    area = {"left": 0.055, "right": 0.97, "bottom": 0.55 * inch, "top": 2.25 * inch}
    charts = figure.add_gridspec(1, 2, **area)
    _histogram(figure.add_subplot(charts[0]), total.words, "words per caption", "captions")
    axes = figure.add_subplot(charts[1])
    label = "short side of the images in pixels, before"
    _histogram(axes, total.short_side, label, "images")
    if job.short_side:
        axes.axvline(job.short_side, color=LIMIT, linewidth=1.2)
        text, place = f" larger ones: {job.short_side}", (job.short_side, 0.93)
        axes.annotate(text, place, xycoords=("data", "axes fraction"), color=LIMIT, size=8.5)
    with warnings.catch_warnings():
        # Captions may have characters that the font lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path)


def _histogram(axes, counts: Counter[int], label: str, unit: str) -> None:
    """Bars up to the 99th percentile; the last one counts all larger values."""
    if counts:
        values, weights = np.array(sorted(counts.items())).T
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
