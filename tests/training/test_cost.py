"""Model FLOPs against XLA's count; communication of the compiled step against the minimum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_support import BATCH, MODEL, TOKENS, batch, compile_step

from simseg_jax.models.simseg import bind, init_params, make_model
from simseg_jax.training.cost import (
    communication_bytes,
    describe_step,
    forward_flops,
    peak_flops,
    step_flops,
)
from simseg_jax.training.loss import contrastive_loss


def test_flops_are_those_that_xla_counts():
    """Of the products: a model whose widths dwarf its element-wise work, within 5 %."""
    image = dataclasses.replace(MODEL.image, width=256, heads=4, mlp_width=1024)
    text = dataclasses.replace(MODEL.text, width=256, heads=4, mlp_width=1024)
    model = dataclasses.replace(MODEL, image=image, text=text, embed_dim=256)

    def loss(params, examples):
        bound = bind(make_model(model), params)
        images, _ = bound.encode_image(examples["image"].astype(jnp.float32))
        texts = bound.encode_text(examples["ids"], examples["mask"])
        return contrastive_loss(images, texts, params["temperature"])[0]

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    counted = jax.jit(loss).lower(params, batch()).compile().cost_analysis()["flops"]
    expected = forward_flops(model, BATCH, TOKENS)
    assert 1 <= counted / expected < 1.05
    assert step_flops(model, BATCH, TOKENS) == 3 * expected


@pytest.fixture(scope="module")
def data_parallel():
    return compile_step(devices=8)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"micro_batch": 2, "loss_chunk": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_data_parallel_step_sends_the_minimum(data_parallel, options):
    """Every gradient is summed once and every text embedding sent once, there and back."""
    step = compile_step(devices=8, **options) if options else data_parallel
    compiled, (state, _) = step
    sent = communication_bytes(compiled.as_text())
    share = 7 / 8  # Of an array that each device of a ring passes on in one direction.
    embeddings = 4 * BATCH * MODEL.embed_dim * share
    assert sent.pop("all-gather") == sent.pop("reduce-scatter") == embeddings
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
    # Four numbers per text: maximum and sum of its column, the best image and its position.
    columns = 4 * 4 * BATCH
    scalars = 100
    least = 2 * share * (parameters + columns)
    assert least <= sent.pop("all-reduce") <= least + scalars
    assert not sent


def test_fsdp_step_gathers_every_parameter_once():
    compiled, (state, _) = compile_step(devices=8, fsdp=4)
    sent = communication_bytes(compiled.as_text())
    split = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(state["params"])
        if not leaf.sharding.is_fully_replicated
    )
    assert split > 0
    embeddings = 4 * BATCH * MODEL.embed_dim * 7 / 8
    assert sent["all-gather"] == split * 3 / 4 + embeddings


HLO = """HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[], f32[64]{0}) parameter(0)
  %part = f32[64]{0} get-tuple-element(%p), index=1
  %r = f32[64]{0} all-reduce(%part), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[64]{0}) tuple(%i, %r)
}

ENTRY %main (x: bf16[8,16]) -> f32[64] {
  %x = bf16[8,16]{1,0} parameter(0)
  %g = bf16[32,16]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %s = (f32[16]{0}, f32[128]{0}) all-gather-start(%y), replica_groups=mesh['a'=2,'b'=8] {'b'}
  %d = f32[128]{0} all-gather-done(%s)
  %c = f32[8] reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=8], device_ids=([4]) {'a','b':(2)4}
  %p = u8[100]{0} collective-permute(%w), source_target_pairs={{0,1},{1,0}}
  %w = (s32[], f32[64]{0}) while(%init), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_communication_of_a_program_text():
    assert communication_bytes(HLO) == {
        "all-reduce": 3 * 2 * 3 / 4 * 64 * 4,
        "all-gather": 32 * 16 * 2 * 3 / 4 + 128 * 4 * 7 / 8,
        "reduce-scatter": 7 * 8 * 4,
        "collective-permute": 100,
    }


def test_peak_is_known_by_the_name_of_the_device():
    def device(kind):
        return type("Device", (), {"device_kind": kind})

    kinds = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "TPU v5 lite")
    peaks = [peak_flops(device(kind)) for kind in (*kinds, "TPU v5p", "cpu")]
    np.testing.assert_array_equal(peaks[:-1], [989e12, 756e12, 312e12, 197e12, 459e12])
    assert peaks[-1] is None


def test_a_step_is_described(data_parallel):
    compiled, _ = data_parallel
    line = describe_step(compiled, 8 * 10**12, 8)
    assert line.startswith("A step takes 1 TFLOP of every device, ")
    assert " MB (all-gather " in line
    assert "sends" not in describe_step(compiled, 10**12, 1)
