"""What a training step costs: model FLOPs, memory and communication of the compiled program."""

import math
import re
from collections import Counter
from typing import Any

from simseg_jax.models.simseg import SimSegConfig

# Dense bfloat16 products of one JAX device per second, from the vendors' data sheets.
PEAK_FLOPS = {
    "V100": 125e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def peak_flops(device) -> float | None:
    """bfloat16 FLOP/s of a `jax.Device` as its maker states them, None where unknown."""
    matches = [name for name in PEAK_FLOPS if name in device.device_kind]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def forward_flops(config: SimSegConfig, batch: int, tokens: int) -> int:
    """Floating-point operations of all matrix products of the loss of `batch` pairs.

    tokens: length of the (padded) captions. A multiply-add is two operations, as usual.
    """
    image, text = config.image, config.text
    patches = (image.image_size // image.patch_size) ** 2
    per_pair = 2 * patches * 3 * image.patch_size**2 * image.width
    for tower, length in ((image, patches + 1), (text, tokens)):
        weights = 4 * tower.width**2 + 2 * tower.width * tower.mlp_width
        attention = 2 * length * tower.width  # multiply-adds per token
        per_pair += 2 * length * (weights + attention) * tower.depth
        per_pair += 2 * length * tower.width * config.embed_dim
    return batch * per_pair + 2 * batch**2 * config.embed_dim


def step_flops(config: SimSegConfig, batch: int, tokens: int) -> int:
    """Model FLOPs of a training step: the gradient takes twice the forward pass.

    What is computed again to save memory does not count, so that MFU (these over what the device
    could do) compares runs.
    """
    return 3 * forward_flops(config, batch, tokens)


def describe_step(compiled: Any, flops: int, devices: int) -> str:
    """What a step costs every device, in one line, from the compiled program.

    flops: of the whole step, see `step_flops`; devices: how many share it.
    """
    memory = compiled.memory_analysis()
    line = (
        f"A step takes {flops / devices / 1e12:.3g} TFLOP of every device, "
        f"{memory.argument_size_in_bytes / 2**30:.3g} GiB for state and batch and "
        f"{memory.temp_size_in_bytes / 2**30:.3g} GiB for temporaries"
    )
    if devices == 1:
        return line
    try:
        sent = communication_bytes(compiled.as_text())
    except ValueError as error:  # Another version of XLA may write its programs differently.
        return f"{line}; communication unknown ({error})"
    kinds = ", ".join(f"{kind} {size / 1e6:.3g}" for kind, size in sorted(sent.items()))
    return f"{line}, and sends {sent.total() / 1e6:.3g} MB ({kinds})"


def communication_bytes(hlo: str) -> Counter[str]:
    """Bytes that every device sends in one run of a compiled program, by kind of collective.

    hlo: `compiled.as_text()`. Counted as for ring algorithms among the n members of a group: an
    all-reduce sends its array 2 (n - 1) / n times, an all-gather or reduce-scatter (n - 1) / n
    times. Loops count as often as they turn.
    """
    # name -> lines; the body of a computation is indented, its head and end are not.
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

    totals: dict[str, Counter[str]] = {}

    def total(name: str) -> Counter[str]:
        if name not in totals:
            totals[name] = Counter()
            for line in computations[name]:
                totals[name].update(_sent(line))
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                    factor = int(turns[1]) if turns else 1
                    for kind, size in total(callee).items():
                        totals[name][kind] += factor * size
        return totals[name]

    return total(entry)


def _sent(line: str) -> dict[str, int]:
    """What one instruction sends."""
    found = re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line)
    if not found:
        return {}
    shapes, kind, start = found.groups()
    sizes = [_array_bytes(*shape) for shape in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shapes)]
    if kind == "collective-permute":
        return {kind: sum(sizes[:1] if start else sizes)}
    if start and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # operands, then results
    members = _group_size(line)
    # A reduce-scatter's result is one member's share.
    turns = {"all-reduce": 2 / members, "reduce-scatter": 1}.get(kind, 1 / members)
    return {kind: round(sum(sizes) * turns * (members - 1))}


def _group_size(line: str) -> int:
    # XLA has three notations: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=4] {'a','b':(1)2}, of
    # whose second axis only a part of size 2 is meant.
    groups = line.partition("replica_groups=")[2]
    listed = re.match(r"\{\{([\d,]+)\}", groups)
    if listed:
        return len(listed[1].split(","))
    iota = re.match(r"\[\d+,(\d+)\]<=", groups)
    if iota:
        return int(iota[1])
    mesh = re.match(r"mesh\[(.*?)\].*?\{(.*?)\}", groups)
    if mesh is None:
        raise ValueError(f"Unknown notation of replica groups: {groups[:80]}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)


def _array_bytes(dtype: str, dimensions: str) -> int:
    size = math.prod(int(dimension) for dimension in dimensions.split(",") if dimension)
    bits = re.search(r"\d+", dtype)
    return size * (max(8, int(bits[0])) if bits else 8) // 8
