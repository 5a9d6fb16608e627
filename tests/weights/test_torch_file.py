import io
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS

from simseg_jax.errors import UserError
from simseg_jax.weights.torch_file import load_tensors, save_tensors


def torch_file(path, pickled, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"bad/{name.replace('_', '/')}", content)
    return path


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="The checkpoint is missing"):
        load_tensors(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="not a PyTorch zip checkpoint"):
        load_tensors(tmp_path / "text.pth")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys, protocol):
    class Malicious:
        def __reduce__(self):
            return print, ("this must never be printed",)

    data = io.BytesIO()
    pickle.dump({"state_dict": Malicious()}, data, protocol)
    with pytest.raises(UserError, match=r"print, which is refused\. If you trust the file"):
        load_tensors(torch_file(tmp_path / "bad.pth", data.getvalue()))
    assert capsys.readouterr().out == ""


def test_allowed_names_lead_nowhere_else(tmp_path):
    # Attributes of what is allowed, as in "_rebuild_tensor_v2.__globals__", are other names.
    for module, name in (
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.__class__"),
        ("torch", "FloatStorage.__init__"),
        ("builtins", "eval"),
    ):
        data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
        data += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
        with pytest.raises(UserError, match="which is refused"):
            load_tensors(torch_file(tmp_path / "bad.pth", data))


def test_truncated_pickles_and_storages_are_refused(tmp_path):
    path = tmp_path / "short.pth"
    with zipfile.ZipFile(GOLDENS / "model.pth") as good:
        for cut in ("data/0", "data.pkl"):
            with zipfile.ZipFile(path, "w") as short:
                for name in good.namelist():
                    content = good.read(name)
                    short.writestr(name, content[:8] if name.endswith(cut) else content)
            with pytest.raises(UserError, match="cannot be read"):
                load_tensors(path)


def test_torchscript_is_named(tmp_path):
    path = torch_file(tmp_path / "script.pt", b"", code_main="class Net: pass")
    with pytest.raises(UserError, match="TorchScript program"):
        load_tensors(path)


def test_what_is_written_is_read_again(tmp_path):
    rng = np.random.default_rng(0)
    content = {
        "state_dict": {
            "matrix": rng.normal(size=(3, 5)).astype(np.float32),
            "transposed": rng.normal(size=(3, 5)).astype(np.float32).T,
            "half": rng.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
            "scalar": np.asarray(np.float32(0.07)),
            "counts": np.arange(4),
            "nothing": np.zeros((0, 3), np.float32),
        },
        "meta": {"text": "ä", "number": 3, "share": 0.5, "none": None, "inner": {}},
    }
    path = tmp_path / "file.pth"
    save_tensors(path, content)
    read = load_tensors(path)
    assert read["meta"] == content["meta"]
    assert list(read["state_dict"]) == list(content["state_dict"])
    for name, expected in content["state_dict"].items():
        assert read["state_dict"][name].dtype == expected.dtype
        np.testing.assert_array_equal(read["state_dict"][name], expected)
    torch = pytest.importorskip("torch", reason="PyTorch reads the file: pip install torch")
    # mmap: wants the storages aligned and uncompressed.
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["meta"] == content["meta"]
    for name, expected in content["state_dict"].items():
        assert tuple(loaded["state_dict"][name].shape) == expected.shape
        np.testing.assert_array_equal(
            loaded["state_dict"][name].double().numpy(), expected.astype(np.float64)
        )
