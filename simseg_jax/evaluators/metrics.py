"""Metrics in plain NumPy."""

import numpy as np
from jaxtyping import Float, Int, Integer


def confusion_matrix(
    prediction: Integer[np.ndarray, "H W"], truth: Integer[np.ndarray, "H W"], classes: int
) -> Int[np.ndarray, "{classes} {classes}"]:
    """Pixel counts int64 [classes, classes], rows truth, columns prediction; truth 255 is ignored.

    Summable over images. Other labels outside [0, classes) are an error in the data.
    """
    valid = truth != 255
    truth, prediction = truth[valid].astype(np.int64), prediction[valid].astype(np.int64)
    for name, labels in (("truth", truth), ("prediction", prediction)):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{name} has label {labels.max()}, but there are {classes} classes.")
    counts = np.bincount(truth * classes + prediction, minlength=classes**2)
    return counts.reshape(classes, classes)


def class_iou(confusion: Int[np.ndarray, "C C"]) -> Float[np.ndarray, " C"]:
    """Intersection over union per class, float64; NaN for classes neither present nor predicted."""
    intersection = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    with np.errstate(invalid="ignore"):
        return intersection / union


def mean_iou(ious: Float[np.ndarray, " C"]) -> float:
    """Mean of the class IoUs that are defined, a fraction; NaN if none is."""
    defined = ious[np.isfinite(ious)]
    return float(defined.mean()) if len(defined) else float("nan")


def recall_at(
    nearest: tuple[Int[np.ndarray, "N K"], Int[np.ndarray, "M L"]],
    owners: Int[np.ndarray, " M"],
    k: int,
) -> tuple[float, float]:
    """R@k of image-to-text and text-to-image retrieval, fractions.

    nearest: of `evaluators.ranking.nearest`, K and L at least k. owners: the image of every text.
    An image counts as right if one of its texts is among the first k.
    """
    of_images, of_texts = nearest
    known = of_images[:, :k]
    right = (owners[known] == np.arange(len(known))[:, None]) & (known >= 0)
    return (
        float(right.any(axis=1).mean()),
        float((of_texts[:, :k] == owners[:, None]).any(axis=1).mean()),
    )


def top_accuracy(
    scores: Float[np.ndarray, "N C"], labels: Integer[np.ndarray, " N"], k: int
) -> float:
    """Share of rows of `scores` [N, C] whose label is among the k highest; ties by position."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((order == labels[:, None]).any(axis=1).mean())
