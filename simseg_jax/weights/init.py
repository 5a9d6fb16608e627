"""Weights a training run starts from (`config.init`), and what they decide of its architecture."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simseg_jax.config import RunConfig
from simseg_jax.data.text import load_tokenizer
from simseg_jax.models.vit import resize_position_embedding
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.settings import changed, plain
from simseg_jax.weights.load import load_model, open_source
from simseg_jax.weights.towers import SIDES, read_model, read_tower, refuse_infinite

PARTS = ("model", *SIDES)  # What `config.init` may name a source for.
# What stays the run's own choice.
KEPT = {"image": ("image_size",), "text": ("dropout",)}


class Pretrained(NamedTuple):
    """params: those to start from, whole encoders. notes: what they are, for the user."""

    params: dict
    notes: list[str]


class _Source(NamedTuple):
    """What was read. fields: of `SimSegConfig`; params and fields may have more than is needed."""

    format: str
    fields: dict[str, Any]
    params: dict
    tokenizer: Any
    note: str


def adopt(config: RunConfig, tokenizer) -> tuple[RunConfig, Pretrained]:
    """Reads what `config.init` names; the configuration gets its architecture.

    tokenizer: of the run, which must be that of a pretrained text encoder.
    """
    params, notes = {}, []
    changes: dict[str, Any] = {}
    for part in PARTS:
        source = getattr(config.init, part)
        if not source:
            continue
        found = _read(source, part)
        if part != "image":
            _check_vocabulary(source, found.tokenizer, tokenizer)
        changes |= _decided(part, found.fields)
        if part == "model":
            params |= found.params
            notes.append(f"The model starts from {source}.{found.note}")
        else:
            params[f"{part}_encoder"] = found.params[f"{part}_encoder"]
            size = "{depth} blocks of width {width}".format(**found.fields[part])
            notes.append(
                f"The {SIDES[part]} starts from {source}: {found.format}, {size}.{found.note}"
            )
    config = changed(config, changes)
    image = params.get("image_encoder")
    if image:
        grid = config.model.image.image_size // config.model.image.patch_size
        resized = resize_position_embedding(jnp.asarray(image["pos_embed"]), (grid, grid))
        params["image_encoder"] = {**image, "pos_embed": np.asarray(resized)}
    return config, Pretrained(params, notes)


def keep_architecture(config: RunConfig, saved: RunConfig) -> RunConfig:
    """The configuration with what `init` decides of the model as in the checkpoint of `saved`."""
    changes: dict[str, Any] = {}
    for part in PARTS:
        if getattr(config.init, part):
            changes |= _decided(part, plain(saved.model))
    return changed(config, changes)


def _decided(part: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What a source of this part decides of a configuration, by dotted name."""
    sides = SIDES if part == "model" else (part,)
    decided = {
        f"model.{side}.{key}": value
        for side in sides
        for key, value in fields[side].items()
        if key not in KEPT[side]
    }
    return {**decided, "model.embed_dim": fields["embed_dim"]} if part == "model" else decided


def _read(source: str, part: str) -> _Source:
    path, weights = open_source(source)
    if weights is None:
        trained = load_model(path)
        params = jax.tree.map(np.asarray, trained.params)
        refuse_infinite(params)
        return _Source("simseg_jax", plain(trained.architecture), params, trained.tokenizer, "")
    if part == "model":
        model = read_model(weights)
        return _Source("", plain(model.config), model.params, None, f" {model.note}")
    tower = read_tower(weights, part)
    params = {f"{part}_encoder": tower.params}
    tokenizer = _tokenizer_beside(path)
    return _Source(tower.format, {part: tower.settings}, params, tokenizer, f" {tower.note}")


def _tokenizer_beside(path: Path):
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
        return load_tokenizer(str(folder))
    return None


def _check_vocabulary(source: str, vocabulary, tokenizer) -> None:
    if vocabulary is not None and vocabulary.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{source} was trained with another vocabulary than data.vocab: the words would get "
            "each other's embeddings. Set data.vocab to its tokenizer (mostly the same folder)."
        )
