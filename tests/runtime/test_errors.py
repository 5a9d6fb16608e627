import errno
import signal
import subprocess
import sys

import pytest
from support import interrupt_imports

from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.processes import keeping


def chained() -> Exception:
    """A library's error about a full disk, buried under one from closing the file."""
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("flush failed") from error
    except RuntimeError:
        try:
            raise ValueError("the handle is closed")
        except ValueError as error:
            return error


CORRECTABLE = [
    (UserError("no such word"), "error: no such word"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.csv"), "error: No such file: a.csv"),
    (OSError(errno.ENOSPC, "No space left on device"), "What was finished before is kept"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "a.csv"), "exceeded: a.csv. What was finished"),
    (RuntimeError("write: No space left on device"), "What was finished before is kept"),
    (ValueError("INTERNAL: File too large [/x]"), "File too large. What was finished"),
    (chained(), "No space left on device. What was"),
    (OSError(errno.EMFILE, "Too many open files"), "error: Too many open files."),
    (
        RuntimeError("Unable to initialize backend 'x': unknown. (set JAX_PLATFORMS='')"),
        "(set JAX_PLATFORMS='')",
    ),
    (MemoryError("Unable to allocate 5 GiB"), "Unable to allocate 5 GiB). In training lower"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "micro_batch, or remat=full"),
]


@pytest.mark.parametrize(("error", "words"), CORRECTABLE, ids=[words for _, words in CORRECTABLE])
def test_what_a_user_can_correct_is_one_line_with_status_2(capsys, error, words):
    @report_user_errors
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


@pytest.mark.parametrize(
    "error", [KeyError("x"), OSError("no mode F"), BrokenPipeError(32, "pipe")]
)
def test_a_mistake_of_the_program_keeps_its_traceback(error):
    @report_user_errors
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        main()
    assert raised.value is error


def test_interrupts_end_with_130_without_traceback(capsys):
    @report_user_errors
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


def test_sigterm_is_reported_as_what_it_is(capsys):
    @report_user_errors
    def main():
        with keeping(lambda: "Masks are kept."):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nStopped. Masks are kept.\nStopped by SIGTERM.\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_while_a_command_loads_its_libraries():
    interrupt_imports("-m", "simseg_jax.main", "--help")


@pytest.mark.parametrize("end", ["while True: print('again and again')", "sys.exit(0)"])
def test_output_that_nobody_reads_ends_the_command_quietly(tmp_path, end):
    script = tmp_path / "talk.py"
    script.write_text(
        "import sys\n"
        "from simseg_jax.runtime.errors import report_user_errors\n"
        "@report_user_errors\n"
        "def main():\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
        "    print('too late')\n"
        f"    {end}\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141
