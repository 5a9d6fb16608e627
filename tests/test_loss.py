import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import assert_close

from simseg_jax.loss import clip_temperature, contrastive_loss


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
