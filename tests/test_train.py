"""The training run: files it leaves, resuming, signals, failures."""

import contextlib
import gc
import gzip
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from support import assert_trees_equal, tiny_config, tiny_eval
from tensorboardX.proto import event_pb2

from simseg_jax import train as train_module
from simseg_jax.config import run_config
from simseg_jax.data import shapes
from simseg_jax.runtime.errors import UserError
from simseg_jax.train import train
from simseg_jax.training.checkpoint import checkpoints_folder, completed_steps
from simseg_jax.training.report import Reporter
from simseg_jax.weights.load import load_model


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(records):
    speed = {"pairs_per_second", "data_wait_seconds", "tflops_per_device"}
    return [{k: v for k, v in r.items() if k not in speed} for r in records]


@pytest.fixture
def seen(monkeypatch):
    """Batches that training takes, in order."""
    batches = []
    original = train_module.to_global_batch

    def record(batch, mesh):
        batches.append(jax.tree.map(np.copy, batch))
        return original(batch, mesh)

    monkeypatch.setattr(train_module, "to_global_batch", record)
    return batches


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """WORKDIR, configuration and results of one uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config()
    config.pictures = 3
    config.eval_every = 2
    config.evals.seg.shapes = tiny_eval()
    return workdir, config, train(config, workdir)


def test_outputs_of_a_run(finished):
    workdir, config, results = finished
    assert 0 < results["seg/shapes/miou"] < 1
    records = lines(workdir)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "seg/shapes/miou" in r] == [2, 4]
    last = next(r for r in reversed(records) if "loss" in r)
    assert set(last) >= {
        "loss",
        "temperature",
        "lr",
        "grad_norm",
        "pairs_per_second",
        "data_wait_seconds",
    }
    assert records[-1]["seg/shapes/miou"] == results["seg/shapes/miou"]
    assert run_config(json.loads((workdir / "config.json").read_text())) == run_config(config)
    assert completed_steps(checkpoints_folder(workdir)) == [2, 4]
    assert (workdir / "pictures" / "shapes.png").stat().st_size > 1000
    assert list((workdir / "tensorboard").iterdir())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    """In a thread as well, where Python allows no handlers of signals."""
    workdir, config, results = finished
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, config, tmp_path).result() == results
    assert without_speed(lines(tmp_path)) == without_speed(lines(workdir))


def test_a_finished_run_can_be_repeated_without_training(finished):
    workdir, config, results = finished
    assert train(config, workdir) == results
    assert completed_steps(checkpoints_folder(workdir)) == [2, 4]


def test_a_checkpoint_loads_alone(finished):
    workdir, config, _ = finished
    model = load_model(workdir)
    assert model.step == 4
    assert model.config == run_config(config)
    with pytest.raises(UserError, match="no checkpoint of step 3, only of 2, 4"):
        load_model(workdir, step=3)
    with pytest.raises(UserError, match="No finished checkpoint"):
        load_model(workdir / "pictures")


@contextlib.contextmanager
def once_reported(step, action):
    """Calls `action` when the metrics of that step have been reported."""
    original = Reporter.train

    def report(self, at, *rest, **counts):
        original(self, at, *rest, **counts)
        if at == step:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "train", report)
        yield


def test_killed_and_resumed_equals_uninterrupted(tmp_path, seen, monkeypatch):
    config = tiny_config()
    config.data.edit_rate = 0.5
    train(config, tmp_path / "whole")
    whole, seen[:] = list(seen), []

    class Killed(BaseException):
        """Not an Exception: nothing may catch it, like a real kill."""

    def die():
        raise Killed

    with pytest.raises(Killed), once_reported(3, die):
        train(config, tmp_path / "parts")
    # Step 2 was saved, step 3 was lost; it comes again from the same batch.
    assert completed_steps(checkpoints_folder(tmp_path / "parts")) == [2]
    first = list(seen)
    seen[:] = []
    train(config, tmp_path / "parts")
    assert_trees_equal(first[:2] + seen, whole)
    assert_trees_equal(load_model(tmp_path / "parts").params, load_model(tmp_path / "whole").params)
    assert without_speed(lines(tmp_path / "parts")) == without_speed(lines(tmp_path / "whole"))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(tmp_path, monkeypatch):
    config = tiny_config()
    config.checkpoint.every = 100
    train(config, tmp_path / "whole")
    with once_reported(1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train(config, tmp_path / "parts") is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    steps = completed_steps(checkpoints_folder(tmp_path / "parts"))
    assert len(steps) == 1
    assert steps[0] < 4
    train(config, tmp_path / "parts")
    assert_trees_equal(load_model(tmp_path / "parts").params, load_model(tmp_path / "whole").params)


def test_a_non_finite_loss_stops_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = tiny_config()
    config.checkpoint.every = 1
    monkeypatch.setattr("simseg_jax.train.cosine_schedule", lambda *_: lambda step: 1e30 * step)
    with pytest.raises(UserError, match=r"last good checkpoint is .*/checkpoints/\d"):
        train(config, tmp_path)
    model = load_model(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in map(np.asarray, jax.tree.leaves(model.params)))


def test_another_run_can_be_the_start(finished, tmp_path):
    workdir, config, _ = finished
    config = config.copy_and_resolve_references()
    config.checkpoint.resume = str(workdir)
    config.steps = 5
    config.evals.seg = {}
    train(config, tmp_path)
    assert [r["step"] for r in lines(tmp_path)] == [5]
    config.checkpoint.resume = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        train(config, tmp_path / "other")


def test_a_changed_architecture_is_refused_before_anything_is_lost(finished, tmp_path):
    workdir, config, _ = finished
    before = (workdir / "config.json").read_text()
    changed = config.copy_and_resolve_references()
    changed.model.embed_dim = 8
    with pytest.raises(UserError, match=r"model.embed_dim=16, the configuration 8"):
        train(changed, workdir)
    assert (workdir / "config.json").read_text() == before


def snapshot(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("change", ["order", "size", "data", "seed"])
def test_other_inputs_are_refused_and_the_folder_stays(finished, tmp_path, change):
    workdir, config, _ = finished
    config = config.copy_and_resolve_references()
    config.steps = 5
    tokens = list(shapes.vocabulary())
    vocab = tmp_path / "vocab.txt"
    if change in ("order", "size"):
        words = tokens[5:][::-1] if change == "order" else tokens[5:-1]
        vocab.write_text("\n".join([*tokens[:5], *words]))
        config.data.vocab = str(vocab)
        message = rf"vocabulary data.vocab='shapes' \({len(tokens)} tokens.*{vocab}"
    elif change == "data":
        config.data.train.shapes["split"] = "test"
        message = "was trained on other data: 64 of 64 compared examples of data.train.shapes"
    else:
        config.seed = 1
        message = "has seed=0, the configuration 1. Set it back, or start a new run"
    before = snapshot(workdir)
    with pytest.raises(UserError, match=message):
        train(config, workdir)
    assert snapshot(workdir) == before


def test_the_vocabulary_may_move(finished, tmp_path):
    """WORKDIR/tokenizer is the one that was named otherwise before."""
    _, config, _ = finished
    config = config.copy_and_resolve_references()
    shutil.copytree(finished[0], tmp_path / "run")
    config.data.vocab = str(tmp_path / "run" / "tokenizer")
    config.evals.seg = {}
    config.pictures = 0
    assert train(config, tmp_path / "run") == {}


@pytest.mark.parametrize("key", ["workdir", "directory", "resume"])
def test_paths_that_cannot_be_read_back_are_refused_before_training(tmp_path, key):
    config = tiny_config()
    workdir = tmp_path / ("run[1]" if key == "workdir" else "run")
    if key != "workdir":
        config.checkpoint[key] = str(tmp_path / "run[1]")
    with pytest.raises(UserError, match=r"run\[1\].*Choose a path without these characters"):
        train(config, workdir)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def reporter(tmp_path):
    def make(start=3):
        settings = {"steps": 9, "batch_size": 8, "log_every": 1, "flops": 1}
        return Reporter(tmp_path, start=start, **settings)

    return make


def test_metrics_of_odd_files_are_kept_in_order(tmp_path, reporter):
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 2, 3)]
    odd = ["[1]", "7", "null", "{}", '{"step": "2"}', '{"step": null}', "[" * 100_000, "", "\x85"]
    odd += [json.dumps({"step": 1}), json.dumps({"step": 4})]
    lines_ = [line.encode() for line in (*good[:3], *odd, good[3])]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*lines_[:1], b"\xff\xfe{", *lines_[1:]]) + b'\n{"step": 3')
    with reporter() as reports:
        reports.write(4, {"loss": 0.5})
    expected = [*good, json.dumps({"step": 4, "loss": 0.5})]
    assert path.read_text().splitlines() == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands for a full disk")
def test_metrics_on_a_full_disk_are_one_sentence(tmp_path, reporter):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"Cannot write the metrics in .*No space left.* make room"),
        reporter() as reports,
    ):
        reports.write(4, {"loss": 0.5})


def test_tensorboard_reads_what_was_written(tmp_path, reporter):
    with reporter() as reports:
        reports.write(4, {"loss": 0.5, "lr": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # Records: length, its checksum, content, its checksum.
        size = int.from_bytes(data[:8], "little")
        events.append(
            event_pb2.Event.FromString(  # type: ignore[reportAttributeAccessIssue]
                data[12 : 12 + size]
            )
        )
        data = data[size + 16 :]
    assert events[1].HasField("session_log")
    assert [event.step for event in events[1:]] == [3, 4]
    assert {v.tag: v.simple_value for v in events[2].summary.value} == {"loss": 0.5, "lr": 1.0}


# Orbax leaves the reads of the other arrays behind when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named(tmp_path, finished):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    for file in (workdir / "checkpoints" / "4" / "params").rglob("*"):
        if file.is_file() and file.name != "_METADATA" and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"checkpoints/4 cannot be read .* next older one"):
        load_model(workdir)
    gc.collect()
    # A write that never finished has another name and does not count at all.
    checkpoints = workdir / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "4.orbax-checkpoint-tmp")
    assert completed_steps(checkpoints_folder(workdir)) == [2]
    assert load_model(workdir).step == 2


@pytest.mark.slow
def test_bfloat16_trains_float32_parameters(tmp_path):
    config = tiny_config()
    config.steps = 2
    config.dtype = "bfloat16"
    train(config, tmp_path)
    losses = [record["loss"] for record in lines(tmp_path)]
    assert np.isfinite(losses).all()
    model = load_model(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}


def test_fewer_steps_than_already_made_are_refused(finished):
    workdir, config, _ = finished
    shorter = config.copy_and_resolve_references()
    shorter.steps = 3
    with pytest.raises(UserError, match="at step 4, beyond the 3 configured"):
        train(shorter, workdir)


def test_indivisible_batches_are_refused(tmp_path):
    config = tiny_config()
    config.batch_size = 12
    with pytest.raises(UserError, match="multiple of the 8 devices"):
        train(config, tmp_path)


@pytest.mark.slow
def test_a_trace_of_a_few_steps(tmp_path, capfd):
    config = tiny_config()
    config.steps = 5
    train(config, tmp_path, profile=1)
    assert "Trace of steps 4 to 4" in "".join(capfd.readouterr())
    # Perfetto's file is a list of named events, some of them of our program.
    (file,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(file, "rt") as content:
        names = {event.get("name") for event in json.load(content)["traceEvents"]}
    assert any("jit_update" in str(name) or "Execute" in str(name) for name in names)


@pytest.mark.slow
def test_checkpoints_may_live_elsewhere(tmp_path, capsys):
    """As on object storage: a new, empty WORKDIR continues from them."""
    config = tiny_config()
    config.checkpoint.directory = str(tmp_path / "bucket")
    config.steps = 2
    train(config, tmp_path / "first")
    assert not (tmp_path / "first" / "checkpoints").exists()
    assert load_model(tmp_path / "first").step == 2
    config.steps = 3
    train(config, tmp_path / "second")
    assert (
        "Changed since the checkpoint: steps 2 -> 3, the learning rate" in capsys.readouterr().out
    )
    assert [r["step"] for r in lines(tmp_path / "second")] == [3]
    assert load_model(tmp_path / "second").step == 3
    (tmp_path / "second" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"Cannot read .*config.json: .* Run its command again"):
        load_model(tmp_path / "second")
    config.checkpoint.update({"directory": "", "resume": str(tmp_path / "first")})
    config.steps = 4
    train(config, tmp_path / "third")
    assert [r["step"] for r in lines(tmp_path / "third")] == [4]
