"""The collective operations of a compiled program, read from XLA's text for CPUs, GPUs and TPUs."""

import dataclasses
import math
import re
from collections import Counter

import numpy as np
from jax.sharding import Mesh

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a compiled program.

    size: bytes of the whole array, that is of the result, or of what a reduce-scatter takes apart.
    members: how many devices take part together. group: the positions in the mesh of one such
    group, None where the program does not list them. times: how often one run of the program
    performs it. network: between the same devices of TPU slices, over the data-center network.
    """

    kind: str
    size: int
    members: int
    group: tuple[int, ...] | None
    times: int
    network: bool = False

    @property
    def sent(self) -> float:
        """Bytes that every device sends in all, by a ring of the members."""
        if self.kind == "collective-permute":
            return self.times * self.size
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.times * rounds * ring(self.size, self.members)

    def axes(self, mesh: Mesh) -> str:
        """The axes of the mesh along which it communicates, such as "fsdp" or "data and fsdp".

        "network" between TPU slices, "unknown" where the program does not list the group.
        """
        if self.network:
            return "network"
        group = range(mesh.size) if self.members == mesh.size else self.group
        if group is None:
            return "unknown"
        places = np.unravel_index(np.array(group), mesh.devices.shape)
        used = zip(mesh.axis_names, places, strict=True)
        return " and ".join(name for name, place in used if len(set(place.tolist())) > 1) or "none"


def ring(size: float, members: int) -> float:
    """Bytes that each of the members of a ring sends to gather or to scatter an array once."""
    return size * (members - 1) / members


def communication_bytes(hlo: str) -> Counter[str]:
    """Bytes that every device sends in one run of a compiled program, by kind of collective.

    hlo: `compiled.as_text()` of a program for CPUs, GPUs or TPUs; a `ValueError` says what of it is
    not understood. Counted as for ring algorithms among the n members of a group: an all-reduce
    sends its array 2 (n - 1) / n times, an all-gather or reduce-scatter (n - 1) / n times. What
    goes to other TPU slices is of a kind of its own, "network all-reduce" and so on.
    """
    return sent_by_kind(collectives(hlo))


def sent_by_kind(found: list[Collective]) -> Counter[str]:
    """As `communication_bytes`, of collectives that were read already."""
    total: Counter[str] = Counter()
    for collective in found:
        kind = f"network {collective.kind}" if collective.network else collective.kind
        total[kind] += round(collective.sent)
    return total


def collectives(hlo: str) -> list[Collective]:
    """The collective operations of a compiled program, each once; see `communication_bytes`."""
    computations, entry = _computations(hlo)
    found: list[Collective] = []
    # The pieces into which XLA for TPUs spreads an operation over fusions repeat it; the first
    # piece counts. {kind and channel: whether the first piece was seen}
    spread: dict[tuple[str, str], bool] = {}

    def visit(name: str, times: int) -> None:
        lines = computations[name]
        text = "\n".join(lines)
        starts = '"AsyncCollectiveStart"' in text
        piece = name.startswith("async_collective_fusion") or '"AsyncCollectiveDone"' in text
        for line in lines:
            transfer = _transfer(line)
            if transfer:
                found.append(dataclasses.replace(transfer, times=times))
            operation = _operation(line)
            if operation:
                kind, size, members, group = operation
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # Every device takes its part out of the sum.
                channel = re.search(r"channel_id=(\d+)", line)
                key = (kind, channel[1] if channel else line)
                if starts or piece:
                    spread[key] = spread.get(key, False) or starts
                if not piece:
                    found.append(Collective(kind, size, members, group, times))
            turns = times
            if " conditional(" in line and any(
                _communicates(branch, computations) for branch in _branches(line)
            ):
                raise ValueError("a conditional that communicates")
            if " while(" in line:
                turns *= _turns(line, computations)
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                visit(callee, turns)

    visit(entry, 1)
    for (kind, _), begun in spread.items():
        if not begun:
            raise ValueError(f"a piece of an {kind} without its beginning")
    return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, name of the entry); the body of a computation is indented, its head not."""
    computations: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = []
        elif name and line.startswith(" "):
            computations[name].append(line)
    return computations, entry


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: noted by XLA, or from the bound and the step of its counter."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if noted:
        return int(noted[1])
    names = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    condition, body = (computations[name] for name in names.groups()) if names else ([], [])
    bounds = re.findall(r" = [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    step = _step(condition, body)
    if len(bounds) == 1 and step:
        return -(-int(bounds[0]) // step)
    if names and not _communicates(names[2], computations):
        return 1
    raise ValueError("a loop of unknown length")


def _step(condition: list[str], body: list[str]) -> int:
    """By how much a turn raises the counter that the condition compares; 0: not understood."""
    compared = re.search(r"compare\(%?([\w.\-]+), .*direction=LT", "\n".join(condition))
    counter = compared and _line_of(compared[1], condition)
    index = counter and re.search(r"get-tuple-element\(.*\), index=(\d+)", counter)
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    results = re.search(r" tuple\((.*?)\)", root)
    if not index or not results:
        return 0
    result = results[1].split(", ")[int(index[1])].rpartition("%")[2]
    sum_ = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", _line_of(result, body))
    for operand in sum_.groups() if sum_ else ():
        constant = re.search(r" constant\((\d+)\)", _line_of(operand, body))
        if constant:
            return int(constant[1])
    return 0


def _line_of(name: str, computation: list[str]) -> str:
    """The instruction of this name, "" if there is none."""
    pattern = re.compile(rf"\s+(ROOT )?%?{re.escape(name)} = ")
    return next((line for line in computation if pattern.match(line)), "")


def _communicates(name: str, computations: dict[str, list[str]]) -> bool:
    """Whether a computation or one that it calls holds a collective."""
    return any(
        re.search(rf" ({COLLECTIVES})(-start)?\(| send\(", line)
        or any(
            _communicates(callee, computations)
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line)
            + _branches(line)
        )
        for line in computations[name]
    )


def _branches(line: str) -> list[str]:
    """The computations among which a conditional chooses."""
    listed = re.search(r"branch_computations=\{(.*?)\}", line)
    names = listed[1].split(", ") if listed else []
    names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
    return [name.removeprefix("%") for name in names]


def _operation(line: str) -> tuple[str, int, int, tuple[int, ...] | None] | None:
    """(kind, bytes of the whole array, members, group) of an instruction, if it communicates."""
    found = re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line)
    if not found:
        return None
    shapes, kind, start = found.groups()
    arrays = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shapes)
    sizes = [_array_bytes(*array) for array in arrays if array != ("u32", "")]
    if kind == "collective-permute":
        pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
        group = (int(pair[1]), int(pair[2])) if pair else None
        # Operands, then results.
        return kind, sum(sizes[: len(sizes) // 2] if start else sizes), 2, group
    if start and kind in ("all-gather", "reduce-scatter", "all-to-all"):
        sizes = sizes[len(sizes) // 2 :]  # Operands, then results.
    members, group = _group(line)
    # A reduce-scatter's result is one member's share.
    return kind, sum(sizes) * (members if kind == "reduce-scatter" else 1), members, group


def _transfer(line: str) -> Collective | None:
    """What an instruction sends to the other slices: each device to its like there."""
    found = re.search(r" = \(([a-z]+\d*\w*)\[([\d,]*)\].* send\(", line)
    if not found:
        return None
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', line)
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if not slices or not kind:
        raise ValueError("a transfer of unknown kind")
    members, name = len(slices[1].split(",")), kind[1].lower().replace("_", "-")
    if name not in ("all-reduce", "all-gather", "reduce-scatter"):
        raise ValueError(f"a transfer of unknown kind: {name}")
    size = _array_bytes(found[1], found[2]) * (members if name == "all-gather" else 1)
    return Collective(name, size, members, None, 1, network=True)


def _group(line: str) -> tuple[int, tuple[int, ...] | None]:
    """(members of a group, the first group if the program lists it)."""
    # XLA has three notations: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=4] {'a','b':(1)2}, of
    # whose second axis only a part of size 2 is meant.
    groups = line.partition("replica_groups=")[2]
    listed = re.match(r"\{\{([\d,]+)\}", groups)
    if listed:
        group = tuple(map(int, listed[1].split(",")))
        return len(group), group
    iota = re.match(r"\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups)
    if iota:
        members = int(iota[1])
        return members, tuple(_iota(iota[2], iota[3]).reshape(-1, members)[0].tolist())
    mesh = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", groups)
    if mesh is None:
        raise ValueError(f"unknown notation of replica groups: {groups[:80]}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[3])
    members = math.prod(int(part or sizes[axis]) for axis, part in axes)
    order = re.fullmatch(
        r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh[2] or f"[{math.prod(sizes.values())}]"
    )
    if order is None or any(part for _, part in axes):
        return members, None
    devices = _iota(order[1], order[2])
    if devices.size != math.prod(sizes.values()):
        return members, None
    chosen = {axis for axis, _ in axes}
    index = tuple(slice(None) if axis in chosen else 0 for axis in sizes)
    return members, tuple(devices.reshape(tuple(sizes.values()))[index].reshape(-1).tolist())


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    """Device numbers in order, in a shape like "4,2" whose axes then change places like "1,0"."""
    sizes = [int(size) for size in shape.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (
        numbers.transpose([int(axis) for axis in transposed.split(",")]) if transposed else numbers
    )


def _array_bytes(dtype: str, dimensions: str) -> int:
    size = math.prod(int(dimension) for dimension in dimensions.split(",") if dimension)
    bits = re.search(r"\d+", dtype)
    return size * (max(8, int(bits[0])) if bits else 8) // 8
