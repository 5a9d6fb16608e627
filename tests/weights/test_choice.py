"""Checkpoints as people have them: wrapped, nested, with a teacher or an average beside it."""

import jax
import numpy as np
import pytest
from conftest import GOLDENS
from support import assert_trees_equal

from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import Weights, read_weights
from simseg_jax.weights.read import parts_in, read_model
from simseg_jax.weights.sources import split_key
from simseg_jax.weights.torch_file import load_tensors, save_tensors


@pytest.fixture(scope="module")
def plain():
    return read_weights(GOLDENS / "neighbours" / "timm").tensors


@pytest.fixture(scope="module")
def encoder(plain):
    return read_model(Weights(plain, {}, {}, {}), "image", 3)


def prefixed(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def read(path, content, key=""):
    save_tensors(path, content)
    return read_model(read_weights(path, key), "image", 3)


@pytest.mark.parametrize(
    "wrap",
    [
        *(
            lambda x, p=p: prefixed(p, x)
            for p in (
                "module.",
                "_orig_mod.",
                "module._orig_mod.",
                "_orig_mod.module.",
                "model.module.",
                "module.backbone.",
                "encoder.model.",
            )
        ),
        *(
            lambda x, k=k: {k: x, "epoch": 3, "loss": {"mean": 0.5}}
            for k in ("model_state_dict", "net", "model", "state_dict", "module", "anything")
        ),
        lambda x: {"checkpoint": {"model": prefixed("module.", x), "epoch": 3}},
        lambda x: {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in x.items()},
    ],
)
def test_whatever_wraps_one_encoder_leaves_it_the_same(wrap, plain, encoder, tmp_path):
    found = read(tmp_path / "file.pth", wrap(plain))
    assert_trees_equal(found.params, encoder.params)
    assert found.note.startswith("Taken: 30 tensors")
    assert "head (2)" in found.note


def averaged(tensors):
    return {name: np.asarray(2 * x) for name, x in tensors.items()}


# What holds an average, its key, the key of the raw weights beside it.
TWO = {
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict_ema", "state_dict"),
    "MAE": (lambda a, b: {"model_ema": b, "model": a}, "model_ema", "model"),
    "DINO": (
        lambda a, b: {
            "student": prefixed("module.backbone.", a),
            "teacher": prefixed("backbone.", b) | {"head.mlp.weight": np.zeros(3, np.float32)},
        },
        "teacher",
        "student",
    ),
    "DINOv2": (
        lambda a, b: {"model": prefixed("student.backbone.", a) | prefixed("teacher.backbone.", b)},
        "teacher",
        "student",
    ),
    "flat": (lambda a, b: a | prefixed("ema.module.", b), "ema", "."),
}


@pytest.mark.parametrize("name", TWO)
def test_the_average_is_taken_unless_a_key_chooses(name, plain, encoder, tmp_path):
    wrap, average, raw = TWO[name]
    content = wrap(plain, averaged(plain))
    default, chosen, other = (read(tmp_path / "a.pth", content, key) for key in ("", average, raw))
    double = jax.tree.map(lambda x: 2 * x, encoder.params)
    assert_trees_equal(default.params, double)
    assert_trees_equal(chosen.params, double)
    assert_trees_equal(other.params, encoder.params)
    assert average in default.note.partition(";")[0]
    assert raw == "." or f"{raw} (32)" in default.note
    with pytest.raises(UserError, match=r"no image encoder .* under #nothing, only under "):
        read(tmp_path / "a.pth", content, "nothing")


def test_equally_good_ones_are_refused_with_their_names(plain, tmp_path):
    for keys in (("net", "other"), ("ema", "teacher"), ("model", "state_dict")):
        content = {key: averaged(plain) for key in keys}
        expected = rf"not one image encoder .* but 2, under {', '.join(keys)}: choose one"
        with pytest.raises(UserError, match=expected):
            read(tmp_path / "two.pth", content)
        read(tmp_path / "two.pth", content, keys[1])
    with pytest.raises(UserError, match="twice"):
        read(tmp_path / "two.pth", prefixed("module.", plain) | plain)
    with pytest.raises(UserError, match="under epoch, schedule"):
        read(tmp_path / "none.pth", {"epoch": np.zeros(1), "schedule": {"lr": np.zeros(1)}})
    with pytest.raises(UserError, match="holds no tensors, only epoch, config"):
        read(tmp_path / "none.pth", {"epoch": 3, "config": {"lr": 0.1}})


def test_moments_of_an_optimiser_are_no_model(plain, encoder, tmp_path):
    content = {"model": plain, "optimizer": {"mu": plain, "nu": averaged(plain)}}
    found = read(tmp_path / "file.pth", content)
    assert_trees_equal(found.params, encoder.params)
    assert "optimizer (64)" in found.note


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "model."])
def test_whole_models_are_found_as_encoders_are(prefix, golden_model, tmp_path):
    tensors = load_tensors(GOLDENS / "model.pth")["state_dict"]
    path = tmp_path / "whole.pth"
    content = {"state_dict": prefixed(prefix, tensors), "ema": averaged(tensors), "meta": {"a": 1}}
    save_tensors(path, content)
    weights = read_weights(path)
    assert parts_in(weights) == ["model"]
    found = read_model(weights, "model", 3, 2)
    assert_trees_equal(found.params, jax.tree.map(lambda x: 2 * x, golden_model[2]))
    assert found.note.startswith("Taken: 82 tensors under ema; ignored: state_dict (82).")
    assert "one per 64 channels" not in found.note
    assert "1 (image) and 1 (text) were taken" in read_model(weights, "model").note
    raw = read_model(read_weights(path, "state_dict"), "model", 3, 2)
    assert_trees_equal(raw.params, golden_model[2])
    assert read_weights(path, "state_dict").origin["key"] == "state_dict"


def test_what_can_be_read_is_named(plain):
    assert parts_in(Weights(plain, {}, {}, {})) == ["image"]
    assert parts_in(read_weights(GOLDENS / "neighbours" / "hf_bert")) == ["text"]
    assert parts_in(Weights({"fc.weight": np.zeros(3)}, {}, {}, {})) == []


def test_keys_in_the_names_of_sources(tmp_path):
    assert split_key("runs/a.pth#teacher") == ("runs/a.pth", "teacher")
    assert split_key("owner/name@main#model.ema") == ("owner/name@main", "model.ema")
    assert split_key("gs://bucket/a.pth") == ("gs://bucket/a.pth", "")
    (tmp_path / "run#1").mkdir()
    assert split_key(tmp_path / "run#1") == (str(tmp_path / "run#1"), "")
    assert split_key(f"{tmp_path}/run#1/a.pth#ema") == (f"{tmp_path}/run#1/a.pth", "ema")


def test_pooled_quantised_and_infinite_weights_are_refused(plain, tmp_path):
    pooled = {n.replace("norm.", "fc_norm.") if n[:4] == "norm" else n: x for n, x in plain.items()}
    changed = {"blocks.0.norm1.weight": plain["blocks.0.norm1.weight"] * np.nan}
    changed["norm.bias"] = np.full_like(plain["norm.bias"], np.inf)
    large = {"norm.bias": np.full(24, 1e300)}
    for content, message in (
        (pooled, "average pooling: .* fc_norm, acts on the mean"),
        (plain | changed, r"2 of 30 parameters hold NaN .*: blocks/0/norm1/scale, norm/bias\."),
        (plain | large, "1 of 30 parameters hold NaN or infinite"),
        (plain | {"norm.bias": np.zeros(24, np.int8)}, r"norm\.bias int8\(24,\) cannot become"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "file.pth", content)
