"""Two-label dense CRF through pydensecrf (optional, extra `crf`: it needs a C++ compiler)."""

import numpy as np

from simseg_jax.errors import UserError

ITERATIONS = 3


def import_pydensecrf():
    """The module `pydensecrf.densecrf`, or a `UserError` that says how to get it."""
    try:
        import pydensecrf.densecrf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "refine=pydensecrf needs the package pydensecrf2 (pip install pydensecrf2, which "
            "compiles C++); without it use refine=none."
        ) from error
    return pydensecrf.densecrf


def pydensecrf_masks(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Refined masks bool [K, H, W] of K independent two-label problems on one image.

    image: uint8 [H, W, 3]; probabilities: float32 [K, H, W] in [0, 1]. Kernels and iterations are
    the paper protocol's: Gaussian sxy 3 compat 3, bilateral sxy 40 srgb 13 compat 10.
    """
    dcrf = import_pydensecrf()
    image = np.ascontiguousarray(image)
    masks = []
    for p in probabilities:
        height, width = p.shape
        unary = -np.log(np.stack([1 - p, p]) + np.float32(1e-8)).reshape(2, -1)
        crf = dcrf.DenseCRF2D(width, height, 2)
        crf.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=40, srgb=13, rgbim=image, compat=10)
        label = np.argmax(crf.inference(ITERATIONS), axis=0)
        masks.append(label.reshape(height, width).astype(bool))
    return np.array(masks, dtype=bool).reshape(probabilities.shape)
