"""Pieces both encoders share: attention, dropout with explicit keys, the GELU MLP."""

import jax
import jax.numpy as jnp
from flax import nnx


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; without a key (evaluation) the identity."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    query, key, value: [batch, tokens, heads, width]; mask: boolean, broadcastable to
    [batch, heads, query tokens, key tokens]. With a dropout key the probabilities are dropped.
    """
    # Heads before tokens: plain batched products, on CPU twice as fast as the interleaved layout.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    probabilities = dropout(jax.nn.softmax(logits), dropout_rate, dropout_key)
    out = jnp.einsum("bhqk,bhkd->bhqd", probabilities.astype(value.dtype), value)
    return jnp.swapaxes(out, 1, 2)


def linear(width_in: int, width_out: int, kernel_init, dtype, rngs, use_bias=True) -> nnx.Linear:
    """A linear layer with float32 parameters that computes in `dtype`."""
    return nnx.Linear(
        width_in, width_out, use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, rngs=rngs
    )


def torch_linear_init():
    """PyTorch's default for linear and convolution weights: uniform within 1/sqrt(fan in)."""
    return nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
