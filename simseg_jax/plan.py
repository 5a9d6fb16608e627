"""Plans a training run for other hardware: `python -m simseg_jax.plan --devices=...`."""

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from simseg_jax.config import RunConfig, load_config
from simseg_jax.data.text import load_tokenizer
from simseg_jax.runtime.command_line import accepted, make_parser
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.files import write_json
from simseg_jax.runtime.hardware import Target, chip_of
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.sharding import make_mesh
from simseg_jax.train import batch_shapes, check_batch, set_up
from simseg_jax.training.cost import collectives, communication_bytes, computed_flops, step_flops
from simseg_jax.training.roofline import bound, traffic

EPILOG = """examples:
  python -m simseg_jax.plan --config=configs/vits16.py --devices=v5e:4x8
  python -m simseg_jax.plan --config=configs/vits16.py --devices=h100:1 --search
  python -m simseg_jax.plan --config=configs/vits16.py --devices=v5e:16x16 --slices=2 \\
      --pairs=15000000 --output=plan.json --config.batch_size=16384

Compiles the training step of the configuration for devices that this machine need not have, and
prints the memory, communication and time per device. TPUs need the extra tpu, GPUs the extra cuda;
cpu:8 needs neither. The time is a lower bound from data sheets, not a measurement. No data and no
weights are read.
"""
# Sizes of known vocabularies, so that planning needs no download.
VOCABULARIES = {"bert-base-uncased": 30522, "bert-base-cased": 28996}
# Presumably the fastest first: recomputation costs time.
SEARCHED: tuple[dict[str, Any], ...] = (
    {},
    {"remat": "dots"},
    {"remat": "full"},
    {"micro_batch": 256},
    {"remat": "full", "micro_batch": 256},
    {"remat": "full", "micro_batch": 256, "loss_chunk": 1024},
)


@report_user_errors
def main() -> None:
    """Parses the command line, turns this process to the target and prints the plan."""
    parser = make_parser("plan", "Plans a training run for other hardware.", EPILOG)
    parser.add_argument("--config", required=True, help="configuration file, see configs/")
    parser.add_argument(
        "--devices",
        required=True,
        help="KIND:SHAPE, such as v5e:4x8, v4:2x2x4, v5p:4x4x4, v6e:4x8, h100:8, h100:4x8, cpu:8",
    )
    parser.add_argument(
        "--slices", type=accepted(whole(1)), default=1, help="TPU slices of that shape"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try remat, micro_batch and loss_chunk, recommend the fastest that fits",
    )
    parser.add_argument(
        "--pairs", type=accepted(whole(1)), help="pairs of the training data, to compute hours"
    )
    parser.add_argument(
        "--vocabulary", type=accepted(whole(1)), help="vocabulary size; default: that of data.vocab"
    )
    parser.add_argument("--output", help="JSON file for all figures")
    args, overrides = parser.parse_known_args()
    target = Target.parse(args.devices, args.slices)
    # JAX reads the environment when it looks for devices, which nothing has made it do so far.
    os.environ.update(target.environment())
    jax.config.update("jax_platforms", "cpu")
    plan(args, overrides, target)


def plan(args: argparse.Namespace, overrides: list[str], target: Target) -> None:
    """Compiles for the target and prints the plan."""
    config = load_config(args.config, overrides)
    vocabulary = args.vocabulary or VOCABULARIES.get(config.data.vocab)
    if vocabulary is None:
        vocabulary = len(load_tokenizer(config.data.vocab))
    devices = target.devices()
    name = f"{args.devices}{f' x {args.slices} slices' if args.slices > 1 else ''}"
    print(f"{args.config} on {name}: {len(devices)} devices ({devices[0].device_kind})", flush=True)
    rows: list[dict[str, Any]] = []
    tried = [options for options in SEARCHED if args.search or not options]
    for options in tqdm(tried, desc="compiling", unit="program", disable=not args.search):
        chosen = dataclasses.replace(config, **options)
        try:
            rows.append(compile_step(chosen, vocabulary, devices, args.pairs))
        except UserError as error:
            if not args.search:
                raise
            rows.append({"options": options_of(chosen), "error": str(error)})
            continue
        if args.search and rows[-1]["fits"]:
            # The remaining options only cost more time.
            break
    for row in rows:
        print(describe(row))
    if args.search:
        print(recommendation(rows))
    if args.output:
        record = {"config": args.config, "overrides": overrides, "devices": name, "plans": rows}
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "jax": jax.__version__})
        print(f"All figures are in {path}")


def options_of(config: RunConfig) -> dict[str, Any]:
    """The keys that trade memory for time, with the batch size."""
    return {
        "batch_size": config.batch_size,
        "remat": config.remat,
        "micro_batch": config.micro_batch,
        "loss_chunk": config.loss_chunk,
        "mesh.fsdp": config.mesh.fsdp,
    }


def compile_step(
    config: RunConfig, vocabulary: int, devices: list, pairs: int | None
) -> dict[str, Any]:
    """The figures of one compiled training step, per device."""
    mesh = make_mesh(config.mesh.fsdp, devices)
    check_batch(config, mesh.size)
    steps = config.steps
    if config.epochs > 0:
        steps = max(1, round(config.epochs * pairs / config.batch_size)) if pairs else 0
    setup = set_up(config, vocabulary, max(steps, 1), mesh)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = setup.update.lower(setup.state_shapes, batch_shapes(config))
        traced = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # The TPU compiler rejects programs that do not fit into memory.
            return {"options": options_of(config), "fits": False, "error": _first_line(error)}
    memory: Any = compiled.memory_analysis()
    tokens = config.data.max_length
    size = (setup.architecture, config.batch_size, tokens)
    model = step_flops(*size) / mesh.size
    computed = computed_flops(*size, config.remat, config.micro_batch) / mesh.size
    text = compiled.as_text()
    row: dict[str, Any] = {
        "options": options_of(config),
        "seconds_to_trace": traced - began,
        "seconds_to_compile": time.monotonic() - traced,
        "state_bytes": _bytes_of(setup.state_shapes, setup.shardings),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "model_flops": model,
        "fused_attention_calls": text.count('custom_call_target="__cudnn$fmha'),
    }
    chip = chip_of(devices[0])
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    row["fits"] = None
    if chip and chip.memory:
        row |= {"memory_bytes": chip.memory, "fits": needed <= chip.memory}
    try:
        sent = collectives(text)
    except ValueError as error:
        return row | {"communication": f"unknown: {error}"}
    row |= {"sent_bytes": communication_bytes(text), "network_bytes": traffic(sent, mesh)[1]}
    least = bound(chip, compiled, computed, sent, mesh)
    row |= {"seconds": dataclasses.asdict(least), "step_seconds": least.seconds}
    row["limit"] = least.limit
    if least.seconds and steps:
        row |= {"steps": steps, "hours": steps * least.seconds / 3600}
    return row


def describe(row: dict[str, Any]) -> str:
    """A plan in a few lines of text."""
    options = ", ".join(f"{key}={value}" for key, value in row["options"].items() if value)
    if "error" in row:
        return f"{options}\n  not possible: {row['error']}"
    inputs = row["argument_bytes"] - row["state_bytes"]
    needed = row["argument_bytes"] + row["temporary_bytes"]
    lines = [
        options,
        f"  memory      {_size(row['state_bytes'])} state, {_size(inputs)} batch, "
        f"{_size(row['temporary_bytes'])} temporaries: {_size(needed)} in all"
        + _margin(row, needed),
        f"  products    {row['model_flops'] / 1e12:.3g} TFLOP of the model",
    ]
    if "sent_bytes" in row:
        kinds = ", ".join(f"{k} {v / 1e6:.4g}" for k, v in sorted(row["sent_bytes"].items()))
        total = sum(row["sent_bytes"].values()) / 1e6
        network = row["network_bytes"] / 1e6
        lines.append(
            f"  sent        {total:.4g} MB ({kinds or 'nothing'})"
            + (f", {network:.4g} MB of it over the network" if network else "")
        )
    else:
        lines.append(f"  sent        {row['communication']}")
    if row["fused_attention_calls"]:
        lines.append(f"  attention   {row['fused_attention_calls']} calls of cuDNN in the program")
    lines.append(
        f"  compiled    in {row['seconds_to_compile']:.0f} s, "
        f"traced in {row['seconds_to_trace']:.0f} s, here"
    )
    if row.get("step_seconds"):
        parts = ", ".join(f"{k} {v * 1e3:.3g}" for k, v in row["seconds"].items() if v is not None)
        speed = row["options"]["batch_size"] / row["step_seconds"]
        line = f"  at best     {row['step_seconds'] * 1e3:.3g} ms a step ({parts}), "
        line += f"{speed:,.0f} pairs/s"
        if "hours" in row:
            line += f", {row['hours']:.3g} hours for {row['steps']:,} steps"
        lines.append(line + "; a bound, not a measurement")
    return "\n".join(lines)


def recommendation(rows: list[dict[str, Any]]) -> str:
    """The fastest plan that fits."""
    fitting = [row for row in rows if row.get("fits")]
    if not fitting:
        if any("error" not in row and row["fits"] is None for row in rows):
            return "The memory of these devices is not known here: nothing can be recommended."
        return "Nothing fits: take more devices, a larger --config.mesh.fsdp or a smaller batch."
    best = min(fitting, key=lambda row: row.get("step_seconds") or 0)
    keys = ("remat", "micro_batch", "loss_chunk")
    options = [f"--config.{key}={best['options'][key]}" for key in keys if best["options"][key]]
    return "Recommended: " + " ".join(
        option for option in options if option != "--config.remat=none"
    )


def _margin(row: dict[str, Any], needed: int) -> str:
    if "memory_bytes" not in row:
        return ""
    free = row["memory_bytes"] - needed
    there = _size(row["memory_bytes"])
    if free < 0:
        return f", {_size(-free)} more than the {there} of the device: does not fit"
    return f", of {there} on the device: fits with {_size(free)} to spare"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _bytes_of(shapes, shardings) -> int:
    """Bytes of a tree of arrays on one device."""
    parts = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(
            sharding.shard_shape(shape.shape), shape.dtype
        ),
        shapes,
        shardings,
    )
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(parts))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


if __name__ == "__main__":
    main()
