"""Several processes as one run: how they find each other, and how they agree to stop."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from simseg_jax.errors import UserError

COUNT, INDEX, COORDINATOR = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"

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

    With several processes a signal to any of them stops all of them before the same step.
    """

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignal":
        # Among several processes JAX's own service watches for SIGTERM; a handler of ours would
        # keep the signal from it.
        own = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
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
