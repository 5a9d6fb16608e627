"""Damaged weights are read as they are or refused in one sentence, within bounds."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file

from simseg_jax.models.layers import BLOCKS
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import read_weights
from simseg_jax.weights.read import read_model

NEIGHBOURS = GOLDENS / "neighbours"


def npz(path, arrays):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array)
            archive.writestr(f"{name}.npy", content.getvalue())
    return path


def test_blocks_and_arrays_without_end_are_refused(tmp_path):
    tensors = read_weights(NEIGHBOURS / "timm").tensors
    for number in (BLOCKS, 10**8, 10**400):
        more = {f"blocks.{number}.norm1.bias": np.zeros(24, np.float32)}
        weights = read_weights(npz(tmp_path / "many.npz", tensors | more))
        with pytest.raises(UserError, match=f"at most {BLOCKS} are read"):
            read_model(weights, "image")
    bomb = npz(tmp_path / "bomb.npz", {"x": np.zeros(18 * 2**20, np.float32)})
    assert bomb.stat().st_size < 2**20
    with pytest.raises(UserError, match=r"would take 75,497,600 bytes"):
        read_weights(bomb)
    endless = np.zeros((10**12, 0), np.float32)
    stacked = {"params/Transformer/encoderblock/LayerNorm_0/bias": endless}
    weights = read_weights(NEIGHBOURS / "big_vision")
    with pytest.raises(UserError, match="problem"):
        read_model(weights._replace(tensors=weights.tensors | stacked), "image")
    flat = {**tensors, "patch_embed.proj.weight": np.zeros((10**12, 3, 0, 0), np.float32)}
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight is of shape"):
        read_model(weights._replace(tensors=flat), "image")


def test_headers_that_lie_are_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    whole = (NEIGHBOURS / "timm" / "model.safetensors").read_bytes()
    for header in (2**24, 2**40, 2**63):
        path.write_bytes(header.to_bytes(8, "little") + whole[8:])
        with pytest.raises(UserError, match="its header has"):
            read_weights(path)
    save_file({"a\nb": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match=r"a tensor has the name 'a\\nb'"):
        read_weights(path)
    save_file({"n" * 501: np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match="a tensor has the name 'nnn"):
        read_weights(path)


def test_odd_settings_beside_the_weights_are_refused(tmp_path):
    folder = shutil.copytree(NEIGHBOURS / "timm", tmp_path / "timm")
    card = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"pretrained_cfg": 3}, "pretrained_cfg is no object"),
        ({"pretrained_cfg": {"mean": "grey"}}, "mean='grey' must be of type tuple"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "must be three numbers"),
        ({"model_args": [1]}, "model_args is no object"),
        ({"model_args": {"num_heads": 5}}, "width=24 must be a multiple"),
        ({"model_args": {"num_heads": -1}}, "heads=-1 must be a whole number"),
        ({"model_args": {"num_heads": 0}}, "heads=0 must be a whole number"),
        ({"model_args": {"num_heads": "a" * 1000}}, r"heads='a+\.\.\."),
    ):
        (folder / "config.json").write_text(json.dumps(card | change))
        with pytest.raises(UserError, match=message) as error:
            read_model(read_weights(folder), "image")
        assert len(str(error.value)) < 400
    for text in ("[" * 200_000, "[]", "\x00", "{" * 9):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            read_weights(folder)
    (folder / "config.json").write_text(" " * (2**23 + 1))
    with pytest.raises(UserError, match="at most 8,388,608 are read"):
        read_weights(folder)


def test_messages_about_many_tensors_are_short(tmp_path):
    tensors = load_file(NEIGHBOURS / "timm" / "model.safetensors")
    renamed = {f"{name}{'_long' * 60}": x for name, x in tensors.items() if name[:5] == "block"}
    rest = {name: x for name, x in tensors.items() if name[:5] != "block"}
    first = {f"blocks.0.{name}": tensors[f"blocks.0.{name}"] for name in ("mlp.fc1.weight",)}
    save_file(rest | renamed | first, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match="problems") as error:
        read_model(read_weights(tmp_path / "file.safetensors"), "image")
    assert len(str(error.value)) < 500


def test_an_index_names_files_and_each_tensor_once(tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    for content in ({"weight_map": 3}, {"weight_map": {"a": 7}}, {"weight_map": [["a"]]}, {}):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError):
            read_weights(folder)
    for name in ("a", "b"):
        save_file({"x": np.zeros(1, np.float32)}, folder / f"{name}.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(UserError, match="holds x in several files"):
        read_weights(folder)
