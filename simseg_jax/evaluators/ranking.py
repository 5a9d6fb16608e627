"""The nearest texts of every image and the nearest images of every text, in bounded memory."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from simseg_jax.runtime.sharding import make_mesh

IMAGE_CHUNK, TEXT_CHUNK = 1024, 8192


def nearest(
    images, texts, k: int, devices: Sequence | None = None, progress=iter
) -> tuple[Int[np.ndarray, "N {k}"], Int[np.ndarray, "M {k}"]]:
    """(numbers of the k nearest texts int32 [N, k], of the k nearest images int32 [M, k]).

    images, texts: float32 [N, D], [M, D]; arrays or memory maps, which are read in parts.
    Similarities are sorted in descending order; of equal ones the lower number comes first. Rows
    with fewer than k entries end with -1. All images stay on the devices. A device holds the
    similarities of IMAGE_CHUNK x TEXT_CHUNK pairs at a time and computes each once for both
    directions. progress: wraps the iterator over chunks of texts, to show a bar.
    """
    devices = devices or jax.local_devices()
    counts = (len(images), len(texts))
    starts = range(0, len(images), IMAGE_CHUNK)
    # Chunks of images are dealt out to the devices and stay there, with the best texts so far.
    homes = [devices[i % len(devices)] for i in range(len(starts))]
    chunks = [
        jax.device_put(_chunk(images, start, IMAGE_CHUNK), home)
        for start, home in zip(starts, homes, strict=True)
    ]
    best = [jax.device_put(_nothing(IMAGE_CHUNK, k), home) for home in homes]
    used = list(dict.fromkeys(homes))
    of_texts = np.empty((len(texts), k), np.int32)
    for begin in progress(range(0, len(texts), TEXT_CHUNK)):
        block = _chunk(texts, begin, TEXT_CHUNK)
        blocks = {device: jax.device_put(block, device) for device in used}
        found = {device: jax.device_put(_nothing(TEXT_CHUNK, k), device) for device in used}
        for i, (start, home) in enumerate(zip(starts, homes, strict=True)):
            # A training run's context has the mesh of all devices; this work is on one.
            with jax.set_mesh(make_mesh(devices=[home])):
                best[i], found[home] = _merge(
                    chunks[i], blocks[home], best[i], found[home], (start, begin), counts
                )
        rows = of_texts[begin : begin + TEXT_CHUNK]
        rows[:] = _join([found[device] for device in used], k)[: len(rows)]
    of_images = np.concatenate([np.asarray(numbers) for _, numbers in best])
    return of_images[: len(images)], of_texts


def _nothing(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, numbers) [rows, k] before any pair has been seen."""
    return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1, np.int32)


def _chunk(embeddings, start: int, size: int) -> np.ndarray:
    """`size` rows from `start` on; zeros fill up the last chunk, so that all have one shape."""
    part = np.asarray(embeddings[start : start + size], np.float32)
    return np.pad(part, ((0, size - len(part)), (0, 0)))


@functools.partial(jax.jit, donate_argnums=(2, 3))
def _merge(images, texts, of_images, of_texts, starts, counts):
    """Updates the best (scores, numbers) of both directions with the pairs of two chunks."""
    similarity = jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)
    rows = jnp.arange(len(images)) + starts[0]
    columns = jnp.arange(len(texts)) + starts[1]
    inside = (rows < counts[0])[:, None] & (columns < counts[1])[None]
    similarity = jnp.where(inside, similarity, -jnp.inf)

    def best(state, similarity, numbers):
        scores, known = state
        k = scores.shape[1]
        top, places = jax.lax.top_k(similarity, min(k, similarity.shape[1]))
        # The known ones have lower numbers and come first, since top_k prefers the first of ties.
        scores, order = jax.lax.top_k(jnp.concatenate([scores, top], axis=1), k)
        known = jnp.concatenate([known, numbers[places].astype(jnp.int32)], axis=1)
        known = jnp.take_along_axis(known, order, axis=1)
        return scores, jnp.where(scores > -jnp.inf, known, -1)

    return best(of_images, similarity, columns), best(of_texts, similarity.T, rows)


def _join(parts: list[Any], k: int) -> np.ndarray:
    """The numbers int32 [rows, k] of the best among the (scores, numbers) of several devices."""
    scores = np.concatenate([np.asarray(scores) for scores, _ in parts], axis=1)
    numbers = np.concatenate([np.asarray(numbers) for _, numbers in parts], axis=1)
    # Descending by score, then ascending by number.
    order = np.lexsort((numbers, -scores), axis=1)[:, :k]
    return np.take_along_axis(numbers, order, axis=1)
