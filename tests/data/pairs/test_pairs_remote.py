import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pairs_support import make_pairs, read_all, settings, write_csv, write_tar

from simseg_jax.data.pairs import BadExample, open_source
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError

PAIRS = make_pairs(8)
EXPECTED = [(image, captions) for _, image, captions in PAIRS]


class FlakyFileSystem(MemoryFileSystem):
    """Each read fails `failures` times before it works."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    failures, calls = 0, 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, *args, **kwargs):
        cls = type(self)
        cls.calls += 1
        if cls.calls % (cls.failures + 1):
            raise ConnectionResetError("reset by peer")
        return super().cat_file(*args, **kwargs)


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    for name, value in (("failures", 0), ("calls", 0), ("store", {}), ("pseudo_dirs", [""])):
        monkeypatch.setattr(FlakyFileSystem, name, value)
    (tmp_path / "data").mkdir()
    write_tar(PAIRS, tmp_path / "data")
    write_csv(PAIRS, tmp_path / "data")
    fsspec.filesystem("flaky").put(str(tmp_path / "data"), "/data", recursive=True)
    return waits


@pytest.mark.parametrize("path", ["flaky://data/*.tar", "flaky://data/captions.csv"])
def test_reads_that_fail_twice(flaky, tmp_path, path):
    FlakyFileSystem.failures = 2
    assert read_all(path, tmp_path / "cache") == EXPECTED
    assert flaky[:4] == [0.5, 1, 0.5, 1]


def test_reads_that_never_work(flaky, tmp_path):
    tars = open_source(settings("flaky://data/*.tar"), str(tmp_path / "cache"))
    table = open_source(settings("flaky://data/captions.csv"))
    FlakyFileSystem.failures = 10**6
    with pytest.raises(BadExample, match=r"data/00000.tar failed 4 times: .*reset by peer"):
        tars[0]
    with pytest.raises(BadExample, match=r"flaky://.*jpg.* failed 4 times"):
        table[0]
    with pytest.raises(UserError, match=r"Cannot read the caption table flaky://.*4 times"):
        open_source(settings("flaky://data/captions.csv"))
    FlakyFileSystem.failures = 0
    assert tars[0]["captions"] == PAIRS[0][2]
    FlakyFileSystem.store.clear()
    flaky.clear()
    with pytest.raises(BadExample, match=r"00000.tar: FileNotFoundError"):
        tars[0]
    assert flaky == []  # What does not exist is not asked for again.


@pytest.mark.parametrize("form", ["webdataset", "array_record", "parquet"])
def test_network_fails_while_indexing(flaky, tmp_path, form):
    """No shard is silently left out, and nothing wrong stays in the cache."""
    if form == "parquet":
        pytest.importorskip("pyarrow")
    FlakyFileSystem.failures = 10**6
    with pytest.raises(UserError, match=r"Cannot open the training data flaky.*reset by peer"):
        open_source(settings("flaky://data/*.tar", form), str(tmp_path / "cache"))
    FlakyFileSystem.failures = 0
    assert read_all("flaky://data/*.tar", tmp_path / "cache") == EXPECTED


def test_parts_of_files(tmp_path):
    fsspec.filesystem("memory").pipe_file("/part/a", bytes(range(100)))
    (tmp_path / "a").write_bytes(bytes(range(100)))
    for path in (str(tmp_path / "a"), "memory://part/a"):
        assert remote.read(path, 10, 3) == bytes([10, 11, 12])
        assert remote.read(path) == bytes(range(100))
        with pytest.raises(OSError, match="a ends before byte 110"):
            remote.read(path, 90, 20)
        with remote.open_file(path) as file:
            assert file.seek(-2, 2) == 98
            assert file.read() == bytes([98, 99])
            assert file.seek(5) == 5
            assert file.read(1) == bytes([5])
    fsspec.filesystem("memory").rm("/part", recursive=True)


def test_hidden_and_vanished_files(tmp_path):
    write_tar(PAIRS, tmp_path)
    for name in ("._00000.tar", ".DS_Store", ".hidden.tar"):
        (tmp_path / name).write_bytes(b"what systems add")
    (tmp_path / "00001.tar").rename(tmp_path / "00001.TAR")
    for path in (tmp_path, f"{tmp_path}/", f"{tmp_path}/*"):
        assert read_all(path, tmp_path / "cache") == EXPECTED
    assert [file.path for file in remote.find(str(tmp_path / ".hidden.tar"))]
    # A link to nowhere is not left out in silence.
    (tmp_path / "00002.tar").symlink_to(tmp_path / "nowhere.tar")
    with pytest.raises(UserError, match=r"No such file or directory: .*00002\.tar"):
        open_source(settings(tmp_path), str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800"])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(OSError, match=r"."):
        remote.read(f"{tmp_path}/{name}")
    assert not remote.exists(f"{tmp_path}/{name}")


def test_folders_and_names():
    assert remote.join("gs://b/annotations", "../images/a.jpg") == "gs://b/images/a.jpg"
    assert remote.join("gs://b/x", "") == "gs://b/x"
    assert remote.join("", "train") == "train"
