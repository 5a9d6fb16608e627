"""Dense CRF of 288x288 images: the NumPy and the JAX back end against pydensecrf.

    pip install -e ".[bench]"
    python benchmarks/densecrf.py [--root VOCdevkit/VOC2012] [--images 24] [--batch 4]

Milliseconds per image for 1, 2 and 5 classes, all sides in turns on the same images and probability
maps; pydensecrf as the original calls it (built for every class) and built once per image. The run
fails if a mask agrees with pydensecrf's on less than 99.99 % of the pixels. Without --root the
images are noise with the spectrum of photographs. The last line is one JSON object.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from peers import photos, require
from PIL import Image

from simseg_jax.masks import densecrf, densecrf_jax
from simseg_jax.masks.densecrf import EPSILON, PAPER, import_pydensecrf
from simseg_jax.masks.permutohedral_jax import batch_positions
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.ranges import whole

SIZE, GRID = 288, 18
SIDES = ("pydensecrf", "pydensecrf, built once", "NumPy", "JAX")


def photographs(root: str | None, count: int) -> np.ndarray:
    """uint8 [count, 288, 288, 3] from a VOC folder, or noise whose power falls with frequency."""
    if root:
        files = photos(Path(root) / "JPEGImages")
        files = files[:: max(1, len(files) // count)][:count]
        images = [Image.open(file).convert("RGB") for file in files]
        return np.stack([np.asarray(image.resize((SIZE, SIZE))) for image in images])
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    amplitude = 1 / np.maximum(frequency, 1 / SIZE) ** 1.8
    spectrum = np.fft.fft2(rng.standard_normal((count, 3, SIZE, SIZE))) * amplitude
    noise = np.fft.ifft2(spectrum).real.transpose(0, 2, 3, 1)
    # Channels of photographs are alike.
    noise = 0.8 * noise.mean(axis=3, keepdims=True) + 0.2 * noise
    noise /= noise.std(axis=(1, 2, 3), keepdims=True)
    return np.ascontiguousarray((110 + 55 * noise).clip(0, 255).astype(np.uint8))


def probability_maps(images: np.ndarray, classes: int) -> np.ndarray:
    """float32 [B, classes, 288, 288]: per class how close patches are to a patch of the image."""
    rng = np.random.default_rng(1)
    side = SIZE // GRID
    colours = images.reshape(len(images), GRID, side, GRID, side, 3).mean(axis=(2, 4))
    maps = np.empty((len(images), classes, GRID, GRID), np.float32)
    for image, grids in zip(colours, maps, strict=True):
        for grid in grids:
            distance = ((image - image[tuple(rng.integers(GRID, size=2))]) ** 2).sum(axis=2)
            grid[:] = np.exp(-distance / 3200) + 0.1 * rng.standard_normal((GRID, GRID))
            grid[:] = (grid - grid.min()) / np.ptp(grid)
    return maps.repeat(side, axis=2).repeat(side, axis=3)


def pydensecrf_built_once(image: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """As `densecrf.pydensecrf_masks` with the lattices shared by the classes."""
    field = import_pydensecrf().DenseCRF2D(SIZE, SIZE, 2)
    field.addPairwiseGaussian(sxy=PAPER.gaussian_sxy, compat=PAPER.gaussian_compat)
    field.addPairwiseBilateral(
        sxy=PAPER.bilateral_sxy,
        srgb=PAPER.bilateral_srgb,
        rgbim=image,
        compat=PAPER.bilateral_compat,
    )
    masks = []
    for p in foreground:
        unary = -np.log(np.stack([1 - p, p]).reshape(2, -1) + EPSILON)
        field.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
        masks.append(np.argmax(field.inference(PAPER.iterations), axis=0))
    return np.array(masks, dtype=bool).reshape(foreground.shape)


class Batched:
    """The JAX back end; like the protocol it remembers when images needed more room."""

    def __init__(self, batch: int):
        self.run = jax.jit(densecrf_jax.crf_masks, static_argnums=(3, 4))
        self.positions = batch_positions(SIZE, SIZE, PAPER.gaussian_sxy, batch)
        self.vertices = densecrf_jax.lattice_size(SIZE, SIZE)

    def __call__(self, images: np.ndarray, foreground: np.ndarray) -> np.ndarray:
        while True:
            masks, used = self.run(images, foreground, self.positions, self.vertices, PAPER)
            if int(used) <= self.vertices:
                return np.asarray(masks)
            self.vertices *= 2


def measure(images: np.ndarray, classes: int, batch: int) -> tuple[dict, dict]:
    """(median milliseconds per image, smallest share of equal pixels of a mask) of every side."""
    foreground = probability_maps(images, classes)

    def one_by_one(function: Callable) -> Callable:
        return lambda x, p: np.stack([function(*pair) for pair in zip(x, p, strict=True)])

    sides = dict(
        zip(
            SIDES,
            (
                one_by_one(densecrf.pydensecrf_masks),
                one_by_one(pydensecrf_built_once),
                one_by_one(densecrf.crf_masks),
                Batched(batch),
            ),
            strict=True,
        )
    )
    seconds, equal = {side: [] for side in SIDES}, {side: [] for side in SIDES}
    for start in [0, *range(0, len(images), batch)]:  # The first batch once more, as a warm-up.
        part = slice(start, start + batch)
        expected = None
        for side, function in sides.items():
            began = time.perf_counter()
            masks = function(images[part], foreground[part])
            seconds[side].append((time.perf_counter() - began) / batch)
            expected = masks if expected is None else expected
            equal[side].append((masks == expected).mean(axis=(2, 3)).min())
    times = {side: 1e3 * float(np.median(seconds[side][1:])) for side in SIDES}
    return times, {side: float(min(equal[side])) for side in SIDES}


@report_user_errors
def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description="Dense CRF against pydensecrf.")
    parser.add_argument("--root", help="VOC2012 folder; default: generated images")
    parser.add_argument("--images", type=accepted(whole(1)), default=24)
    parser.add_argument(
        "--batch", type=accepted(whole(1)), default=4, help="images per call of the JAX back end"
    )
    args = parser.parse_args()
    require("pydensecrf")
    images = photographs(args.root, args.images)
    if len(images) < args.batch:
        raise UserError(f"--batch={args.batch} must not exceed the {len(images)} images.")
    images = images[: len(images) // args.batch * args.batch]
    figures = {}
    print(f"{len(images)} images, ms per image (times as fast as pydensecrf)")
    print(f"{'classes':>7s}" + "".join(f"{side:>26s}" for side in SIDES))
    for classes in (1, 2, 5):
        times, equal = measure(images, classes, args.batch)
        ratios = {side: times[SIDES[0]] / times[side] for side in SIDES}
        cells = [f"{times[side]:.1f} ({ratios[side]:.2f}x)" for side in SIDES]
        print(f"{classes:7d}" + "".join(f"{cell:>26s}" for cell in cells), flush=True)
        if min(equal.values()) < 0.9999:
            raise SystemExit(f"Not the same masks: {equal}")
        figures[classes] = {"ms": times, "ratio": ratios, "worst_mask_equal": equal}
    hardware = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    record = {"benchmark": "densecrf", "hardware": hardware, "batch": args.batch}
    print(json.dumps({**record, "images": len(images), "classes": figures}))


if __name__ == "__main__":
    main()
