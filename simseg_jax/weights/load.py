"""Loading a trained model for inference, from a training run or a folder that `convert` wrote."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from simseg_jax.config import RunConfig, compute_dtype, from_file, model_config, of_checkpoint
from simseg_jax.data.text import TextEncoder, load_tokenizer, vocabulary_identity
from simseg_jax.models.simseg import SimSegConfig, init_params, make_model
from simseg_jax.runtime.errors import UserError, reading, some
from simseg_jax.runtime.files import sha256
from simseg_jax.runtime.sharding import make_mesh, state_sharding
from simseg_jax.training.arrays import with_sharding
from simseg_jax.training.checkpoint import (
    CONFIG,
    TOKENIZER,
    Record,
    checkpoints_folder,
    completed_steps,
    load_run,
    read_metadata,
)
from simseg_jax.weights.containers import Weights, read_weights
from simseg_jax.weights.folder import MANIFEST, is_model_folder, read_manifest, read_params
from simseg_jax.weights.sources import fetch, split_key
from simseg_jax.zeroshot.model import Model


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel(Model):
    """A model with its parameters and all else that inference needs, as a checkpoint holds it.

    identity: differs between checkpoints, to keep their results apart. origin: where the model came
    from.
    """

    config: RunConfig
    step: int
    params: Any
    tokenizer: Any
    identity: dict[str, Any]
    origin: dict[str, Any]


def is_trained(folder: Path) -> bool:
    """Whether `load_model` can read this folder: that of a run or of a converted model."""
    return is_model_folder(folder) or (folder / TOKENIZER).is_dir()


def open_source(source: str | Path) -> tuple[Path, Weights | None]:
    """(local path, None) of a run or a converted model, else (local path, weights).

    source: as for `load_model`, or a weights file or folder of any code base; "FILE#KEY" chooses
    among several models in a file, see `sources.split_key`.
    """
    name, key = split_key(source)
    path = fetch(name)
    if not is_trained(path):
        return path, read_weights(path, key)
    if key:
        raise UserError(f"{name} is a run or a converted model: it has no #{key}, leave that out.")
    return path, None


def load_model(source: str | Path, step: int | None = None, dtype=None) -> TrainedModel:
    """The parameters of a trained model, replicated over all devices.

    source: the --workdir of a run, or a folder that `convert` wrote; a local path, an address
    (gs://, s3://, hf://) or a hub repository. step: of a run, by default the newest. dtype: compute
    type, by default that of `compute_dtype` for the configuration.
    """
    folder = fetch(source)
    if is_model_folder(folder):
        manifest = read_manifest(folder)
        config, origin = from_file(folder / CONFIG), manifest["origin"]
        if step is not None:
            raise UserError(f"{source} is a converted model with a single step: leave --step out.")
        at_step = origin.get("step", 0)
        if not isinstance(at_step, int):
            raise UserError(f"{folder / MANIFEST} says step={at_step!r}: get the folder again.")
        trained_with = None  # The manifest covers the vocabulary.
        identity = {"manifest": sha256(folder / MANIFEST)}
        read = functools.partial(read_params, folder, manifest)
    else:
        path, at_step = _checkpoint(folder, step)
        config, record = of_checkpoint(path)
        identity = {"step": at_step, "written": read_metadata(path)["init_timestamp_nsecs"]}
        origin = {"source": str(folder), "format": "training run", "step": at_step}
        trained_with = record.identity and record.identity["vocabulary"]
        read = functools.partial(_read_run, path, record)

    if not (folder / TOKENIZER).is_dir():
        raise UserError(f"{folder} has no {TOKENIZER}/, which every run and converted model has.")
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    if trained_with not in (None, vocabulary_identity(tokenizer)):
        raise UserError(
            f"{folder / TOKENIZER} is not the vocabulary that the model was trained with: words "
            "would get wrong embeddings. Put the right one there."
        )
    return assemble_model(config, tokenizer, read, at_step, identity, origin, dtype)


def assemble_model(
    config: RunConfig,
    tokenizer,
    read: Callable[[SimSegConfig, Any], dict],
    step: int,
    identity: dict[str, Any],
    origin: dict[str, Any],
    dtype=None,
) -> TrainedModel:
    """A `TrainedModel`; read(architecture, shape structs with shardings) -> its parameters."""
    architecture = model_config(config, len(tokenizer))
    mesh = make_mesh()
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    params = read(architecture, with_sharding(shapes, state_sharding(shapes, mesh)))
    dtype = dtype or compute_dtype(config, mesh)
    return TrainedModel(
        config=config,
        step=step,
        architecture=architecture,
        graphdef=make_model(architecture, dtype),
        params=params,
        tokenizer=tokenizer,
        encoder=TextEncoder(tokenizer, config.data.max_length),
        mesh=mesh,
        identity={**identity, "dtype": str(dtype)},
        origin=origin,
    )


def _read_run(path, record: Record, _architecture: SimSegConfig, shapes) -> dict:
    return load_run(path, {"params": shapes}, record)["params"]


def _checkpoint(workdir: Path, step: int | None):
    """(folder, step) of a run's checkpoint, by default the newest."""
    if workdir.is_file():
        raise UserError(
            f"{workdir} is a file: make a checkpoint of it with python -m simseg_jax.convert "
            f"{workdir} FOLDER."
        )
    with reading(f"the run {workdir}", f"Run its command again, which writes {CONFIG}."):
        folder = checkpoints_folder(workdir)
        steps = completed_steps(folder)
    if not steps:
        raise UserError(
            f"No finished checkpoint under {folder}: give the --workdir of a run, or a folder "
            "that python -m simseg_jax.convert wrote."
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}, only of {some(steps)}.")
    return folder / str(step), step
