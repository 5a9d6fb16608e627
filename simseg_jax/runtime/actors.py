"""A function over many items on the processes of a Ray cluster, or of a Ray on this machine."""

import contextlib
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from simseg_jax.runtime.command_line import cache_programs
from simseg_jax.runtime.errors import UserError, one_line

TRIES = 3  # So many processes may die with an item.


def import_ray():
    """The module ray; a `UserError` if it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Else it warns.
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError('Actors need Ray: pip install -e ".[ray]", or set --actors=0.') from error
    return ray


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module ray while it is connected to a cluster, by default to one of this process."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    board = None if address else False  # A cluster has its own, or none.
    try:
        ray.init(
            address or "local",
            include_dashboard=board,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"No Ray cluster at --address={address}: {one_line(error)}.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def cores_each(nodes: Sequence[float], actors: int) -> int:
    """The most cores per actor, at least 1, with which all fit into nodes of so many cores."""
    sizes = range(int(max(nodes, default=1)), 1, -1)
    return next((n for n in sizes if sum(cores // n for cores in nodes) >= actors), 1)


def results(
    ray, make: Callable[[int], Callable], items: Sequence[Any], actors: int, gpus: float
) -> Iterator[tuple[Any, Any, str]]:
    """Yields (item, result, "") in the order in which they end; (item, None, reason) if `TRIES`
    processes died with that item.

    make(cores) -> the function, which every actor gets once; what it imports must be installed on
    all nodes. gpus: of each actor; it sees no others. Items go to actors that run: those for which
    the cluster has no room yet hold nothing up, and one that died is replaced.
    """
    cores = cores_each([n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]], actors)
    # XLA starts so many threads.
    environment = {"NPROC": str(cores), "PJRT_NPROC": str(cores)}
    environment |= {} if gpus else {"JAX_PLATFORMS": "cpu"}
    if 0 < gpus < 1:  # Each process would take three quarters of the memory.
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    options = {"num_cpus": cores, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
    kind, function = ray.remote(_Actor).options(**options), ray.put(make(cores))
    waiting, deaths = deque(enumerate(items)), Counter()
    running: dict[Any, tuple[Any, tuple[int, Any] | None]] = {}

    def start() -> None:
        actor = kind.remote(function)
        running[actor.ready.remote()] = actor, None

    for _ in range(min(actors, len(items))):
        start()
    while waiting or any(item for _, item in running.values()):
        finished, _ = ray.wait(list(running), timeout=60)
        if not finished and not any(item for _, item in running.values()):
            print(f"Waiting for room: an actor takes {cores} cores and {gpus:g} GPUs.")
        for reference in finished:
            actor, item = running.pop(reference)
            number = item[0] if item else None
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError:
                raise  # A bug of the function.
            except ray.exceptions.RayError as error:
                ray.kill(actor)
                start()
                deaths[number] += 1
                reason = f"{TRIES} processes died, perhaps for lack of memory: {one_line(error)}"
                if deaths[number] < TRIES:
                    waiting.extend([item] if item else [])
                elif item is None:
                    raise UserError(reason) from error
                else:
                    yield item[1], None, reason
                continue
            if item is not None:
                yield item[1], result, ""
            if waiting:
                item = waiting.popleft()
                running[actor.call.remote(item[1])] = actor, item


class _Actor:
    def __init__(self, function: Callable):
        self.function = function

    def ready(self) -> None:
        cache_programs()

    def call(self, item: Any) -> Any:
        return self.function(item)
