"""Seconds from a fresh process to the first mask: exported program against package and checkpoint.

Both segment one image of noise by the paper protocol with nothing compiled before; turns alternate.
The program comes with the embeddings of its classes, the package computes them, here from one
prompt each (with the 80 of ImageNet that alone takes BERT-base 40 s on two cores). Parameters are
random.

python benchmarks/programs.py
python benchmarks/programs.py --model shapes --refine crf
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from simseg_jax.config import load_config, model_config
from simseg_jax.data.text import load_tokenizer
from simseg_jax.models.simseg import init_params
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.sharding import place
from simseg_jax.segmenter import Segmenter
from simseg_jax.weights.export import PLATFORMS, SEGMENTER, SUFFIX, write_programs
from simseg_jax.weights.folder import PARAMS, write_orbax, writing
from simseg_jax.weights.load import assemble_model

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, time
began = time.perf_counter()
import jax, numpy as np
from jax import export
from PIL import Image
imported = time.perf_counter()
with open("segmenter.stablehlo", "rb") as file:
    segment = jax.jit(export.deserialize(file.read()).call)
classes, size = np.load("classes.npz"), int(sys.argv[1])
loaded = time.perf_counter()
image = Image.open("photo.png").resize((size, size), Image.Resampling.BILINEAR)
jax.block_until_ready(segment(np.asarray(image)[None], classes["embeddings"]))
ended = time.perf_counter()
print(imported - began, loaded - imported, ended - loaded)
"""
PACKAGE = """
import sys, time
began = time.perf_counter()
from PIL import Image
from simseg_jax.segmenter import Segmenter
imported = time.perf_counter()
segmenter = Segmenter.from_pretrained("model", refine=sys.argv[2], prompts="plain")
classes = segmenter.classes(sys.argv[3].split(","), [])
loaded = time.perf_counter()
next(segmenter.answers([Image.open("photo.png").convert("RGB")], classes))
ended = time.perf_counter()
print(imported - began, loaded - imported, ended - loaded)
"""


def run(script: str, folder: Path, *arguments: str) -> list[float]:
    """Seconds of import, load and first mask in a process of its own."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The process failed: {done.stderr[-500:]}")
    return [float(number) for number in done.stdout.split()]


@report_user_errors
def main() -> None:
    """Prints sizes, the medians of both and their ratio."""
    parser = argparse.ArgumentParser(description="Exported program against the package.")
    parser.add_argument("--model", default="vits16", choices=("vits16", "vitb16", "shapes"))
    parser.add_argument("--refine", default="none", choices=("none", "crf"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=accepted(whole(1)), default=3)
    args = parser.parse_args()
    other = ["--config.data.vocab=shapes", "--config.model.text.vocab_size=30522"]
    config = load_config(args.model, other if args.model != "shapes" else [])
    tokenizer = load_tokenizer("shapes")
    params = init_params(model_config(config, len(tokenizer)), jax.random.key(0))
    model = assemble_model(
        config,
        tokenizer,
        lambda _, shapes: place(params, shapes),
        step=0,
        identity={},
        origin={},
        dtype=jnp.dtype(jnp.float32),
    )
    segmenter = Segmenter(model, refine=args.refine, prompts="plain")
    classes = segmenter.classes([f"word {i}" for i in range(20)], [])
    size = segmenter.settings.resolution
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "photo.png")
        began = time.perf_counter()
        dtype = jnp.dtype(args.dtype)
        names, embeddings = classes.names, classes.embeddings
        write_programs(folder, model, segmenter.settings, names, embeddings, PLATFORMS, dtype)
        written = time.perf_counter() - began
        with writing(folder / "model", config, tokenizer, {}, PARAMS, card="") as partial:
            write_orbax(partial, params)
        rows: dict[str, list[list[float]]] = {"program": [], "package": []}
        for _ in range(args.rounds):
            rows["program"].append(run(PROGRAM, folder, str(size)))
            words = ",".join(classes.words)
            rows["package"].append(run(PACKAGE, folder, str(size), args.refine, words))
        sizes = {f.name: f.stat().st_size / 1e6 for f in folder.glob(f"*{SUFFIX}")}
    listed = ", ".join(f"{name} {megabytes:.1f} MB" for name, megabytes in sorted(sizes.items()))
    print(f"{args.model}, {args.dtype}, refine={args.refine}: {listed}; written in {written:.1f} s")
    assert f"{SEGMENTER}{SUFFIX}" in sizes
    medians = {}
    for name, measured in rows.items():
        parts = [statistics.median(column) for column in zip(*measured, strict=True)]
        medians[name] = statistics.median(sum(row) for row in measured)
        print(
            f"{name}: import {parts[0]:.1f} s, load {parts[1]:.2f} s, first mask {parts[2]:.1f} s, "
            f"all {medians[name]:.1f} s"
        )
    print(f"package / program: {medians['package'] / medians['program']:.2f}")


if __name__ == "__main__":
    main()
