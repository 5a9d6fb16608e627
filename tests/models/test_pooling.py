import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close

from simseg_jax.models.pooling import mean_pool, top_m, top_m_pool, weighted_top_m_triton


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (3, 20, 7))


@pytest.mark.parametrize("m", [1, 4, 20])
def test_values_and_gradient_equal_a_sort(x, m):
    def by_sorting(x):
        return jnp.sort(x, axis=1)[:, -m:].mean(axis=1)

    assert_close(top_m_pool(x, m), by_sorting(x), 1e-6)
    weight = jax.random.normal(jax.random.key(1), (3, 7))
    ours = jax.grad(lambda x: (top_m_pool(x, m) * weight).sum())(x)
    assert_close(ours, jax.grad(lambda x: (by_sorting(x) * weight).sum())(x), 1e-6)


def test_more_maxima_than_tokens_is_the_mean(x):
    assert_close(top_m_pool(x, 50), x.mean(axis=1), 1e-6)


def test_ties_go_to_the_first_tokens():
    x = jnp.ones((1, 6, 2))
    _, positions = top_m(x, 3)
    np.testing.assert_array_equal(positions[0, :, 0], [0, 1, 2])
    gradient = jax.grad(lambda x: top_m_pool(x, 3).sum())(x)
    np.testing.assert_allclose(gradient[0, :, 0], [1 / 3] * 3 + [0] * 3, rtol=1e-6)


@pytest.mark.parametrize(("tokens", "m"), [(49, 5), (64, 4), (5, 5)])
def test_the_kernel_for_gpus_finds_the_same(tokens, m):
    """With many equal values, some below every weight that counts; the kernel interpreted."""
    x = jnp.round(2 * jax.random.normal(jax.random.key(0), (3, tokens, 128))) / 2
    weights = jax.random.uniform(jax.random.key(1), (3, m)).at[1, m // 2 :].set(0)
    values, positions = top_m(x, m)
    pooled, same_positions = weighted_top_m_triton(x, weights, m, interpret=True)
    np.testing.assert_array_equal(same_positions[:, :m], positions)
    assert_close(pooled, (values * weights[:, :, None]).sum(axis=1), 1e-6)


def test_mask_hides_tokens_and_shortens_short_examples(x):
    lengths = np.array([2, 5, 20])
    mask = np.arange(20) < lengths[:, None]
    pooled = top_m_pool(x, 4, mask)
    for row, length in enumerate(lengths):
        alone = top_m_pool(x[row : row + 1, :length], min(4, int(length)))
        assert_close(pooled[row : row + 1], alone, 1e-6)
    gradient = jax.grad(lambda x: top_m_pool(x, 4, mask).sum())(x)
    assert not np.asarray(gradient)[~mask].any()
    np.testing.assert_allclose(gradient.sum(axis=1), 1, rtol=1e-6)


def test_an_example_without_tokens_is_finite(x):
    pooled = top_m_pool(x, 4, np.zeros((3, 20), bool))
    assert np.isfinite(np.asarray(pooled)).all()
    assert not np.asarray(mean_pool(x, jnp.zeros((3, 20), bool))).any()


def test_bfloat16_input_pools_in_float32(x):
    low = x.astype(jnp.bfloat16)
    assert top_m_pool(low, 5).dtype == jnp.float32
    assert_close(top_m_pool(low, 5), top_m_pool(low.astype(jnp.float32), 5), 1e-7)
    assert jax.grad(lambda x: top_m_pool(x, 5).sum())(low).dtype == jnp.bfloat16


def test_the_backward_pass_keeps_positions_only():
    x = jnp.zeros((8, 196, 64))
    _, pullback = jax.eval_shape(lambda x: jax.vjp(lambda y: top_m_pool(y, 5), x), x)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
    positions, weights = 8 * 5 * 64, 8 * 5 * 4
    assert kept <= positions + weights
