"""The command `simseg`."""

import importlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import interrupt_imports

import simseg_jax
from simseg_jax.__main__ import MODULES

# As pip writes it for the entry point in setup.py.
SCRIPT = "import sys; from simseg_jax.__main__ import main; sys.exit(main())"


def run(*arguments, options=()):
    command = [sys.executable, *options, "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_entry_point_is_this_function():
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    assert '"simseg=simseg_jax.__main__:main"' in setup


def test_help_is_one_screen_and_imports_little():
    done = run("--help", options=["-X", "importtime"])
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 85
    loaded = re.findall(r"\| +([\w.]+)$", done.stderr, re.M)
    assert "simseg_jax.runtime.errors" in loaded
    assert not {"jax", "numpy", "argparse"} & set(loaded)


def test_help_says_what_the_commands_say_of_themselves(monkeypatch, capsys):
    overview = " ".join(run("--help").stdout.split())
    for name, module in MODULES.items():
        monkeypatch.setattr(sys, "argv", [f"simseg {name}", "--help"])
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"simseg_jax.{module}").main()
        text = capsys.readouterr().out
        assert text.startswith(f"usage: simseg {name} ")
        description = " ".join(text.split("\n\n")[1].split())
        assert f"{name} {description}" in overview
        # The examples are spelled in the same way, all of them.
        examples = set(re.findall(r"^ +simseg (\w+)", text, re.M))
        assert name in examples
        assert examples <= MODULES.keys()
        assert "python -m simseg_jax" not in text


def test_every_command_has_a_name():
    package = Path(simseg_jax.__file__).parent
    commands = {
        str(path.relative_to(package).with_suffix("")).replace("/", ".")
        for path in package.rglob("*.py")
        if re.search(r"^    parser = make_parser\(", path.read_text(), re.M)
    }
    assert commands == set(MODULES.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segmnt"], "There is no command segmnt; the nearest is segment; simseg --help lists"),
        (["zzz"], "There is no command zzz; simseg --help lists all."),
        (["--words=x"], "There is no command --words=x; simseg --help lists all."),
        ([], "Name a command; simseg --help lists all."),
    ],
)
def test_an_unknown_command_is_one_sentence(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_commands_keep_their_arguments_and_exit_status(tmp_path):
    assert run("--version").stdout == f"simseg_jax {simseg_jax.__version__}\n"
    command = [sys.executable, "-m", "simseg_jax", "linear-probe", "--checkpoint=none"]
    command.append(f"--config={tmp_path}/none.py")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: No configuration file at {tmp_path}/none.py;")


@pytest.mark.parametrize("start", [["-c", SCRIPT], ["-m", "simseg_jax"]])
def test_an_interrupt_while_libraries_load(start):
    interrupt_imports(*start, "train", "--help")


@pytest.mark.slow
def test_a_signal_saves_a_training(tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, "train", "--config=shapes", f"--workdir={workdir}"]
    command += ["--config.steps=100000", "--config.batch_size=8", "--config.model.image.depth=1"]
    command += ["--config.data.autoaugment=False", "--config.log_every=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert b"run the same command again to continue" in out
    assert any((workdir / "checkpoints").iterdir())
