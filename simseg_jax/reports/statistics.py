"""Tables per class and per image, from the records of a segmentation test set."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simseg_jax.evaluators.metrics import class_iou, mean_iou
from simseg_jax.evaluators.records import Record, total_confusion


def class_table(records: Sequence[Record], ious: np.ndarray, names: Sequence[str]) -> list[dict]:
    """One row per class that occurs or is predicted, in label order.

    images: how many show the class. drawn: the share of them where it is predicted somewhere.
    score_present, deviation_present: mean and deviation of its image-text score on these images.
    score_absent: the mean on the others. The scores show whether a class is missed (as "person" in
    figure 14 of the paper) or confused with others.
    """
    present, predicted = (_occurring(records, len(names), column) for column in (0, 1))
    scores = np.array([record.scores[0] for record in records])
    rows = []
    for label, name in enumerate(names):
        if not np.isfinite(ious[label]):
            continue
        shown = present[:, label]
        rows.append(
            {
                "class": name,
                "iou": float(ious[label]),
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
    lines = [f"{'class':{width}}    IoU  images  drawn  score if present  if absent"]
    for row in rows:
        drawn, present, deviation, absent = (
            row[key] for key in ("drawn", "score_present", "deviation_present", "score_absent")
        )
        lines.append(
            f"{row['class']:{width}}  {row['iou']:.3f}  {row['images']:6d}  {_cell(drawn, 5)}  "
            f"{_cell(present, 7)} +- {_cell(deviation, 5)}  {_cell(absent, 9)}"
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


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.3f'):>{width}}"
