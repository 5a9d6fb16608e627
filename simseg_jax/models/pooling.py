"""LoDA's maximum response selection: per channel, the mean of the M largest values over tokens.

The forward pass keeps the positions of the maxima only (one or two bytes each); the gradient is
written from them in one pass. Ties go to the token that comes first.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def top_m(
    x: Float[Array, "B N D"], m: int
) -> tuple[Float[Array, "B {m} D"], Int[Array, "B {m} D"]]:
    """Values and token positions of the M maxima of every channel, in descending order.

    x: [B, N, D], m <= N. Returns float32 values and int32 positions, both [B, M, D].
    """
    x = x.astype(jnp.float32)
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    value = jnp.full((x.shape[0], 1, x.shape[2]), jnp.inf)
    position = jnp.full(value.shape, -1, jnp.int32)
    values, positions = [], []
    # Each maximum is the largest entry that comes after the previous one, in descending order of
    # value and, among equals, ascending order of token: plain reductions that only read x.
    for _ in range(m):
        later = (x < value) | ((x == value) & (token > position))
        value = jnp.where(later, x, -jnp.inf).max(axis=1, keepdims=True)
        here = later & (x == value)
        position = jnp.where(here, token, x.shape[1]).min(axis=1, keepdims=True)
        values.append(value)
        positions.append(position)
    return jnp.concatenate(values, axis=1), jnp.concatenate(positions, axis=1)


@functools.partial(jax.jit, static_argnames="m")
def top_m_pool(
    x: Float[Array, "B N D"], m: int, mask: Shaped[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
    """Mean of the M largest values of every channel (paper eq. 4): [B, N, D] -> float32 [B, D].

    mask: [B, N], False for tokens that must not be chosen (padding). An example with fewer than M
    unmasked tokens averages those it has, so the result never depends on the rest of the batch.
    """
    m = min(m, x.shape[1])
    if mask is None:
        weights = jnp.full((x.shape[0], m), 1 / m, jnp.float32)
    else:
        mask = mask.astype(bool)
        count = jnp.clip(mask.sum(axis=1, keepdims=True), 1, m)
        weights = (jnp.arange(m)[None] < count) / count.astype(jnp.float32)
        x = jnp.where(mask[:, :, None], x, jnp.finfo(x.dtype).min)
    return _weighted_top_m(x, weights, m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weighted_top_m(x: jax.Array, weights: jax.Array, m: int) -> jax.Array:
    values, _ = top_m(x, m)
    return _weighted_sum(values, weights)


def _weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    # Values of rank >= count are the mask's fill; their weight is zero.
    return jnp.sum(values * weights[:, :, None], axis=1)


def _forward(x: jax.Array, weights: jax.Array, m: int):
    values, positions = top_m(x, m)
    tokens = x.shape[1]
    small = jnp.uint8 if tokens <= 256 else jnp.uint16 if tokens <= 65536 else jnp.int32
    # An empty array carries the shape and dtype of x without keeping x itself.
    like = jnp.empty((0, tokens, 0), x.dtype)
    return _weighted_sum(values, weights), (positions.astype(small), weights, like)


def _backward(m: int, residuals, gradient: jax.Array):
    positions, weights, like = residuals
    shape = (gradient.shape[0], like.shape[1], gradient.shape[1])
    token = jax.lax.broadcasted_iota(positions.dtype, shape, 1)
    # M comparisons fused into one write: no scatter, and no atomics on a GPU.
    total = jnp.zeros(shape, jnp.float32)
    for rank in range(m):
        share = gradient * weights[:, rank, None]
        total += jnp.where(token == positions[:, rank, None], share[:, None], 0)
    return total.astype(like.dtype), jnp.zeros_like(weights)


_weighted_top_m.defvjp(_forward, _backward)


def mean_pool(
    x: Float[Array, "B N D"], mask: Shaped[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
    """Mean over (unmasked) tokens, the "w/o LoDA" baseline: [B, N, D] -> float32 [B, D]."""
    x = x.astype(jnp.float32)
    if mask is None:
        return x.mean(axis=1)
    weight = mask.astype(jnp.float32)[:, :, None]
    return (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
