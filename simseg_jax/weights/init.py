"""Weights that a training run starts from (`config.init`), and the architecture they require."""

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
from simseg_jax.weights.read import PARTS, SIDES, Found, read_model, refuse_infinite

# Fields of the encoders that remain the run's choice.
KEPT = {"image": ("image_size", "keep"), "text": ("dropout",)}


class Pretrained(NamedTuple):
    """params: of whole encoders, to start from. notes: their origin in sentences for the user."""

    params: dict
    notes: list[str]


def adopt(config: RunConfig, tokenizer) -> tuple[RunConfig, Pretrained]:
    """Reads what `config.init` names; the returned configuration has its architecture.

    tokenizer: the run's; a pretrained text encoder must have the same vocabulary.
    """
    params, notes = {}, []
    changes: dict[str, Any] = {}
    for part in PARTS:
        source = getattr(config.init, part)
        if not source:
            continue
        found, vocabulary = _read(source, part)
        if part != "image":
            _check_vocabulary(source, vocabulary, tokenizer)
        changes |= _decided(part, found.fields)
        if part == "model":
            params |= found.params
            what = ""
        else:
            params[f"{part}_encoder"] = found.params
            size = "{depth} blocks of width {width}".format(**found.fields)
            what = f": {found.format}, {size}"
        notes.append(f"The {PARTS[part]} starts from {source}{what}. {found.note}".rstrip())
    config = changed(config, changes)
    image = params.get("image_encoder")
    if image:
        grid = config.model.image.image_size // config.model.image.patch_size
        resized = resize_position_embedding(jnp.asarray(image["pos_embed"]), (grid, grid))
        params["image_encoder"] = {**image, "pos_embed": np.asarray(resized)}
    return config, Pretrained(params, notes)


def keep_architecture(config: RunConfig, saved: RunConfig) -> RunConfig:
    """`config` with the architecture that `init` decides taken from the checkpoint of `saved`."""
    changes: dict[str, Any] = {}
    for part in PARTS:
        if getattr(config.init, part):
            changes |= _decided(
                part, plain(saved.model if part == "model" else getattr(saved.model, part))
            )
    return changed(config, changes)


def _decided(part: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of the settings that a source with these fields decides."""
    if part == "model":
        sides = [_decided(side, fields[side]) for side in SIDES]
        return {**sides[0], **sides[1], "model.embed_dim": fields["embed_dim"]}
    return {f"model.{part}.{k}": v for k, v in fields.items() if k not in KEPT[part]}


def _read(source: str, part: str) -> tuple[Found, Any]:
    """(the part that a source holds, its tokenizer or None)."""
    path, weights = open_source(source)
    if weights is not None:
        model = read_model(weights, part)
        return model, None if part == "model" else _tokenizer_beside(path)
    trained = load_model(path)
    params = jax.tree.map(np.asarray, trained.params)
    refuse_infinite(params)
    config, fields = trained.architecture, plain(trained.architecture)
    if part != "model":
        config, fields, params = getattr(config, part), fields[part], params[f"{part}_encoder"]
    return Found("simseg_jax", config, fields, params, ""), trained.tokenizer


def _tokenizer_beside(path: Path):
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
        return load_tokenizer(str(folder))
    return None


def _check_vocabulary(source: str, vocabulary, tokenizer) -> None:
    if vocabulary is not None and vocabulary.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{source} was trained with another vocabulary than data.vocab: words would get wrong "
            "embeddings. Set data.vocab to its tokenizer (usually the same folder)."
        )
