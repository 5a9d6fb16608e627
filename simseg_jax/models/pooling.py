"""LoDA's maximum response selection: per channel, the mean of the M largest values over tokens.

For the gradient only the positions of the maxima are kept, in one or two bytes each up to 65,536
tokens. Among equal values the first token's counts as the largest.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8

from simseg_jax.runtime.sharding import map_batch, target_device

# What one program of the Triton kernel keeps in registers.
TRITON_TOKENS, TRITON_CHANNELS = 256, 64


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
    return _forward(x, weights, m)[0]


def _forward(x: jax.Array, weights: jax.Array, m: int):
    tokens = x.shape[1]
    if _fits_triton(x):
        pooled, positions = map_batch(functools.partial(weighted_top_m_triton, m=m), x, weights)
    else:
        values, positions = top_m(x, m)
        # Values of rank >= count are the mask's fill; their weight is zero.
        pooled = jnp.sum(values * weights[:, :, None], axis=1)
        small = jnp.uint8 if tokens <= 256 else jnp.uint16 if tokens <= 65536 else jnp.int32
        positions = positions.astype(small)
    # An empty array tells the gradient N and the dtype of x without keeping x itself.
    return pooled, (positions, weights, jnp.empty((0, tokens, 0), x.dtype))


def _backward(m: int, residuals, gradient: jax.Array):
    positions, weights, like = residuals
    shape = (gradient.shape[0], like.shape[1], gradient.shape[1])
    token = jax.lax.broadcasted_iota(positions.dtype, shape, 1)
    # M comparisons that are fused into one write, where a scatter would need atomics on a GPU.
    total = jnp.zeros(shape, jnp.float32)
    for rank in range(m):
        share = gradient * weights[:, rank, None]
        total += jnp.where(token == positions[:, rank, None], share[:, None], 0)
    return total.astype(like.dtype), jnp.zeros_like(weights)


_weighted_top_m.defvjp(_forward, _backward)


def _fits_triton(x: jax.Array) -> bool:
    target = target_device()
    nvidia = target.platform == "gpu" and "NVIDIA" in target.device_kind
    return nvidia and x.shape[1] <= TRITON_TOKENS and x.shape[2] % TRITON_CHANNELS == 0


def weighted_top_m_triton(
    x: Float[Array, "B N D"], weights: Float[Array, "B {m}"], m: int, interpret: bool = False
) -> tuple[Float[Array, "B D"], UInt8[Array, "B ranks D"]]:
    """Weighted sum of the M maxima of every channel, and their tokens, on an NVIDIA GPU.

    x: [B, N, D] with at most TRITON_TOKENS tokens and a multiple of TRITON_CHANNELS channels.
    Returns float32 [B, D] and uint8 [B, R, D] with R >= m; the first m rows are the positions, in
    the order of `top_m`. Every program keeps all tokens of its channels in registers, so that x is
    read once; `top_m` reads it M times. interpret: runs on any device, slowly.
    """
    # Imported late: it takes most of a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    batch, tokens, channels = x.shape
    rows, ranks = pl.next_power_of_2(tokens), pl.next_power_of_2(m)

    def kernel(x_ref, weights_ref, pooled_ref, positions_ref):
        token = jax.lax.broadcasted_iota(jnp.int32, (rows, TRITON_CHANNELS), 0)
        rest = plgpu.load(x_ref, mask=token < tokens, other=-jnp.inf).astype(jnp.float32)
        total = jnp.zeros((1, TRITON_CHANNELS), jnp.float32)
        for rank in range(m):
            value = rest.max(axis=0, keepdims=True)
            position = jnp.where(rest == value, token, rows).min(axis=0, keepdims=True)
            rest = jnp.where(token == position, -jnp.inf, rest)
            total += value * weights_ref[rank]
            positions_ref[pl.ds(rank, 1), :] = position.astype(jnp.uint8)
        pooled_ref[...] = total

    def block(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, count, TRITON_CHANNELS), lambda row, part: (row, 0, part))

    padded = jnp.pad(weights, ((0, 0), (0, ranks - m)))
    pooled, positions = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((batch, 1, channels), jnp.float32),
            jax.ShapeDtypeStruct((batch, ranks, channels), jnp.uint8),
        ),
        grid=(batch, channels // TRITON_CHANNELS),
        in_specs=[block(rows), pl.BlockSpec((None, ranks), lambda row, part: (row, 0))],
        out_specs=(block(1), block(ranks)),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
    )(x, padded)
    return pooled[:, 0], positions


def mean_pool(
    x: Float[Array, "B N D"], mask: Shaped[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
    """Mean of the unmasked tokens, the paper's "w/o LoDA": [B, N, D] -> float32 [B, D]."""
    x = x.astype(jnp.float32)
    if mask is None:
        return x.mean(axis=1)
    weight = mask.astype(jnp.float32)[:, :, None]
    return (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
