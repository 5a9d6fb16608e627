"""What is measured on a segmentation test set, as sums that any selection of images can share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from simseg_jax.evaluators.records import Record

MEASURES = ("miou", "miou_given", "pointing")


class Quotients(NamedTuple):
    """A measure whose value for a class is a quotient of sums over images; its own is their mean.

    IoU divides pixels of the intersection by those of the union, the pointing game hits by trials.
    Both fields: float [n, C] for n images and C classes.
    """

    hits: np.ndarray
    trials: np.ndarray

    def of_classes(self, weights: Float[np.ndarray, "*R n"]) -> Float[np.ndarray, "*R C"]:
        """The values of every class, each image counted `weights` times; NaN without trials."""
        with np.errstate(invalid="ignore"):
            return (weights @ self.hits) / (weights @ self.trials)

    def mean(self, weights: Float[np.ndarray, "*R n"]) -> Float[np.ndarray, "*R"]:
        """The mean over the classes with trials; NaN if none has any."""
        return _mean(self.of_classes(weights))

    def mean_without_each(self) -> Float[np.ndarray, " n"]:
        """The mean over all images but one: the first, the second and so on."""
        with np.errstate(invalid="ignore"):
            return _mean((self.hits.sum(0) - self.hits) / (self.trials.sum(0) - self.trials))

    def without(self, image: int) -> "Quotients":
        """The same for all images but this one."""
        return Quotients(np.delete(self.hits, image, axis=0), np.delete(self.trials, image, axis=0))

    @property
    def once(self) -> Float[np.ndarray, " n"]:
        """The weights that count every image once."""
        return np.ones(len(self.hits))


def measures(records: Sequence[Record], classes: int, background: bool) -> dict[str, Quotients]:
    """The measures of a model under its first settings, by the names in MEASURES.

    background: whether label 0 is a class.
    """
    return {
        "miou": _ious([record.counts[0] for record in records], classes, background),
        "miou_given": _ious([record.given for record in records], classes, background),
        "pointing": _points(records, classes, column=1),
    }


def without_model(
    records: Sequence[Record], classes: int, background: bool
) -> dict[str, Quotients]:
    """What `measures` would be for an empty mask, for the largest class of an image everywhere,
    and for the patch in the middle of the image.
    """
    empty, largest = [], []
    for record in records:
        labels, pixels = record.truth.T
        things = np.where(labels > 0, pixels, 0)
        everywhere = labels[things.argmax()] if things.any() else 0
        empty.append(np.stack([labels, 0 * labels, pixels], axis=1))
        largest.append(np.stack([labels, 0 * labels + everywhere, pixels], axis=1))
    return {
        "miou": _ious(empty, classes, background),
        "miou_given": _ious(largest, classes, background),
        "pointing": _points(records, classes, column=2),
    }


def _mean(values: Float[np.ndarray, "*R C"]) -> Float[np.ndarray, "*R"]:
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=-1) / np.isfinite(values).sum(axis=-1)


def _ious(counts: Sequence[Int[np.ndarray, "m 3"]], classes: int, background: bool) -> Quotients:
    """IoU from rows (true label, predicted label, pixels) of every image."""
    found = Quotients(np.zeros((len(counts), classes)), np.zeros((len(counts), classes)))
    for hits, union, rows in zip(*found, counts, strict=True):
        truth, predicted, pixels = rows.T
        same = truth == predicted
        np.add.at(hits, truth[same], pixels[same])
        np.add.at(union, truth, pixels)
        np.add.at(union, predicted[~same], pixels[~same])
    if not background:
        found.hits[:, 0] = found.trials[:, 0] = 0
    return found


def _points(records: Sequence[Record], classes: int, column: int) -> Quotients:
    """The pointing game with the hits in this column of `Record.points`."""
    found = Quotients(np.zeros((len(records), classes)), np.zeros((len(records), classes)))
    for hits, trials, record in zip(*found, records, strict=True):
        labels = record.points[:, 0]
        hits[labels], trials[labels] = record.points[:, column], 1
    return found
