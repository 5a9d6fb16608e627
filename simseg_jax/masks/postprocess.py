"""From class scores and similarity maps to index masks (method of the paper, section 3.3).

The jax functions are batched and traceable; they run inside one jitted program per batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def adaptive_threshold(scores: jax.Array, top_k: int, sigma_weight: float) -> jax.Array:
    """Mean plus sigma_weight standard deviations (unbiased) of the top-k scores: [B, C] -> [B]."""
    top, _ = jax.lax.top_k(scores, min(top_k, scores.shape[1]))
    return jnp.mean(top, axis=1) + sigma_weight * jnp.std(top, axis=1, ddof=1)


def candidate_classes(
    scores: jax.Array, threshold: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` best classes in order and which of them may be drawn: int32, bool [B, count].

    Class 0 (background) takes a place but is never drawn.
    """
    best, classes = jax.lax.top_k(scores, min(count, scores.shape[1]))
    return classes, (best >= threshold[:, None]) & (classes != 0)


def min_max(maps: jax.Array) -> jax.Array:
    """Each map [..., h, w] scaled to [0, 1]; a constant map becomes 0."""
    low = maps.min(axis=(-2, -1), keepdims=True)
    spread = maps.max(axis=(-2, -1), keepdims=True) - low
    return jnp.where(spread > 0, (maps - low) / jnp.where(spread > 0, spread, 1), 0)


def upsample(maps: jax.Array, factor: int) -> jax.Array:
    """Nearest-neighbour upsampling of [..., h, w] by an integer factor."""
    return jnp.repeat(jnp.repeat(maps, factor, axis=-2), factor, axis=-1)


def closing(masks: jax.Array, side: int = 7) -> jax.Array:
    """One dilation, then one erosion of boolean [..., H, W] by a square of `side` pixels.

    Pixels outside the image count for neither, as in OpenCV.
    """

    def along(masks: jax.Array, axis: int, initial: bool, operation: Callable) -> jax.Array:
        # A square is a row of columns: two short windows instead of side x side comparisons.
        window = tuple(side if i == axis else 1 for i in range(masks.ndim))
        strides = (1,) * masks.ndim
        return jax.lax.reduce_window(masks, initial, operation, window, strides, "SAME")

    for initial, operation in ((False, jax.lax.bitwise_or), (True, jax.lax.bitwise_and)):
        for axis in (masks.ndim - 1, masks.ndim - 2):
            masks = along(masks, axis, initial, operation)
    return masks


def compose(masks: jax.Array, scores: jax.Array, classes: jax.Array, drawn: jax.Array) -> jax.Array:
    """Index masks [B, H, W] of `label_type` from per-candidate masks [B, K, H, W].

    The original multiplies every mask with its class score and takes the argmax over classes with
    0 for the background. Candidates come in descending order of score, so that is the first
    candidate whose mask is set, provided its score is positive.
    """
    drawn &= jnp.take_along_axis(scores, classes, axis=1) > 0
    masks = masks & drawn[:, :, None, None]
    first = jnp.argmax(masks, axis=1)
    label = jnp.take_along_axis(classes[:, :, None, None], first[:, None], axis=1)[:, 0]
    return jnp.where(masks.any(axis=1), label, 0).astype(label_type(scores.shape[1]))


def label_type(classes: int) -> Any:
    """The unsigned integer type that holds labels of so many classes, at most 65,536."""
    return np.uint8 if classes <= 256 else np.uint16


def resize_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w] -> [height, width] as OpenCV's INTER_NEAREST, at every pixel.

    OpenCV takes the source index floor(i * (1 / (new / old))). Rounded twice, that is not
    floor(i * old / new): at 288 pixels they differ for 97 of the new sizes from 100 to 1024.
    """
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(np.intp), old - 1)
        for old, new in zip(mask.shape, (height, width), strict=True)
    )
    return mask[:, columns][rows]
