"""Kills, damage and nonsense by the hundred: what must end well, or in one sentence.

Cases are drawn from a seed: trainings that are killed anywhere and started again, damaged
checkpoints, configurations, images, captions and weights, 200 checkpoints in a row. A case is right
(the result of undamaged input, or input that was used), or refused with one line. Anything else
fails: a wrong start without a word, a traceback, another program started, more than 1 GiB of
address space, more than a minute. Failing cases stay in the folder that the last line names, each
with its files and a report.txt; the exit status is 1 then. Takes minutes on two cores.

python benchmarks/drills.py
python benchmarks/drills.py --seed 7 --only images,weights --rounds 1000
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import drill_cases as cases
import numpy as np

from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.ranges import SEED, whole

PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}  # Audit events.
LIMIT = 2**30
FAILURES = {
    "wrong": "silent wrong",
    "traceback": "tracebacks",
    "program": "external programs started",
    "memory": "above 1 GiB",
    "hang": "hangs",
}


class Kind(NamedTuple):
    """prepare(home) -> the function that runs a case in a folder of its own."""

    prepare: Callable[[Path], cases.Case]
    rounds: int
    limited: bool = True  # In memory, and in programs that it may start.
    trained: bool = True  # Needs the undisturbed run.
    seconds: int = 60


KINDS = {
    "kills": Kind(cases.kills, 6, limited=False, seconds=400),
    "checkpoints": Kind(cases.checkpoints, 60),
    "settings": Kind(cases.settings, 120, trained=False),
    "images": Kind(cases.images, 300),
    "captions": Kind(cases.captions, 200, trained=False),
    "weights": Kind(cases.weights, 200),
    "leaks": Kind(cases.leaks, 1, limited=False, trained=False, seconds=400),
}


def judged(case: cases.Case, rng: np.random.Generator, place: Path) -> tuple[str, str]:
    """(verdict, what to report) of one case."""
    try:
        case(rng, place)
        return "right", ""
    except cases.WrongError as error:
        return "wrong", str(error)
    except BaseException as error:
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        report = "".join(traceback.format_exception(error))
        if any(isinstance(e, MemoryError) for e in chain) or "RESOURCE_EXHAUSTED" in str(error):
            return "memory", report
        one_line = isinstance(error, UserError) and "\n" not in str(error).strip()
        return ("refused" if one_line else "traceback"), report


def serve(connection, name: str, home: Path, seed: int) -> None:
    """A worker: runs the cases whose numbers come in, answers with verdicts."""
    kind, started = KINDS[name], []
    sys.stdout = sys.stderr = (home / f"worker-{os.getpid()}.txt").open("w")
    case = kind.prepare(home)
    if kind.limited:
        sys.addaudithook(lambda event, data: event in PROGRAMS and started.append(data))
    connection.send("ready")
    while (number := connection.recv()) is not None:
        place = home / "cases" / f"{name}-{seed}-{number}"
        place.mkdir(parents=True)
        started.clear()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if kind.limited:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT, hard))
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        verdict, report = judged(case, rng, place)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        if started:
            verdict, report = "program", f"{started}"
        connection.send((verdict, report))


class Worker:
    """A process for the cases of one kind; another one takes its place after a crash or a hang."""

    def __init__(self, name: str, home: Path, seed: int):
        self.arguments, self.process = (name, home, seed), None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()

    def run(self, number: int) -> tuple[str, str]:
        """(verdict, report) of a case."""
        if self.process is None:
            self._start()
        self.connection.send(number)
        try:
            if self.connection.poll(KINDS[self.arguments[0]].seconds):
                return self.connection.recv()
            answer = "hang", "no end"
        except (EOFError, ConnectionError):
            answer = "traceback", "the process died"
        self.close()
        return answer

    def close(self) -> None:
        """Ends the process, by force if it does not listen."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(5)
        self.process.kill()
        self.process.join()
        self.process = None


def drill(name: str, home: Path, seed: int, numbers: range) -> Counter[str]:
    """Verdicts of the cases of one kind; the files of those that fail stay."""
    verdicts: Counter[str] = Counter()
    began, cores = time.monotonic(), min(2, len(numbers))

    def share(first: int) -> None:
        worker = Worker(name, home, seed)
        for number in numbers[first::cores]:
            verdict, report = worker.run(number)
            verdicts[verdict] += 1
            place = home / "cases" / f"{name}-{seed}-{number}"
            if verdict in FAILURES:
                (place / "report.txt").write_text(f"{FAILURES[verdict]}\n{report}\n")
            else:
                shutil.rmtree(place)
        worker.close()

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(share, range(cores)))
    failures = ", ".join(f"{verdicts[key]} {text}" for key, text in FAILURES.items())
    print(
        f"{name}: {len(numbers)} cases, {verdicts['right']} right, {verdicts['refused']} refused; "
        f"{failures} ({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    return verdicts


def set_up(home: Path, names: Sequence[str]) -> None:
    """The configuration, the undisturbed run and its converted folder."""
    (home / "config.py").write_text(cases.CONFIG)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(home / "programs")
    os.environ.update({"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"})
    if not any(KINDS[name].trained for name in names):
        return
    began = time.monotonic()
    if cases.train(home, home / "run").wait():
        sys.exit(f"The undisturbed run fails: {(home / 'output.txt').read_text()[-2000:]}")
    (home / "seconds.txt").write_text(f"{time.monotonic() - began}")
    command = [sys.executable, "-m", "simseg_jax.convert", str(home / "run")]
    command += [str(home / "converted"), "--to=safetensors"]
    subprocess.run(command, cwd=cases.ROOT, check=True, stdout=subprocess.DEVNULL)


@report_user_errors
def main() -> None:
    """One line per kind, then the folder of what failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=accepted(SEED), default=0, help="draws other cases (%(default)s)"
    )
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, with commas (%(default)s)")
    parser.add_argument(
        "--rounds", type=accepted(whole(1)), help="cases of each kind; default: for some minutes"
    )
    args = parser.parse_args()
    names = args.only.split(",")
    if not set(names) <= set(KINDS):
        parser.error(f"--only takes {', '.join(KINDS)}")
    home = Path(tempfile.mkdtemp(prefix="drills-"))
    set_up(home, names)
    failed = 0
    for name in names:
        verdicts = drill(name, home, args.seed, range(args.rounds or KINDS[name].rounds))
        failed += sum(verdicts[key] for key in FAILURES)
    if failed:
        sys.exit(f"{failed} cases failed; each has a folder with report.txt in {home / 'cases'}")
    shutil.rmtree(home)
    print("Nothing failed.")


if __name__ == "__main__":
    main()
