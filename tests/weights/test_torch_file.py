import argparse
import copy
import io
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS

from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import read_weights
from simseg_jax.weights.torch_file import load_tensors, save_tensors


def torch_file(path, pickled, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"bad/{name.replace('_', '/')}", content)
    return path


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="No weights at"):
        read_weights(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="neither safetensors"):
        read_weights(tmp_path / "text.pth")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("model.bin", b"")
    with pytest.raises(UserError, match="no checkpoint of PyTorch"):
        read_weights(tmp_path / "archive.pth")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys, protocol):
    class Malicious:
        def __reduce__(self):
            return print, ("this must never be printed",)

    data = io.BytesIO()
    pickle.dump({"state_dict": Malicious()}, data, protocol)
    with pytest.raises(UserError, match=r"print', which is refused\. If you trust the file"):
        read_weights(torch_file(tmp_path / "bad.pth", data.getvalue()))
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
            read_weights(torch_file(tmp_path / "bad.pth", data))


def refused(path, pickled, **entries):
    """The message about a file with this pickle; it takes neither memory nor time."""
    torch_file(path, pickled, **entries)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            read_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 400 + len(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def tensor_pickle(size=(2,), stride=(1,), offset=0, key="0"):
    """The pickle of {"x": tensor} whose tensor is described by these numbers."""

    def named(module, name):
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def plain(value):
        return pickle.dumps(value, 2)[2:-1]

    parts = [plain(part) for part in (key, "cpu", 2)]
    storage = b"(" + plain("storage") + named("torch", "FloatStorage") + b"".join(parts) + b"tQ"
    # Each piece was pickled alone: without memo, whose indices would clash.
    rest = plain(offset) + plain(size) + plain(stride) + pickle.NEWFALSE
    rest += named("collections", "OrderedDict") + b")R"
    tensor = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + rest + b"tR"
    return b"\x80\x02}" + plain("x") + tensor + b"s."


def test_the_description_of_a_tensor_does_not_lead_out_of_its_storage(tmp_path):
    path, data = tmp_path / "bad.pth", np.arange(2, dtype=np.float32).tobytes()
    torch_file(path, tensor_pickle(), data_0=data)
    np.testing.assert_array_equal(read_weights(path).tensors["x"], [0, 1])
    for wrong in (
        {"size": (3,)},
        {"size": (10**30,)},
        {"size": (-1,)},
        {"size": (1,), "stride": (10**30,)},
        {"stride": (2,)},
        {"stride": (-1,)},
        {"offset": 1},
        {"offset": -1},
        {"size": (10**5, 10**5), "stride": (0, 0)},
        {"size": (1,) * 100, "stride": (0,) * 100},
        {"size": "ab", "stride": "ab"},
        {"key": "1"},
    ):
        assert "Cannot read the weights" in refused(path, tensor_pickle(**wrong), data_0=data)


def test_small_pickles_take_no_memory_or_time(tmp_path):
    path = tmp_path / "bad.pth"
    for index in (2**28, 2**31):  # Python's own unpickler fills a table up to this index.
        read = b"\x80\x02}r" + index.to_bytes(4, "little") + b"."
        assert "no tensors" in refused(path, read)
    # The hash of such a key would take longer than there is time.
    nested = b"\x80\x02}K\x01" + b"".join(b"q%c" % i + b"h%c" % i + b"\x86" for i in range(200))
    assert "neither a name nor a number" in refused(path, nested + b"K\x01s.")
    assert "bytes, more than" in refused(path, b"\x80\x02" + b"}0" * 2**21 + b"}.")
    assert "EMPTY_SET" in refused(path, b"\x80\x04" + b"\x8f" * 100 + b".")
    # A dictionary in itself.
    assert "no tensors" in refused(path, b"\x80\x02}q\x00K\x01h\x00s.")
    name = b"X" + (600).to_bytes(4, "little") + b"n" * 600
    assert "more than 500 characters" in refused(path, b"\x80\x02}" + name + b"}s.")


def test_compressed_and_overlapping_entries_are_refused(tmp_path):
    path = tmp_path / "bad.pth"
    for large in ("bad/byteorder", "bad/data/0", "bad/data.pkl"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (
                ("bad/data.pkl", tensor_pickle()),
                ("bad/byteorder", b"little"),
                ("bad/data/0", bytes(8)),
            ):
                kind = zipfile.ZIP_DEFLATED if name == large else zipfile.ZIP_STORED
                archive.writestr(name, content + bytes(2**20) * (name == large), kind)
        with pytest.raises(UserError, match="compressed or overlap"):
            read_weights(path)
    # Two names of one storage of nearly the whole file.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad/data/0", bytes(2**20))
        archive.writestr("bad/data.pkl", tensor_pickle()[:-1] + tensor_pickle(key="1")[3:])
        second = copy.copy(archive.getinfo("bad/data/0"))
        second.filename = "bad/data/1"
        archive.filelist.append(second)
    with pytest.raises(UserError, match=r"compressed or overlap|Overlapped|differ"):
        read_weights(path)


def test_what_training_loops_keep_beside_the_weights_is_left_out(tmp_path):
    content = {"epoch": 3, "args": argparse.Namespace(lr=0.1, names=["a"]), "best": np.float64(2)}
    pickled = pickle.dumps(content, 2)
    read = load_tensors(torch_file(tmp_path / "file.pth", pickled))
    assert read["epoch"] == 3
    assert not isinstance(read["args"], argparse.Namespace)


def test_truncated_pickles_and_storages_are_refused(tmp_path):
    path = tmp_path / "short.pth"
    with zipfile.ZipFile(GOLDENS / "model.pth") as good:
        for cut in ("data/0", "data.pkl"):
            with zipfile.ZipFile(path, "w") as short:
                for name in good.namelist():
                    content = good.read(name)
                    short.writestr(name, content[:8] if name.endswith(cut) else content)
            with pytest.raises(UserError, match="Cannot read the weights"):
                read_weights(path)


def test_torchscript_is_named(tmp_path):
    path = torch_file(tmp_path / "script.pt", b"", code_main="class Net: pass")
    with pytest.raises(UserError, match="TorchScript program"):
        read_weights(path)


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
