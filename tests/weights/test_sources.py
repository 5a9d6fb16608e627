import json
import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from conftest import GOLDENS
from support import hub_environment

from simseg_jax.runtime.errors import UserError
from simseg_jax.weights import sources
from simseg_jax.weights.containers import read_weights
from simseg_jax.weights.read import read_model
from simseg_jax.weights.sources import fetch

NEIGHBOURS = GOLDENS / "neighbours"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def bucket():
    """An address with a copy of an encoder; memory:// keeps it in this process."""
    system = fsspec.filesystem("memory")
    for file in (NEIGHBOURS / "hf_bert").iterdir():
        system.pipe(f"/bucket/bert/{file.name}", file.read_bytes())
    system.pipe("/bucket/bert/notes/readme.txt", b"inner")
    yield "memory://bucket/bert"
    system.rm("/bucket", recursive=True)


def test_the_content_tells_the_container(tmp_path):
    for source in (
        "timm/model.safetensors",
        "timm_layerscale/pytorch_model.bin",
        "augreg/model.npz",
    ):
        path = tmp_path / "weights"
        shutil.copy(NEIGHBOURS / source, path)
        original = read_weights(NEIGHBOURS / source)
        assert read_weights(path).tensors.keys() == original.tensors.keys()


def test_what_lies_beside_the_state_dict_is_kept():
    weights = read_weights(GOLDENS / "model.pth")
    assert weights.meta == {"meta": {"epoch": 1, "step": 2, "inner_step": 0}}
    (checksum,) = weights.origin["files"].values()
    assert len(checksum) == 64


def test_folders_with_no_or_several_weights(tmp_path):
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(tmp_path)
    for name in ("a.npz", "b.npz"):
        shutil.copy(NEIGHBOURS / "augreg" / "model.npz", tmp_path / name)
    with pytest.raises(UserError, match=r"several weights files, name one of them: a\.npz, b\.npz"):
        read_weights(tmp_path)


def test_damaged_files_are_named(tmp_path):
    whole = (NEIGHBOURS / "timm" / "model.safetensors").read_bytes()
    for name, content in (
        ("half.safetensors", whole[: len(whole) // 2]),
        ("text.bin", b"not weights at all"),
        ("empty.npz", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}(: | is neither)"):
            read_weights(tmp_path / name)
    with pytest.raises(UserError, match="No weights at"):
        read_weights(tmp_path / "nothing.pth")
    # Arrays of Python objects are pickles.
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match=r"x\.npy is no array of numbers") as error:
        read_weights(tmp_path / "objects.npz")
    assert "allow_pickle" not in str(error.value)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    shutil.copy(NEIGHBOURS / "timm" / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (tmp_path / "inner" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks secret\.safetensors"):
        read_weights(tmp_path / "inner")


def test_folders_on_object_storage_are_copied_once(cache, bucket, monkeypatch):
    path = fetch(bucket)
    assert read_model(read_weights(path), "text").config.depth == 2
    assert (path / "notes" / "readme.txt").read_bytes() == b"inner"
    with monkeypatch.context() as patch:
        patch.setattr(sources.shutil, "copyfileobj", None)
        assert fetch(bucket + "/") == path
    # A new version is another copy.
    fsspec.filesystem("memory").pipe("/bucket/bert/config.json", b"{}")
    assert fetch(bucket) != path
    assert not list(cache.glob("*.partial"))


def test_files_on_object_storage_bring_their_settings(cache, bucket):
    path = fetch(f"{bucket}/model.safetensors")
    assert path.name == "model.safetensors"
    assert read_model(read_weights(path), "text").config.heads == 3
    with pytest.raises(UserError, match="Nothing at memory://bucket/bert/other"):
        fetch(f"{bucket}/other.npz")


HUB = """
import os, pathlib, sys
from hub_server import serve

serve(pathlib.Path(sys.argv[1]))
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import read_weights
from simseg_jax.weights.sources import fetch
from simseg_jax.weights.read import read_model

for source in ("someone/bert", "someone/bert@main"):
    folder = fetch(source)
    print(read_model(read_weights(folder), "text").config.depth, sorted(os.listdir(folder)))
try:
    fetch("someone/else")
except UserError as error:
    print(error)
"""


def test_a_hub_repository(tmp_path):
    files = tmp_path / "hub" / "someone" / "bert"
    shutil.copytree(NEIGHBOURS / "hf_bert", files)
    # Of two containers the safe one is taken.
    (files / "pytorch_model.bin").write_bytes(b"not asked for")
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path / "hub")],
        capture_output=True,
        text=True,
        timeout=120,
        env=hub_environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    *found, error = done.stdout.splitlines()
    assert found == ["2 ['config.json', 'model.safetensors']"] * 2
    assert error.startswith("No file or folder someone/else here, and the hub did not provide it")


def test_a_name_without_hub_or_file(cache):
    # HF_HUB_OFFLINE is set for all tests.
    with pytest.raises(UserError, match="No file or folder someone/thing here"):
        fetch("someone/thing")
