"""Seconds from the launch of a training run to its first step, without and with cached programs.

Every run is a process of its own that trains on generated scenes; the clock stops when the first
step is in metrics.jsonl. Cold and warm runs alternate, each cold one with an empty cache folder.

python benchmarks/startup.py --rounds 3
python benchmarks/startup.py --model shapes
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import whole

ROOT = Path(__file__).parents[1]
CONFIG = """
from simseg_jax.config import data_set, default_config

def get_config():
    config = default_config()
    config.data.train.shapes = data_set(format="shapes", size=64)
    config.data.vocab = "shapes"
    return config
"""


def first_step(config: str, cache: Path, overrides: list[str]) -> float:
    """Seconds from the start of the process to its first line of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "simseg_jax.main", f"--config={config}"]
        command += [f"--workdir={metrics.parent}", "--config.steps=100", "--config.log_every=1"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, *overrides],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.05)
            if process.poll() is not None:
                sys.exit(f"The run failed: {process.communicate()[1][-500:]}")
        seconds = time.perf_counter() - began
        process.kill()
        process.communicate()
        return seconds


@report_user_errors
def main() -> None:
    """Prints the median of both and their ratio."""
    parser = argparse.ArgumentParser(description="Launch to first step, cold and warm.")
    parser.add_argument("--model", default="vits16", choices=("vits16", "shapes"))
    parser.add_argument("--batch", type=accepted(whole(1)), default=8, help="pairs per step")
    parser.add_argument("--rounds", type=accepted(whole(1)), default=3)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        config = "shapes"
        if args.model == "vits16":
            (Path(folder) / "config.py").write_text(CONFIG)
            config = f"{folder}/config.py"
        overrides = [f"--config.batch_size={args.batch}"]
        for turn in range(args.rounds):
            for kind in seconds:
                cache = Path(folder) / f"cache{turn}"
                seconds[kind].append(first_step(config, cache, overrides))
    for kind, values in seconds.items():
        print(f"{kind}: {statistics.median(values):.1f} s, runs {[round(v, 1) for v in values]}")
    ratios = [a / b for a, b in zip(seconds["cold"], seconds["warm"], strict=True)]
    print(f"{args.model}, batch {args.batch}: cold / warm {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
