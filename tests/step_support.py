"""A small training step for the tests that look at gradients, memory and traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig, init_params, make_model
from simseg_jax.models.vit import ViTConfig
from simseg_jax.runtime.sharding import make_mesh, state_sharding, to_global_batch
from simseg_jax.training.step import initial_state, jit_update, make_update

BATCH, TOKENS = 32, 12
MODEL = SimSegConfig(
    image=ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=64),
    text=BertConfig(
        vocab_size=50, max_positions=TOKENS, width=128, depth=2, heads=2, mlp_width=256, dropout=0.3
    ),
    embed_dim=16,
    m_text=3,
)


def batch(size=BATCH, groups=0):
    """groups: if given, the number of groups of pairs."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, TOKENS + 1, (size, 1))
    arrays = {
        "image": rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
        "ids": rng.integers(1, 50, (size, TOKENS)).astype(np.int32),
        "mask": np.arange(TOKENS)[None] < lengths,
    }
    if groups:
        arrays["groups"] = rng.integers(0, groups, (size, 1)).astype(np.uint32)
    return arrays


def compile_step(**settings):
    """The compiled step and its arguments, see `lower_step`."""
    step, arguments = lower_step(**settings)
    return step.compile(), arguments


def lower_step(
    devices=1,
    fsdp=1,
    remat="none",
    size=BATCH,
    model=MODEL,
    dtype=jnp.float32,
    gradient_dtype=None,
    wrap=lambda update: update,
    groups=0,
    **options,
):
    """The step before compilation and its arguments; the state after it holds the gradients.

    wrap: changes the function that is jitted.
    """
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    optimizer = optax.trace(0.0)
    graphdef = make_model(model, dtype, remat, gradient_dtype)
    update = make_update(graphdef, optimizer, seed=0, **options)

    def init():
        state = initial_state(init_params(model, jax.random.key(0)), optimizer)
        return {**state, "step": jnp.int32(7)}

    shardings = state_sharding(jax.eval_shape(init), mesh)
    step = jit_update(wrap(update), shardings, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=shardings)()
        arguments = state, to_global_batch(batch(size, groups), mesh)
        return step.lower(*arguments), arguments
