import json

import jax
import numpy as np
import pytest
from conftest import GOLDENS
from flax.traverse_util import flatten_dict
from support import assert_trees_equal

from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.models.vit import ViTConfig
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import ARCHITECTURE, META, Weights
from simseg_jax.weights.formats import AUTHORS, IMAGE, TEXT
from simseg_jax.weights.read import architecture_json, fit, read_model, shapes_of, state_dict
from simseg_jax.weights.torch_file import load_tensors


@pytest.fixture(scope="module")
def tensors():
    return load_tensors(GOLDENS / "model.pth")["state_dict"]


def test_architecture_is_read_off_the_shapes(golden_model):
    config, _, _ = golden_model
    assert (config.image.width, config.image.depth, config.image.image_size) == (48, 3, 224)
    assert (config.text.width, config.text.depth, config.text.vocab_size) == (32, 2, 120)
    assert config.embed_dim == 24


def test_module_prefix_and_unused_entries_are_ignored(tensors, golden_model):
    _, _, params = golden_model
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    prefixed[f"module.{TEXT}pooler.dense.weight"] = np.zeros((32, 32))
    prefixed[f"module.{TEXT}embeddings.position_ids"] = np.zeros((1, 64))
    prefixed[f"module.{IMAGE}head.weight"] = np.zeros((10, 48))
    found = read_model(Weights(prefixed, {}, {}, {}), "model", 3, 2)
    assert found.note.startswith("Taken: 82 tensors; ignored: text_encoder (2), image_encoder (1)")
    assert found.config == golden_model[0]
    assert_trees_equal(found.params, params)


def test_all_problems_are_reported_together(tensors, golden_model):
    broken = dict(tensors)
    del broken["loss.temperature"]
    broken["image_projection.linear.weight"] = np.zeros((2, 2))
    broken["decoder.weight"] = np.zeros(3)
    with pytest.raises(UserError, match="3 problems") as error:
        fit(broken, golden_model[0])
    for part in (
        "missing loss.temperature",
        "image_projection.linear.weight float64(2, 2)",
        "decoder",
    ):
        assert part in str(error.value)


def test_foreign_state_dict_is_refused():
    with pytest.raises(UserError, match="Not a SimSeg checkpoint"):
        read_model(Weights({"fc.weight": np.zeros((3, 3))}, {}, {}, {}), "model")


def test_there_and_back_is_exact(tensors, golden_model):
    back = state_dict(golden_model[2])
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(back[name], tensor)


def full_size_names(image: ViTConfig, text: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shapes in a checkpoint of the authors, written down from timm's and BERT's own code."""
    shapes = {
        "cls_token": (1, 1, image.width),
        "pos_embed": (1, 197, image.width),
        "patch_embed.proj.weight": (image.width, 3, 16, 16),
        "patch_embed.proj.bias": (image.width,),
        "norm.weight": (image.width,),
        "norm.bias": (image.width,),
    }
    for i in range(12):
        for name, rows, columns in (
            ("attn.qkv", 3 * image.width, image.width),
            ("attn.proj", image.width, image.width),
            ("mlp.fc1", 4 * image.width, image.width),
            ("mlp.fc2", image.width, 4 * image.width),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns)}
            shapes |= {f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (image.width,)
    bert = {
        "embeddings.word_embeddings.weight": (30522, 768),
        "embeddings.position_embeddings.weight": (512, 768),
        "embeddings.token_type_embeddings.weight": (2, 768),
        "embeddings.LayerNorm.weight": (768,),
        "embeddings.LayerNorm.bias": (768,),
    }
    for i in range(12):
        layer = f"encoder.layer.{i}"
        for name, rows, columns in (
            *((f"attention.self.{part}", 768, 768) for part in ("query", "key", "value")),
            ("attention.output.dense", 768, 768),
            ("intermediate.dense", 3072, 768),
            ("output.dense", 768, 3072),
        ):
            bert |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            bert |= {f"{layer}.{name}.weight": (768,), f"{layer}.{name}.bias": (768,)}
    return {
        **{IMAGE + name: shape for name, shape in shapes.items()},
        **{TEXT + name: shape for name, shape in bert.items()},
        "image_projection.linear.weight": (512, image.width),
        "text_projection.linear.weight": (512, 768),
        "loss.temperature": (),
    }


@pytest.mark.parametrize(
    "image",
    [ViTConfig(), ViTConfig.b16()],
    ids=["ViT-S", "ViT-B"],
)
@pytest.mark.slow
def test_full_size_checkpoints_use_every_name_once(image):
    shapes = full_size_names(image, BertConfig.base())
    # Another value in every tensor: one that went to the wrong place would be noticed.
    tensors = {n: np.full(s, i, np.float32) for i, (n, s) in enumerate(shapes.items())}
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    _, config, _, params, _ = read_model(Weights(prefixed, {}, {}, {}), "model")
    assert config == SimSegConfig(image, BertConfig.base())
    leaves = {path: x.shape for path, x in flatten_dict(params, sep="/").items()}
    assert leaves == shapes_of(config)
    values = [int(leaf.flat[0]) for leaf in jax.tree.leaves(params)]
    assert sorted(values) == list(range(len(tensors)))
    names = [name for path in leaves for name in AUTHORS.tensors(path)]
    assert sorted(names) == sorted(tensors)


def test_the_description_beside_a_state_dict_decides(tensors, golden_model):
    config = golden_model[0]
    meta = {META: {ARCHITECTURE: architecture_json(config)}}
    assert read_model(Weights(tensors, {}, meta, {}), "model").config == config
    # Without it heads are taken to be 64 channels wide.
    assert read_model(Weights(tensors, {}, {}, {}), "model").config.image.heads == 1
    for text in ("{}", "[", "[]", '{"image": 3}', "[" * 100_000):
        with pytest.raises(UserError, match="Cannot read the description of the architecture"):
            read_model(Weights(tensors, {}, {META: {ARCHITECTURE: text}}, {}), "model")
    described = json.loads(architecture_json(config))
    for side, key, value in (
        ("image", "depth", 10**6),
        ("image", "heads", 5),
        ("text", "width", "32"),
        ("image", "mean", [1.0]),
        ("text", "mlp_width", -1),
        ("text", "vocab_size", 0),
    ):
        text = json.dumps(described | {side: described[side] | {key: value}})
        with pytest.raises(UserError, match=f"describe an impossible model: .*{key}"):
            read_model(Weights(tensors, {}, {META: {ARCHITECTURE: text}}, {}), "model")
