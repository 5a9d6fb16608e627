"""Symmetric InfoNCE over the global batch (paper section 3.1) with the learnable temperature.

`contrastive_loss` is the plain form. `chunked_contrastive_loss` gives the same result without
keeping all similarities.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped, UInt32

from simseg_jax.runtime.sharding import constrain_batch, device_count, gather_batch


def clip_temperature(temperature: Float[Array, ""]) -> Float[Array, ""]:
    """The temperature in effect: the parameter clipped to [0.001, 0.5], as the authors do."""
    return jnp.clip(temperature, 0.001, 0.5)


def contrastive_loss(
    images: Float[Array, "B D"],
    texts: Float[Array, "B D"],
    temperature: Float[Array, ""],
    groups: UInt32[Array, "B n"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of the image-to-text and text-to-image cross entropies; pair i belongs to row i.

    images, texts: unit-length embeddings [B, D] of the global batch. If it is split over devices,
    each compares its own images with all texts; loss and gradient are as on one device.
    groups: if given, all pairs with equal rows belong together: the cross entropy's target is
    spread evenly over them (Khosla et al., "Supervised Contrastive Learning", 2020, L_out).
    Returns the loss and the metrics: accuracies of both directions, the clipped temperature.
    """
    tau, pairs = clip_temperature(temperature), jnp.arange(len(images))
    logits = similarities(images, texts) / tau
    to_images = jax.nn.logsumexp(logits, axis=0)
    same = None
    if groups is not None:
        rows = groups.reshape(device_count(), -1, groups.shape[1])
        same = constrain_batch(_equal(rows, gather_batch(groups)).reshape(logits.shape))
    # A cross entropy is the log-sum-exp of a row or column minus the pair's logit; the logit is
    # subtracted here for both directions.
    to_texts = jax.nn.logsumexp(logits, axis=1) - 2 * _matched(logits, pairs, same)
    loss = (to_texts.sum() + to_images.sum()) / (2 * len(images))
    # argmax(axis=0): the first image with the highest logit. XLA would gather the maxima of all
    # devices on each of them for argmax, while max and min send B numbers each.
    highest = logits.max(axis=0, keepdims=True)
    best = jnp.where(logits == highest, pairs[:, None], len(images)).min(axis=0)
    metrics = {
        "i2t_accuracy": jnp.mean(_found(jnp.argmax(logits, axis=1), pairs, same)),
        "t2i_accuracy": jnp.mean(_matches(best, groups)),
        "temperature": tau,
    }
    return loss, metrics


def similarities(images: Float[Array, "B D"], texts: Float[Array, "B D"]) -> Float[Array, "B B"]:
    """Cosines [B, B] of every image (row) and text; rows are split over devices as images are."""
    rows = images.reshape(device_count(), -1, images.shape[1])
    cosines = _cosines(rows, gather_batch(texts))
    return constrain_batch(cosines.reshape(len(images), -1))


def chunked_contrastive_loss(
    images: Float[Array, "B D"],
    texts: Float[Array, "B D"],
    temperature: Float[Array, ""],
    chunk: int,
    groups: UInt32[Array, "B n"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`contrastive_loss` in less memory: no more than chunk x B similarities per device at a time.

    chunk: images per device compared at a time; a divisor of the images per device, or larger. Each
    chunk completes the sums over its rows and adds to the sums over columns. The gradient computes
    the similarities again.
    """
    tau = clip_temperature(temperature)
    batch, devices = len(images), device_count()
    rows = min(chunk, batch // devices)
    if batch % (devices * rows):
        raise ValueError(f"{batch} images on {devices} devices are not a multiple of chunk={rows}.")
    # All arrays have a leading axis over devices: each device sums on its own, and embeddings,
    # gradients and statistics of columns are exchanged once, not once per chunk.
    queries = constrain_batch(images.reshape(devices, -1, rows, images.shape[1]))
    keys = gather_batch(texts)
    pairs = constrain_batch(jnp.arange(batch).reshape(devices, -1, rows))
    own, others = None, None
    if groups is not None:
        own = constrain_batch(groups.reshape(devices, -1, rows, groups.shape[1]))
        others = gather_batch(groups)

    def compare(columns, inputs):
        # [devices, B] each: log-sum-exp, highest logit and the image that has it.
        total, best, where = columns
        queries, pairs, own = inputs
        same = None if own is None or others is None else _equal(own, others)
        logits = _cosines(queries, keys) / tau
        total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1))
        to_texts = jax.nn.logsumexp(logits, axis=2) - 2 * _matched(logits, pairs, same)
        logits = jax.lax.stop_gradient(logits)
        highest = logits.max(axis=1)
        first = jnp.take_along_axis(pairs, jnp.argmax(logits, axis=1), axis=1)
        columns = total, jnp.maximum(best, highest), jnp.where(highest > best, first, where)
        return columns, (to_texts, _found(jnp.argmax(logits, axis=2), pairs, same))

    nothing = jnp.full((devices, batch), -jnp.inf)
    start = jax.tree.map(
        constrain_batch, (nothing, nothing, jnp.zeros((devices, batch), jnp.int32))
    )
    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (queries, pairs, own))
    columns, (to_texts, found) = jax.lax.scan(jax.checkpoint(compare), start, inputs)
    total, best, where = columns
    to_images = jax.nn.logsumexp(total, axis=0)
    first = jnp.where(best == best.max(axis=0, keepdims=True), where, batch).min(axis=0)
    metrics = {
        "i2t_accuracy": jnp.mean(found),
        "t2i_accuracy": jnp.mean(_matches(first, groups)),
        "temperature": tau,
    }
    return (to_texts.sum() + to_images.sum()) / (2 * batch), metrics


def _cosines(images: jax.Array, texts: jax.Array) -> jax.Array:
    """[P, R, B] from images [P, R, D] and, on each of the P devices, all texts [P, B, D]."""
    # Full float32 products; GPUs and TPUs round the inputs by default.
    return jnp.einsum("prd,pbd->prb", images, texts, precision=jax.lax.Precision.HIGHEST)


def _equal(groups: UInt32[Array, "P R n"], others: UInt32[Array, "P B n"]) -> Bool[Array, "P R B"]:
    """Whether a row of `groups` equals one of `others`."""
    return jnp.all(groups[:, :, None] == others[:, None], axis=-1)


def _matched(
    logits: Float[Array, "*P R B"],
    pairs: Shaped[Array, "*P R"],
    same: Bool[Array, "*P R B"] | None,
) -> Float[Array, "*P R"]:
    """The logit of every row's own pair, or the mean over the pairs of its group."""
    if same is None:
        return jnp.take_along_axis(logits, pairs[..., None], axis=-1)[..., 0]
    return jnp.mean(logits, axis=-1, where=same)


def _found(
    best: Shaped[Array, "*P R"], pairs: Shaped[Array, "*P R"], same: Bool[Array, "*P R B"] | None
) -> Bool[Array, "*P R"]:
    """Whether the best text of every row is its own, or one of its group."""
    if same is None:
        return best == pairs
    return jnp.take_along_axis(same, best[..., None], axis=-1)[..., 0]


def _matches(best: Shaped[Array, " B"], groups: UInt32[Array, "B n"] | None) -> Bool[Array, " B"]:
    """Whether the best image of every text is its own, or one of its group."""
    if groups is None:
        return best == jnp.arange(len(best))
    return jnp.all(groups[best] == groups, axis=1)
