"""One device against eight fake ones: the same loss, gradients and parameters."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import tiny_config

from simseg_jax.config import model_config, run_config
from simseg_jax.data.pipeline import Examples, TrainBatches
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.models.simseg import init_params, make_model
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.sharding import (
    constrain_batch,
    make_mesh,
    own_devices,
    state_sharding,
    to_global_batch,
)
from simseg_jax.train import make_optimizer
from simseg_jax.training.step import initial_state, jit_update, make_update

STEPS = 5


def batches():
    config = tiny_config()
    encoder = TextEncoder(load_tokenizer("shapes"), config.data.max_length, 0.2)
    examples = Examples(
        config.data, image_size=32, batch_size=config.batch_size, encoder=encoder, seed=0
    )
    iterator = TrainBatches(examples, batch_size=config.batch_size)
    return [next(iterator) for _ in range(STEPS)], encoder.vocab_size


def run(devices: int, fsdp: int):
    """Losses, gradient norms and final state of five steps with dropout."""
    config = tiny_config()
    config.model.text.mlp_width = 2048  # Large enough for FSDP to split it.
    # Adam divides by the gradient's size: with the usual 1e-6 it would blow up gradients that are
    # rounding noise (the bias of attention keys has none at all) to full steps.
    config.optim.eps = 1e-3
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    data, vocab_size = batches()
    architecture = model_config(run_config(config), vocab_size)
    graphdef = make_model(architecture)

    def init():
        return initial_state(init_params(architecture, jax.random.key(0)), optimizer)

    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    optimizer, _ = make_optimizer(run_config(config).optim, STEPS, shapes)
    shardings = state_sharding(jax.eval_shape(init), mesh)
    update = jit_update(make_update(graphdef, optimizer, seed=0), shardings, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=shardings)()
        history = []
        for batch in data:
            state, metrics = update(state, to_global_batch(batch, mesh))
            history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(history), state


@pytest.fixture(scope="module")
def one_device():
    history, state = run(devices=1, fsdp=1)
    return history, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize(
    "fsdp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(8, marks=pytest.mark.slow)]
)
def test_eight_devices_equal_one(one_device, fsdp):
    history, state = run(devices=8, fsdp=fsdp)
    expected_history, expected_state = one_device
    # Float32 sums over devices run in another order. The state holds the parameters and, as Adam's
    # moments, the gradients; absolute noise of 1e-8 stands for the gradients that are zero.
    np.testing.assert_allclose(history, expected_history, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max() + 1e-8),
        state,
        expected_state,
    )
    kernel = state["params"]["text_encoder"]["layers"]["0"]["intermediate"]["kernel"]
    moments = [leaf for leaf in jax.tree.leaves(state["opt"]) if leaf.shape == kernel.shape]
    assert len(moments) == 2
    for leaf in (kernel, *moments):
        assert len(leaf.sharding.device_set) == 8
        assert leaf.addressable_shards[0].data.size == leaf.size // fsdp


def test_parameter_rule():
    mesh = make_mesh(fsdp=4)
    shapes = {
        "tall": jax.ShapeDtypeStruct((512, 128), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1023, 128), jnp.float32),
        "indivisible": jax.ShapeDtypeStruct((1023, 129), jnp.float32),
        "small": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    specs = jax.tree.map(lambda s: s.spec, state_sharding(shapes, mesh))
    assert specs == {
        "tall": P("fsdp", None),
        "odd": P(None, "fsdp"),
        "indivisible": P(),
        "small": P(),
    }


def test_batches_are_split_over_all_devices():
    mesh = make_mesh(fsdp=2)
    rows = np.arange(16.0).reshape(16, 1)
    array = to_global_batch(rows, mesh)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(array, rows)
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain_batch(x.T @ jnp.ones((16, 8))))(array.repeat(8, 1))
    assert {shard.data.shape for shard in pinned.addressable_shards} == {(1, 8)}
    np.testing.assert_array_equal(constrain_batch(rows), rows)  # Without a mesh: the identity.


def test_fsdp_must_divide_the_devices():
    with pytest.raises(UserError, match=r"mesh.fsdp=3 must divide .* 8"):
        make_mesh(fsdp=3)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """A TPU core as the mesh sees it: two slices of four, listed in turn."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "fake"
    process_index: int = 0


def test_a_copy_of_the_parameters_stays_within_a_slice():
    devices = [SliceDevice(i, slice_index=i % 2) for i in range(8)]
    mesh = make_mesh(fsdp=2, devices=devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert [[d.slice_index for d in row] for row in mesh.devices] == [
        [0, 0],
        [0, 0],
        [1, 1],
        [1, 1],
    ]
    with pytest.raises(UserError, match="must divide the 4 devices of a slice"):
        make_mesh(fsdp=8, devices=devices)


def test_a_process_of_several_uses_one_small_tpu_for_its_own_programs():
    def count(kind, processes):
        devices = [SimpleNamespace(device_kind=kind) for _ in range(4)]
        return len(own_devices(devices, processes))

    assert count("TPU v5 lite", 2) == count("TPU v6 lite", 2) == 1
    assert count("TPU v5 lite", 1) == count("TPU v4", 2) == count("NVIDIA H100", 2) == 4
