import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image, ImageOps
from scipy import stats

from simseg_jax.data import autoaugment, autoaugment_jax
from simseg_jax.data.autoaugment import IMAGENET_POLICY, OPERATIONS
from simseg_jax.data.autoaugment_jax import (
    POLICY_VARIANTS,
    apply_variants,
    augment_batch,
    draw_keys,
)
from simseg_jax.data.autoaugment_tables import autocontrast_exceptions
from simseg_jax.runtime.sharding import batch_sharding, make_mesh, map_batch

VARIANTS = [("", 0, 1)] + [(op, lv, s) for op in OPERATIONS for lv in (0, 2, 5, 9) for s in (-1, 1)]
SHEARS = ("shearX", "shearY")


def photo(height=37, width=52, seed=0):
    """Smooth colours and some noise: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return (0.9 * large + rng.integers(0, 25, large.shape)).astype(np.uint8)


def pil(image, operation, level, sign):
    return np.asarray(OPERATIONS[operation](Image.fromarray(image), level, sign))


def assert_equals_pil(result, expected, operation, name):
    difference = np.abs(result.astype(int) - expected)
    if operation in SHEARS:
        # The cubic filter runs in float32 here and in float64 there; both truncate.
        assert difference.max() <= 1, name
        assert (difference > 0).mean() < 0.001, name
    else:
        assert difference.max() == 0, name


def test_both_paths_equal_the_reference():
    """PIL's results of every operation, of which every sixteenth pixel and a checksum are kept."""
    reference = np.load(GOLDENS / "autoaugment.npz")
    image = reference["image"]
    keys = [key for key in reference if key[-1] in "+-"]
    parts = [key.split("/") for key in keys]
    variants = [("", 0, 1)] + [(op, int(lv), 1 if s == "+" else -1) for op, lv, s in parts]
    assert {op for op, *_ in parts} == set(OPERATIONS)
    images = jnp.repeat(image[None], len(keys), axis=0)
    numbers = jnp.arange(1, len(variants))[:, None]
    results = np.asarray(jax.jit(lambda x: apply_variants(x, numbers, variants))(images))
    for key, variant, result in zip(keys, variants[1:], results, strict=True):
        expected = pil(image, *variant)
        np.testing.assert_array_equal(expected[::16, ::16], reference[key], err_msg=key)
        assert zlib.crc32(expected.tobytes()) == reference[f"{key}/checksum"], key
        assert_equals_pil(result, expected, variant[0], key)


@pytest.mark.parametrize("size", [(37, 52), (48, 31)])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_every_operation_equals_pil(size, one_by_one):
    image = photo(*size)
    images = jnp.repeat(image[None], len(VARIANTS), axis=0)
    numbers = jnp.arange(len(VARIANTS))[:, None]
    run = jax.jit(lambda x: apply_variants(x, numbers, VARIANTS, one_by_one))
    results = np.asarray(run(images))
    np.testing.assert_array_equal(results[0], image)
    for variant, result in zip(VARIANTS[1:], results[1:], strict=True):
        assert_equals_pil(result, pil(image, *variant), variant[0], variant)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((20, 30, 3)),
        np.full((20, 30, 3), 255),
        np.full((20, 30, 3), [7, 100, 250]),
        np.where(np.arange(30)[None, :, None] < 15, 40, [41, 90, 255]) + np.zeros((20, 1, 3)),
        np.where(np.arange(600).reshape(20, 30, 1) < 1, 0, [255, 1, 128]),
        np.arange(20 * 30 * 3).reshape(20, 30, 3) % 256,
    ],
)
def test_degenerate_images(image):
    image = image.astype(np.uint8)
    levels = [v for v in VARIANTS if v[0] not in SHEARS and v[1] == 9]
    images, numbers = jnp.repeat(image[None], len(levels), axis=0), jnp.arange(len(levels))[:, None]
    for one_by_one in (True, False):
        results = apply_variants(images, numbers, levels, one_by_one)
        for variant, result in zip(levels, np.asarray(results), strict=True):
            np.testing.assert_array_equal(result, pil(image, *variant), err_msg=str(variant))


def test_autocontrast_of_every_range_equals_pil():
    """All 32,640 pairs of darkest and brightest value."""
    low, high, value = np.ogrid[:256, :256, :256]
    exact = np.clip((value - low) * 255 // np.maximum(high - low, 1), 0, 255).astype(np.uint8)
    exact.reshape(-1)[autocontrast_exceptions()] -= 1
    ramp = np.arange(256, dtype=np.uint8)
    for lo in range(0, 256, 5):
        for hi in range(lo + 1, 256):
            image = Image.fromarray(ramp[None, lo : hi + 1])
            expected = np.asarray(ImageOps.autocontrast(image))[0]
            np.testing.assert_array_equal(exact[lo, hi, lo : hi + 1], expected)


def test_a_sub_policy_applies_its_operations_in_order():
    image = photo()
    chosen = [(POLICY_VARIANTS.index(("color", 4, -1)), POLICY_VARIANTS.index(("contrast", 8, 1)))]
    result = apply_variants(image[None], jnp.array(chosen))[0]
    expected = pil(pil(image, "color", 4, -1), "contrast", 8, 1)
    np.testing.assert_array_equal(result, expected)


def test_policy_uses_known_operations():
    assert len(IMAGENET_POLICY) == 25
    used = {operation for policy in IMAGENET_POLICY for _, operation, _ in policy}
    assert used <= set(OPERATIONS)
    assert used == {operation for operation, *_ in POLICY_VARIANTS} - {""}


def test_draws_belong_to_seed_step_and_place():
    images = jnp.asarray(np.stack([photo(seed=i) for i in range(8)]))
    run = jax.jit(augment_batch)
    first = np.asarray(run(images, draw_keys(0, 3, 8)))
    np.testing.assert_array_equal(first, run(images, draw_keys(0, 3, 8)))
    assert not np.array_equal(first, run(images, draw_keys(0, 4, 8)))
    assert not np.array_equal(first, run(images, draw_keys(1, 3, 8)))
    # An example's result depends on its own key alone.
    np.testing.assert_array_equal(first[2:5], run(images[2:5], draw_keys(0, 3, 8)[2:5]))


def test_a_sharded_batch_gives_the_same_images():
    images = np.stack([photo(seed=i) for i in range(16)])
    mesh = make_mesh()
    expected = jax.jit(augment_batch)(images, draw_keys(0, 0, 16))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(images, batch_sharding(mesh))
        run = jax.jit(lambda x: map_batch(augment_batch, x, draw_keys(0, 0, 16)))
        compiled = run.lower(sharded).compile()
        np.testing.assert_array_equal(compiled(sharded), expected)
        # Every device works on its own images: nothing of their size is exchanged.
        assert "all-gather" not in compiled.as_text()


def check_draws(policies, slots):
    """Chi-square of 100,000 draws. slots [n, 2]: 0 not applied, -1 or 1 the sign."""
    counts = np.bincount(policies, minlength=25)
    assert stats.chisquare(counts).pvalue > 1e-4
    observed, expected = [], []
    for number, policy in enumerate(IMAGENET_POLICY):
        for slot, (probability, *_) in enumerate(policy):
            drawn = slots[policies == number, slot]
            shares = (1 - probability, probability / 2, probability / 2)
            for value, share in zip((0, -1, 1), shares, strict=True):
                if share > 1e-9:
                    observed.append((drawn == value).sum())
                    expected.append(share * len(drawn))
                else:
                    assert not (drawn == value).any()
    statistic = ((np.array(observed) - expected) ** 2 / expected).sum()
    # Three outcomes of every slot have two degrees of freedom, certain operations one.
    freedom = sum(0 if p == 0 else 1 if p == 1 else 2 for x in IMAGENET_POLICY for p, *_ in x)
    assert stats.chi2.sf(statistic, freedom) > 1e-4


def test_draw_statistics_on_the_device():
    keys = jax.random.split(jax.random.key(0), 100_000)
    policies, signs = jax.jit(jax.vmap(autoaugment_jax.draw))(keys)
    check_draws(np.asarray(policies), np.asarray(signs))


def test_draw_statistics_on_the_host():
    rng = np.random.default_rng(0)
    policies, signs = zip(*(autoaugment.draw(rng) for _ in range(100_000)), strict=True)
    check_draws(np.array(policies), np.array(signs))


def test_the_host_applies_what_it_draws():
    image = Image.fromarray(photo())
    for seed in range(8):
        policy, signs = autoaugment.draw(np.random.default_rng(seed))
        expected = np.asarray(image)
        for sign, (_, operation, level) in zip(signs, IMAGENET_POLICY[policy], strict=True):
            expected = pil(expected, operation, level, sign) if sign else expected
        result = autoaugment.autoaugment(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(result), expected)
