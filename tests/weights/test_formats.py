"""Encoders of other code bases, against outputs of theirs (tests/goldens/make_neighbours.py)."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import nnx
from safetensors.numpy import load_file, save_file
from support import assert_close

from simseg_jax.models.bert import Bert, BertConfig
from simseg_jax.models.layers import Keys
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.models.vit import ViT, ViTConfig
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import Weights, read_weights
from simseg_jax.weights.formats import FORMATS
from simseg_jax.weights.read import read_model, shapes_of

NEIGHBOURS = GOLDENS / "neighbours"
IMAGE_TOWERS = {
    "timm": "timm ViT",
    "timm_layerscale": "timm ViT",
    "timm_clip": "timm ViT",
    "hf_vit": "Hugging Face ViT",
    "hf_clip": "Hugging Face CLIP",
    "open_clip": "open_clip",
    "augreg": "big_vision ViT",
    "big_vision": "big_vision ViT",
}


@pytest.fixture(scope="module")
def outputs():
    return dict(np.load(NEIGHBOURS / "outputs.npz"))


def run_tower(tower, *inputs):
    kind = Bert if tower.format == "Hugging Face BERT" else ViT
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: kind(tower.config, jnp.float32, Keys(jax.random.key(0))))
    )

    def apply(params, *inputs):
        return nnx.merge(graphdef, keyed(params))(*inputs)

    return jax.jit(apply)(tower.params, *inputs)


def keyed(tree):
    """Numbers of blocks as NNX has them."""
    if not isinstance(tree, dict):
        return jnp.asarray(tree)
    return {int(k) if k.isdigit() else k: keyed(v) for k, v in tree.items()}


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_image_encoders_agree(name, outputs):
    tower = read_model(read_weights(NEIGHBOURS / name), "image")
    assert tower.format == IMAGE_TOWERS[name]
    assert (tower.config.width, tower.config.depth, tower.config.heads) == (24, 2, 3)
    # LayerScale is multiplied into the weights: another order of rounding, still within 1e-5.
    assert_close(run_tower(tower, outputs["images"]), outputs[name])


def test_text_encoder_agrees(outputs):
    tower = read_model(read_weights(NEIGHBOURS / "hf_bert"), "text")
    tokens = run_tower(tower, outputs["ids"], outputs["mask"])
    assert_close(tokens, outputs["hf_bert"])
    assert tower.config.activation == "gelu_tanh"


def test_normalisation_comes_with_the_weights():
    means = {n: read_model(read_weights(NEIGHBOURS / n), "image").config.mean for n in IMAGE_TOWERS}
    assert means["timm"] == means["augreg"] == means["hf_vit"] == (0.5, 0.5, 0.5)
    assert means["hf_clip"] == (0.48, 0.46, 0.41)
    assert means["open_clip"] == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    # Not in the files: what the configuration says stays.
    assert "mean" not in read_model(read_weights(NEIGHBOURS / "timm_clip"), "image").fields


def test_blocks_in_a_loop_and_old_names(outputs):
    weights = read_weights(NEIGHBOURS / "big_vision")
    stacked, blocks = {}, {}
    for name, tensor in weights.tensors.items():
        before, found, after = name.partition("encoderblock_")
        if found:
            blocks.setdefault(f"{before}encoderblock/{after[2:]}", []).append(tensor)
        else:
            stacked[name] = tensor
    stacked |= {name: np.stack(parts) for name, parts in blocks.items()}
    tower = read_model(weights._replace(tensors=stacked), "image")
    assert_close(run_tower(tower, outputs["images"]), outputs["big_vision"])

    weights = read_weights(NEIGHBOURS / "hf_bert")
    gamma = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in weights.tensors
    }
    old = dict(
        zip(sorted(gamma), (weights.tensors[n] for n in sorted(weights.tensors)), strict=True)
    )
    assert any(name.endswith("gamma") for name in old)
    tower = read_model(weights._replace(tensors=old), "text")
    tokens = run_tower(tower, outputs["ids"], outputs["mask"])
    assert_close(tokens, outputs["hf_bert"])


def test_what_the_weights_do_not_say_must_lie_beside_them(tmp_path):
    for name, file, needed in (
        ("hf_bert", "model.safetensors", "config.json"),
        ("hf_clip", "model.safetensors", "config.json"),
        ("open_clip", "open_clip_model.safetensors", "open_clip_config.json"),
    ):
        shutil.copy(NEIGHBOURS / name / file, tmp_path / file)
        side = "text" if name == "hf_bert" else "image"
        with pytest.raises(UserError, match=f"needs its {needed}"):
            read_model(read_weights(tmp_path / file), side)


def changed(name, remove=(), **tensors):
    weights = read_weights(NEIGHBOURS / name)
    kept = {k: v for k, v in weights.tensors.items() if k not in remove}
    return weights._replace(tensors=kept | tensors)


def test_all_problems_of_an_encoder_are_reported_together():
    lost = "blocks.1.attn.qkv.bias"
    weights = changed("timm", remove=(lost,), extra=np.zeros(3))
    weights.tensors["blocks.0.mlp.fc2.weight"] = np.zeros((24, 47), np.float32)
    with pytest.raises(UserError, match="3 problems") as error:
        read_model(weights, "image")
    for part in (f"missing {lost}", "unexpected extra", "fc2.weight float32(24, 47) cannot become"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind", "parameter"),
    [
        ("timm", r"attn\.qkv\.bias", ("attn", "qkv")),
        ("hf_vit", r"intermediate\.dense\.bias", ("mlp", "fc1")),
        ("open_clip", r"visual\..*attn\.in_proj_bias", ("attn", "qkv")),
    ],
)
def test_layers_without_bias_in_all_blocks_have_zeros(name, kind, parameter):
    biases = [n for n in read_weights(NEIGHBOURS / name).tensors if re.search(f"{kind}$", n)]
    assert len(biases) >= 2
    found = read_model(changed(name, remove=biases), "image").params["blocks"]
    for block in found.values():
        layer = block[parameter[0]][parameter[1]]
        assert not layer["bias"].any()
        assert layer["bias"].shape == layer["kernel"].shape[1:]
    with pytest.raises(UserError, match=r"missing .*bias"):
        read_model(changed(name, remove=biases[:1]), "image")


@pytest.mark.parametrize("name", ["augreg", "big_vision"])
def test_layers_of_big_vision_always_have_their_bias(name):
    biases = [n for n in read_weights(NEIGHBOURS / name).tensors if n.endswith("Dense_0/bias")]
    with pytest.raises(UserError, match=r"2 problems\). missing .*Dense_0/bias"):
        read_model(changed(name, remove=biases), "image")


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_a_table_has_tensors_of_their_own_for_every_parameter(form):
    image = ViTConfig(pre_norm="norm_pre" in form.names, depth=2)
    text = BertConfig(vocab_size=9, depth=2)
    config = {"model": SimSegConfig(image, text), "image": image, "text": text}[form.part]
    names = [form.tensors(path) for path in shapes_of(config)]
    assert all(names)
    flat = [name for several in names for name in several]
    assert len(flat) == len(set(flat))
    assert form.signature in flat
    assert not any(set("#()*") & set(name) for name in flat)


def test_what_is_not_representable_is_said():
    with pytest.raises(UserError, match="register tokens, which have no place here"):
        read_model(changed("timm", reg_token=np.zeros((1, 4, 24))), "image")
    with pytest.raises(UserError, match=r"gated MLPs"):
        read_model(changed("timm", **{"blocks.0.mlp.w12.weight": np.zeros((4, 4))}), "image")
    with pytest.raises(UserError, match="its position embedding has 4 rows"):
        read_model(changed("timm", pos_embed=np.zeros((1, 4, 24))), "image")
    with pytest.raises(UserError, match="missing cls_token"):
        read_model(changed("timm", remove=("cls_token",)), "image")
    with pytest.raises(
        UserError, match=r"open_clip, not one text .*\. CLIP's text encoder is causal"
    ):
        read_model(changed("open_clip"), "text")
    with pytest.raises(UserError, match=r"no encoder known here, not one image encoder"):
        read_model(Weights({"fc.weight": np.zeros((2, 2))}, {}, {}, {}), "image")


def test_other_kinds_of_text_encoders_are_refused(tmp_path):
    shutil.copytree(NEIGHBOURS / "hf_bert", tmp_path / "roberta")
    file = tmp_path / "roberta" / "config.json"
    card = json.loads(file.read_text())
    for change, message in (
        ({"model_type": "roberta"}, "model_type='roberta', which is not supported"),
        ({"is_decoder": True}, "is a decoder"),
        ({"hidden_act": "swish"}, "'swish' is not supported"),
    ):
        file.write_text(json.dumps(card | change))
        with pytest.raises(UserError, match=message):
            read_model(read_weights(tmp_path / "roberta"), "text")


def test_one_encoder_out_of_a_whole_model(golden_model):
    config, _, params = golden_model
    tower = read_model(read_weights(GOLDENS / "model.pth"), "image", 3)
    assert tower.config == config.image
    jax.tree.map(np.testing.assert_array_equal, tower.params, params["image_encoder"])


def test_weights_in_several_files_and_in_half_precision(tmp_path, outputs):
    tensors = load_file(NEIGHBOURS / "hf_bert" / "model.safetensors")
    shutil.copy(NEIGHBOURS / "hf_bert" / "config.json", tmp_path)
    names = list(tensors)
    parts = {"one.safetensors": names[:10], "two.safetensors": names[10:]}
    for file, part in parts.items():
        save_file({name: tensors[name].astype(jnp.bfloat16) for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tower = read_model(read_weights(tmp_path), "text")
    # bfloat16 has eight bits.
    tokens = run_tower(tower, outputs["ids"], outputs["mask"])
    assert_close(tokens, outputs["hf_bert"], 2e-2)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks two\.safetensors"):
        read_weights(tmp_path)
