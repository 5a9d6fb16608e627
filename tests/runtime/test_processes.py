"""Several real processes on this machine, started by launch/local.py as a user starts them."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from support import classification_eval, retrieval_eval, tiny_config, tiny_eval

from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.processes import STOPPED, StopSignal, join_processes, only_run
from simseg_jax.train import train
from simseg_jax.training.checkpoint import checkpoints_folder, completed_steps
from simseg_jax.weights.load import load_model

HERE = Path(__file__).parent
TESTS = HERE.parent
# What the tests run in every process: the training command, which sends itself a signal once.
FAULTY = """
import os, pathlib, time
import jax
from simseg_jax import main
from simseg_jax.training.checkpoint import checkpoints_folder, completed_steps
from simseg_jax.training.report import Reporter

report = Reporter.train

def die(self, step, *rest, **counts):
    report(self, step, *rest, **counts)
    if step == int(os.environ["AT_STEP"]) and jax.process_index() == int(os.environ["PROCESS"]):
        if not os.path.exists(os.environ["ONCE"]):
            open(os.environ["ONCE"], "w").close()
            while not completed_steps(checkpoints_folder(pathlib.Path(os.environ["SAVED"]))):
                time.sleep(0.1)  # Saving goes on in the background.
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

Reporter.train = die
main.main()
"""


def configuration():
    """Dropout and edited captions; Adam's epsilon as in test_sharding."""
    config = tiny_config()
    config.steps = 6
    config.data.edit_rate = 0.5
    config.optim.eps = 1e-3
    return config


def launch(processes, module, *arguments, restarts=0, path="", **environment):
    """The finished launcher, with its output as text."""
    # The children share the compiled programs of the tests and have one device each.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ["SIMSEG_JAX_TEST_CACHE"],
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
        "PYTHONPATH": f"{HERE}:{TESTS}:{path}",
        **environment,
    }
    command = [sys.executable, TESTS.parent / "launch" / "local.py", f"--processes={processes}"]
    command += [f"--restarts={restarts}", module, *arguments]
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of an uninterrupted run of one process, and the file of its configuration."""
    folder = tmp_path_factory.mktemp("alone")
    file = folder / "config.py"
    file.write_text("from test_processes import configuration as get_config\n")
    train(configuration(), folder / "run")
    return folder / "run", file


def assert_same_run(workdir, expected):
    """The same losses at every step and the same parameters, up to the order of summation."""
    (one, losses), (two, other) = ((w, read_losses(w)) for w in (expected, workdir))
    assert list(other) == list(losses)
    np.testing.assert_allclose([*other.values()], [*losses.values()], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max() + 1e-8),
        load_model(two).params,
        load_model(one).params,
    )


def read_losses(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def launch_faulty(processes, at_step, number, config, workdir, *overrides, **options):
    """Training whose last process gets a signal at a step, the first time that it comes there."""
    folder = workdir.parent
    (folder / "faulty.py").write_text(FAULTY)
    settings = {"AT_STEP": at_step, "PROCESS": processes - 1, "SIGNAL": int(number)}
    settings |= {"ONCE": folder / f"{processes}.signalled", "SAVED": workdir}
    settings = {key: str(value) for key, value in settings.items()}
    arguments = ("faulty", f"--config={config}", f"--workdir={workdir}", *overrides)
    return launch(processes, *arguments, path=folder, **options, **settings)


@pytest.mark.slow
def test_a_killed_process_is_started_again(alone, tmp_path):
    """Two processes train like one, although one of them is killed after step 3."""
    expected, config = alone
    done = launch_faulty(2, 3, signal.SIGKILL, config, tmp_path / "run", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "restart 1 of 1" in done.stderr
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    """Two, which share the parameters and one of which is killed; one, which is asked to stop; four
    until the end, which share them by twos. All of it equals an uninterrupted run of one process.
    """
    expected, config = alone
    workdir = tmp_path / "run"
    sharded = "--config.mesh.fsdp=2"
    killed = launch_faulty(2, 3, signal.SIGKILL, config, workdir, sharded)
    assert killed.returncode not in (0, STOPPED)
    # Step 3 was reported but not saved.
    assert completed_steps(checkpoints_folder(workdir)) == [2]
    stopped = launch_faulty(1, 3, signal.SIGTERM, config, workdir)
    assert stopped.returncode == STOPPED, stopped.stderr[-3000:]
    assert "Stopped by a signal" in stopped.stdout
    assert 2 < completed_steps(checkpoints_folder(workdir))[-1] < 6
    arguments = (f"--config={config}", f"--workdir={workdir}", sharded)
    finished = launch(4, "simseg_jax.main", *arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "on 4 cpu device(s)" in finished.stdout
    assert finished.stdout.count("Everything is in") == 1
    assert_same_run(workdir, expected)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them(alone, tmp_path):
    _, config = alone
    long = ("--config.steps=100000", "--config.checkpoint.every=2")
    done = launch_faulty(2, 3, signal.SIGTERM, config, tmp_path / "run", *long)
    assert done.returncode == STOPPED, done.stderr[-3000:]
    assert done.stdout.count("Stopped by a signal") == 1


@pytest.mark.slow
def test_a_mistake_is_not_repeated(tmp_path, alone):
    _, config = alone
    arguments = (f"--config={config}", f"--workdir={tmp_path}", "--config.batch_size=3")
    done = launch(2, "simseg_jax.main", *arguments, restarts=5)
    assert done.returncode == 2
    assert "must be a multiple of the 2 devices" in done.stderr
    assert "restart" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID must be set as well"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID='2' must be one of 0 to",
        ),
        ({}, "found no TPU pod, SLURM job or MPI launch: leave it out"),
    ],
    ids=["incomplete", "beyond", "nothing"],
)
def test_processes_that_cannot_be_found(monkeypatch, settings, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_processes()


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 7 on elsewhere since noon", file=file, flush=True)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = tmp_path / "run"
    with only_run(folder):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* since 2.*: wait for"):
            train(tiny_config(), folder)
        link = tmp_path / "link"
        link.symlink_to(folder)
        with pytest.raises(UserError, match="belongs to another run"), only_run(link):
            pass
        (folder / "result").touch()
        assert (folder / ".lock").is_file()
    with only_run(folder):
        pass
    assert [file.name for file in folder.iterdir()] == ["result"]


def test_a_refused_run_leaves_nothing(tmp_path):
    config = tiny_config()
    config.batch_size = 12
    for directory in ("", str(tmp_path / "bucket")):
        config.checkpoint.directory = directory
        with pytest.raises(UserError, match="multiple of the 8 devices"):
            train(config, tmp_path / "run")
        assert not list(tmp_path.iterdir())


def test_folders_of_checkpoints_are_locked_as_well(tmp_path):
    config = tiny_config()
    config.checkpoint.directory = str(tmp_path / "bucket")
    with only_run(tmp_path / "bucket"), pytest.raises(UserError, match="bucket belongs to another"):
        train(config, tmp_path / "run")


def test_a_lock_ends_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        message = r"belongs to another run, process 7 on elsewhere since noon: wait"
        with pytest.raises(UserError, match=message), only_run(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with only_run(tmp_path):
        pass


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run(tmp_path):
        assert f"{tmp_path} allows no locks: let only one run" in capsys.readouterr().err


def test_signals_outside_of_the_main_thread_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)

    def watch():
        with StopSignal() as stop:
            return stop.requested(1), signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(watch).result() == (False, before)


@pytest.mark.slow
def test_two_processes_evaluate_like_one(tmp_path):
    config = tiny_config()
    config.evals.seg.shapes = tiny_eval()
    config.evals.seg.windows = tiny_eval(protocol="standard", window=32, limit=7)
    small = {"split": "val", "resize": 32, "crop": 32}
    config.evals.retrieval.pairs = retrieval_eval(format="shapes", size=9, batch_size=4, **small)
    config.evals.classification.kinds = classification_eval(data="shapes", size=7, **small)
    expected = train(config, tmp_path / "run")
    output = tmp_path / "out"
    arguments = ("simseg_jax.evaluate", f"--checkpoint={tmp_path / 'run'}", f"--output={output}")
    done = launch(2, *arguments, "--pictures=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((output / "result.json").read_text())["results"] == expected
    assert done.stdout.count("shapes: 20 images in") == 1
    files = sorted(file.name for file in (output / "shapes").glob("*.jsonl"))
    assert files == ["records-00000.jsonl", "records-00001.jsonl"]
    lines = [(output / "shapes" / file).read_text().splitlines() for file in files]
    assert [len(x) for x in lines] == [11, 11]

    # One of them was killed half way; with the other's records only those are missing.
    (output / "shapes" / files[1]).write_text("\n".join(lines[1][:4]) + "\n")
    done = launch(2, *arguments, "--test_set=shapes")
    assert "shapes: 7 images in" in done.stdout
    again = json.loads((output / "result.json").read_text())["results"]
    assert again == {key: value for key, value in expected.items() if "/shapes/" in key}
