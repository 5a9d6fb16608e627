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

# What stays the run's own choice.
KEPT = {"image": ("image_size",), "text": ("dropout",)}


class Pretrained(NamedTuple):
    """params: those to start from, whole encoders. notes: what they are, for the user."""

    params: dict
    notes: list[str]


def adopt(config: RunConfig, tokenizer) -> tuple[RunConfig, Pretrained]:
    """Reads what `config.init` names; the configuration gets its architecture.

    tokenizer: of the run, which must be that of a pretrained text encoder.
    """
    params, notes = {}, []
    changes: dict[str, Any] = {}
    if config.init.model:
        architecture, loaded, vocabulary, note = _read_model(config.init.model)
        _check_vocabulary(config.init.model, vocabulary, tokenizer)
        for side in SIDES:
            changes |= _adopted(side, plain(getattr(architecture, side)))
        changes["model.embed_dim"] = architecture.embed_dim
        params = loaded
        notes.append(f"The model starts from {config.init.model}.{note}")
    for side in SIDES:
        source = getattr(config.init, side)
        if source:
            form, settings, encoder, vocabulary, note = _read_encoder(source, side)
            if side == "text":
                _check_vocabulary(source, vocabulary, tokenizer)
            changes |= _adopted(side, settings)
            params[f"{side}_encoder"] = encoder
            notes.append(
                f"The {SIDES[side]} starts from {source}: {form}, {settings['depth']} blocks of "
                f"width {settings['width']}.{note}"
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
    for side in SIDES:
        if config.init.model or getattr(config.init, side):
            changes |= _adopted(side, plain(getattr(saved.model, side)))
    if config.init.model:
        changes["model.embed_dim"] = saved.model.embed_dim
    return changed(config, changes)


def _adopted(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What an encoder decides of a configuration, by dotted name."""
    return {f"model.{side}.{k}": v for k, v in settings.items() if k not in KEPT[side]}


def _read_model(source: str):
    """(architecture, parameters, tokenizer or None, note) of a whole model."""
    path, weights = open_source(source)
    if weights is None:
        return *_trained(path), ""
    architecture, params, note = read_model(weights)
    return architecture, params, None, f" {note}"


def _read_encoder(source: str, side: str):
    """(format, settings, parameters, tokenizer or None, note) of one encoder."""
    path, weights = open_source(source)
    if weights is None:
        architecture, params, vocabulary = _trained(path)
        settings = plain(getattr(architecture, side))
        return "simseg_jax", settings, params[f"{side}_encoder"], vocabulary, ""
    tower = read_tower(weights, side)
    return tower.format, tower.settings, tower.params, _tokenizer_beside(path), f" {tower.note}"


def _trained(path: Path):
    model = load_model(path)
    params = jax.tree.map(np.asarray, model.params)
    refuse_infinite(params)
    return model.architecture, params, model.tokenizer


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
