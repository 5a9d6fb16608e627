"""Indexes and copies in the cache folder: damage, changes, folders that cannot be written."""

import json
import os

import numpy as np
import pytest
from pairs_support import make_pairs, read_all, settings, write_parquet, write_tar

from simseg_jax.data.pairs import Problems, open_source
from simseg_jax.data.pairs import cache as stored
from simseg_jax.data.pairs.cache import cached
from simseg_jax.runtime.errors import UserError

PAIRS = make_pairs(6)
EXPECTED = [(image, captions) for _, image, captions in PAIRS]


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(_content: bytes) -> bytes:
    return b""


def garbage(content: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(content))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def other_json(_content: bytes) -> bytes:
    return b'{"problems": {"count": "7", "size": []}}'


@pytest.fixture(params=[write_tar, write_parquet])
def path(request, tmp_path):
    if request.param is write_parquet:
        pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    return request.param(PAIRS, tmp_path / "data")


@pytest.mark.parametrize("damage", [truncated, emptied, garbage, flipped, other_json])
def test_what_is_damaged_is_built_again(tmp_path, path, damage):
    cache = tmp_path / "cache"
    assert read_all(path, cache) == EXPECTED
    names = sorted(cache.iterdir())
    for name in names:
        name.write_bytes(damage(name.read_bytes()))
        assert read_all(path, cache) == EXPECTED, name
    assert sorted(cache.iterdir()) == names


def test_a_copied_cache_is_used(tmp_path, monkeypatch):
    built = []

    def build(target):
        built.append(target)
        target.write_text("content")
        return Problems(1, ["x"])

    for _ in range(2):
        path, problems = cached(tmp_path / "cache", ("a",), ".txt", build)
        assert (path.read_text(), problems) == ("content", Problems(1, ["x"]))
        os.utime(path, ns=(1, 1))
    assert len(built) == 1
    # An index of other code is another one.
    monkeypatch.setattr(stored, "VERSION", stored.VERSION + 1)
    assert cached(tmp_path / "cache", ("a",), ".txt", build)[0] != path
    assert len(built) == 2


def test_an_older_index_is_not_taken(tmp_path):
    """Neither its name nor its notes are those of today."""
    cache = tmp_path / "cache"
    path, _ = cached(cache, ("a",), ".txt", lambda target: target.touch() or Problems())
    path.with_suffix(".json").write_text(json.dumps({"count": 0, "first": []}))
    path.write_text("old")
    path, _ = cached(cache, ("a",), ".txt", lambda target: target.touch() or Problems())
    assert path.read_text() == ""


def test_folders_that_cannot_be_written(tmp_path, path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"Cannot write to the cache folder .*Set data\.cache"):
        open_source(settings(path), str(tmp_path / "file"))
    # A complete cache needs no writing.
    assert read_all(path, tmp_path / "cache") == EXPECTED
    monkeypatch.setattr("pathlib.Path.touch", lambda _: pytest.fail("written"))
    assert read_all(path, tmp_path / "cache") == EXPECTED


def test_a_full_disk(tmp_path):
    def build(_target):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left.* Set data\.cache"):
        cached(tmp_path / "cache", ("a",), ".txt", build)
    assert list((tmp_path / "cache").iterdir()) == []
