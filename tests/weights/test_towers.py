import io
import pickle
import zipfile

import jax
import numpy as np
import pytest
from conftest import GOLDENS
from simseg_jax.models.convert import convert, infer_config, load_authors_checkpoint
from simseg_jax.models.torch_file import load_tensors

from simseg_jax.errors import UserError


@pytest.fixture(scope="module")
def tensors():
    return load_tensors(GOLDENS / "model.pth")["state_dict"]


def test_architecture_is_read_off_the_shapes(golden_model):
    config, _, _ = golden_model
    assert (config.image.width, config.image.depth, config.image.image_size) == (48, 3, 224)
    assert (config.text.width, config.text.depth, config.text.vocab_size) == (32, 2, 120)
    assert config.embed_dim == 24


def test_module_prefix_and_unused_entries_are_ignored(tensors, golden_model):
    config, _, params = golden_model
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    prefixed["module.text_encoder.model.model.pooler.dense.weight"] = np.zeros((32, 32))
    jax.tree.map(np.testing.assert_array_equal, convert(prefixed, config), params)


def test_all_problems_are_reported_together(tensors, golden_model):
    broken = dict(tensors)
    del broken["loss.temperature"]
    broken["image_projection.linear.weight"] = np.zeros((2, 2))
    broken["decoder.weight"] = np.zeros(3)
    with pytest.raises(UserError, match="3 problems") as error:
        convert(broken, golden_model[0])
    for part in ("missing temperature", "image_projection.linear.weight", "unexpected decoder"):
        assert part in str(error.value)


def test_foreign_state_dict_is_refused():
    with pytest.raises(UserError, match="Not a SimSeg checkpoint"):
        infer_config({"fc.weight": np.zeros((3, 3))})


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="No checkpoint file"):
        load_authors_checkpoint(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="not a PyTorch zip checkpoint"):
        load_authors_checkpoint(tmp_path / "text.pth")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return print, ("this must never be printed",)

    data = io.BytesIO()
    pickle.dump({"state_dict": Malicious()}, data)
    path = tmp_path / "bad.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad/data.pkl", data.getvalue())
    with pytest.raises(UserError, match="print, which is refused"):
        load_tensors(path)


def test_a_truncated_storage_is_refused(tmp_path):
    path = tmp_path / "short.pth"
    with zipfile.ZipFile(GOLDENS / "model.pth") as good, zipfile.ZipFile(path, "w") as short:
        for name in good.namelist():
            content = good.read(name)
            short.writestr(name, content[:8] if name.endswith("data/0") else content)
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(path)
