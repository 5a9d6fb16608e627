import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close, golden_batch

from simseg_jax.models.bert import BertConfig, Embeddings
from simseg_jax.models.layers import Keys
from simseg_jax.models.simseg import POOLS, SimSegConfig, bind, init_params, make_model
from simseg_jax.models.vit import ViTConfig

TINY = SimSegConfig(
    image=ViTConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, mlp_width=32),
    text=BertConfig(vocab_size=20, max_positions=8, width=16, depth=2, heads=2, mlp_width=32),
    embed_dim=8,
    m_image=3,
    m_text=2,
)


@pytest.mark.parametrize(
    ("image", "expected"), [(ViTConfig(), 21_665_664), (ViTConfig.b16(), 85_798_656)]
)
def test_full_size_parameter_counts(image, expected):
    # timm's vit_{small,base}_patch16_224 without head; HF's bert-base-uncased without pooler.
    config = SimSegConfig(image=image, text=BertConfig.base())
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    assert count["image_encoder"] == expected
    assert count["text_encoder"] == 108_891_648
    assert count["image_projection"] == image.width * 512
    assert count["text_projection"] == 768 * 512


@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_gives_unit_embeddings_and_gradients(pool):
    config = dataclasses.replace(TINY, pool=pool)
    params = init_params(config, jax.random.key(0))
    graphdef = make_model(config)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    ids = jax.random.randint(jax.random.key(2), (4, 6), 0, 20)
    mask = jnp.arange(6)[None] < jnp.array([[3], [4], [5], [6]])

    def similarity(params):
        model = bind(graphdef, params)
        image, _ = model.encode_image(images)
        text = model.encode_text(ids, mask)
        return (image * text).sum(), (image, text)

    value_and_grad = jax.jit(jax.value_and_grad(similarity, has_aux=True))
    (_, embeddings), gradients = value_and_grad(params)
    for embedding in embeddings:
        np.testing.assert_allclose(jnp.linalg.norm(embedding, axis=1), 1, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in map(np.asarray, jax.tree.leaves(gradients)))


def test_drawn_patches_are_the_tokens():
    """The image encoder on some patches is the one on all tokens, of which the others are cut."""
    config = dataclasses.replace(TINY, image=dataclasses.replace(TINY.image, keep=0.4))
    params = init_params(config, jax.random.key(0))
    vit = bind(make_model(config), params).image_encoder
    images = jax.random.normal(jax.random.key(1), (5, 32, 32, 3))
    keys = jax.random.split(jax.random.key(2), 5)
    embedded = vit.patch_embed(vit.patch_embed.cut(images)) + vit.pos_embed[...][:, 1:]
    numbers = jnp.broadcast_to(jnp.arange(16)[None, :, None], (5, 16, 1))
    places = jnp.concatenate([jnp.zeros((1, 1, 1)), jnp.arange(16.0)[None, :, None]], axis=1)
    chosen, found = vit._draw(places, numbers, keys)
    np.testing.assert_array_equal(chosen[..., 0], found[:, 1:, 0])  # Each with its own position.
    chosen = np.asarray(chosen[..., 0])
    assert chosen.shape == (5, 6)
    assert (np.diff(chosen) > 0).all()
    assert len({tuple(row) for row in chosen}) > 1
    cls = vit.cls_token[...] + vit.pos_embed[...][:, :1]
    kept = jnp.take_along_axis(embedded, chosen[:, :, None], axis=1)
    x = jnp.concatenate([jnp.broadcast_to(cls, (5, 1, 16)), kept], axis=1)
    for block in vit.blocks:
        x = block(x)
    assert_close(vit(images, keys), vit.norm(x))
    # An image draws the same in any batch, and without keys, as in evaluation, all are kept.
    assert_close(vit(images[3:4], keys[3:4]), vit(images, keys)[3:4])
    assert vit(images).shape == (5, 17, 16)


def test_twelve_layers_keep_their_order():
    """With more than ten, "10" sorts before "2"."""
    image = dataclasses.replace(TINY.image, depth=12)
    text = dataclasses.replace(TINY.text, depth=12)
    config = dataclasses.replace(TINY, image=image, text=text)
    params = init_params(config, jax.random.key(0))
    model = bind(make_model(config), params)
    for i in range(12):
        block, layer = model.image_encoder.blocks[i], model.text_encoder.layers[i]
        for actual, expected in (
            (block.mlp.fc1.kernel, params["image_encoder"]["blocks"][str(i)]["mlp"]["fc1"]),
            (layer.intermediate.kernel, params["text_encoder"]["layers"][str(i)]["intermediate"]),
        ):
            np.testing.assert_array_equal(actual[...], expected["kernel"])


def test_dropout_only_with_a_key():
    graphdef, params = make_model(TINY), init_params(TINY, jax.random.key(0))
    model = bind(graphdef, params)
    ids, mask = jnp.ones((2, 6), int), jnp.ones((2, 6), bool)
    plain = model.encode_text(ids, mask)
    keys = jax.random.split(jax.random.key(1), 2)
    first = model.encode_text(ids, mask, keys=keys)
    np.testing.assert_array_equal(plain, model.encode_text(ids, mask))
    np.testing.assert_array_equal(first, model.encode_text(ids, mask, keys=keys))
    assert np.abs(np.asarray(first - plain)).max() > 1e-3
    # Equal examples with different keys; an example alone draws what it draws in a batch.
    assert np.abs(np.asarray(first[0] - first[1])).max() > 1e-3
    assert_close(model.encode_text(ids[1:], mask[1:], keys=keys[1:]), first[1:])


def test_padding_competes_only_when_unmasked(golden_model, golden):
    _, graphdef, params = golden_model
    model = bind(graphdef, params)
    _, ids, mask = golden_batch(golden)
    longer = jnp.pad(ids, ((0, 0), (0, 10)))
    longer_mask = jnp.pad(mask, ((0, 0), (0, 10)))
    masked = model.encode_text(ids, mask, m=3, mask_padding=True)
    assert_close(model.encode_text(longer, longer_mask, m=3, mask_padding=True), masked)
    unmasked = model.encode_text(ids, mask, m=3, mask_padding=False)
    changed = model.encode_text(longer, longer_mask, m=3, mask_padding=False)
    assert np.abs(np.asarray(changed - unmasked)).max() > 1e-3


def test_bfloat16_stays_close_to_float32(golden_model, golden):
    config, graphdef, params = golden_model
    images, ids, mask = golden_batch(golden)
    low = bind(make_model(config, jnp.bfloat16), params)
    full = bind(graphdef, params)
    image, patches = low.encode_image(images)
    assert image.dtype == patches.dtype == jnp.float32
    # bfloat16 has 8 bits of mantissa: 3 layers stay within a few times 2^-8.
    assert_close(image, full.encode_image(images)[0], 0.03)
    assert_close(low.encode_text(ids, mask), full.encode_text(ids, mask), 0.03)


def test_images_are_normalised_as_the_encoder_expects():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    config = dataclasses.replace(TINY, image=dataclasses.replace(TINY.image, mean=mean, std=std))
    model = bind(make_model(config), init_params(config, jax.random.key(0)))
    batch = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    normalised = jax.jit(model.normalize)(batch)
    assert normalised.dtype == jnp.float32
    expected = (batch / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_frequent_word_is_summed_in_float32():
    """In bfloat16 a sum of 4096 equal terms stops at 256 of them."""
    config = dataclasses.replace(TINY.text, vocab_size=10)
    ids = jnp.full((512, 8), 7)

    def gradient(dtype):
        model = Embeddings(config, dtype, Keys(jax.random.key(0)))
        graphdef, state = nnx.split(model)
        slope = jax.random.normal(jax.random.key(1), (config.width,))

        def loss(state):
            return (nnx.merge(graphdef, state)(ids).astype(jnp.float32) * slope[None, None]).sum()

        return nnx.to_pure_dict(jax.grad(loss)(state))

    expected, found = gradient(jnp.float32), gradient(jnp.bfloat16)
    for table, row in (("word_embeddings", 7), ("token_type_embeddings", 0)):
        assert_close(  # The slope itself is rounded to eight bits.
            found[table]["embedding"][row], expected[table]["embedding"][row], tolerance=1e-2
        )
