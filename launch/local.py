"""Starts several processes on this machine as one distributed run, and starts them again.

python launch/local.py --processes=2 simseg_jax.main --config=shapes --workdir=runs/two
python launch/local.py --processes=8 --one_gpu_each simseg_jax.main --config=vits16 ...

The module runs as `python -m MODULE ARGUMENTS --distributed` in every process. If one of them dies
(out of memory, a crash, kill -9) the others are ended and all start again from the last checkpoint,
at most --restarts times. A mistake in the command (exit status 2) ends everything at once; SIGTERM
and Ctrl-C save a checkpoint first (exit status 75). One process drives all devices of a machine by
itself: several are for trials of a distributed run and for input that needs more than one Python.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

# Exit statuses of the commands, see `python -m simseg_jax.main --help`.
USER_ERROR, STOPPED = 2, 75


def main() -> None:
    """Runs the module until it is through, was stopped, or has failed too often."""
    parser = argparse.ArgumentParser(
        prog="python launch/local.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--restarts", type=int, default=3, help="after a process died (3)")
    parser.add_argument(
        "--one_gpu_each", action="store_true", help="process i sees GPU i only; else all see all"
    )
    parser.add_argument("module", help="simseg_jax.main or simseg_jax.evaluate")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes={args.processes} must be at least 1")
    if args.restarts < 0:
        parser.error(f"--restarts={args.restarts} must be at least 0")
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: stopping.append(number))
    for attempt in range(args.restarts + 1):
        status = run(args, stopping)
        if status in (0, USER_ERROR, STOPPED) or stopping or attempt == args.restarts:
            sys.exit(status)
        print(
            f"A process died with status {status}; restart {attempt + 1} of {args.restarts}.",
            file=sys.stderr,
            flush=True,
        )


def run(args: argparse.Namespace, stopping: list[int]) -> int:
    """One attempt: the exit status of all processes together, 0 if all ended well."""
    command = [sys.executable, "-m", args.module, *args.arguments, "--distributed"]
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    processes = []
    for index in range(args.processes):
        environment = {
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(args.processes),
            "JAX_PROCESS_ID": str(index),
        }
        if args.one_gpu_each:
            environment["CUDA_VISIBLE_DEVICES"] = str(index)
        # A session of its own: Ctrl-C reaches it through this process alone, once.
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
    told = False
    try:
        while True:
            statuses = [process.poll() for process in processes]
            failures = [status for status in statuses if status not in (None, 0, STOPPED)]
            if failures:
                # The others wait for the dead one in a collective: nothing of theirs is lost.
                return USER_ERROR if USER_ERROR in failures else failures[0]
            if None not in statuses:
                return max(statuses)
            if stopping and not told:
                told = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
