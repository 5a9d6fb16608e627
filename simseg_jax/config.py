"""Making, reading, overriding and checking configurations; `config_keys` lists every key.

A file in configs/ starts from `default_config()` and sets what differs; the command line overrides
single keys with `--config.optim.lr=1e-3`. Nothing else in the package knows a default.
"""

import dataclasses
import json
import re
import runpy
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simseg_jax.config_checks import check_name, validate
from simseg_jax.config_keys import (
    CLASSIFICATION_KEYS,
    DATA_SET_KEYS,
    ENTRIES,
    KEYS,
    PROBE_KEYS,
    RETRIEVAL_KEYS,
    SEGMENTATION_KEYS,
)
from simseg_jax.data.testsets.classes import top_k
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.models.vit import ViTConfig
from simseg_jax.runtime.dotted import assign, get, literal, unknown_key
from simseg_jax.runtime.errors import UserError, one_line, reading
from simseg_jax.runtime.ranges import Key, shown

# An `ml_collections.ConfigDict` whose keys are those of KEYS; its attributes have no static types.
Config = Any


def default_config() -> Config:
    """The paper's settings with no data set and no evaluation yet."""
    config = _from_table(KEYS).lock()
    for group in ENTRIES:
        get(config, group).unlock()
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


def load_config(
    path: str | Path, overrides: Sequence[str] = (), check: Callable[[Config], None] = validate
) -> Config:
    """Runs `get_config()` of a configuration file, applies overrides, checks everything.

    check: raises a `UserError` for what cannot work.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No configuration file at {path}; see the ones in configs/.")
    config = _run(path)
    _override(config, overrides)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{path}{' and --config...' if overrides else ''}: {error}") from error
    return config


def _run(path: Path) -> Config:
    """What `get_config()` of a configuration file returns; a `UserError` says what fails where."""
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if not callable(get_config):
            raise UserError("it does not define get_config()")
        config = get_config()
    # A configuration is a program: it can fail, or ask to exit, in any way.
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else path
        raise UserError(f"{where}: {_reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() returns {shown(config)}; it must return the default_config() "
            "that it has changed."
        )
    return config


def _reason(error: BaseException) -> str:
    unknown = re.search(r'Key \\?"(\w+)\\?" does not exist', str(error))
    if unknown:
        return unknown_key(unknown[1], [key.split(".")[-1] for key, _ in flatten(KEYS)])
    message = one_line(error)
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"


def apply_overrides(
    config: Config, overrides: Sequence[str], check: Callable[[Config], None] = validate
) -> Config:
    """Sets the keys of `--config.key=value` arguments in `config` and checks the result."""
    _override(config, overrides)
    check(config)
    return config


def _override(config: Config, overrides: Sequence[str]) -> None:
    for argument in overrides:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(
                f"Cannot read {shown(argument)}: overrides look like --config.key=value."
            )
        assign(config, name, text if isinstance(get(config, name), str) else literal(name, text))


def resolved(config: Config) -> Config:
    """A copy in which every segmentation benchmark names the `top_k` that it takes from its data.

    A configuration keeps 0, so that another data set brings its own; results show the number.
    """
    config = config.copy_and_resolve_references()
    for settings in config.evals.seg.values():
        settings.top_k = top_k(settings)
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
    """A configuration stored as plain values (`to_dict`, JSON); keys added since take defaults.

    Whatever is wrong with it is a `UserError`.
    """
    config = default_config()
    if not (isinstance(saved, dict) and {"model", "data", "evals"} <= saved.keys()):
        raise UserError("model, data or evals is missing: this is no configuration of a run.")
    _update(config, saved)
    validate(config)
    return config


def from_file(path: Path) -> Config:
    """The configuration in a JSON file that `to_json` wrote."""
    with reading(f"the configuration {path}", "Get it again."):
        saved = json.loads(path.read_text(encoding="utf-8"))
    try:
        return from_dict(saved)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


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


TRAINING = ((KEYS, ""), *((table, f"{group}.<name>.") for group, table in ENTRIES.items()))
PROBE = ((PROBE_KEYS, ""),)


def describe(tables: Sequence[tuple[dict, str]] = TRAINING) -> str:
    """All keys with default, what they accept and mean: the end of a command's help."""
    return "\n".join(
        f"  {name} = {key.default!r} ({key.accepts.text})\n      {key.meaning}"
        for table, prefix in tables
        for name, key in flatten(table, prefix)
    )


def _from_table(table: dict) -> Config:
    config = ConfigDict()
    for key, value in table.items():
        config[key] = value.default if isinstance(value, Key) else _from_table(value)
    return config


def flatten(table: dict, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """(dotted name, key) of all keys of a table."""
    for name, value in table.items():
        if isinstance(value, Key):
            yield prefix + name, value
        else:
            yield from flatten(value, f"{prefix}{name}.")


def _update(config: Config, settings: Any, prefix: str = "") -> None:
    if not isinstance(settings, dict):
        raise UserError(f"{prefix.removesuffix('.')}={shown(settings)} must be a group of keys.")
    for key, value in settings.items():
        name = prefix + key
        if name in ENTRIES:
            _add_entries(get(config, name), name, value)
        elif isinstance(get(config, name), ConfigDict):
            _update(config, value, f"{name}.")
        else:
            assign(config, name, value)


def _add_entries(group: Config, name: str, entries: Any) -> None:
    if not isinstance(entries, dict):
        raise UserError(f"{name}={shown(entries)} must be a group of entries.")
    for entry, settings in entries.items():
        check_name(name, entry)
        group[entry] = _from_table(ENTRIES[name]).lock()
        _update(group[entry], settings)
