"""A linear classifier on features of a frozen encoder (tables 9 and 10 of the paper)."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from simseg_jax.evaluators.classification import ClassificationConfig
from simseg_jax.evaluators.embedding import ImageConfig
from simseg_jax.models.layers import torch_bias_init, torch_linear_init
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import (
    BATCH,
    BELOW_ONE,
    DECAY,
    FLAG,
    LEARNING_RATE,
    SCENES,
    SEED,
    TEXT,
    one_of,
    whole,
)
from simseg_jax.runtime.settings import inherited, setting
from simseg_jax.runtime.sharding import batch_sharding, make_mesh, replicated, to_global_batch
from simseg_jax.training.optim import cosine_schedule, lars


@dataclasses.dataclass(frozen=True)
class ProbeConfig(ImageConfig):
    """Data, features and training of a linear probe."""

    seed: int = setting(0, "seeds the classifier and the order of the images", SEED)
    data: str = inherited(ClassificationConfig, "data", "folder")
    root: str = inherited(ClassificationConfig, "root", "")
    train: str = setting("train", "split for training", TEXT)
    val: str = setting("val", "split for evaluation", TEXT)
    size: int = setting(2000, "shapes: number of training scenes", SCENES)
    val_size: int = setting(500, "shapes: number of validation scenes", SCENES)
    feature: str = setting(
        "cls",
        "cls: CLS token, as the authors; mean: mean of the patches; embedding: top-M pooled, "
        "projected, of unit length",
        one_of("embedding", "cls", "mean"),
    )
    resize: int = inherited(ImageConfig, "resize", 256)
    crop: int = inherited(ImageConfig, "crop", 224)
    images: int = setting(
        32, "images per batch of the encoder over all devices of a process", BATCH
    )
    standardize: bool = setting(
        False, "subtract the features' mean and divide by their standard deviation", FLAG
    )
    epochs: int = setting(90, "passes over the features", whole(1, 10**6))
    warmup_epochs: int = setting(
        10, "epochs in which the learning rate rises from 0", whole(0, 10**6)
    )
    batch_size: int = setting(16384, "features per step, at most all", whole(1))
    base_lr: float = setting(
        0.1, "peak learning rate for 256 features per step, scaled with the batch", LEARNING_RATE
    )
    momentum: float = setting(0.9, "momentum of LARS", BELOW_ONE)
    weight_decay: float = setting(0.0, "weight decay of LARS", DECAY)

    def check(self, prefix: str = "") -> None:
        """Raises a `UserError` if fields contradict each other; prefix: precedes their names."""
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"{prefix}warmup_epochs={self.warmup_epochs} must be less than "
                f"{prefix}epochs={self.epochs}."
            )


def probe(
    settings: ProbeConfig, train: dict[str, np.ndarray], features: np.ndarray, classes: int
) -> np.ndarray:
    """Scores float32 [N, classes] of `features` from a linear classifier trained on `train`.

    train: "features" [M, D] and "labels" [M]; every host holds all of them in memory. A batch is
    split over all devices.
    """
    mesh = make_mesh()
    known, labels = train["features"], train["labels"]
    if settings.standardize:
        mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-6
        known, features = (known - mean) / deviation, (features - mean) / deviation
    count = len(known)
    # Rounded down to the same number on every device.
    batch = min(settings.batch_size, count) // mesh.size * mesh.size
    if not batch:
        raise UserError(f"{count} training images are fewer than the {mesh.size} devices.")
    per_epoch = count // batch
    steps, warmup = settings.epochs * per_epoch, settings.warmup_epochs * per_epoch
    schedule = cosine_schedule(settings.base_lr * batch / 256, steps, warmup, 0.0)
    optimizer = lars(schedule, momentum=settings.momentum, weight_decay=settings.weight_decay)
    width, keys = known.shape[1], jax.random.split(jax.random.key(settings.seed))
    # PyTorch's initialisation matters: LARS scales updates by the norm of the weights.
    params = {
        "kernel": torch_linear_init()(keys[0], (width, classes)),
        "bias": torch_bias_init(width)(keys[1], (classes,)),
    }
    params = jax.device_put(params, replicated(mesh))
    state = jax.device_put(optimizer.init(params), replicated(mesh))
    step = jax.jit(
        lambda *arguments: probe_step(optimizer, *arguments),
        in_shardings=(replicated(mesh), replicated(mesh), batch_sharding(mesh)),
        donate_argnums=(0, 1),
    )
    rng = np.random.default_rng(settings.seed)
    own = batch // jax.process_count()  # Rows of the batch that this process hands over.
    begin = jax.process_index() * own
    with tqdm(total=steps, unit="step", disable=jax.process_index() > 0) as bar:
        loss = np.nan
        for _ in range(settings.epochs):
            order = rng.permutation(count)
            for start in range(0, per_epoch * batch, batch):
                rows = np.sort(order[start + begin : start + begin + own])
                part = to_global_batch({"x": known[rows], "y": labels[rows]}, mesh)
                params, state, loss = step(params, state, part)
                bar.update()
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    return features @ kernel + bias


def probe_step(optimizer: optax.GradientTransformation, params, state, batch) -> tuple[Any, ...]:
    """One step on the softmax cross-entropy: (parameters, optimiser state, loss)."""

    def loss(params):
        logits = batch["x"] @ params["kernel"] + params["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value
