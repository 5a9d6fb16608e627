"""The dense CRF of `densecrf` for a batch on an accelerator, as one traceable function.

The lattice of an image is built once and shared by its classes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from simseg_jax.masks.densecrf import CRF, EPSILON, PAPER
from simseg_jax.masks.permutohedral import embedding
from simseg_jax.masks.permutohedral_jax import BatchLattice, build_lattice
from simseg_jax.runtime.errors import UserError


def lattice_size(height: int, width: int) -> int:
    """Vertices per image to begin with: twice the mean of photographs of 288x288 pixels.

    Room is pooled over the batch. Noise needs ten times as much; see `BatchLattice.count`.
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
    """Masks bool [B, K, H, W] of two-label problems, and the vertices needed per image.

    images: uint8 [B, H, W, 3]; foreground: probabilities float32 [B, K, H, W]; positions: of
    `batch_positions`; vertices: room per image on average over the batch. The masks are right only
    if no more than that were needed. needed: bool [K], leave the other masks empty.
    """
    message, used = _message(images, positions, vertices, crf)
    batch, count, height, width = foreground.shape

    def refine(k, masks):
        p = jax.lax.dynamic_index_in_dim(foreground, k, axis=1, keepdims=False).reshape(-1)
        # The barrier keeps XLA from adding the constants of (1 - p) + 1e-8 up to 1.
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
    """Label distributions float32 [B, L, H, W] after inference, and the vertices needed per image.

    labels: probabilities of L exclusive labels, float32 [B, L, H, W]; the rest as in `crf_masks`.
    """
    message, used = _message(images, positions, vertices, crf)
    batch, count, height, width = labels.shape
    unary = jnp.log(labels.swapaxes(0, 1).reshape(count, -1) + EPSILON)

    def update(_, q):
        return jax.nn.softmax(unary + jax.lax.map(message, q), axis=0)

    q = jax.lax.fori_loop(0, crf.iterations, update, jax.nn.softmax(unary, axis=0))
    return q.reshape(count, batch, height, width).swapaxes(0, 1), used


def _message(images: jax.Array, positions: BatchLattice, vertices: int, crf: CRF):
    """The weighted sum of both kernels as a function of [B * H * W], and vertices per image."""
    batch, height, width, _ = images.shape
    space = embedding(height, width, crf.bilateral_sxy, crf.bilateral_srgb)
    if space.keys >= 2**31:
        raise UserError(
            f"The lattice of {width}x{height} pixels with bilateral_sxy={crf.bilateral_sxy:g} and "
            f"bilateral_srgb={crf.bilateral_srgb:g} is too fine to number with 32 bits: raise one "
            "of them or use the NumPy back end."
        )
    slots = 1 << (4 * vertices - 1).bit_length()
    bilateral = build_lattice(space, images, batch * vertices, slots)
    near, alike = positions.norm(), bilateral.norm()

    def message(x: jax.Array) -> jax.Array:
        gaussian = crf.gaussian_compat * near * positions.filter(x * near)
        return gaussian + crf.bilateral_compat * alike * bilateral.filter(x * alike)

    # Rounded up, and large when the table overflowed.
    return message, (bilateral.count - 1) // batch + 1
