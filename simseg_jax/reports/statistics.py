"""Tables per class and per image, from the records of a segmentation test set."""

import csv
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from simseg_jax.evaluators.measures import MEASURES, Quotients
from simseg_jax.evaluators.metrics import class_iou, mean_iou
from simseg_jax.evaluators.records import Record, total_confusion
from simseg_jax.reports.bootstrap import class_intervals


def class_table(
    records: Sequence[Record],
    names: Sequence[str],
    found: Mapping[str, Quotients],
    draws: int = 0,
) -> list[dict]:
    """One row per class that occurs or is predicted, in label order.

    found: the `measures` of the records.
    iou_low, iou_high: the 95 % interval, None without `draws`. iou_given, pointing: of masks and
    maps for the classes that are known to show, see `evaluators.localisation`.
    images: how many show the class. drawn: the share of them where it is predicted somewhere.
    score_present, deviation_present: mean and deviation of its image-text score on these images.
    score_absent: the mean on the others. The scores show whether a class is missed (as "person" in
    figure 14 of the paper) or confused with others.
    """
    present, predicted = (_occurring(records, len(names), column) for column in (0, 1))
    scores = np.array([record.scores[0] for record in records])
    values = {key: measure.of_classes(measure.once) for key, measure in found.items()}
    ends = class_intervals(found["miou"], draws) if draws else np.full((len(names), 2), np.nan)
    rows = []
    for label, name in enumerate(names):
        iou, iou_given, pointing, low, high = (
            float(value) if np.isfinite(value) else None
            for value in (*(values[key][label] for key in MEASURES), *ends[label])
        )
        if iou is None:
            continue
        shown = present[:, label]
        rows.append(
            {
                "class": name,
                "iou": iou,
                "iou_low": low,
                "iou_high": high,
                "iou_given": iou_given,
                "pointing": pointing,
                "images": int(shown.sum()),
                "drawn": _mean(predicted[shown, label]),
                "score_present": _mean(scores[shown, label]),
                "deviation_present": float(scores[shown, label].std()) if shown.any() else None,
                "score_absent": _mean(scores[~shown, label]),
            }
        )
    return rows


def format_table(rows: Sequence[dict]) -> str:
    """The rows of `class_table` as aligned text."""
    width = max(len(row["class"]) for row in rows)
    bounds = any(row["iou_low"] is not None for row in rows)
    head = f"{'class':{width}}    IoU  {'  95 % interval  ' if bounds else ''}given  points"
    lines = [f"{head}  images  drawn  score if present  if absent"]
    for row in rows:
        cell = functools.partial(_cell, row)
        interval = f" {cell('iou_low', 5)} to {cell('iou_high', 5)}  " if bounds else ""
        lines.append(
            f"{row['class']:{width}}  {row['iou']:.3f}  {interval}{cell('iou_given', 5)}  "
            f"{cell('pointing', 6)}  {row['images']:6d}  {cell('drawn', 5)}  "
            f"{cell('score_present', 7)} +- {cell('deviation_present', 5)}  "
            f"{cell('score_absent', 9)}"
        )
    return "\n".join(lines)


def image_ious(records: Sequence[Record], classes: int) -> np.ndarray:
    """Mean IoU [n] of every image over the labels that occur or are predicted in it."""
    confusions = (total_confusion([record], classes) for record in records)
    return np.array([mean_iou(class_iou(confusion)) for confusion in confusions])


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Writes rows with equal keys under a header of these keys."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _occurring(records: Sequence[Record], classes: int, column: int) -> np.ndarray:
    """bool [n, C]: which labels occur in a column (0: truth, 1: prediction) of the counts."""
    found = np.zeros((len(records), classes), bool)
    for row, record in zip(found, records, strict=True):
        row[record.counts[0][:, column]] = True
    return found


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def _cell(row: dict, key: str, width: int) -> str:
    value = row[key]
    return f"{'-' if value is None else format(value, '.3f'):>{width}}"
