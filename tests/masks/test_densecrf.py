import importlib.util
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, SHARED
from PIL import Image

from simseg_jax.masks import densecrf, densecrf_jax, permutohedral
from simseg_jax.masks.densecrf import CRF, PAPER
from simseg_jax.masks.permutohedral_jax import batch_positions
from simseg_jax.runtime.errors import UserError

VOC_IMAGES = SHARED / "data" / "VOCdevkit" / "VOC2012" / "JPEGImages"
PHOTOS = ("astronaut", "chelsea")
needs_crf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason="pydensecrf is not installed (extra crf)",
)


@pytest.fixture(scope="module")
def pydensecrf_golden():
    """Results of pydensecrf on small noisy scenes: odd sizes, 2 to 4 labels, other kernels."""
    return dict(np.load(GOLDENS / "densecrf.npz"))


def photo_problem(golden, photo):
    """Image, foreground probabilities and the masks of the original's CRF."""
    shape = golden[f"seg/{photo}/mask_shape"]
    bits = np.unpackbits(golden[f"seg/{photo}/crf_and_closed"])[: np.prod(shape)]
    maps = golden[f"seg/{photo}/similarity_18x18"]
    low, high = (f(axis=(1, 2), keepdims=True) for f in (maps.min, maps.max))
    foreground = ((maps - low) / (high - low)).repeat(16, axis=1).repeat(16, axis=2)
    return golden[f"seg/{photo}/denormalised_uint8"], foreground, bits.reshape(shape)[:, 0] > 0


def batched(images, foreground, vertices=None, crf=PAPER, needed=None):
    """`densecrf_jax.crf_masks`, compiled."""
    batch, height, width, _ = images.shape
    positions = batch_positions(height, width, crf.gaussian_sxy, batch)
    vertices = vertices or densecrf_jax.lattice_size(height, width)
    run = jax.jit(densecrf_jax.crf_masks, static_argnums=(3, 4))
    return run(images, foreground, positions, vertices, crf, needed)


@pytest.mark.parametrize("photo", PHOTOS)
def test_numpy_masks_equal_the_original(golden, photo):
    image, foreground, expected = photo_problem(golden, photo)
    np.testing.assert_array_equal(densecrf.crf_masks(image, foreground), expected)


def test_jax_masks_equal_the_original_in_one_batch(golden):
    problems = [photo_problem(golden, photo) for photo in PHOTOS]
    images, foreground, expected = map(np.stack, zip(*problems, strict=True))
    masks, needed = batched(images, foreground)
    np.testing.assert_array_equal(masks, expected)
    assert 5000 < int(needed) <= densecrf_jax.lattice_size(288, 288)


@pytest.mark.parametrize("case", ["odd", "narrow", "kernels"])
def test_label_distributions_equal_pydensecrf(pydensecrf_golden, case):
    """The reference sums in another order: 1e-5 on probabilities, measured 2e-6."""
    image, labels, expected, values = (
        pydensecrf_golden[f"{case}/{name}"] for name in ("image", "labels", "result", "crf")
    )
    crf = CRF(*map(float, values[:5]), iterations=int(values[5]))
    actual = densecrf.crf_probabilities(image, labels, crf)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_array_equal(actual.argmax(axis=0), expected.argmax(axis=0))
    positions = batch_positions(*image.shape[:2], crf.gaussian_sxy, 1)
    run = jax.jit(densecrf_jax.crf_probabilities, static_argnums=(3, 4))
    on_device, needed = run(image[None], labels[None], positions, 8192, crf)
    assert int(needed) <= 8192
    np.testing.assert_allclose(on_device[0], expected, atol=1e-5)


def test_two_labels_are_the_log_odds_form(pydensecrf_golden):
    image, labels = (pydensecrf_golden[f"narrow/{name}"] for name in ("image", "labels"))
    masks = densecrf.crf_masks(image, labels[1:])
    expected = densecrf.crf_probabilities(image, labels)[1:] > 0.5
    np.testing.assert_array_equal(masks, expected)


def test_sorted_numbering_gives_the_same_result(pydensecrf_golden, monkeypatch):
    """The path of images too large for a table of all keys."""
    image, labels = (pydensecrf_golden[f"odd/{name}"] for name in ("image", "labels"))
    expected = densecrf.crf_probabilities(image, labels)
    monkeypatch.setattr(permutohedral, "MAX_TABLE", 0)
    np.testing.assert_allclose(densecrf.crf_probabilities(image, labels), expected, atol=1e-6)


def test_too_many_vertices_are_reported_not_clamped():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    foreground = rng.random((2, 2, 32, 40), dtype=np.float32)
    for vertices in (16, 1024):  # The hash table overflows, only the room for vertices does.
        _, needed = batched(images, foreground, vertices)
        assert int(needed) > vertices
    masks, needed = batched(images, foreground, 6 * 32 * 40)
    assert 1024 < int(needed) <= 6 * 32 * 40
    expected = [densecrf.crf_masks(*problem) for problem in zip(images, foreground, strict=True)]
    np.testing.assert_array_equal(masks, expected)


def test_only_needed_classes_are_computed(golden):
    image, foreground, expected = photo_problem(golden, "chelsea")
    needed = jnp.arange(len(foreground)) == 1
    masks, _ = batched(image[None], foreground[None], needed=needed)
    np.testing.assert_array_equal(masks[0, 1], expected[1])
    assert not np.asarray(masks[0])[~np.asarray(needed)].any()


def test_empty_and_unsuitable_inputs():
    image = np.zeros((8, 8, 3), np.uint8)
    assert densecrf.crf_masks(image, np.zeros((0, 8, 8), np.float32)).shape == (0, 8, 8)
    # As outside of the tests, where nothing checks the signature.
    crf_masks = inspect.unwrap(densecrf.crf_masks)
    with pytest.raises(ValueError, match="uint8"):
        crf_masks(image / 255, np.zeros((1, 8, 8), np.float32))
    with pytest.raises(UserError, match="too fine to number"):
        batched(image[None], np.zeros((1, 1, 8, 8), np.float32), crf=CRF(bilateral_srgb=0.5))


def test_missing_pydensecrf_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match="refine=crf gives the same"):
        densecrf.pydensecrf_masks(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8), np.float32))


def probability_maps(image, rng):
    """Five kinds [5, H, W]: independent, smooth, a blob, similar in colour, hard 0 and 1."""
    height, width, _ = image.shape
    rows, columns = np.arange(height) * 18 // height, np.arange(width) * 18 // width
    small = np.asarray(Image.fromarray(image).resize((18, 18), Image.Resampling.BOX), float)
    noise = rng.random((18, 18))
    smooth = sum(np.roll(noise, shift, axis) for shift in range(-2, 3) for axis in (0, 1))
    y, x = np.mgrid[:18, :18]
    distance = np.hypot(y - rng.uniform(4, 14), x - rng.uniform(4, 14))
    alike = np.exp(-((small - small[rng.integers(18), rng.integers(18)]) ** 2).sum(-1) / 3200)
    grids = [noise, smooth, np.exp(-(distance**2) / 24), alike, (distance < 5).astype(float)]
    scaled = np.stack([(g - g.min()) / np.ptp(g) for g in grids]).astype(np.float32)
    return np.ascontiguousarray(scaled[:, rows][:, :, columns])


@needs_crf
@pytest.mark.skipif(not VOC_IMAGES.is_dir(), reason=f"VOC images are missing: {VOC_IMAGES}")
@pytest.mark.parametrize("size", [(288, 288), (241, 173), None], ids=["288", "241x173", "odd"])
def test_masks_equal_pydensecrf_on_photographs(size):
    """At least 99.99 % of the pixels of every mask; rounding may turn a pixel that is undecided.

    Both back ends; the batched one only where all images have one size.
    """
    files = sorted(VOC_IMAGES.glob("*.jpg"))
    images, maps, expected = [], [], []
    for index, file in enumerate(files):
        rng = np.random.default_rng(index)
        shape = size or tuple(2 * rng.integers(60, 160, size=2) + 1)
        with Image.open(file) as opened:
            resized = opened.convert("RGB").resize(shape, Image.Resampling.BILINEAR)
        images.append(np.array(resized))
        maps.append(probability_maps(images[-1], rng))
        expected.append(densecrf.pydensecrf_masks(images[-1], maps[-1]))
    assert len(files) == 100
    results = [map(densecrf.crf_masks, images, maps)]
    if size:
        on_device = []
        for start in range(0, 100, 10):
            rows = slice(start, start + 10)
            masks, needed = batched(np.stack(images[rows]), np.stack(maps[rows]), 40_000)
            assert int(needed) <= 40_000
            on_device += list(np.asarray(masks))
        results.append(on_device)
    for masks in results:
        equal = [(a == b).mean(axis=(1, 2)).min() for a, b in zip(masks, expected, strict=True)]
        assert min(equal) >= 0.9999
