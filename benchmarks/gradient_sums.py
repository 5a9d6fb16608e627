"""What summing gradients over devices in bfloat16 costs, beside what bfloat16 costs anyway.

    python benchmarks/gradient_sums.py

Trains the model of configs/shapes.py for a while in float32. At some steps it takes the gradient
of one batch in bfloat16, device by device for 8, 32 and 256 devices, and adds the parts up: in
bfloat16 along a ring (each device adds its part to what it receives) and as a tree, and exactly.
Prints relative errors (norm of the difference of all gradients over the norm):
- products: of the exact sum, against the gradient of the float32 model: the cost of bfloat16;
- ring, tree: of that sum in bfloat16, against the exact sum;
- all: of the ring's sum, against the float32 model.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from simseg_jax.config import RunConfig, load_config
from simseg_jax.data.pipeline import TrainBatches
from simseg_jax.data.text import load_tokenizer
from simseg_jax.models.simseg import bind, make_model
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.sharding import make_mesh
from simseg_jax.train import open_examples, set_up
from simseg_jax.training.loss import contrastive_loss

DEVICES = (8, 32, 256)


def parts_of_gradient(graphdef, params, batch, devices: int) -> list[np.ndarray]:
    """Every device's part of the gradient: per parameter an array [devices, ...]."""

    def embed(params, part):
        model = bind(graphdef, params)
        images, _ = model.encode_image(model.normalize(part["image"]))
        return images, model.encode_text(part["ids"], part["mask"])

    @jax.jit
    def parts(params, batch):
        split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        embeddings = jax.lax.map(lambda part: embed(params, part), split)
        whole = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), embeddings)
        slopes = jax.grad(
            lambda pair: contrastive_loss(pair[0], pair[1], params["temperature"])[0]
        )(whole)
        slopes = jax.tree.map(lambda x: x.reshape(devices, -1, x.shape[-1]), slopes)

        def pull(inputs):
            part, part_slopes = inputs
            return jax.vjp(lambda params: embed(params, part), params)[1](part_slopes)[0]

        return jax.lax.map(pull, (split, slopes))

    return [np.asarray(leaf) for leaf in jax.tree.leaves(parts(params, batch))]


def ring(parts: np.ndarray) -> np.ndarray:
    """The sum over the first axis, rounded after every addition."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def tree(parts: np.ndarray) -> np.ndarray:
    """The sum over the first axis, of neighbours, then of neighbouring sums, and so on."""
    while len(parts) > 1:
        parts = parts[::2] + parts[1::2]
    return parts[0]


def distance(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Norm of the difference over the norm of the second."""
    difference = sum(float(((a - b) ** 2).sum()) for a, b in zip(first, second, strict=True))
    return (difference / sum(float((b**2).sum()) for b in second)) ** 0.5


def in_bfloat16(parts: list[np.ndarray], add) -> list[np.ndarray]:
    """Sums of the parts that the step has in bfloat16; the others are summed exactly."""
    sums = []
    for part in parts:
        half = part.astype(jnp.bfloat16)
        rounded = (half.astype(np.float32) == part).all()
        sums.append(np.float64(add(half)) if rounded else part.sum(axis=0, dtype=np.float64))
    return sums


@report_user_errors
def main() -> None:
    """Trains, prints a row per step and number of devices."""
    parser = argparse.ArgumentParser(description="Errors of gradient sums in bfloat16.")
    parser.add_argument(
        "--steps",
        type=lambda text: [accepted(whole(0))(step) for step in text.split(",")],
        default="0,50,200",
        help="steps to look at, with commas",
    )
    looked_at = parser.parse_args().steps
    config: RunConfig = load_config("shapes", [f"--config.batch_size={DEVICES[-1]}"])
    tokenizer = load_tokenizer(config.data.vocab)
    _, examples = open_examples(config, tokenizer)
    data = TrainBatches(examples, batch_size=config.batch_size)
    mesh = make_mesh(devices=jax.devices()[:1])
    setup = set_up(config, len(tokenizer), config.steps, mesh)
    half = make_model(setup.architecture, jnp.bfloat16)
    print(f"{'step':>5s} {'devices':>7s} {'products':>9s} {'ring':>9s} {'tree':>9s} {'all':>9s}")
    with jax.set_mesh(mesh):
        state = jax.jit(setup.init_state)()
        for step in tqdm(range(max(looked_at) + 1), desc="training", unit="step"):
            batch = {k: jnp.asarray(v) for k, v in next(data).items()}
            if step in looked_at:
                params = state["params"]
                single = parts_of_gradient(setup.graphdef, params, batch, 1)
                single = [part[0].astype(np.float64) for part in single]
                for devices in DEVICES:
                    parts = parts_of_gradient(half, params, batch, devices)
                    exact = [part.sum(axis=0, dtype=np.float64) for part in parts]
                    errors = (
                        distance(exact, single),
                        distance(in_bfloat16(parts, ring), exact),
                        distance(in_bfloat16(parts, tree), exact),
                        distance(in_bfloat16(parts, ring), single),
                    )
                    row = " ".join(f"{error:9.4f}" for error in errors)
                    tqdm.write(f"{step:5d} {devices:7d} {row}")
            state, _ = setup.update(state, batch)


if __name__ == "__main__":
    main()
