"""Attention and GELU against their definitions; the cuDNN path as far as a CPU can follow it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from scipy.special import erf
from step_support import MODEL, batch
from support import assert_close

from simseg_jax.models import layers, vit
from simseg_jax.models.layers import attention, flash_attention, gelu
from simseg_jax.models.simseg import bind, init_params, make_model
from simseg_jax.runtime.sharding import target_device


def qkv(tokens, dtype=jnp.float32, width=64):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, tokens, 3, width)).astype(dtype) for key in keys]


def outputs_and_gradients(attend, *inputs):
    outputs, pullback = jax.vjp(attend, *inputs)
    return outputs, *pullback(jnp.cos(outputs))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_the_field(masked):
    mask = jnp.arange(9)[None] < jnp.array([[9], [4]])
    mask = mask[:, None, None] if masked else None

    def expected(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    inputs = qkv(9)
    results = outputs_and_gradients(lambda *x: attention(*x, mask), *inputs)
    for actual, wanted in zip(results, outputs_and_gradients(expected, *inputs), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("tokens", [197, 16])
def test_tokens_added_for_flash_attention_change_nothing(tokens):
    """The same call with JAX's own implementation instead of cuDNN's."""
    inputs = qkv(tokens)
    results = outputs_and_gradients(lambda *x: flash_attention(*x, "xla"), *inputs)
    for actual, wanted in zip(results, outputs_and_gradients(attention, *inputs), strict=True):
        assert_close(actual, wanted)


def test_flash_attention_is_lowered_to_cudnn(monkeypatch):
    """Forward and backward, at ViT-S/16's 197 tokens: the program that a GPU would compile."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90_000)

    def loss(*inputs):
        return flash_attention(*inputs).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*qkv(197, jnp.bfloat16))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in program
    assert "__cudnn$fmhaSoftmaxBackward" in program


def test_the_image_tower_takes_it_where_it_can(monkeypatch, golden, golden_model):
    """Heads of 16 channels, as a GPU would choose; the same embeddings."""
    config, graphdef, params = golden_model
    images = jnp.asarray(golden["image"].astype(np.float32).transpose(0, 2, 3, 1))
    expected, _ = bind(graphdef, params).encode_image(images)
    calls = []

    def flash(*inputs):
        calls.append(inputs[0].shape)
        return flash_attention(*inputs, "xla")

    monkeypatch.setattr(vit, "can_flash", lambda dtype: True)
    monkeypatch.setattr(vit, "flash_attention", flash)
    actual, _ = bind(make_model(config), params).encode_image(images)
    assert calls == [(6, 197, 3, 16)] * config.image.depth
    assert_close(actual, expected)


def target(monkeypatch, kind, platform="gpu"):
    """Programs are traced for this kind of device."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(layers, "target_device", lambda: device)


def test_flash_attention_is_for_gpus_in_half_precision(monkeypatch):
    assert not layers.can_flash(jnp.bfloat16)
    target(monkeypatch, "TPU v5 lite", "tpu")
    assert not layers.can_flash(jnp.bfloat16)
    target(monkeypatch, "NVIDIA H100 80GB HBM3")  # That this machine lacks.
    assert layers.can_flash(jnp.bfloat16)
    assert not layers.can_flash(jnp.float32)
    for capability, can in (("8.0", True), ("7.0", False), ("gfx942", False)):
        here = SimpleNamespace(device_kind="here", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda here=here: [here])
        target(monkeypatch, "here")
        assert layers.can_flash(jnp.bfloat16) == can


def test_the_target_is_the_mesh_in_context():
    assert target_device().platform == "cpu"
    kind = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = AbstractMesh((2, 1), ("data", "fsdp"), auto, abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_device().platform == "tpu"


def test_blocks_in_a_loop_equal_blocks_in_a_row(monkeypatch):
    """As accelerators compute them: the text tower, with dropout, value and gradient."""
    examples = jax.tree.map(jnp.asarray, batch(4))
    keys = jax.random.split(jax.random.key(1), 4)

    @jax.jit
    def value_and_gradient(params):
        def loss(params):
            model = bind(make_model(MODEL), params)
            texts = model.encode_text(examples["ids"], examples["mask"], keys=keys)
            return (texts**3).sum()

        return jax.value_and_grad(loss)(params)

    params = init_params(MODEL, jax.random.key(0))
    in_a_row = value_and_gradient.lower(params).as_text()
    expected = value_and_gradient(params)
    target(monkeypatch, "TPU v5 lite", "tpu")
    jax.clear_caches()
    looped = value_and_gradient.lower(params).as_text()
    assert looped.count("dot_general") < in_a_row.count("dot_general")
    for actual, wanted in zip(
        jax.tree.leaves(value_and_gradient(params)), jax.tree.leaves(expected), strict=True
    ):
        # Float32 sums in another order; the biases of attention keys have no gradient but noise.
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max() + 1e-7)


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 1001)
    assert_close(gelu(jnp.float32(x)), 0.5 * x * (1 + erf(x / np.sqrt(2))), 1e-6)
    assert gelu(jnp.bfloat16(x)).dtype == jnp.bfloat16
