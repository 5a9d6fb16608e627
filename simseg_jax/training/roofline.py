"""A lower bound on the time of a training step, from the compiled program and data sheets."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from simseg_jax.runtime.hardware import Chip
from simseg_jax.training.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Bound:
    """The minimum seconds per step that each part of the machine is busy; None: not known."""

    products: float | None
    memory: float | None
    links: float | None
    network: float | None

    @property
    def seconds(self) -> float | None:
        """The longest of the known times, since all parts can work at once: a lower bound."""
        known = [x for x in dataclasses.astuple(self) if x is not None]
        return max(known, default=None)

    @property
    def limit(self) -> str:
        """The part of the machine that takes longest."""
        known = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return max(known, key=known.__getitem__) if known else "nothing known"


def bound(
    chip: Chip | None, compiled: Any, flops: float, sent: list[Collective], mesh: Mesh
) -> Bound:
    """The bound for one device of the mesh.

    flops: FLOPs of the matrix products of one device. Memory traffic: arguments are read once,
    results are written once, and every temporary byte is written and read once.
    """
    if chip is None:
        return Bound(None, None, None, None)
    memory = compiled.memory_analysis()
    moved = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    )
    links, network = traffic(sent, mesh)
    return Bound(
        flops / chip.flops,
        moved / chip.bandwidth if chip.bandwidth else None,
        links / chip.links if chip.links else None,
        network / chip.network if network and chip.network else None,
    )


def traffic(sent: list[Collective], mesh: Mesh) -> tuple[float, float]:
    """Bytes that one device sends per step: (to its neighbours, over the network).

    The network connects TPU slices or machines with GPUs. TPU programs mark the collectives that
    use it, GPU programs do not. There a collective over several machines is assumed to have two
    levels: a ring among neighbours, and each device's share of the array over the network.
    """
    machines = [device.process_index for device in mesh.devices.flat]
    tpu = mesh.devices.flat[0].platform == "tpu"
    links = network = 0.0
    for collective in sent:
        if collective.network:
            network += collective.sent
            continue
        links += collective.sent
        group = collective.group or tuple(range(len(machines)))
        spread = len({machines[member] for member in group})
        if spread > 1 and not tpu:
            rounds = 2 if collective.kind == "all-reduce" else 1
            share = collective.size / (len(group) / spread)
            network += collective.times * rounds * share * (spread - 1) / spread
    return links, network
