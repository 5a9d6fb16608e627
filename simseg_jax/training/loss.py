"""Symmetric InfoNCE over the global batch (paper section 3.1) with the learnable temperature."""

import jax
import jax.numpy as jnp

from simseg_jax.runtime.sharding import constrain_batch, device_count, gather_batch


def clip_temperature(temperature: jax.Array) -> jax.Array:
    """The temperature in effect: the parameter clipped to [0.001, 0.5], as the authors do."""
    return jnp.clip(temperature, 0.001, 0.5)


def contrastive_loss(
    images: jax.Array, texts: jax.Array, temperature: jax.Array, chunk: int = 0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean of the image-to-text and text-to-image cross entropies; pair i belongs to row i.

    images, texts: unit-length embeddings [B, D], B the global batch. Under jit with the batch
    sharded, the texts are gathered and every device compares its own images with all of them: the
    value and gradient are those of one device. chunk: images per device compared at a time, 0 for
    all; it divides those a device has, or is larger. No more than chunk x B similarities exist at
    once then; the gradient computes them again.
    Returns the loss and its metrics: accuracies of both directions, the clipped temperature.
    """
    tau = clip_temperature(temperature)
    batch, parts = len(images), device_count()
    rows = min(chunk or batch, batch // parts)
    if batch % (parts * rows):
        raise ValueError(f"{batch} images on {parts} devices are no multiple of chunk={rows}.")
    # Everything has a leading axis over the devices, so that each sums up on its own and they
    # exchange embeddings, gradients and statistics of columns once, not once per chunk.
    queries = constrain_batch(images.reshape(parts, -1, rows, images.shape[1]))
    keys = gather_batch(texts)
    targets = constrain_batch(jnp.arange(batch).reshape(parts, -1, rows))

    def compare(columns, inputs):
        total, best, where = columns
        queries, targets = inputs
        # Full float32 products: GPUs and TPUs would otherwise round the inputs.
        logits = jnp.einsum("prd,pbd->prb", queries, keys, precision=jax.lax.Precision.HIGHEST)
        logits /= tau
        total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1))
        matched = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=2) - 2 * matched
        logits = jax.lax.stop_gradient(logits)
        higher = logits.max(axis=1) > best
        first = jnp.take_along_axis(targets, jnp.argmax(logits, axis=1), axis=1)
        columns = total, jnp.maximum(best, logits.max(axis=1)), jnp.where(higher, first, where)
        return columns, (loss, jnp.argmax(logits, axis=2) == targets)

    start = jnp.full((parts, batch), -jnp.inf)
    columns = (start, start, jnp.zeros((parts, batch), jnp.int32))
    columns = jax.tree.map(constrain_batch, columns)
    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (queries, targets))
    if len(inputs[0]) == 1:
        columns, outputs = compare(columns, jax.tree.map(lambda x: x[0], inputs))
    else:
        columns, outputs = jax.lax.scan(jax.checkpoint(compare), columns, inputs)
    total, best, where = columns
    loss, found = outputs
    # Of equal similarities the first counts, as for argmax; devices exchange B numbers twice, where
    # an argmax over them would gather devices x B.
    first = jnp.where(best == best.max(axis=0, keepdims=True), where, batch).min(axis=0)
    found_by_text = first == jnp.arange(batch)
    metrics = {
        "i2t_accuracy": jnp.mean(found),
        "t2i_accuracy": jnp.mean(found_by_text),
        "temperature": tau,
    }
    return (loss.sum() + jax.nn.logsumexp(total, axis=0).sum()) / (2 * batch), metrics
