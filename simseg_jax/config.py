"""Making, reading, overriding and checking configurations; `config_keys` lists every key.

A file in configs/ starts from `default_config()` and sets what differs; the command line overrides
single keys with `--config.optim.lr=1e-3`. Nothing else in the package knows a default.
"""

import dataclasses
import json
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simseg_jax.config_checks import validate
from simseg_jax.config_keys import (
    CLASSIFICATION_KEYS,
    DATA_SET_KEYS,
    KEYS,
    PROBE_KEYS,
    RETRIEVAL_KEYS,
    SEGMENTATION_KEYS,
)
from simseg_jax.dotted import assign, get, literal, unknown_key
from simseg_jax.errors import UserError
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.models.vit import ViTConfig

# An `ml_collections.ConfigDict` whose keys are those of KEYS; its attributes have no static types.
Config = Any


def default_config() -> Config:
    """The paper's settings with no data set and no evaluation yet."""
    config = _from_table(KEYS).lock()
    # The places where a configuration names keys of its own.
    config.data.train.unlock()
    for kind in EVALS:
        config.evals[kind].unlock()
    return config


def data_set(**settings) -> Config:
    """One entry of `config.data.train`: a data set of image-caption pairs."""
    return _entry(DATA_SET_KEYS, settings)


def segmentation_eval(**settings) -> Config:
    """One entry of `config.evals.seg`: the paper protocol with `settings` changed."""
    return _entry(SEGMENTATION_KEYS, settings)


def retrieval_eval(**settings) -> Config:
    """One entry of `config.evals.retrieval`."""
    return _entry(RETRIEVAL_KEYS, settings)


def classification_eval(**settings) -> Config:
    """One entry of `config.evals.classification`."""
    return _entry(CLASSIFICATION_KEYS, settings)


def probe_config(**settings) -> Config:
    """The settings of a linear probe; see configs/linear_probe.py."""
    return _entry(PROBE_KEYS, settings)


def _entry(table: dict, settings: dict) -> Config:
    config = _from_table(table).lock()
    _update(config, settings)
    return config


EVALS = {
    "seg": segmentation_eval,
    "retrieval": retrieval_eval,
    "classification": classification_eval,
}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), check: Callable[[Config], None] = validate
) -> Config:
    """Runs `get_config()` of a configuration file, applies overrides, checks everything.

    check: raises a `UserError` for what cannot work.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No configuration file at {path}; see the ones in configs/.")
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise UserError(f"{path} does not define get_config().")
    try:
        config = get_config()
    except (AttributeError, KeyError, TypeError) as error:
        message = " ".join(str(error).split())
        unknown = re.search(r'Key \\?"(\w+)\\?" does not exist', message)
        if unknown:
            message = unknown_key(unknown[1], [key.split(".")[-1] for key, *_ in _flatten(KEYS)])
        raise UserError(f"{path}: {message}") from error
    return apply_overrides(config, overrides, check)


def apply_overrides(
    config: Config, overrides: Sequence[str], check: Callable[[Config], None] = validate
) -> Config:
    """Sets the keys of `--config.key=value` arguments in `config` and checks the result."""
    for argument in overrides:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(f"Cannot read {argument!r}: overrides look like --config.key=value.")
        assign(config, name, text if isinstance(get(config, name), str) else literal(name, text))
    check(config)
    return config


def first_segmentation(config: Config) -> Config:
    """A copy of the first entry of `config.evals.seg`; without any, the paper protocol."""
    entries = list(config.evals.seg.values())
    return segmentation_eval(**(entries[0].to_dict() if entries else {}))


def model_config(config: Config, vocab_size: int) -> SimSegConfig:
    """The architecture a configuration describes; vocab_size fills in model.text.vocab_size=0."""
    model = config.model
    text = BertConfig(**{**model.text, "vocab_size": model.text.vocab_size or vocab_size})
    if text.vocab_size < vocab_size:
        raise UserError(
            f"model.text.vocab_size={text.vocab_size} is smaller than the vocabulary: "
            f"{vocab_size} tokens."
        )
    rest = {key: model[key] for key in model if key not in ("image", "text")}
    return SimSegConfig(image=ViTConfig(**model.image), text=text, **rest)


def to_json(config: Config) -> str:
    """The resolved configuration as indented JSON."""
    return config.to_json(indent=2, sort_keys=True)


def from_dict(saved: dict) -> Config:
    """A configuration stored as plain values (`to_dict`, JSON); keys added since take defaults."""
    config = default_config()
    data = {key: value for key, value in saved["data"].items() if key != "train"}
    rest = {key: value for key, value in saved.items() if key != "evals"}
    _update(config, {**rest, "data": data})
    for name, settings in saved["data"]["train"].items():
        config.data.train[name] = data_set(**settings)
    for kind, make in EVALS.items():
        for name, settings in saved["evals"].get(kind, {}).items():
            config.evals[kind][name] = make(**settings)
    validate(config)
    return config


def from_file(path: Path) -> Config:
    """The configuration in a JSON file that `to_json` wrote."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no configuration ({error!r}): get it again.") from error


def of_architecture(architecture: SimSegConfig) -> Config:
    """The paper's settings with this model, evaluated as in the paper on VOC."""
    config = default_config()
    _update(config.model, dataclasses.asdict(architecture))
    patch = architecture.image.patch_size
    config.evals.seg.voc = segmentation_eval(
        data="voc", root="VOCdevkit/VOC2012", resolution=round(288 / patch) * patch
    )
    validate(config)
    return config


def published(config: Config) -> Config:
    """A copy without what only matters to the training run: its data and folders."""
    defaults = default_config()
    saved = {**config.to_dict(), "checkpoint": {}, "init": {}}
    saved["data"] = {**saved["data"], "train": {}, "cache": defaults.data.cache}
    return from_dict(saved)


def compute_dtype(config: Config) -> jnp.dtype:
    """The type of matrix products: `config.dtype`, where auto is bfloat16 on accelerators."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


TRAINING = (
    (KEYS, ""),
    (DATA_SET_KEYS, "data.train.<name>."),
    (SEGMENTATION_KEYS, "evals.seg.<name>."),
    (RETRIEVAL_KEYS, "evals.retrieval.<name>."),
    (CLASSIFICATION_KEYS, "evals.classification.<name>."),
)
PROBE = ((PROBE_KEYS, ""),)


def describe(tables: Sequence[tuple[dict, str]] = TRAINING) -> str:
    """All keys, one per line with default and meaning: the end of a command's help."""
    return "\n".join(
        f"  {key} = {default!r}\n      {text}"
        for table, prefix in tables
        for key, default, text in _flatten(table, prefix)
    )


def _from_table(table: dict) -> Config:
    config = ConfigDict()
    for key, value in table.items():
        config[key] = _from_table(value) if isinstance(value, dict) else value[0]
    return config


def _flatten(table: dict, prefix: str = "") -> Iterator[tuple[str, object, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, *value


def _update(config: Config, settings: dict, prefix: str = "") -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _update(config, value, f"{prefix}{key}.")
        else:
            assign(config, prefix + key, value)
