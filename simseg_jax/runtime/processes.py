"""Several processes as one run: how they find each other, agree to stop, keep other runs out."""

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

import jax
from jax.experimental import multihost_utils

from simseg_jax.runtime.errors import UserError

COUNT, INDEX, COORDINATOR = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"

LOCK = ".lock"
# What file systems without locks answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# Exit status of a run that a signal stopped: it waits for its command to be given again.
STOPPED = 75


def add_distributed_option(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that several processes can run together."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a TPU pod, SLURM job or MPI launch first, or those that "
        f"{COORDINATOR} (host:port), {COUNT} and {INDEX} describe; see launch/",
    )


def join_processes() -> None:
    """Connects this process with the others of its run, before JAX is used for anything else.

    The environment variables above come first; without them JAX asks the TPU, SLURM, Open MPI or
    Kubernetes. When a process dies, the others end as well.
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
    """Work that may be stopped at any time: SIGTERM ends it as Ctrl-C does, by KeyboardInterrupt.

    kept() says in one line what is kept and how to go on; it is printed then, by process 0.
    """
    # Among several processes JAX's own service watches for SIGTERM.
    own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler) if own else None
    try:
        yield
    except KeyboardInterrupt:
        if jax.process_index() == 0:
            print(f"\nStopped. {kept()}", file=sys.stderr)
        raise
    finally:
        if own:
            signal.signal(signal.SIGTERM, previous)


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a request to save and stop; a second one kills.

    With several processes a signal to any of them stops all of them before the same step. Outside
    of the main thread, where Python allows no handlers, signals stay with the program around.
    """

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignal":
        # Among several processes JAX's own service watches for SIGTERM; a handler of ours would
        # keep the signal from it.
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
    """Keeps other runs out of `folder`, which is made if need be; a `UserError` says who is in it.

    Process 0 holds a lock of the operating system on FOLDER/.lock, which ends with the process
    however that ends. Nothing stays behind: no lock file, nor the folder if it is empty and new.
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
            with contextlib.suppress(OSError):  # Mostly it has files by now.
                folder.rmdir()


def _locked(path: Path) -> int:
    """A descriptor of the file at `path`, locked and with a line that tells by whom."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run before may have removed the file since it was opened.
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
