import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simseg_jax.runtime.errors import UserError
from simseg_jax.training.optim import OptimConfig, adamw, cosine_schedule, match_rules

PARAMS = {
    "tower": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "temperature": jnp.float32(1),
}


def optimizer(**settings):
    schedule = cosine_schedule(1.0, steps=10, warmup_steps=0, final_fraction=0.1)
    return adamw(OptimConfig(**{"weight_decay": 0.1, **settings}), schedule, PARAMS)


def updates(transform, gradients):
    result, _ = transform.update(gradients, transform.init(PARAMS), PARAMS)
    return result


def test_schedule_starts_at_zero_and_ends_at_a_tenth():
    schedule = cosine_schedule(2.0, steps=100, warmup_steps=10, final_fraction=0.1)
    np.testing.assert_allclose(
        [schedule(i) for i in (0, 5, 10, 55, 100, 200)], [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6
    )


def test_rules_scale_decay_and_freeze():
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    plain = updates(optimizer(), gradients)
    rules = (("tower/kernel", 0.0), ("temperature", 0.5), (".*", 1.0))
    ruled = updates(optimizer(lr_rules=rules), gradients)
    assert not np.asarray(ruled["tower"]["kernel"]).any()
    np.testing.assert_allclose(ruled["temperature"], plain["temperature"] / 2, rtol=1e-6)
    np.testing.assert_array_equal(ruled["tower"]["bias"], plain["tower"]["bias"])
    # Without decay the first Adam step of a unit gradient is the learning rate itself.
    undecayed = updates(optimizer(decay_rules=((".*bias", 0.0), (".*", 1.0))), gradients)
    np.testing.assert_allclose(undecayed["tower"]["bias"], -1, rtol=1e-5)
    np.testing.assert_allclose(undecayed["tower"]["kernel"], -1.1, rtol=1e-5)


def test_frozen_parameters_keep_no_moments():
    state = optimizer(lr_rules=(("tower/.*", 0.0), (".*", 1.0))).init(PARAMS)
    assert not any(leaf.shape in [(2, 3), (3,)] for leaf in jax.tree.leaves(state))


def test_clipping_bounds_the_global_norm():
    gradients = jax.tree.map(lambda x: 100 * jnp.ones_like(x), PARAMS)
    small = jax.tree.map(lambda x: x / 1000, gradients)
    clipped, free = optimizer(clip_norm=1e-3), optimizer()
    # Adam is blind to scale, but not to eps: compare the first moments through a huge eps.
    assert (
        updates(optimizer(clip_norm=1e-3, eps=1e3), gradients)["temperature"]
        > (updates(optimizer(eps=1e3), gradients)["temperature"])
    )
    np.testing.assert_allclose(
        updates(clipped, gradients)["temperature"], updates(free, small)["temperature"], rtol=1e-2
    )


def test_uncovered_parameters_and_unused_patterns_are_errors():
    with pytest.raises(UserError, match="covers no temperature"):
        match_rules((("tower/.*", 1.0),), PARAMS, "optim.lr_rules")
    with pytest.raises(UserError, match="matches no parameter first: 'towr"):
        match_rules((("towr/.*", 1.0), (".*", 1.0)), PARAMS, "optim.lr_rules")
