import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simseg_jax.masks.pamr import DILATIONS, affinity, pamr


def example(height=11, width=14, batch=2, masks=3, seed=0):
    """Random uint8 images, with a flat corner, and random soft masks."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    images[:, : height // 2, : width // 2] = 77
    return images, rng.random((batch, masks, height, width)).astype(np.float32)


def naive(image, masks, iterations, dilations):
    """PAMR of one image pixel by pixel in float64: image [H, W, 3], masks [K, H, W]."""
    height, width = image.shape[:2]
    image, masks = image.astype(np.float64), masks.astype(np.float64)

    def window(y, x, distance):
        offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        at = [(y + i * distance, x + j * distance) for i, j in offsets]
        return [(min(max(i, 0), height - 1), min(max(j, 0), width - 1)) for i, j in at]

    for _ in range(iterations):
        refined = np.empty_like(masks)
        for y in range(height):
            for x in range(width):
                windows = [window(y, x, distance) for distance in dilations]
                around = [p for points in windows for p in (*points[:4], *points[5:])]
                sample = np.array([image[p] for points in windows for p in points])
                difference = np.abs(np.array([image[p] for p in around]) - image[y, x])
                relative = difference / (1e-8 + 0.1 * sample.std(axis=0, ddof=1))
                weights = np.exp(-relative.mean(axis=1))
                values = np.array([masks[:, i, j] for i, j in around])
                refined[:, y, x] = weights @ values / weights.sum()
        masks = refined
    return masks


@pytest.mark.parametrize(
    ("iterations", "dilations"), [(1, (1,)), (10, DILATIONS)], ids=["one step", "as TCL"]
)
def test_equals_the_definition(iterations, dilations):
    images, masks = example()
    expected = [naive(i, m, iterations, dilations) for i, m in zip(images, masks, strict=True)]
    # float32: the exponents reach about 20, so a weight is good to 20 * 6e-8 * a few roundings;
    # weighted means do not add to that from step to step.
    np.testing.assert_allclose(pamr(images, masks, iterations, dilations), expected, atol=1e-5)


def test_scale_and_offset_of_the_image_do_not_matter():
    images, masks = example()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = ((images / 255 - mean) / std).astype(np.float32)
    np.testing.assert_allclose(pamr(normalized, masks), pamr(images, masks), atol=1e-5)


def test_weights_are_a_mean_and_masks_stay_in_range():
    images, masks = example()
    weights = affinity(jnp.asarray(images), DILATIONS)
    assert weights.shape == (2, 48, 11, 14)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    refined = np.asarray(pamr(images, np.round(masks)))
    # A sum of 48 weights may miss 1 by rounding, in each of ten steps.
    assert refined.min() >= 0
    assert refined.max() <= 1 + 1e-5
    np.testing.assert_allclose(pamr(images, np.ones_like(masks)), 1, rtol=1e-5)


def test_constant_image_gives_the_plain_mean_of_the_neighbours():
    _, masks = example(batch=1, masks=1)
    flat = np.full((1, 11, 14, 3), 200, np.uint8)
    padded = np.pad(masks[0, 0].astype(np.float64), 2, mode="edge")
    box = np.zeros((11, 14))
    for distance in (1, 2):
        for dy in (-distance, 0, distance):
            for dx in (-distance, 0, distance):
                box += padded[2 + dy : 13 + dy, 2 + dx : 16 + dx] * (dy != 0 or dx != 0)
    np.testing.assert_allclose(pamr(flat, masks, 1, (1, 2))[0, 0], box / 16, atol=1e-6)


def test_does_not_cross_a_strong_edge():
    """Noise is smoothed on either side of an edge, little leaks over it."""
    rng = np.random.default_rng(0)
    image = np.full((1, 32, 32, 3), 30, np.uint8)
    image[:, :, 16:] = 220
    truth = np.zeros((1, 1, 32, 32))
    truth[..., 16:] = 1
    noisy = np.clip(truth + rng.normal(0, 0.3, truth.shape), 0, 1).astype(np.float32)
    refined = np.asarray(pamr(image, noisy))
    assert np.abs(refined - truth).mean() < np.abs(noisy - truth).mean()
    np.testing.assert_array_equal(refined > 0.5, truth > 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (9, 30)])
def test_odd_sizes_and_images_smaller_than_the_reach(shape):
    images, masks = example(*shape, batch=1, masks=2)
    expected = naive(images[0], masks[0], 2, (1, 24))
    np.testing.assert_allclose(pamr(images, masks, 2, (1, 24))[0], expected, atol=1e-5)


def test_images_and_masks_are_independent():
    images, masks = example()
    together = np.asarray(pamr(images, masks))
    np.testing.assert_allclose(pamr(images[1:], masks[1:]), together[1:], atol=1e-6)
    np.testing.assert_allclose(pamr(images, masks[:, 1:2]), together[:, 1:2], atol=1e-6)


def test_inside_a_larger_program_and_without_masks():
    images, masks = example()
    inside = jax.jit(lambda i, m: pamr(i, m) > 0.5)(images, masks)
    assert inside.shape == masks.shape
    assert pamr(images, masks[:, :0]).shape == (2, 0, 11, 14)
