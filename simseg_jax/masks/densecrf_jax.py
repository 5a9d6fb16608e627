"""The dense CRF of `densecrf` for a batch of images on an accelerator, as traceable functions.

The lattice of an image is built once for all of its masks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from simseg_jax.masks.densecrf import CRF, EPSILON, PAPER
from simseg_jax.masks.permutohedral import embedding
from simseg_jax.masks.permutohedral_jax import BatchLattice, build_lattice
from simseg_jax.runtime.errors import UserError


def lattice_size(height: int, width: int) -> int:
    """Vertices per image to allocate at first: twice the mean of photographs of 288x288 pixels.

    The images of a batch share their room. Noise needs ten times as much: see `BatchLattice.count`.
    """
    return height * width * 3 // 8


def crf_masks(
    images: UInt8[Array, "B H W 3"],
    foreground: Float[Array, "B K H W"],
    positions: BatchLattice,
    vertices: int,
    crf: CRF = PAPER,
    needed: Bool[Array, " K"] | None = None,
) -> tuple[Bool[Array, "B K H W"], Int[Array, ""]]:
    """(masks bool [B, K, H, W] of two-label problems, vertices that were needed per image).

    images: uint8 [B, H, W, 3]; foreground: probabilities float32 [B, K, H, W]; positions: from
    `batch_positions`; vertices: room to allocate per image, as a mean over the batch. The masks are
    correct only if no more vertices were needed. needed: bool [K]; other masks stay empty.
    """
    message, used = _message(images, positions, vertices, crf)
    batch, count, height, width = foreground.shape

    def refine(k, masks):
        p = jax.lax.dynamic_index_in_dim(foreground, k, axis=1, keepdims=False).reshape(-1)
        # The barrier keeps XLA from reordering (1 - p) + 1e-8 to (1 + 1e-8) - p, which is 1 - p.
        unary = jnp.log(p + EPSILON) - jnp.log(jax.lax.optimization_barrier(1 - p) + EPSILON)

        def update(_, odds):
            return unary + message(jnp.tanh(odds * 0.5))

        odds = jax.lax.fori_loop(0, crf.iterations, update, unary)
        mask = (odds > 0).reshape(batch, 1, height, width)
        return jax.lax.dynamic_update_slice_in_dim(masks, mask, k, axis=1)

    def refine_if_needed(k, masks):
        if needed is None:
            return refine(k, masks)
        return jax.lax.cond(needed[k], lambda masks: refine(k, masks), lambda masks: masks, masks)

    empty = jnp.zeros(foreground.shape, bool)
    return jax.lax.fori_loop(0, count, refine_if_needed, empty), used


def crf_probabilities(
    images: UInt8[Array, "B H W 3"],
    labels: Float[Array, "B L H W"],
    positions: BatchLattice,
    vertices: int,
    crf: CRF = PAPER,
) -> tuple[Float[Array, "B L H W"], Int[Array, ""]]:
    """(label distributions float32 [B, L, H, W] after inference, vertices needed per image).

    labels: probabilities of L exclusive labels, float32 [B, L, H, W]. Other arguments and the limit
    on vertices: as in `crf_masks`.
    """
    message, used = _message(images, positions, vertices, crf)
    batch, count, height, width = labels.shape
    unary = jnp.log(labels.swapaxes(0, 1).reshape(count, -1) + EPSILON)

    def update(_, q):
        return jax.nn.softmax(unary + jax.lax.map(message, q), axis=0)

    q = jax.lax.fori_loop(0, crf.iterations, update, jax.nn.softmax(unary, axis=0))
    return q.reshape(count, batch, height, width).swapaxes(0, 1), used


def _message(images: jax.Array, positions: BatchLattice, vertices: int, crf: CRF):
    """(filter of [B * H * W] with the weighted sum of both kernels, vertices needed per image)."""
    batch, height, width, _ = images.shape
    space = embedding(height, width, crf.bilateral_sxy, crf.bilateral_srgb)
    if space.keys >= 2**31:
        raise UserError(
            f"The lattice of {width}x{height} pixels with bilateral_sxy={crf.bilateral_sxy:g} and "
            f"bilateral_srgb={crf.bilateral_srgb:g} is too fine to number its vertices with 32 "
            "bits: raise one of them or set crf.backend to numpy."
        )
    slots = 1 << (4 * vertices - 1).bit_length()  # The power of two from 4 * vertices on.
    bilateral = build_lattice(space, images, batch * vertices, slots)
    near, alike = positions.norm(), bilateral.norm()

    def message(x: jax.Array) -> jax.Array:
        gaussian = crf.gaussian_compat * near * positions.filter(x * near)
        return gaussian + crf.bilateral_compat * alike * bilateral.filter(x * alike)

    # The mean per image, rounded up; it is huge if the hash table overflowed.
    return message, (bilateral.count - 1) // batch + 1
