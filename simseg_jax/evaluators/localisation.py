"""Where a model sees the classes that an image shows, apart from whether it recognises them.

Both measures are given the classes of the ground truth and read nothing but the similarity maps:
neither the threshold on scores nor the refinement changes them.
"""

import numpy as np
from jaxtyping import Float, Int, Integer


def masks_of_given(
    maps: Float[np.ndarray, "C h w"],
    scores: Float[np.ndarray, " C"],
    shown: Integer[np.ndarray, " n"],
    background: bool,
) -> Int[np.ndarray, "h w"]:
    """Labels [h, w] of a grid of patches, from exactly the classes that are `shown`.

    With a background as the paper protocol without refinement: a class covers the patches where its
    map, scaled to [0, 1], exceeds 0.5, and among several classes the one of the highest score wins.
    Without a background every patch gets the class of the highest similarity.
    """
    labels = np.zeros(maps.shape[1:], np.int64)
    if not background and len(shown):
        return shown[maps[shown].argmax(axis=0)].astype(np.int64)
    for label in shown[np.argsort(-scores[shown], kind="stable")][::-1]:
        low, high = maps[label].min(), maps[label].max()
        labels[maps[label] - low > (high - low) / 2] = label
    return labels


def pointing_game(
    maps: Float[np.ndarray, "C h w"],
    truth: Integer[np.ndarray, "H W"],
    shown: Integer[np.ndarray, " n"],
) -> Int[np.ndarray, "m 3"]:
    """Whether the most similar patch lies on the class (Zhang et al., "Top-down Neural Attention
    by Excitation Backprop", 2016; here without their tolerance of 15 pixels).

    The rows are (class, whether the centre of its most similar patch has that class, whether the
    centre of the patch in the middle of the image has it: their "Center"). Patches with an ignored
    centre are not chosen: the next similar one, or the next to the middle, takes their place.
    """
    grid = maps.shape[1:]
    rows, columns = (
        ((np.arange(n) + 0.5) * size / n).astype(int)
        for n, size in zip(grid, truth.shape, strict=True)
    )
    centres = truth[rows][:, columns]
    labelled = centres != 255
    y, x = ((np.arange(n) - (n - 1) / 2) ** 2 for n in grid)
    middle = np.where(labelled, y[:, None] + x, np.inf).argmin()
    found = []
    for label in shown if labelled.any() else ():
        best = np.where(labelled, maps[label], -np.inf).argmax()
        found.append((label, centres.flat[best] == label, centres.flat[middle] == label))
    return np.array(found, np.int64).reshape(-1, 3)
