"""Plans a run for other hardware: `python -m simseg_jax.plan --devices=...`."""

import argparse
import dataclasses
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from simseg_jax.config import RunConfig, load_config
from simseg_jax.data.testsets.classes import classes_of, prompt_names
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.evaluators.build import entries_of
from simseg_jax.evaluators.embedding import ImageEmbedder
from simseg_jax.reports.plans import describe, recommendation
from simseg_jax.runtime.command_line import accepted, add_config_option, make_parser
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.files import make_writable, write_json
from simseg_jax.runtime.hardware import Target, chip_of
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.sharding import batch_sharding, make_mesh, own_devices, replicated
from simseg_jax.train import batch_shapes, check_batch, set_up
from simseg_jax.training.arrays import with_sharding
from simseg_jax.training.collectives import collectives, sent_by_kind
from simseg_jax.training.cost import computed_flops, image_flops, least_communication, step_flops
from simseg_jax.training.roofline import bound, traffic
from simseg_jax.zeroshot.engine import PROTOCOLS
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.settings import SegmentationConfig

EPILOG = """examples:
  python -m simseg_jax.plan --config=vits16 --devices=v5e:4x8
  python -m simseg_jax.plan --config=vits16 --devices=h100:1 --search
  python -m simseg_jax.plan --config=vits16 --devices=h100:1 --what=evaluate
  python -m simseg_jax.plan --config=vits16 --devices=v5e:16x16 --slices=2 \\
      --pairs=15000000 --output=plan.json --config.batch_size=16384

Compiles the programs of the configuration for devices that this machine need not have, and prints
the memory, communication and time per device. TPUs need the extra tpu, GPUs the extra cuda; cpu:8
needs neither. The time is a lower bound from data sheets, not a measurement. No data and no weights
are read, those of init.* neither: set model.* to their sizes. XLA_FLAGS of the environment are
ignored.
"""
# Sizes of known vocabularies, so that planning needs no download.
VOCABULARIES = {"bert-base-uncased": 30522, "bert-base-cased": 28996}
TRAINING = "training step"
# (remat, micro_batch, loss_chunk), presumably the fastest first: recomputation costs time.
SEARCHED = (
    ("none", 0, 0),
    ("dots", 0, 0),
    ("full", 0, 0),
    ("none", 256, 0),
    ("full", 256, 0),
    ("full", 256, 1024),
)
PHOTOGRAPH = (375, 500)  # Height and width of most images of VOC.


@report_user_errors
def main() -> None:
    """Parses the command line, turns this process to the target and prints the plan."""
    parser = make_parser("plan", "Plans a run for other hardware.", EPILOG)
    add_config_option(parser)
    parser.add_argument(
        "--devices",
        required=True,
        help="KIND:SHAPE, such as v5e:4x8, v4:2x2x4, v5p:4x4x4, v6e:4x8, h100:8, h100:4x8, cpu:8",
    )
    parser.add_argument(
        "--slices", type=accepted(whole(1)), default=1, help="TPU slices of that shape"
    )
    parser.add_argument(
        "--what",
        choices=("train", "evaluate"),
        default="train",
        help="the training step (default), or the programs of the test sets in evals, which every "
        "process runs on its own devices",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try remat, micro_batch, loss_chunk and mesh.fsdp, presumably the fastest first; "
        "recommend the first that fits",
    )
    parser.add_argument(
        "--pairs",
        type=accepted(whole(1)),
        help="pairs of the training data, to compute the hours of a run of `epochs`",
    )
    parser.add_argument(
        "--vocabulary", type=accepted(whole(1)), help="vocabulary size; default: that of data.vocab"
    )
    parser.add_argument("--output", help="JSON file for all figures")
    args, overrides = parser.parse_known_args()
    if args.what == "evaluate" and (args.search or args.pairs):
        parser.error("--search and --pairs are for --what=train")
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
    output = Path(args.output) if args.output else None
    if output:
        make_writable(output.parent)
        if output.is_dir():
            raise UserError(f"--output={output} is a folder: name a JSON file.")
    devices = target.devices()
    name = f"{args.devices}{f' x {args.slices} slices' if args.slices > 1 else ''}"
    print(f"{args.config} on {name}: {len(devices)} devices ({devices[0].device_kind})", flush=True)
    for key in ("image", "text", "model"):
        if getattr(config.init, key):
            print(f"init.{key} is not read: set model.* to the sizes that it brings.")
    if args.pairs and not config.epochs:
        print(f"--pairs changes nothing: steps={config.steps} is the length of the run.")
    record = {"config": args.config, "overrides": overrides, "devices": name}
    rows: list[dict[str, Any]] = []
    if args.what == "evaluate":
        programs = compile_evaluation(config, vocabulary, devices)
    elif args.search:
        programs = search(config, vocabulary, devices, args.pairs)
    else:
        programs = iter([compile_step(config, vocabulary, devices, args.pairs)])
    for row in tqdm(programs, desc="compiling", unit="program", disable=None):
        rows.append(row)
        tqdm.write(describe(row))
        if output:
            write_json(output, {**record, "plans": rows, "jax": jax.__version__})
    if args.search:
        print(recommendation(rows, options_of(config)))
    if output:
        print(f"All figures are in {output}")


def options_of(config: RunConfig) -> dict[str, Any]:
    """The keys that trade memory for time, with the batch size."""
    return {
        "batch_size": config.batch_size,
        "remat": config.remat,
        "micro_batch": config.micro_batch,
        "loss_chunk": config.loss_chunk,
        "mesh.fsdp": config.mesh.fsdp,
    }


def search(
    config: RunConfig, vocabulary: int, devices: list, pairs: int | None
) -> Iterator[dict[str, Any]]:
    """The figures of one combination of options after the other, until one fits.

    Parameters are split over the devices of a slice or machine only where that may be enough.
    """
    neighbours = Counter(
        device.slice_index if device.platform == "tpu" else device.process_index
        for device in devices
    )
    fsdp = min(neighbours.values())
    # Mistakes that no option mends are errors.
    make_mesh(config.mesh.fsdp, devices)
    check_batch(dataclasses.replace(config, micro_batch=0, loss_chunk=0), len(devices))
    share = config.batch_size // len(devices)
    for remat, micro_batch, loss_chunk in SEARCHED:
        if micro_batch and micro_batch >= share:
            continue  # One micro-batch would be the whole batch.
        options = {"remat": remat, "micro_batch": micro_batch, "loss_chunk": loss_chunk}
        tried = [dataclasses.replace(config, **options)]
        for chosen in tried:
            try:
                row = compile_step(chosen, vocabulary, devices, pairs)
            except UserError as error:
                yield {"program": TRAINING, "options": options_of(chosen), "error": str(error)}
                continue
            yield row
            if row["fits"] is not False:
                return
            # The state shrinks, and so do gradients, which are no larger than a third of it.
            excess = row.get("excess_bytes", 0)
            if chosen.mesh.fsdp == 1 < fsdp and excess < 4 / 3 * row["state_bytes"]:
                mesh = dataclasses.replace(config.mesh, fsdp=fsdp)
                tried.append(dataclasses.replace(chosen, mesh=mesh))


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
    row: dict[str, Any] = {
        "program": TRAINING,
        "options": options_of(config),
        "unit": "pairs",
        "state_bytes": _bytes_of(setup.state_shapes, setup.shardings),
    }
    began = time.monotonic()
    with jax.set_mesh(mesh):
        try:
            compiled = setup.update.lower(setup.state_shapes, batch_shapes(config)).compile()
        except jax.errors.JaxRuntimeError as error:
            # The TPU compiler rejects programs that do not fit into memory.
            return row | {"fits": False, **_excess(error)}
    row["seconds_to_compile"] = time.monotonic() - began
    size = (setup.architecture, config.batch_size, config.data.max_length)
    row["flops"] = step_flops(*size) / mesh.size
    row["least_sent_bytes"] = least_communication(
        setup.graphdef,
        setup.state_shapes["params"],
        setup.shardings["params"],
        setup.frozen,
        size[1:],
        mesh,
        config.micro_batch,
    )
    computed = computed_flops(*size, config.remat, config.micro_batch) / mesh.size
    row |= figures(compiled, computed, mesh)
    if row.get("step_seconds") and steps:
        row |= {"steps": steps, "hours": steps * row["step_seconds"] / 3600}
    return row


def compile_evaluation(
    config: RunConfig, vocabulary: int, devices: list
) -> Iterator[dict[str, Any]]:
    """The figures of the programs of every test set, per device that a process uses for them.

    The embedding of texts is left out; it takes little.
    """
    entries = entries_of(config.evals)
    if not entries:
        raise UserError("--what=evaluate needs a test set in config.evals.")
    # As `sharding.local_mesh`.
    processes = {device.process_index for device in devices}
    local = [device for device in devices if device.process_index == min(processes)]
    fsdp = config.mesh.fsdp if len(processes) == 1 else 1
    mesh = make_mesh(fsdp, own_devices(local, len(processes)))
    setup = set_up(config, vocabulary, 1, mesh)
    params = with_sharding(setup.state_shapes["params"], setup.shardings["params"])
    # No text is encoded here, so any vocabulary will do: this one needs no download.
    encoder = TextEncoder(load_tokenizer("shapes"), config.data.max_length)
    model = Model(setup.architecture, setup.graphdef, encoder, mesh)
    for prefix, settings in entries.items():
        size = -(-settings.batch_size // mesh.size) * mesh.size
        row = {"options": {"batch_size": size}, "unit": "images"}
        if fsdp > 1:
            row["options"]["mesh.fsdp"] = fsdp
        with jax.set_mesh(mesh):
            if isinstance(settings, SegmentationConfig):
                windows, programs = _segmentation_programs(model, params, settings, size)
            else:
                windows = _shape((size, settings.crop, settings.crop, 3), "uint8", mesh)
                embedder = ImageEmbedder(model, settings, settings.batch_size)
                programs = embedder.compile(params, windows)
            *several, height, width, _ = windows.shape
            flops = math.prod(several) * image_flops(setup.architecture, height, width)
            began = time.monotonic()
            try:
                for name, compiled in programs:
                    took = {"seconds_to_compile": time.monotonic() - began}
                    title = {"program": f"{prefix}, {name}", "flops": flops / mesh.size}
                    yield row | title | took | figures(compiled, flops / mesh.size, mesh)
                    # Only the first program runs the encoder.
                    began, flops = time.monotonic(), 0
            except jax.errors.JaxRuntimeError as error:
                yield row | {"program": prefix, "fits": False, **_excess(error)}


def _segmentation_programs(
    model: Model, params, settings: SegmentationConfig, size: int
) -> tuple[jax.ShapeDtypeStruct, Iterator[tuple[str, Any]]]:
    """(shape of the encoder's input for a batch of photographs, the protocol's programs)."""
    height, width = PHOTOGRAPH
    background = classes_of(settings).background
    classes = len(prompt_names(settings)) + (not background)
    protocol = PROTOCOLS[settings.protocol](model, [settings], background)
    loaded = protocol.load(Image.new("RGB", (width, height)), PHOTOGRAPH)
    batch = {k: _shape((size, *v.shape), v.dtype, model.mesh) for k, v in loaded.items()}
    texts = jax.ShapeDtypeStruct(
        (classes, model.architecture.embed_dim), "float32", sharding=replicated(model.mesh)
    )
    programs = protocol.compile(params, {settings.m_text: texts}, batch)
    return next(iter(batch.values())), programs


def figures(compiled: Any, flops: float, mesh: Mesh) -> dict[str, Any]:
    """Memory, communication and the bound on the time of a compiled program, per device.

    flops: of its matrix products, on one device.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    row: dict[str, Any] = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        # Those that do not take the place of arguments.
        "result_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "fused_attention_calls": text.count('custom_call_target="__cudnn$fmha'),
        "gpu": mesh.devices.flat[0].platform == "gpu",
        "fits": None,
    }
    chip = chip_of(mesh.devices.flat[0])
    if chip and chip.memory:
        needed = row["argument_bytes"] + row["temporary_bytes"] + row["result_bytes"]
        excess = needed - chip.memory
        row |= {"memory_bytes": chip.memory, "fits": excess <= 0, "excess_bytes": max(0, excess)}
    try:
        sent = collectives(text)
    except ValueError as error:
        return row | {"communication": f"unknown: {error}"}
    axes: Counter[str] = Counter()
    for collective in sent:
        axes[collective.axes(mesh)] += round(collective.sent)
    row |= {"sent_bytes": sent_by_kind(sent), "sent_by_axis": axes}
    row["network_bytes"] = traffic(sent, mesh)[1]
    least = bound(chip, compiled, flops, sent, mesh)
    row |= {"seconds": dataclasses.asdict(least), "step_seconds": least.seconds}
    return row | {"limit": least.limit}


def _shape(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


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


def _excess(error: Exception) -> dict[str, Any]:
    """What the compiler says of a program that does not fit; other errors are raised again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    row: dict[str, Any] = {"error": text.strip().splitlines()[0][:300]}
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    over = re.search(r"Exceeded hbm capacity by ([\d.]+)([KMG])", text)
    both = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", text)
    if over:
        row["excess_bytes"] = float(over[1]) * unit[over[2]]
    elif both:
        row["excess_bytes"] = float(both[1]) * unit[both[2]] - float(both[3]) * unit[both[4]]
    return row


if __name__ == "__main__":
    main()
