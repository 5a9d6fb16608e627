"""The paper's architectures at full size: one training step on a tiny batch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simseg_jax.config import load_config, model_config
from simseg_jax.models.simseg import init_params, make_model
from simseg_jax.train import make_optimizer, make_update

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", ["vits16", "vitb16"])
def test_one_step(name):
    config = load_config(CONFIGS / f"{name}.py")
    architecture = model_config(config, vocab_size=30522)
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    # Without warm-up the first step already moves the parameters.
    config.optim.warmup = 0.0
    optimizer, _ = make_optimizer(config, 10, shapes)
    update = jax.jit(make_update(make_model(architecture), optimizer, 0), donate_argnums=0)
    # Ones for weights would be no network; drawing 100M normal numbers on a CPU takes long.
    params = jax.tree.map(lambda s: 0.02 * np.resize(PATTERN, s.shape), shapes)
    params = jax.tree.map(jnp.asarray, {**params, "temperature": np.float32(0.07)})
    state = {"params": params, "opt": optimizer.init(params), "step": jnp.int32(0)}
    before = np.asarray(params["image_projection"]["kernel"])
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8),
        "ids": rng.integers(1, 30522, (2, 25), dtype=np.int32),
        "mask": np.ones((2, 25), bool),
    }
    state, metrics = update(state, batch)
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["grad_norm"]) > 0
    assert np.abs(np.asarray(state["params"]["image_projection"]["kernel"]) - before).max() > 1e-5
    assert int(state["step"]) == 1


PATTERN = np.random.default_rng(1).normal(size=10_007).astype(np.float32)
