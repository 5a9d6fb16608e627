"""Pixel-adaptive mask refinement: PAMR (Araslanov & Roth, CVPR 2020), as TCL (CVPR 2023) uses it.

In each of ten steps the mask value of a pixel becomes a weighted mean of its neighbours' values.
Neighbours of similar colour have larger weights. Unlike the dense CRF, PAMR is local and runs
entirely on the device.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from simseg_jax.runtime.ranges import several, whole
from simseg_jax.runtime.settings import setting

DILATIONS = (1, 2, 4, 8, 12, 24)
# Colour differences are divided by a tenth of the local standard deviation, plus EPS in case that
# the region is flat.
SHARPNESS, EPS = 0.1, 1e-8


@dataclasses.dataclass(frozen=True)
class PAMR:
    """How PAMR smooths masks."""

    iterations: int = setting(10, "smoothing steps", whole(1, 1000))
    dilations: tuple[int, ...] = setting(
        DILATIONS,
        "distances of the neighbours in pixels",
        several(whole(1, 256), range(1, 17), "1 to 16 distances"),
    )


@functools.partial(jax.jit, static_argnames=("iterations", "dilations"))
def pamr(
    images: Shaped[Array, "B H W 3"],
    masks: Float[Array, "B K H W"],
    iterations: int = 10,
    dilations: tuple[int, ...] = DILATIONS,
) -> Float[Array, "B K H W"]:
    """Refined soft masks float32 [B, K, H, W].

    images: [B, H, W, 3], uint8 or float. TCL passes ImageNet-normalised values. Any other range
    gives the same result, because a channel's scale and offset cancel in the affinity (except for
    EPS, which is far below one grey level). masks: [B, K, H, W]; values in [0, 1] stay there up to
    rounding. The K masks share one affinity [B, 8 * len(dilations), H, W], the largest array here.
    """
    weights = affinity(images, dilations)

    def smooth(_, masks: jax.Array) -> jax.Array:
        refined = jnp.zeros_like(masks)
        for n, view in enumerate(neighbours(masks, dilations)):
            refined += weights[:, n, None] * view
        return refined

    return jax.lax.fori_loop(0, iterations, smooth, masks.astype(jnp.float32))


def affinity(
    images: Shaped[Array, "B H W 3"], dilations: Sequence[int]
) -> Float[Array, "B 8*{len(dilations)} H W"]:
    """Weights of every pixel's neighbours, [B, H, W, 3] -> [B, 8 * len(dilations), H, W], sum 1.

    The weights are the softmax over the neighbours of -|difference| / (0.1 * deviation), averaged
    over the colour channels. The deviation is the unbiased one of all 3x3 windows together, one
    window per dilation; the pixel itself therefore counts once per dilation.
    """
    channels = jnp.moveaxis(images.astype(jnp.float32), -1, 1)
    total, squares = jnp.zeros_like(channels), jnp.zeros_like(channels)
    for view in neighbours(channels, dilations):
        total += view - channels
        squares += (view - channels) ** 2
    # The one-pass formula is accurate enough here: differences are taken to the pixel, which is a
    # ninth of the sample, so that the subtraction leaves at least a ninth of `squares`.
    count = 9 * len(dilations)
    deviation = jnp.sqrt((squares - total**2 / count) / (count - 1))
    scale = 1 / (EPS + SHARPNESS * deviation)
    logits = []
    for view in neighbours(channels, dilations):
        far = jnp.abs(view - channels) * scale
        # Not jnp.mean, which is six times slower: XLA on CPUs does not fuse that reduction.
        logits.append((far[:, 0] + far[:, 1] + far[:, 2]) / -3)
    return jax.nn.softmax(jnp.stack(logits, axis=1), axis=1)


def neighbours(
    x: Float[Array, "*B H W"], dilations: Sequence[int]
) -> Iterator[Float[Array, "*B H W"]]:
    """The 8 neighbours at each distance as shifted [..., H, W]; pixels at the border repeat."""
    height, width = x.shape[-2:]
    reach = max(dilations)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(reach, reach)] * 2, mode="edge")
    for distance in dilations:
        for dy in (-distance, 0, distance):
            for dx in (-distance, 0, distance):
                if dy or dx:
                    top, left = reach + dy, reach + dx
                    yield padded[..., top : top + height, left : left + width]
