"""segment_dataset with actors of Ray: its speed against the plain loop, memory, kills.

    python benchmarks/segment_dataset.py runs/shapes [--images 10000] [--shard_size 500]

Generates small images, then takes turns: the plain loop over `Segmenter.segment`, the command with
one actor, the loop again, the command with two. Each rate leaves out the first shard, in which the
model is loaded and compiled. Then the command is killed (SIGKILL to its group) after a third and
after two thirds of its shards, and started once more: every image must be in exactly one row.
Prints the memory of the actors while they work. The last line is one JSON object.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from simseg_jax.data import shapes
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.segmenter import Segmenter

WORDS = ["apple", "leaf", "moon"]


def plain_rate(args, photos: list[Path], out: Path) -> float:
    """Images per second of the loop that writes one mask per image."""
    out.mkdir(exist_ok=True)
    segmenter = Segmenter.from_pretrained(args.checkpoint, maps=False)
    began = 0.0
    for number, answer in enumerate(segmenter.segment(photos, WORDS), 1):
        (out / f"{number}.png").write_bytes(answer.mask_png())
        if number == args.shard_size:
            began = time.perf_counter()
    return (len(photos) - args.shard_size) / (time.perf_counter() - began)


def actors_memory() -> int:
    """Resident bytes of all actors on this machine."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"_Actor" in (process / "cmdline").read_bytes():
                total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return total


def job(args, photos: Path, out: Path, actors: int, stop: int = 0) -> tuple[float, list[int]]:
    """(images per second after the first shard, memory at every shard) of the command.

    stop: the number of finished shards at which it is killed; 0: never.
    """
    command = [sys.executable, "-m", "simseg_jax.segment_dataset", photos, out]
    command += [f"--checkpoint={args.checkpoint}", f"--words={', '.join(WORDS)}"]
    command += [f"--shard_size={args.shard_size}", f"--actors={actors}"]
    process = subprocess.Popen([*map(str, command)], start_new_session=True)
    seen, memory, times = len(list(out.glob("*.parquet"))), [], []
    while process.poll() is None:
        count = len(list(out.glob("*.parquet")))
        if count > seen:
            times += [time.perf_counter()] * (count - seen)
            memory.append(actors_memory())
            seen = count
        if stop and seen >= stop:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    if not stop and process.returncode:
        sys.exit(f"the command ended with {process.returncode}")
    rate = args.shard_size * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return rate, memory


@report_user_errors
def main() -> None:
    """Runs everything and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--shard_size", type=int, default=500)
    args = parser.parse_args()
    if not all(map(importlib.util.find_spec, ("ray", "pyarrow"))):
        raise UserError('This benchmark needs more: pip install -e ".[ray,parquet]".')
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photos = root / "photos"
        photos.mkdir()
        for index in range(args.images):
            Image.fromarray(shapes.scene(index, "val")[0]).save(photos / f"{index:06d}.png")
        files = sorted(photos.iterdir())
        rates: dict[str, float] = {}
        for actors in (1, 2):
            rates[f"loop before {actors}"] = plain_rate(args, files, root / "loop")
            rate, memory = job(args, photos, root / f"actors{actors}", actors)
            rates[f"{actors} actors"] = rate
            print(f"{actors} actors, MB at every shard: {[size >> 20 for size in memory]}")
        ratios = {n: rates[f"{n} actors"] / rates[f"loop before {n}"] for n in (1, 2)}
        for name, rate in rates.items():
            print(f"{name}: {rate:.1f} images/s")

        killed, shards = root / "killed", -(-args.images // args.shard_size)
        for stop in (shards // 3, 2 * shards // 3, 0):
            job(args, photos, killed, 1, stop)
        tables = map(pyarrow.parquet.read_table, sorted(killed.glob("*.parquet")))
        rows = collections.Counter(key for table in tables for key in table["key"].to_pylist())
        once = rows == {path.stem: 1 for path in files}
        print(f"killed twice: {rows.total()} rows, every image exactly once: {once}")
        print(json.dumps({"rates": rates, "ratios": ratios, "exactly_once": once}))
        if not once:
            sys.exit(1)


if __name__ == "__main__":
    main()
