"""One training step as a pure function: augment, embed, compare, update; exact gradient cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from simseg_jax.data.autoaugment_jax import augment_batch, draw_keys
from simseg_jax.models.simseg import bind
from simseg_jax.runtime.sharding import batch_sharding, constrain_batch, map_batch
from simseg_jax.training.loss import chunked_contrastive_loss, contrastive_loss


def make_update(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    autoaugment: bool = False,
    micro_batch: int = 0,
    loss_chunk: int = 0,
    frozen: Any = None,
) -> Callable:
    """update(state, batch) -> (state, metrics): one pure training step.

    state: {"params", "opt", "step"}; batch: {"image": uint8 [B, H, W, 3], "ids": int32 [B, T],
    "mask": bool [B, T], optionally "groups": uint32 [B, n], see `contrastive_loss`}. Dropout,
    the draw of patches and augmentation follow from (seed, step) alone.

    micro_batch: pairs per device that the encoders see at a time, 0 for all (`cached_gradient`).
    loss_chunk: as of `chunked_contrastive_loss`, 0 for the plain form. Neither changes the result,
    but for rounding.
    frozen: a bool per parameter, those that the optimiser does not move; their gradients are zero,
    and what only serves those is not computed.
    """

    def fixed(params):
        if frozen is None:
            return params
        return jax.tree.map(lambda x, f: jax.lax.stop_gradient(x) if f else x, params, frozen)

    def embed(params, examples):
        model = bind(graphdef, fixed(params))
        keys = examples["keys"]
        images, _ = model.encode_image(model.normalize(examples["image"]), keys)
        texts = model.encode_text(examples["ids"], examples["mask"], keys=keys)
        return images, texts

    def compare(embeddings, params, groups):
        images, texts = embeddings
        temperature = fixed(params)["temperature"]
        if loss_chunk:
            return chunked_contrastive_loss(images, texts, temperature, loss_chunk, groups)
        return contrastive_loss(images, texts, temperature, groups)

    def update(state, batch):
        params, size = state["params"], len(batch["image"])
        batch = dict(batch)
        groups = batch.pop("groups", None)
        if autoaugment:
            keys = draw_keys(seed, state["step"], size)
            batch = {**batch, "image": map_batch(augment_batch, batch["image"], keys)}
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        examples = {**batch, "keys": constrain_batch(jax.random.split(key, size))}
        compare_all = functools.partial(compare, groups=groups)
        if micro_batch:
            value_and_gradient = cached_gradient(embed, compare_all, micro_batch)
        else:
            value_and_gradient = jax.value_and_grad(
                lambda params, examples: compare_all(embed(params, examples), params), has_aux=True
            )
        (loss, metrics), gradients = value_and_gradient(params, examples)
        updates, opt = optimizer.update(gradients, state["opt"], params)
        params = optax.apply_updates(params, updates)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return update


def initial_state(params, optimizer: optax.GradientTransformation) -> dict:
    """What `update` takes before the first step: parameters, fresh moments, step 0."""
    return {"params": params, "opt": optimizer.init(params), "step": jnp.int32(0)}


def jit_update(update: Callable, shardings: dict, mesh: Mesh):
    """`update` as it is run everywhere: state split as `shardings` and donated."""
    return jax.jit(
        update,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def cached_gradient(embed: Callable, compare: Callable, micro_batch: int) -> Callable:
    """As jax.value_and_grad of compare(embed(params, examples), params), in less memory.

    The exact gradient cache of Gao et al., "Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup" (2021): embeds micro-batches without keeping activations, takes the
    gradient of the whole batch's loss with respect to the embeddings, then embeds every micro-batch
    again and propagates its part of that gradient. One more forward pass buys activations of
    micro_batch pairs per device; gradients are summed over devices once.
    embed(params, examples) must treat every example alone.
    """

    def embed_all(params, examples):
        parts = split(examples)
        _, embeddings = jax.lax.scan(lambda _, part: (None, embed(params, part)), None, parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), embeddings)

    def propagate(params, examples, slopes):
        def accumulate(total, inputs):
            part, part_slopes = inputs
            _, pullback = jax.vjp(lambda params: embed(params, part), params)
            return jax.tree.map(jnp.add, total, pullback(part_slopes)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(accumulate, zeros, split((examples, slopes)))
        return jax.tree.map(lambda x: x[None], total)

    def split(tree):
        size = min(micro_batch, len(jax.tree.leaves(tree)[0]))
        return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)

    def value_and_gradient(params, examples):
        embeddings = map_batch(embed_all, examples, shared=params)
        value, (slopes, direct) = jax.value_and_grad(compare, argnums=(0, 1), has_aux=True)(
            embeddings, params
        )
        gradients = map_batch(propagate, examples, slopes, shared=params)
        return value, jax.tree.map(lambda x, y: x.sum(axis=0) + y, gradients, direct)

    return value_and_gradient
