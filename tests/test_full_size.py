"""The paper's architectures at full size: ViT-S/16 makes a training step, ViT-B/16 is traced."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simseg_jax.config import load_config, model_config
from simseg_jax.models.simseg import init_params, make_model
from simseg_jax.train import make_optimizer
from simseg_jax.training.step import make_update

CONFIGS = Path(__file__).parents[1] / "configs"


def build(name):
    """(update, shapes of the state, batch of two examples) of a configuration."""
    # Without warm-up the first step already moves the parameters.
    config = load_config(CONFIGS / f"{name}.py", ["--config.optim.warmup=0.0"])
    architecture = model_config(config, vocab_size=30522)
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    optimizer, _ = make_optimizer(config.optim, 10, shapes)
    state = {"params": shapes, "opt": jax.eval_shape(optimizer.init, shapes)}
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8),
        "ids": rng.integers(1, 30522, (2, 25), dtype=np.int32),
        "mask": np.ones((2, 25), bool),
    }
    step = {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    # Blocks as a loop: unrolled ones take several times as long to compile.
    graphdef = make_model(architecture, remat="full")
    return make_update(graphdef, optimizer, 0), state | step, batch


@pytest.mark.slow
def test_vits16_makes_a_step():
    update, shapes, batch = build("vits16")
    # Ones for weights would be no network; drawing 100M normal numbers on a CPU takes long.
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    params = jax.tree.map(lambda s: 0.02 * np.resize(PATTERN, s.shape), shapes["params"])
    params = jax.tree.map(jnp.asarray, {**params, "temperature": np.float32(0.07)})
    before = np.asarray(params["image_projection"]["kernel"])
    state, metrics = jax.jit(update, donate_argnums=0)({**state, "params": params}, batch)
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["grad_norm"]) > 0
    assert np.abs(np.asarray(state["params"]["image_projection"]["kernel"]) - before).max() > 1e-5
    assert int(state["step"]) == 1


@pytest.mark.slow
def test_vitb16_has_the_papers_size():
    update, shapes, batch = build("vitb16")
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(shapes["params"][name]))
        for name in shapes["params"]
    }
    # timm's vit_base_patch16_224 without its head, BERT-base without its pooler.
    assert sizes["image_encoder"] == 85_798_656
    assert sizes["text_encoder"] == 108_891_648
    state, metrics = jax.eval_shape(update, shapes, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    assert metrics["loss"].shape == ()


PATTERN = np.random.default_rng(1).normal(size=10_007).astype(np.float32)
