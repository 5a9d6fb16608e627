"""Several processes as one run: joining, stopping together, keeping other runs out of a folder."""

import argparse
import contextlib
import datetime
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from simseg_jax.runtime.errors import UserError

COUNT, INDEX, COORDINATOR = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"

LOCK = ".lock"
# Errors of file systems that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# Exit status of a training run that a signal stopped: the same command continues it.
STOPPED = 75


def add_distributed_option(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed, for commands that several processes can run together."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="first join the other processes of a TPU pod, SLURM job or MPI launch, or the ones "
        f"described by {COORDINATOR} (host:port), {COUNT} and {INDEX}; see launch/",
    )


def join_processes() -> None:
    """Connects this process to the others of its run; call it before any other use of JAX.

    The environment variables above take precedence; without them JAX detects a TPU pod, SLURM, Open
    MPI or Kubernetes. When one process dies, the others end as well.
    """
    if os.environ.get(COUNT) or os.environ.get(INDEX):
        missing = [name for name in (COORDINATOR, COUNT, INDEX) if not os.environ.get(name)]
        if missing:
            raise UserError(f"--distributed: {', '.join(missing)} must be set as well.")
        count, index = os.environ[COUNT], os.environ[INDEX]
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(
                f"--distributed: {INDEX}={index!r} must be one of 0 to {COUNT}={count!r} - 1."
            )
        jax.distributed.initialize(
            os.environ[COORDINATOR], int(count), int(index), cluster_detection_method="deactivate"
        )
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "--distributed found no TPU pod, SLURM job or MPI launch: leave it out for a single "
            f"process, or set {COORDINATOR}, {COUNT} and {INDEX} (JAX says: {error})."
        ) from error


@contextlib.contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """A context for work that may be stopped at any time: SIGTERM raises KeyboardInterrupt, too.

    kept(): one line on what is kept and how to continue; process 0 prints it after a stop.
    """
    # With several processes JAX's own service watches for SIGTERM.
    own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _interrupt) if own else None
    try:
        yield
    except KeyboardInterrupt:
        if jax.process_index() == 0:
            print(f"\nStopped. {kept()}", file=sys.stderr)
        raise
    finally:
        if own:
            signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, _frame) -> NoReturn:
    """A signal handler whose KeyboardInterrupt carries the name of the signal."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def exit_stopped() -> NoReturn:
    """Ends the process of a training run that a signal stopped."""
    if jax.process_index() == 0:
        print("Stopped by a signal; run the same command again to continue.", flush=True)
    sys.exit(STOPPED)


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a request to save and stop; a second one kills.

    With several processes a signal to any of them stops all of them before the same step. Outside
    the main thread Python allows no handlers, and signals keep their previous effect.
    """

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignal":
        # With several processes JAX's own service watches for SIGTERM; our handler would hide the
        # signal from it.
        own = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            own = ()
        self.previous = {number: signal.signal(number, self._handle) for number in own}
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame) -> None:
        self.received = True
        signal.signal(number, self.previous[number])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder`, creating it if needed.

    If another run uses it, a `UserError` names that run's process. Process 0 locks FOLDER/.lock;
    the operating system releases the lock when the process ends, even in a crash. On exit the lock
    file is removed, and so is the folder if it was created here and is empty.
    """
    if jax.process_index() > 0:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
        if new:
            with contextlib.suppress(OSError):  # Usually it is not empty by now.
                folder.rmdir()


def _locked(path: Path) -> int:
    """A descriptor of the locked file at `path`, whose content names this process."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous run may have removed the file since it was opened.
            if _same(path, file):
                break
        except OSError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip()
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise UserError(
                    f"{path.parent} belongs to another run{holder and ', '}{holder}: wait for its "
                    "end, stop it or choose another folder."
                ) from error
            print(f"{path.parent} allows no locks: let only one run use it.", file=sys.stderr)
            break
        os.close(file)
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    os.truncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
    return file


def _same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
