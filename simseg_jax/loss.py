"""Symmetric InfoNCE over the global batch (paper section 3.1) with the learnable temperature."""

import jax
import jax.numpy as jnp


def clip_temperature(temperature: jax.Array) -> jax.Array:
    """The temperature in effect: the parameter clipped to [0.001, 0.5], as the authors do."""
    return jnp.clip(temperature, 0.001, 0.5)


def contrastive_loss(
    images: jax.Array, texts: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean of the image-to-text and text-to-image cross entropies; pair i belongs to row i.

    images, texts: unit-length embeddings [B, D], B the global batch. Under jit with the batch
    sharded, XLA gathers one side: the value and gradient are those of one device.
    Returns the loss and its metrics: accuracies of both directions, the clipped temperature.
    """
    tau = clip_temperature(temperature)
    # Full float32 products: GPUs and TPUs would otherwise round the inputs.
    logits = jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST) / tau
    target = jnp.arange(logits.shape[0])
    matched = jnp.diagonal(logits)
    image_to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - matched)
    text_to_image = jnp.mean(jax.nn.logsumexp(logits, axis=0) - matched)
    metrics = {
        "i2t_accuracy": jnp.mean(jnp.argmax(logits, axis=1) == target),
        "t2i_accuracy": jnp.mean(jnp.argmax(logits, axis=0) == target),
        "temperature": tau,
    }
    return (image_to_text + text_to_image) / 2, metrics
