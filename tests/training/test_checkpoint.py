"""Checkpoints: damage is noticed whatever was hit, errors are one sentence, nothing leaks."""

import gc
import json
import os
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from support import assert_trees_equal, tiny_config

from simseg_jax.config import of_checkpoint, run_config
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.sharding import make_mesh
from simseg_jax.training.arrays import checksums, shapes, with_sharding
from simseg_jax.training.checkpoint import (
    METADATA,
    Checkpoints,
    Record,
    checkpoints_folder,
    completed_steps,
    load_run,
    read_record,
)

# Orbax leaves the reads of the other arrays behind when one of them fails.
left_behind = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(size=64):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(size, 8)), "b": {"0": rng.normal(size=7), "1": np.zeros(3)}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return {
        "params": params,
        "opt": {"mu": {**params}, "count": jnp.int32(5)},
        "step": jnp.int32(5),
    }


def record():
    return Record(
        tiny_config().to_dict(), 80, {"vocabulary": {"tokens": 3, "digest": "1f"}, "data": {}}
    )


def save(folder, state, steps=(5,), keep=3):
    with Checkpoints(epath.Path(folder), keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, record())
    return epath.Path(folder) / str(steps[-1])


def trees(state):
    return {
        "params": state["params"],
        "optimizer": {"opt": state["opt"], "step": state["step"]},
    }


def load(path, wanted=None):
    wanted = trees(state()) if wanted is None else wanted
    shapes = with_sharding(wanted, jax.tree.map(lambda x: x.sharding, wanted))
    return load_run(path, shapes, read_record(path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of one checkpoint: for reading only."""
    return save(tmp_path_factory.mktemp("saved") / "checkpoints", state())


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "5")
    return epath.Path(tmp_path / "5")


def flip(file, position, bit):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


@left_behind
def test_a_flipped_bit_is_never_loaded(copy):
    """Anywhere: it is refused, naming the checkpoint, or it changes nothing."""
    rng = np.random.default_rng(0)
    files = sorted(f for f in Path(copy).rglob("*") if f.is_file() and f.stat().st_size)
    arrays = [file for file in files if file.parent.name == "d"]
    refused = []
    for file in [*files, *arrays * 3]:
        position, bit = int(rng.integers(file.stat().st_size)), int(rng.integers(8))
        flip(file, position, bit)
        try:
            assert_trees_equal(load(copy), trees(state()))
            config, found = of_checkpoint(copy)
            assert config == run_config(record().config)
            assert found == read_record_of_the_original(found.config)
        except UserError as error:
            refused.append(str(error))
        flip(file, position, bit)
    assert len(refused) > len(arrays)
    assert all(str(copy) in message and len(message) < 450 for message in refused)
    assert_trees_equal(load(copy), trees(state()))
    gc.collect()


def read_record_of_the_original(config):
    """With `config` in the place of its own, as JSON makes lists of tuples."""
    arrays = trees(state())
    return Record(config, 80, record().identity, checksums(arrays), shapes(arrays))


def test_the_damaged_array_is_named(saved):
    other = state()
    other["params"]["a"] = other["params"]["a"].at[3, 2].add(1e-6)
    wrong = checksums(trees(other))
    there = read_record(saved)
    shapes = with_sharding(trees(other), jax.tree.map(lambda x: x.sharding, trees(other)))
    with pytest.raises(UserError, match=r"/5 is damaged, not what was saved: params/a\. Move it"):
        load_run(saved, shapes, Record(there.config, there.position, None, wrong))


def test_every_single_bit_counts():
    x = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    seen = {checksums(x)[""]}
    for index in np.ndindex(x.shape):
        for bit in range(32):
            changed = x.copy()
            changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
            seen.add(checksums(changed)[""])
    swapped = x.copy()
    swapped[0], swapped[1] = x[1], x[0]
    assert len(seen | {checksums(swapped)[""], checksums(x.T.copy())[""]}) == 15 * 32 + 3


def test_checksums_do_not_depend_on_the_sharding(tmp_path):
    """A state split over devices is saved, and read whole and split otherwise."""
    mesh = make_mesh(4)
    whole = state()
    specs = (PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(("data", "fsdp")))
    split = [{**whole, "params": dict(whole["params"])} for _ in specs]
    for part, spec in zip(split, specs, strict=True):
        part["params"]["a"] = jax.device_put(whole["params"]["a"], NamedSharding(mesh, spec))
    assert len({json.dumps(checksums(trees(part))) for part in (whole, *split)}) == 1
    path = save(tmp_path, split[1])
    for part in split:
        assert_trees_equal(load(path, trees(part)), trees(whole))


def rewrite(path, change):
    file = Path(path) / METADATA
    content = json.loads(file.read_text())
    change(content["custom_metadata"])
    file.write_text(json.dumps(content))


def test_checkpoints_without_checksums_are_read_and_said_to_be(copy, capsys):
    def strip(content):
        for key in ("digest", "checksums", "shapes", "identity"):
            del content[key]

    rewrite(copy, strip)
    assert_trees_equal(load(copy), trees(state()))
    assert f"{copy} has no checksums" in capsys.readouterr().err
    assert read_record(copy).identity is None


@pytest.mark.parametrize("position", ["80", 10**30, -1, None, 1.5, [], True])
def test_a_position_that_is_none(copy, position):
    def change(content):
        del content["digest"]
        content["position"] = position

    rewrite(copy, change)
    with pytest.raises(UserError, match=r"/5 cannot be read .*position="):
        read_record(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.clear(),
        lambda content: content.update(config=[1]),
        lambda content: content["config"]["data"].update(transform="fasT"),
        lambda content: content["config"].pop("data"),
    ],
)
def test_a_damaged_description_names_the_checkpoint(copy, change):
    def damage(content):
        del content["digest"]
        change(content)

    rewrite(copy, damage)
    with pytest.raises(UserError, match=r"The checkpoint .*/5 cannot be read"):
        of_checkpoint(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[]", b"7"])
def test_metadata_that_is_no_object(copy, content):
    (Path(copy) / METADATA).write_bytes(content)
    with pytest.raises(UserError, match=r"The checkpoint .*/5 cannot be read"):
        read_record(copy)


def test_other_shapes_are_no_damage(saved):
    with pytest.raises(UserError, match=r"does not fit: .*a is \[64, 8\] there and \[65, 8\] here"):
        load(saved, trees(state(65)))


def test_only_numbers_are_steps(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("5", "²", "٣", "05x", "-3", "6.orbax-checkpoint-tmp"):
        shutil.copytree(saved, folder / name)
    assert completed_steps(epath.Path(folder)) == [5]


@pytest.mark.parametrize("name", ["run[1]", "a*b", "who?", "a\\b", "nul\0"])
def test_paths_that_cannot_be_read_back_are_refused(tmp_path, name):
    for workdir, directory in ((tmp_path / name, None), (tmp_path, str(tmp_path / name))):
        with pytest.raises(UserError, match="Choose a path without these characters"):
            checkpoints_folder(workdir, directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a b", "a#b", "a%20b", "a{b}", "a=b&c", "a:b", "'", '"', "漢字"])
def test_other_paths_are_read_back(tmp_path, name):
    path = save(checkpoints_folder(tmp_path / name), state())
    assert_trees_equal(load(path), trees(state()))


def test_addresses_without_their_driver(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"Cannot read gs://bucket/run: .*simseg-jax\[cloud\]"):
        checkpoints_folder(tmp_path, "gs://bucket/run")


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(tmp_path):
    """A limit on the size of files stands for it: the system refuses to write in the same way."""
    small, large = state(), state(40_000)
    save(tmp_path, small, (1,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = r"Cannot write a checkpoint to .*newest complete one is .*/1: make room"
        with pytest.raises(UserError, match=message) as failure:
            save(tmp_path, large, (2, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(failure.value)) < 450
    assert completed_steps(epath.Path(tmp_path)) == [1]
    assert_trees_equal(load(epath.Path(tmp_path) / "1"), trees(small))
    # With room again the same step is saved.
    path = save(tmp_path, large, (2,))
    assert_trees_equal(load(path, trees(large)), trees(large))


def handles():
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the files in /proc")
@pytest.mark.parametrize("count", [10, pytest.param(80, marks=pytest.mark.slow)])
def test_nothing_stays_open_after_a_save(tmp_path, count):
    with Checkpoints(epath.Path(tmp_path), 2) as checkpoints:
        for step in range(1, count + 1):
            checkpoints.save(step, state(), record())
            if step == 5:
                checkpoints.wait()
                before = handles()
        checkpoints.wait()
        assert np.all(np.array(handles()) <= np.array(before))
    assert completed_steps(epath.Path(tmp_path)) == [count - 1, count]
