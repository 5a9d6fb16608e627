"""Parity with the authors' code, layer by layer, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, golden_batch

from simseg_jax.models.pooling import mean_pool, top_m_pool
from simseg_jax.models.simseg import bind, path_string
from simseg_jax.models.vit import resize_position_embedding
from simseg_jax.training.loss import contrastive_loss
from simseg_jax.training.optim import OptimConfig, adamw, cosine_schedule
from simseg_jax.weights.read import fit
from simseg_jax.weights.torch_file import load_tensors


@pytest.fixture(scope="module")
def model(golden_model):
    _, graphdef, params = golden_model
    return bind(graphdef, params)


def training_loss(graphdef, golden):
    images, ids, mask = golden_batch(golden)

    def loss(params):
        model = bind(graphdef, params)
        embeddings, _ = model.encode_image(images)
        return contrastive_loss(embeddings, model.encode_text(ids, mask), model.temperature[...])

    return loss


def test_encoders_and_projections(model, golden):
    images, ids, mask = golden_batch(golden)
    image_tokens = model.image_encoder(images)
    text_tokens = model.text_encoder(ids, mask)
    assert_close(image_tokens[:, 1:], golden["vit_patch_tokens"])
    assert_close(text_tokens, golden["bert_tokens"])
    assert_close(model.image_projection(image_tokens[:, 1:]), golden["image_projected"])
    assert_close(model.text_projection(text_tokens), golden["text_projected"])


@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("side", ["image", "text"])
def test_unmasked_pooling(golden, side, m):
    pooled = top_m_pool(golden[f"{side}_projected"], m)
    assert_close(pooled, golden[f"pool_vanilla_k{m}_{side}"], 1e-6)


@pytest.mark.parametrize("m", [1, 3])
def test_masked_pooling(golden, m):
    pooled = top_m_pool(golden["text_projected"], m, golden["attention_mask"])
    assert_close(pooled, golden[f"pool_masked_k{m}_text"], 1e-6)


def test_mean_pooling(golden):
    pooled = mean_pool(jnp.asarray(golden["text_projected"]), jnp.asarray(golden["attention_mask"]))
    assert_close(pooled, golden["pool_avg_masked_text"], 1e-6)


def test_evaluation_embeddings(model, golden):
    images, ids, mask = golden_batch(golden)
    embedding, tokens = model.encode_image(images)
    assert_close(embedding, golden["eval_image_embedding"])
    assert_close(model.pool_image(tokens, m=5), golden["eval_image_embedding"])
    assert_close(tokens[:, 1:], golden["image_projected"])
    text = model.encode_text(ids, mask, m=1, mask_padding=True)
    assert_close(text, golden["eval_text_embedding_m1"])


def test_resized_position_embedding(model, golden):
    resized = resize_position_embedding(model.image_encoder.pos_embed[...], (18, 18))
    assert_close(resized, golden["pos_embed_288"])


def test_loss_and_gradients(golden_model, golden):
    config, graphdef, params = golden_model
    params = {**params, "temperature": jnp.float32(0.07)}
    value_and_grad = jax.jit(jax.value_and_grad(training_loss(graphdef, golden), has_aux=True))
    (loss, metrics), gradients = value_and_grad(params)
    assert_close(loss, golden["train_loss"], 1e-6)
    assert_close(metrics["i2t_accuracy"], golden["train_i2t_acc"], 1e-6)
    assert_close(metrics["t2i_accuracy"], golden["train_t2i_acc"], 1e-6)
    # The gradients carry the authors' names: give the parameters the same layout by conversion.
    stored = {k.removeprefix("grad/"): v for k, v in golden.items() if k.startswith("grad/")}
    everything = {**load_tensors_of_model(), **stored}
    expected = jax.tree_util.tree_leaves_with_path(fit(everything, config))
    ours = {path_string(p): g for p, g in jax.tree_util.tree_leaves_with_path(gradients)}
    weights = {path_string(p): w for p, w in jax.tree_util.tree_leaves_with_path(params)}
    compared = 0
    for path, gradient in expected:
        name = path_string(path)
        if name == "temperature" or not np.array_equal(gradient, weights[name]):
            # A key bias cannot move the softmax: its true gradient is 0, both are rounding noise.
            if name.endswith("key/bias"):
                assert np.abs(ours[name]).max() < 1e-6
            else:
                assert_close(ours[name], gradient)
            compared += 1
    assert compared == len(stored)


def load_tensors_of_model():
    from conftest import GOLDENS

    return load_tensors(GOLDENS / "model.pth")["state_dict"]


def test_twelve_adamw_steps(golden_model, golden):
    _, graphdef, params = golden_model
    params = jax.tree.map(jnp.asarray, {**params, "temperature": np.float32(0.07)})
    schedule = cosine_schedule(3e-4, steps=12, warmup_steps=3, final_fraction=0.1)
    optim = OptimConfig(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
    optimizer = adamw(optim, schedule, params)
    value_and_grad = jax.value_and_grad(training_loss(graphdef, golden), has_aux=True)

    @jax.jit
    def step(params, opt):
        (loss, _), gradients = value_and_grad(params)
        updates, opt = optimizer.update(gradients, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    opt = optimizer.init(params)
    losses = []
    for _ in range(12):
        params, opt, loss = step(params, opt)
        losses.append(loss)
    assert_close([schedule(i) for i in range(12)], golden["opt_lrs"], 1e-6)
    assert_close(losses, golden["opt_losses"])
    assert_close(params["temperature"], golden["opt_final_temperature"])
    kernel = params["image_projection"]["kernel"]
    assert_close(kernel.T, golden["opt_final_image_projection"])
