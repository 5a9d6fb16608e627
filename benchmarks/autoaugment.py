"""AutoAugment on the device against PIL on one core: milliseconds per 1,000 images of 224x224.

    python benchmarks/autoaugment.py [--root FOLDER_OF_JPEGS] [--batch 256] [--rounds 7]

Both sides in turns on the same images, each with its own draws of the ImageNet policy. The device
is whatever JAX finds; compiling is not counted but printed. With the peak of an accelerator in
TFLOP/s (--peak) it prints the share of a ViT-S/16 training step: 41 GFLOP per pair, 40 % of the
peak.
Without --root the images are noise with the spectrum of photographs. The last line is one JSON
object.
"""

import argparse
import json
import os
import time

import jax
import numpy as np
from densecrf import photographs
from peers import photos
from PIL import Image

from simseg_jax.data.autoaugment import autoaugment
from simseg_jax.data.autoaugment_jax import augment_batch, draw_keys
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import number, whole

SIZE = 224
GIGAFLOP_PER_PAIR, UTILISATION = 41, 0.4


@report_user_errors
def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description="AutoAugment on the device against PIL.")
    parser.add_argument("--root", help="folder of JPEG photographs; default: generated images")
    parser.add_argument("--batch", type=accepted(whole(1)), default=256)
    parser.add_argument("--rounds", type=accepted(whole(1)), default=7)
    parser.add_argument(
        "--peak", type=accepted(number(1e-3, 1e6), float), help="bfloat16 TFLOP/s of the device"
    )
    args = parser.parse_args()
    if args.root:
        images = [Image.open(file).convert("RGB") for file in photos(args.root)[:64]]
    else:
        images = [Image.fromarray(image) for image in photographs(None, 32)]
    squares = [image.resize((SIZE, SIZE)) for image in images]
    arrays = [np.asarray(square) for square in squares]
    batch = jax.device_put(np.stack([arrays[i % len(arrays)] for i in range(args.batch)]))
    run = jax.jit(lambda images, step: augment_batch(images, draw_keys(0, step, args.batch)))
    began = time.perf_counter()
    compiled = run.lower(batch, 0).compile()
    compile_seconds = time.perf_counter() - began
    rng, seconds = np.random.default_rng(0), {"device": [], "PIL": []}
    for step in range(args.rounds + 1):  # The first round warms up.
        began = time.perf_counter()
        jax.block_until_ready(compiled(batch, step))
        seconds["device"].append((time.perf_counter() - began) / args.batch)
        began = time.perf_counter()
        for image in squares:
            np.asarray(autoaugment(image, rng))
        seconds["PIL"].append((time.perf_counter() - began) / len(squares))
    times = {side: 1e6 * float(np.median(values[1:])) for side, values in seconds.items()}
    device = jax.devices()[0]
    print(f"{device.device_kind}, batch {args.batch}, compiled in {compile_seconds:.1f} s")
    print(f"{'':8s}{'ms per 1,000':>14s}")
    for side, value in times.items():
        print(f"{side:8s}{value:14.1f}")
    record = {
        "benchmark": "autoaugment",
        "hardware": f"{device.device_kind}, {os.cpu_count()} CPU cores",
        "batch": args.batch,
        "compile_seconds": compile_seconds,
        "ms_per_1000": times,
        "ratio": times["PIL"] / times["device"],
    }
    if args.peak:
        step = GIGAFLOP_PER_PAIR / (args.peak * UTILISATION)  # ms per pair
        record["share_of_step"] = times["device"] / (1e3 * step)
        print(f"{record['share_of_step']:.1%} of a ViT-S/16 step")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
