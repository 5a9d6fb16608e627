import inspect
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

from simseg_jax.masks.postprocess import closing, resize_nearest, upsample


def test_upsample_repeats_pixels():
    np.testing.assert_array_equal(upsample(jnp.array([[1, 2]]), 2), [[1, 1, 2, 2], [1, 1, 2, 2]])


@pytest.mark.parametrize("photo", ["astronaut", "chelsea"])
def test_closing_equals_opencv(golden, photo):
    shape = golden[f"seg/{photo}/mask_shape"]
    bits = np.unpackbits(golden[f"seg/{photo}/crf_and_closed"])[: np.prod(shape)]
    before, after = bits.reshape(shape).astype(bool).swapaxes(0, 1)
    np.testing.assert_array_equal(closing(jnp.asarray(before)), after)


@pytest.fixture(scope="module")
def nearest():
    """Source indices of OpenCV, made by tests/goldens/make_nearest.py."""
    return dict(np.load(GOLDENS / "nearest.npz"))


def sources(old: int, new: int) -> np.ndarray:
    """int16 [new]: where `resize_nearest` takes every pixel from."""
    # Without the check of its signature, which takes longer than the function, a million times.
    return inspect.unwrap(resize_nearest)(np.arange(old, dtype=np.int16)[None], 1, new)[0]


def assert_as_opencv(nearest, sizes):
    for old in sizes:
        checksum = 0
        for new in range(1, len(nearest["checksums"])):
            checksum = zlib.crc32(sources(old, new), checksum)
        assert checksum == nearest["checksums"][old], f"from {old} pixels"


@pytest.mark.parametrize(("old", "new"), [(288, 640), (288, 427), (128, 428), (448, 214)])
def test_nearest_resize_takes_the_pixels_that_opencv_takes(nearest, old, new):
    np.testing.assert_array_equal(sources(old, new), nearest[f"{old}/{new}"])
    np.testing.assert_array_equal(sources(new, new), np.arange(new))


def test_nearest_resize_equals_opencv_from_usual_sizes_to_all(nearest):
    """To 1..1100 pixels, from the resolutions in use and some others."""
    assert_as_opencv(nearest, (1, 2, 3, 64, 128, 160, 224, 288, 336, 384, 448, 997, 1100))


@pytest.mark.slow
def test_nearest_resize_equals_opencv_from_all_sizes_to_all(nearest):
    assert_as_opencv(nearest, range(1, len(nearest["checksums"])))


def test_nearest_resize_treats_rows_and_columns_alike():
    mask = np.random.default_rng(0).integers(0, 200, (288, 128), np.uint8)
    resized = resize_nearest(mask, 640, 428)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, mask[sources(288, 640)[:, None], sources(128, 428)])
