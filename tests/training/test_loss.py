import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close

from simseg_jax.runtime.sharding import batch_sharding, make_mesh
from simseg_jax.training.loss import (
    chunked_contrastive_loss,
    clip_temperature,
    contrastive_loss,
)


def unit_rows(seed, shape):
    x = jax.random.normal(jax.random.key(seed), shape)
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def test_equals_two_cross_entropies():
    images, texts = unit_rows(0, (12, 8)), unit_rows(1, (12, 8))
    loss, metrics = contrastive_loss(images, texts, jnp.float32(0.1))
    logits = images @ texts.T / 0.1
    labels = jnp.arange(12)
    expected = [
        optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()
        for x in (logits, logits.T)
    ]
    assert_close(loss, sum(expected) / 2, 1e-6)
    assert metrics["i2t_accuracy"] == (np.asarray(logits).argmax(1) == labels).mean()
    assert metrics["t2i_accuracy"] == (np.asarray(logits).argmax(0) == labels).mean()


def test_temperature_is_clipped_and_gets_no_gradient_outside():
    np.testing.assert_allclose(
        [clip_temperature(jnp.float32(t)) for t in (-1.0, 0.07, 3.0)], [0.001, 0.07, 0.5]
    )
    images, texts = unit_rows(0, (4, 8)), unit_rows(1, (4, 8))
    slope = jax.grad(lambda t: contrastive_loss(images, texts, t)[0])
    assert slope(jnp.float32(3.0)) == 0
    assert slope(jnp.float32(0.07)) != 0


@pytest.mark.parametrize(("devices", "chunk"), [(1, 1), (1, 16), (1, 100), (8, 0), (8, 2)])
def test_chunks_and_devices_give_the_same_loss(devices, chunk):
    # Row 5 is as similar to two texts: the first of them is the answer, in every order of chunks.
    images, texts = unit_rows(0, (64, 8)), unit_rows(1, (64, 8))
    texts = texts.at[jnp.array([5, 40])].set(images[5])
    arguments = (images, texts, jnp.float32(0.07))
    (expected, metrics), gradients = value_and_gradients(0)(*arguments)
    assert 0 < metrics["t2i_accuracy"] < 1
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        rows = jax.device_put(arguments[:2], batch_sharding(mesh))
        (loss, same_metrics), same_gradients = value_and_gradients(chunk)(*rows, arguments[2])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert same_metrics == metrics
    # Sums of 64 float32 terms in another order.
    jax.tree.map(lambda a, b: assert_close(a, b, 5e-6), same_gradients, gradients)


def groups_of(numbers):
    return jnp.stack([jnp.zeros(len(numbers), jnp.uint32), jnp.array(numbers, jnp.uint32)], axis=1)


def test_groups_share_the_target():
    """Against soft cross entropies: the target of a row is even over the columns of its group."""
    numbers = np.array([0, 1, 0, 2, 1, 0, 3, 4, 5, 6, 7, 8])
    same = numbers[:, None] == numbers
    texts = unit_rows(1, (12, 8))
    # The best text of an image is that of the first pair in its group.
    images = texts[same.argmax(axis=1)] + 0.1 * unit_rows(0, (12, 8))
    target = same / same.sum(1, keepdims=True)

    def expected(images, texts):
        logits = images @ texts.T / 0.1
        both = [optax.safe_softmax_cross_entropy(x, target).mean() for x in (logits, logits.T)]
        return sum(both) / 2

    def actual(images, texts):
        return contrastive_loss(images, texts, jnp.float32(0.1), groups_of(numbers))

    loss, metrics = actual(images, texts)
    assert_close(loss, expected(images, texts), 1e-6)
    gradients = jax.grad(lambda *pair: actual(*pair)[0], (0, 1))(images, texts)
    expected_gradients = jax.grad(expected, (0, 1))(images, texts)
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-6), gradients, expected_gradients)
    logits = np.asarray(images @ texts.T)
    rows = np.arange(12)
    assert_close(metrics["t2i_accuracy"], same[rows, logits.argmax(0)].mean(), 1e-6)
    assert metrics["i2t_accuracy"] == 1 > (logits.argmax(1) == rows).mean()


def test_groups_of_one_change_nothing():
    images, texts = unit_rows(0, (12, 8)), unit_rows(1, (12, 8))
    plain, metrics = contrastive_loss(images, texts, jnp.float32(0.1))
    alone, same_metrics = contrastive_loss(images, texts, jnp.float32(0.1), groups_of(range(12)))
    np.testing.assert_allclose(alone, plain, rtol=1e-6)
    assert same_metrics == metrics


@pytest.mark.parametrize(("devices", "chunk"), [(1, 16), (8, 0), (8, 2)])
def test_chunks_and_devices_give_the_same_loss_of_groups(devices, chunk):
    images, texts = unit_rows(0, (64, 8)), unit_rows(1, (64, 8))
    groups = groups_of(np.random.default_rng(0).integers(0, 20, 64))
    arguments = (images, texts, jnp.float32(0.07))
    (expected, metrics), gradients = value_and_gradients(0)(*arguments, groups=groups)
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        sharding = batch_sharding(mesh)
        *rows, own = jax.device_put((*arguments[:2], groups), sharding)
        (loss, same_metrics), same_gradients = value_and_gradients(chunk)(
            *rows, arguments[2], groups=own
        )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert same_metrics == metrics
    # Sums of 64 float32 terms in another order.
    jax.tree.map(lambda a, b: assert_close(a, b, 5e-6), same_gradients, gradients)


def value_and_gradients(chunk):
    loss = contrastive_loss
    if chunk:
        loss = functools.partial(chunked_contrastive_loss, chunk=chunk)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def test_chunks_save_memory():
    """In the temporaries XLA plans: 1024 x 1024 similarities at once against 32 x 1024."""
    arguments = (unit_rows(0, (1024, 8)), unit_rows(1, (1024, 8)), jnp.float32(0.07))
    plain, chunked = (
        value_and_gradients(chunk).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for chunk in (0, 32)
    )
    assert plain > 4 * 1024**2
    assert chunked < plain / 4


def test_a_chunk_divides_the_batch():
    with pytest.raises(ValueError, match="not a multiple of chunk=5"):
        chunked_contrastive_loss(unit_rows(0, (12, 8)), unit_rows(1, (12, 8)), jnp.float32(1), 5)
