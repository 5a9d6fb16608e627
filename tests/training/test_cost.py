"""Model FLOPs against XLA's count; communication of the compiled step against the minimum."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from step_support import BATCH, MODEL, TOKENS, batch, compile_step, lower_step

from simseg_jax.models.simseg import bind, init_params, make_model
from simseg_jax.training.collectives import communication_bytes
from simseg_jax.training.cost import (
    describe_step,
    forward_flops,
    least_communication,
    step_flops,
)
from simseg_jax.training.loss import contrastive_loss


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_flops_are_those_that_xla_counts(keep):
    """Of the products: a model whose widths dwarf its element-wise work, within 5 %."""
    image = dataclasses.replace(MODEL.image, width=256, heads=4, mlp_width=1024, keep=keep)
    text = dataclasses.replace(MODEL.text, width=256, heads=4, mlp_width=1024)
    model = dataclasses.replace(MODEL, image=image, text=text, embed_dim=256)

    def loss(params, examples):
        bound = bind(make_model(model), params)
        keys = jax.random.split(jax.random.key(0), BATCH)
        images, _ = bound.encode_image(examples["image"].astype(jnp.float32), keys)
        texts = bound.encode_text(examples["ids"], examples["mask"])
        return contrastive_loss(images, texts, params["temperature"])[0]

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    counted = jax.jit(loss).lower(params, batch()).compile().cost_analysis()["flops"]
    expected = forward_flops(model, BATCH, TOKENS)
    assert 1 <= counted / expected < 1.05
    assert step_flops(model, BATCH, TOKENS) == 3 * expected


SOME_PATCHES = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, keep=0.5))


@pytest.fixture(scope="module")
def data_parallel():
    return compile_step(devices=8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"micro_batch": 2, "loss_chunk": 2}, marks=pytest.mark.slow),
        pytest.param({"model": SOME_PATCHES}, marks=pytest.mark.slow, id="keep"),
    ],
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
    # The row of the second token type has no gradient; micro-batches add it up all the same.
    unused = 0 if "micro_batch" in options else 4 * MODEL.text.width
    least = 2 * share * (parameters - unused + columns)
    assert least <= sent.pop("all-reduce") <= least + scalars
    assert not sent
    # XLA for CPUs takes the maximum of a column twice.
    column = 2 * share * 4 * BATCH
    needless = column + (2 * share * 4 * MODEL.text.width if not unused else 0)
    expected = 2 * embeddings + least - needless
    assert least_bytes(state["params"], options.get("micro_batch", 0)) == expected


def least_bytes(params, micro_batch=0, trained=True):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    frozen = jax.tree.map(lambda _: not trained, params)
    mesh = params["temperature"].sharding.mesh
    size = (BATCH, TOKENS)
    return least_communication(
        make_model(MODEL), params, shardings, frozen, size, mesh, micro_batch
    )


def test_a_needless_collective_exceeds_the_minimum(data_parallel):
    """What the comparison in `plan` and above is for."""

    def gather_images(update):
        def wrapped(state, batch):
            state, metrics = update(state, batch)
            return state, metrics | {
                "images": jax.lax.with_sharding_constraint(batch["image"], P())
            }

        return wrapped

    compiled, (state, arguments) = compile_step(devices=8, wrap=gather_images)
    least = least_bytes(state["params"])
    usual = communication_bytes(data_parallel[0].as_text()).total()
    assert least <= usual < 1.001 * least
    sent = communication_bytes(compiled.as_text()).total()
    assert sent == usual + arguments["image"].nbytes * 7 / 8 > 1.03 * least


def test_frozen_parameters_are_gathered_once_and_their_gradients_not_sent():
    _, (state, _) = lower_step(devices=8, fsdp=4)
    leaves = jax.tree.leaves(state["params"])
    split = sum(x.nbytes for x in leaves if not x.sharding.is_fully_replicated)
    embeddings = 2 * 4 * BATCH * MODEL.embed_dim * 7 / 8
    columns = 3 * 2 * 4 * BATCH * 7 / 8
    assert least_bytes(state["params"], trained=False) == split * 3 / 4 + embeddings + columns


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


def test_a_step_is_described(data_parallel):
    compiled, _ = data_parallel
    line = describe_step(compiled, 8 * 10**12, 8)
    assert line.startswith("A step takes 1 TFLOP of every device, ")
    assert " MB (all-gather " in line
    assert "sends" not in describe_step(compiled, 10**12, 1)
