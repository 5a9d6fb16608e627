"""Metrics of segmentation, retrieval and classification in NumPy."""

import numpy as np
from jaxtyping import Float, Int, Integer


def confusion_matrix(
    prediction: Integer[np.ndarray, "H W"], truth: Integer[np.ndarray, "H W"], classes: int
) -> Int[np.ndarray, "{classes} {classes}"]:
    """Pixel counts int64 [classes, classes]: rows are the truth, columns the prediction.

    Pixels with truth 255 are ignored; a `ValueError` for any other label outside [0, classes). The
    matrices of several images can be added.
    """
    valid = truth != 255
    truth, prediction = truth[valid].astype(np.int64), prediction[valid].astype(np.int64)
    for name, labels in (("truth", truth), ("prediction", prediction)):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{name} has label {labels.max()}, but there are {classes} classes.")
    counts = np.bincount(truth * classes + prediction, minlength=classes**2)
    return counts.reshape(classes, classes)


def class_iou(confusion: Int[np.ndarray, "C C"]) -> Float[np.ndarray, " C"]:
    """IoU of every class, float64; NaN for a class that is neither present nor predicted."""
    intersection = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    with np.errstate(invalid="ignore"):
        return intersection / union


def mean_iou(ious: Float[np.ndarray, " C"]) -> float:
    """Mean of the class IoUs that are not NaN, a fraction; NaN if all are."""
    defined = ious[np.isfinite(ious)]
    return float(defined.mean()) if len(defined) else float("nan")


def recall_at(
    nearest: tuple[Int[np.ndarray, "N K"], Int[np.ndarray, "M L"]],
    owners: Int[np.ndarray, " M"],
    k: int,
) -> tuple[float, float]:
    """(R@k of image-to-text, R@k of text-to-image retrieval), fractions.

    nearest: from `evaluators.ranking.nearest`, with K and L at least k. owners: the image of every
    text. An image is a hit if one of its texts is among the first k.
    """
    of_images, of_texts = nearest
    texts = of_images[:, :k]
    image_hits = (owners[texts] == np.arange(len(texts))[:, None]) & (texts >= 0)
    text_hits = of_texts[:, :k] == owners[:, None]
    return float(image_hits.any(axis=1).mean()), float(text_hits.any(axis=1).mean())


def top_accuracy(
    scores: Float[np.ndarray, "N C"], labels: Integer[np.ndarray, " N"], k: int
) -> float:
    """Share of rows of `scores` [N, C] whose label is among the k highest; ties by position."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((order == labels[:, None]).any(axis=1).mean())
