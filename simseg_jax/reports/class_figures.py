"""Figures of IoU and scores per class, from the classes.csv of evaluations."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simseg_jax.runtime.errors import UserError, require_file


def draw_classes(tables: Sequence[tuple[str, list[dict]]]):
    """Figure 7 of the paper: IoU of every class, sorted by the first table."""
    from matplotlib.figure import Figure

    first = sorted(tables[0][1], key=lambda row: -float(row["iou"]))
    names = [row["class"] for row in first]
    figure = Figure(figsize=(2 + 0.32 * len(names), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(tables)
    for number, (title, rows) in enumerate(tables):
        ious = {row["class"]: float(row["iou"]) for row in rows}
        heights = [ious.get(name, 0.0) for name in names]
        places = np.arange(len(names)) + number * width
        mean = np.mean(list(ious.values()))
        axis.bar(places, heights, width, label=f"{title}: mean {mean:.3f}")
    axis.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names, rotation=60, ha="right")
    axis.set(ylabel="IoU", title="IoU per class")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    return figure


def draw_scores(table: tuple[str, list[dict]]):
    """Figure 14 of the paper: mean and deviation of image-text scores, frequent classes first."""
    from matplotlib.figure import Figure

    _, rows = table
    rows = [row for row in rows if row["score_present"] and row["class"] != "background"]
    if not rows:
        raise UserError("The table has no class with scores on images that show it.")
    rows = sorted(rows, key=lambda row: -int(row["images"]))[:40]
    figure = Figure(figsize=(2 + 0.36 * len(rows), 3.8), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))
    present, deviation = (
        [float(row[key]) for row in rows] for key in ("score_present", "deviation_present")
    )
    axis.bar(places, present, 0.6, yerr=deviation, capsize=2, label="images with the class")
    absent = [float(row["score_absent"] or "nan") for row in rows]  # matplotlib leaves out NaN.
    axis.plot(places, absent, "k_", markersize=12, label="images without it")
    names = [f"{row['class']} ({row['images']})" for row in rows]
    axis.set_xticks(places, names, rotation=60, ha="right")
    axis.set(ylabel="image-text score", title="Scores of the classes (number of images)")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def read_table(argument: str) -> tuple[str, list[dict]]:
    """(name, rows) from NAME=PATH or PATH, where PATH is a classes.csv or its folder."""
    name, equals, path = argument.rpartition("=")
    file = Path(path)
    file = file / "classes.csv" if file.is_dir() else file
    require_file(file, "the table", "write one with python -m simseg_jax.evaluate")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    if not rows or not {"class", "iou", "images"} <= set(rows[0]):
        raise UserError(f"{file} is no table of classes: give classes.csv of an evaluation.")
    return (name if equals else file.parent.name), rows
