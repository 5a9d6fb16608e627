"""Resident memory of the training input over many steps: it must stay flat.

    python benchmarks/loader_memory.py [--config shapes] [--steps 10000] [--batch 16]

Takes batches as training does, prints the memory of this process (and of its worker processes, if
data.workers is set) ten times on the way, and fails if it grew by more than --limit MiB after the
first tenth, which fills buffers and caches. The configuration takes --config.KEY=VALUE as in
training. The last line is one JSON object.
"""

import argparse
import json
import os
import time

from peers import require

from simseg_jax.config import load_config
from simseg_jax.data.pipeline import Examples, TrainBatches
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import whole


def resident() -> float:
    """MiB of this process and its children."""
    import psutil

    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 2**20


@report_user_errors
def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description="Memory of the training input.")
    parser.add_argument("--config", default="shapes")
    parser.add_argument("--steps", type=accepted(whole(2)), default=10_000)
    parser.add_argument("--batch", type=accepted(whole(1)), default=16)
    parser.add_argument("--limit", type=float, default=32, help="MiB it may grow (%(default)s)")
    args, overrides = parser.parse_known_args()
    require("psutil")
    config = load_config(args.config, overrides)
    tokenizer = load_tokenizer(config.data.vocab)
    examples = Examples(
        config.data,
        image_size=config.model.image.image_size,
        batch_size=args.batch,
        encoder=TextEncoder(tokenizer, config.data.max_length, config.data.edit_rate),
        seed=config.seed,
    )
    batches = TrainBatches(examples, batch_size=args.batch)
    began, memory = time.monotonic(), {}
    print(f"{'step':>8s}{'MiB':>9s}{'examples/s':>12s}")
    for step in range(1, args.steps + 1):
        next(batches)
        if step % max(1, args.steps // 10) == 0:
            memory[step] = resident()
            speed = step * args.batch / (time.monotonic() - began)
            print(f"{step:8d}{memory[step]:9.1f}{speed:12.0f}", flush=True)
    values = list(memory.values())
    growth = max(values[1:]) - values[0]
    record = {"benchmark": "loader_memory", "hardware": f"{os.cpu_count()} CPU cores"}
    print(json.dumps({**record, "batch": args.batch, "mib": memory, "growth_mib": growth}))
    if growth > args.limit:
        raise SystemExit(f"Memory grew by {growth:.1f} MiB.")


if __name__ == "__main__":
    main()
