"""One training step of this package against a tuned PyTorch peer: throughput, MFU, peak memory.

The peer has the same architecture (timm's ViT if timm is installed, else the same layers in plain
PyTorch; Hugging Face's BERT), scaled_dot_product_attention, fused AdamW, with --compile
torch.compile and, on GPUs, bfloat16 autocast (benchmarks/torch_train_step.py). Both sides live in
processes of their own and take turns, so that both see the same machine. Images are on the device
already: augmentation and input are measured by benchmarks/autoaugment.py and benchmarks/input.py.
Prints a table, writes JSON. `plan` and `bound` are what the compiled program takes of memory (GiB)
and the least time for it (ms), as `python -m simseg_jax.plan` prints them: what GiB and ms/step
are to be compared with.

pip install -e ".[bench]"
python benchmarks/train_step.py --batches 16
python benchmarks/train_step.py --models vits16,vitb16 --batches 256,1024,4096 --compile \
    --options none remat=dots remat=full micro_batch=256 micro_batch=256,loss_chunk=1024

--peer "" leaves PyTorch out, and --models tiny is for a trial. The memory of batches that would not
fit: python -m simseg_jax.plan.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from peers import require

from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.ranges import whole

TOKENS = 25
VOCABULARY = 30522
SIZES = {
    "vits16": {"width": 384, "depth": 12, "heads": 6, "text_width": 768, "text_depth": 12},
    "vitb16": {"width": 768, "depth": 12, "heads": 12, "text_width": 768, "text_depth": 12},
    "tiny": {"width": 128, "depth": 2, "heads": 2, "text_width": 128, "text_depth": 2},
}


def make_batch(batch: int):
    """The same images, ids and masks for both sides; captions of 8 to 25 tokens."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = rng.integers(8, TOKENS + 1, (batch, 1))
    mask = np.arange(TOKENS)[None] < lengths
    return {
        "image": rng.integers(0, 256, (batch, 224, 224, 3), np.uint8),
        "ids": (rng.integers(1000, VOCABULARY, (batch, TOKENS)) * mask).astype(np.int32),
        "mask": mask,
    }


class Ours:
    """The package's own step, compiled as `simseg_jax.train` compiles it."""

    def __init__(self, size: str, batch: int, options: dict, args):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import jax.numpy as jnp

        from simseg_jax.models.bert import BertConfig
        from simseg_jax.models.simseg import SimSegConfig, init_params, make_model
        from simseg_jax.models.vit import ViTConfig
        from simseg_jax.runtime.hardware import chip_of
        from simseg_jax.runtime.sharding import make_mesh, state_sharding, to_global_batch
        from simseg_jax.training.collectives import collectives
        from simseg_jax.training.cost import computed_flops, step_flops
        from simseg_jax.training.optim import OptimConfig, adamw
        from simseg_jax.training.roofline import bound
        from simseg_jax.training.step import initial_state, jit_update, make_update

        s = SIZES[size]
        config = SimSegConfig(
            image=ViTConfig(224, 16, s["width"], s["depth"], s["heads"], 4 * s["width"]),
            text=BertConfig(
                VOCABULARY, 512, s["text_width"], s["text_depth"], s["text_width"] // 64,
                4 * s["text_width"],
            ),
        )  # fmt: skip
        on_cpu = jax.default_backend() == "cpu"
        dtype = jnp.float32 if on_cpu else jnp.bfloat16
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        optim = OptimConfig(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
        optimizer = adamw(optim, lambda _: 1e-4, shapes)

        def init():
            return initial_state(init_params(config, jax.random.key(0)), optimizer)

        state_shapes = jax.eval_shape(lambda params: initial_state(params, optimizer), shapes)
        self.jax = jax
        mesh = make_mesh()
        options = dict(options)
        remat = options.pop("remat", "none")
        graphdef = make_model(config, dtype, remat)
        shardings = state_sharding(state_shapes, mesh)
        with jax.set_mesh(mesh):
            examples = {
                key: jax.ShapeDtypeStruct((batch, *value.shape[1:]), value.dtype)
                for key, value in make_batch(1).items()
            }
            update = jit_update(make_update(graphdef, optimizer, 0, **options), shardings, mesh)
            print(f"compiling {size}, batch {batch}", file=sys.stderr, flush=True)
            began = time.perf_counter()
            self.compiled = update.lower(state_shapes, examples).compile()
            self.compile_seconds = time.perf_counter() - began
            self.state = jax.jit(init, out_shardings=shardings)()
            self.batch = to_global_batch(make_batch(batch), mesh)
        self.flops = step_flops(config, batch, TOKENS)
        chip = chip_of(jax.devices()[0])
        self.peak = chip and chip.flops * jax.device_count()
        memory: Any = self.compiled.memory_analysis()
        self.planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        sent = collectives(self.compiled.as_text() or "")
        computed = computed_flops(config, batch, TOKENS, remat, options.get("micro_batch", 0))
        share = computed / jax.device_count()
        self.bound = bound(chip, self.compiled, share, sent, mesh).seconds

    def step(self):
        self.state, self.metrics = self.compiled(self.state, self.batch)

    def wait(self) -> float:
        return float(self.metrics["loss"])

    def facts(self) -> dict:
        stats = self.jax.devices()[0].memory_stats() or {}
        return {
            "device": self.jax.devices()[0].device_kind,
            "peak_flops": self.peak,
            "flops": self.flops,
            "peak_bytes": stats.get("peak_bytes_in_use"),
            "compile_seconds": self.compile_seconds,
            "planned_bytes": self.planned,
            "bound_seconds": self.bound,
        }


def make_side(side: str, size: str, batch: int, options: dict, args):
    """The side of this name; only its own process loads its libraries."""
    if side == "simseg_jax":
        return Ours(size, batch, options, args)
    from torch_train_step import Peer

    remat = options.get("remat", "none")
    return Peer(SIZES[size], VOCABULARY, make_batch(batch), remat, args.compile)


def serve(connection, side: str, size: str, batch: int, options: dict, args) -> None:
    """A side's process: answers a number of steps with the seconds they took."""
    # Nothing that a library prints may come between the rows of the table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        worker = make_side(side, size, batch, options, args)
        worker.step()
        worker.wait()
        connection.send("ready")
        while steps := connection.recv():
            began = time.perf_counter()
            for _ in range(steps):
                worker.step()
            loss = worker.wait()
            connection.send((time.perf_counter() - began, loss))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = worker.facts()
        connection.send(facts | {"peak_bytes": facts["peak_bytes"] or peak})
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def measure(size: str, batch: int, options: dict, sides: list[str], args) -> dict[str, dict]:
    """Both sides in turn, `args.rounds` times `args.steps` steps each."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    results: dict[str, dict] = {}
    for side in sides:
        connection, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, side, size, batch, options, args))
        process.start()
        theirs.close()
        processes.append(process)
        answer = receive(connection)
        if answer == "ready":
            connections[side], results[side] = connection, {"seconds": []}
        else:
            results[side] = {"error": answer}
    for _ in range(args.rounds):
        for side, connection in connections.items():
            connection.send(args.steps)
            seconds, loss = connection.recv()
            # Threads of the one side go on spinning for a moment, on the cores of the other.
            time.sleep(1)
            results[side]["seconds"].append(seconds / args.steps)
            results[side]["loss"] = loss
    for side, connection in connections.items():
        connection.send(0)
        results[side] |= connection.recv()
    for process in processes:
        process.join()
    return results


def receive(connection):
    """What a side says, or that it died (the kernel ends a process that has no memory left)."""
    try:
        return connection.recv()
    except EOFError:
        return "the process died, most likely out of memory"


def options_of(text: str) -> dict:
    """The options of a row, such as "remat=dots,micro_batch=256" or "none"."""
    pairs = [item.partition("=")[::2] for item in text.split(",") if item != "none"]
    if not {key for key, _ in pairs} <= {"remat", "micro_batch", "loss_chunk"}:
        raise UserError(
            f"--options: {text} must be none, or KEY=VALUE,... of remat, micro_batch, loss_chunk."
        )
    return {key: int(value) if value.isdigit() else value for key, value in pairs}


@report_user_errors
def main() -> None:
    """Measures every combination, prints a row for each side, writes everything as JSON."""
    # Imports JAX, which the peer's process does without.
    from simseg_jax.runtime.command_line import accepted

    parser = argparse.ArgumentParser(description="The training step against a PyTorch peer.")
    parser.add_argument("--models", default="vits16", help="vits16, vitb16, tiny; with commas")
    parser.add_argument(
        "--batches",
        type=lambda text: [accepted(whole(1))(batch) for batch in text.split(",")],
        default="16",
        help="batch sizes, with commas",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=["none"],
        help="rows: none, or KEY=VALUE,... of remat, micro_batch, loss_chunk",
    )
    parser.add_argument("--steps", type=accepted(whole(1)), default=3, help="steps of a turn")
    parser.add_argument("--rounds", type=accepted(whole(1)), default=5, help="turns of each side")
    parser.add_argument(
        "--peer",
        default="pytorch",
        choices=("pytorch", ""),
        help="'' measures this package alone",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile for the peer")
    parser.add_argument("--json", default="", help="file for all figures")
    args = parser.parse_args()
    models = args.models.split(",")
    rows_of_options = {text: options_of(text) for text in args.options}
    if not set(models) <= SIZES.keys():
        parser.error(f"--models takes {', '.join(SIZES)}")
    if args.peer:
        require("torch")
    sides = ["simseg_jax"] + ([args.peer] if args.peer else [])
    rows = []
    print(
        f"{'model':7s} {'batch':>6s} {'options':28s} {'':10s} {'ms/step':>9s} {'pairs/s':>9s} "
        f"{'TFLOP/s':>8s} {'MFU':>5s} {'GiB':>6s} {'plan':>6s} {'bound':>7s} {'start s':>7s}  "
        "peer / ours"
    )
    for size in models:
        for batch in args.batches:
            for text, options in rows_of_options.items():
                # The peer has remat alone; its rows without the other options are enough.
                both = sides if set(options) <= {"remat"} else sides[:1]
                results = measure(size, batch, options, both, args)
                rows.append({"model": size, "batch": batch, "options": text, **results})
                print_rows(size, batch, text, results)
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": sys.argv[1:], "rows": rows}, indent=1))
        print(f"Everything is in {args.json}")


def print_rows(size: str, batch: int, text: str, results: dict[str, dict]) -> None:
    """One row per side; medians, and the median of the ratios of neighbouring turns."""
    facts = results["simseg_jax"]
    for side, result in results.items():
        head = f"{size:7s} {batch:6d} {text:28s} {side:10s}"
        if "error" in result:
            print(f"{head} {result['error']}")
            continue
        seconds = statistics.median(result["seconds"])
        speed = facts["flops"] / seconds if "flops" in facts else 0
        mfu = f"{speed / facts['peak_flops']:5.1%}" if facts.get("peak_flops") else "    -"
        planned = f"{'':6s} {'':7s}"
        if result.get("planned_bytes"):
            least = result["bound_seconds"]
            planned = f"{result['planned_bytes'] / 2**30:6.2f} "
            planned += f"{least * 1e3:7.1f}" if least else "      -"
        ratio = ""
        if side != "simseg_jax" and "seconds" in facts:
            turns = zip(result["seconds"], facts["seconds"], strict=True)
            ratio = f"  {statistics.median(a / b for a, b in turns):.2f}x"
        print(
            f"{head} {seconds * 1e3:9.1f} {batch / seconds:9.1f} {speed / 1e12:8.2f} {mfu} "
            f"{result['peak_bytes'] / 2**30:6.2f} {planned} {result['compile_seconds']:7.1f}"
            f"{ratio}",
            flush=True,
        )


if __name__ == "__main__":
    main()
