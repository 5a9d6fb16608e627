"""Fully connected CRF (Kraehenbuehl and Koltun, 2011) in NumPy and SciPy, equal to pydensecrf.

The energy is the unary term -log(p + 1e-8) plus two Potts terms: one with a Gaussian kernel on
pixel positions, one with a bilateral kernel on positions and colours. Inference is a fixed number
of mean-field updates. The reference pydensecrf can be used instead (extra `crf`, which needs a C++
compiler). `densecrf_jax` is the batched version for accelerators.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from simseg_jax.masks.permutohedral import Lattice, embedding, position_lattice
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import number, one_of, whole
from simseg_jax.runtime.settings import setting

EPSILON = np.float32(1e-8)
DEVIATION = number(0.01, 1000)
COMPATIBILITY = number(0, 1000)


@dataclasses.dataclass(frozen=True)
class CRF:
    """Kernels, iterations and back end of a dense CRF; the default is the paper protocol's."""

    gaussian_sxy: float = setting(3.0, "deviation of the Gaussian kernel in pixels", DEVIATION)
    gaussian_compat: float = setting(3.0, "weight of the Gaussian kernel", COMPATIBILITY)
    bilateral_sxy: float = setting(40.0, "bilateral kernel: deviation in pixels", DEVIATION)
    bilateral_srgb: float = setting(
        13.0, "bilateral kernel: deviation in colour levels 0..255", DEVIATION
    )
    bilateral_compat: float = setting(10.0, "weight of the bilateral kernel", COMPATIBILITY)
    iterations: int = setting(3, "mean-field updates", whole(1, 1000))
    backend: str = setting(
        "auto",
        "numpy: host threads; jax: device; auto: jax on GPUs, otherwise numpy",
        one_of("auto", "numpy", "jax"),
    )


PAPER = CRF()


def crf_masks(
    image: UInt8[np.ndarray, "H W 3"], foreground: Float[np.ndarray, "K H W"], crf: CRF = PAPER
) -> Bool[np.ndarray, "K H W"]:
    """Masks bool [K, H, W] of K independent two-label problems on one image.

    image: uint8 [H, W, 3]; foreground: probabilities float32 [K, H, W] in [0, 1].
    """
    message = _message(image, crf)
    masks = np.empty(foreground.shape, bool)
    for mask, p in zip(masks, foreground, strict=True):
        p = p.reshape(-1).astype(np.float32, copy=False)
        # Since q_bg = 1 - q_fg, one number per pixel suffices: the log-odds log(q_fg / q_bg). The
        # messages of both labels differ by the filtered q_fg - q_bg, which is tanh(odds / 2).
        unary = np.log(p + EPSILON) - np.log((1 - p) + EPSILON)
        odds = unary
        for _ in range(crf.iterations):
            odds = unary + message(np.tanh(odds * np.float32(0.5)))
        mask[:] = (odds > 0).reshape(mask.shape)
    return masks


def crf_probabilities(
    image: UInt8[np.ndarray, "H W 3"], labels: Float[np.ndarray, "L H W"], crf: CRF = PAPER
) -> Float[np.ndarray, "L H W"]:
    """Label distribution of every pixel after inference, float32 [L, H, W].

    image: uint8 [H, W, 3]; labels: probabilities float32 [L, H, W] of L >= 2 exclusive labels.
    """
    message = _message(image, crf)
    unary = np.log(labels.reshape(len(labels), -1).astype(np.float32, copy=False) + EPSILON)
    q = _softmax(unary)
    for _ in range(crf.iterations):
        q = _softmax(unary + np.stack([message(label) for label in q]))
    return q.reshape(labels.shape)


def pydensecrf_masks(
    image: UInt8[np.ndarray, "H W 3"], foreground: Float[np.ndarray, "K H W"], crf: CRF = PAPER
) -> Bool[np.ndarray, "K H W"]:
    """`crf_masks` by pydensecrf. Like the original it builds the lattices anew for every class."""
    pairs = (np.stack([1 - p, p]) for p in foreground)
    masks = [pydensecrf_probabilities(image, pair, crf).argmax(axis=0) for pair in pairs]
    return np.array(masks, dtype=bool).reshape(foreground.shape)


def pydensecrf_probabilities(
    image: UInt8[np.ndarray, "H W 3"], labels: Float[np.ndarray, "L H W"], crf: CRF = PAPER
) -> Float[np.ndarray, "L H W"]:
    """`crf_probabilities` by pydensecrf."""
    dcrf = import_pydensecrf()
    count, height, width = labels.shape
    field = dcrf.DenseCRF2D(width, height, count)
    unary = -np.log(labels + EPSILON).reshape(count, -1)
    field.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
    field.addPairwiseGaussian(sxy=crf.gaussian_sxy, compat=crf.gaussian_compat)
    field.addPairwiseBilateral(
        sxy=crf.bilateral_sxy,
        srgb=crf.bilateral_srgb,
        rgbim=np.require(image, requirements=["C", "W"]),
        compat=crf.bilateral_compat,
    )
    return np.array(field.inference(crf.iterations), np.float32).reshape(labels.shape)


def import_pydensecrf():
    """The module `pydensecrf.densecrf`, or a `UserError` that says how to get it."""
    try:
        import pydensecrf.densecrf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "refine=pydensecrf needs the package pydensecrf2 (pip install pydensecrf2, which "
            "compiles C++); refine=crf gives the same masks without it."
        ) from error
    return pydensecrf.densecrf


def _message(image: np.ndarray, crf: CRF) -> Callable[[np.ndarray], np.ndarray]:
    """The filter of float32 [H * W] with the weighted sum of both kernels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"The image must be uint8 [H, W, 3], not {image.dtype} {image.shape}.")
    size = image.shape[:2]
    gaussian = position_lattice(*size, crf.gaussian_sxy)
    bilateral = Lattice(embedding(*size, crf.bilateral_sxy, crf.bilateral_srgb), image)
    near, alike = np.float32(crf.gaussian_compat), np.float32(crf.bilateral_compat)
    return lambda x: near * gaussian(x) + alike * bilateral(x)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=0))
    return exponentials / exponentials.sum(axis=0)
