"""What a configuration cannot be: the range of every key, and how keys must fit each other."""

import re
from typing import Any

from ml_collections import ConfigDict

from simseg_jax.config_keys import DATA_SET_KEYS, ENTRIES, KEYS, PROBE_KEYS, SEGMENTATION_KEYS
from simseg_jax.runtime.dotted import get, unknown_key
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.ranges import Key, shown


def validate(config: Any) -> None:
    """Raises a `UserError` naming the first key that cannot work."""
    _check_keys(config, KEYS)
    for group, table in ENTRIES.items():
        for name, entry in get(config, group).items():
            check_name(group, name)
            _check_keys(entry, table, f"{group}.{name}.")
    image, text = config.model.image, config.model.text
    for name, entry in config.evals.seg.items():
        _check_sizes(entry, image.patch_size, f"evals.seg.{name}.")
    for kind in ("retrieval", "classification"):
        for name, entry in config.evals[kind].items():
            validate_crop(entry, image.patch_size, f"evals.{kind}.{name}.")
    if image.image_size % image.patch_size:
        raise UserError(
            f"model.image.image_size={image.image_size} must be a multiple of "
            f"model.image.patch_size={image.patch_size}."
        )
    for name, tower in (("image", image), ("text", text)):
        if tower.width % tower.heads:
            raise UserError(
                f"model.{name}.width={tower.width} must be a multiple of "
                f"model.{name}.heads={tower.heads}."
            )
    if config.data.max_length > text.max_positions:
        raise UserError(
            f"data.max_length={config.data.max_length} must not exceed "
            f"model.text.max_positions={text.max_positions}."
        )
    if config.init.model and (config.init.image or config.init.text):
        raise UserError("init.model is a whole model: leave init.image and init.text empty.")
    if not (config.epochs or config.steps):
        raise UserError("Set steps or epochs to a positive number.")
    if config.data.train and config.model.pool == "loda":
        _check_responses(config)


def check_name(group: str, name: str) -> None:
    """Checks what a configuration calls a data set or benchmark, as files are called so, too."""
    if not re.fullmatch(r"[\w-]{1,100}", name):
        raise UserError(f"{group}: a name has 1 to 100 letters, digits, _ or -, not {shown(name)}.")


def validate_data_set(settings: Any) -> None:
    """Checks one data set of image-caption pairs by itself."""
    _check_keys(settings, DATA_SET_KEYS)


def validate_segmentation(settings: Any, patch_size: int) -> None:
    """Checks the settings of one segmentation benchmark by themselves."""
    _check_keys(settings, SEGMENTATION_KEYS)
    _check_sizes(settings, patch_size)


def validate_crop(settings: Any, patch_size: int, prefix: str = "") -> None:
    """Checks resize and crop of images that a ViT embeds; `prefix` stands before their names."""
    if settings.crop % patch_size or settings.crop > settings.resize:
        raise UserError(
            f"{prefix}crop={settings.crop} must be a multiple of the patch size, which is "
            f"{patch_size}, and at most {prefix}resize={settings.resize}."
        )


def validate_probe(settings: Any) -> None:
    """Raises a `UserError` naming the first key of a linear probe that cannot work."""
    _check_keys(settings, PROBE_KEYS)
    if settings.warmup_epochs >= settings.epochs:
        raise UserError(
            f"warmup_epochs={settings.warmup_epochs} must be less than epochs={settings.epochs}."
        )


def _check_responses(config: Any) -> None:
    model, words = config.model, config.data.max_length
    patches = (model.image.image_size // model.image.patch_size) ** 2
    for key, most, what in (("m_image", patches, "patches"), ("m_text", words, "words")):
        if model[key] > most:
            raise UserError(f"model.{key}={model[key]} must not exceed the {most} {what}.")


def _check_sizes(settings: Any, patch_size: int, prefix: str = "") -> None:
    sizes = {"resolution": settings.resolution}
    if settings.protocol == "standard":
        sizes["window"] = settings.window
        if settings.window > settings.resolution:
            raise UserError(
                f"{prefix}window={settings.window} must not exceed the shorter side of the images, "
                f"{prefix}resolution={settings.resolution}; 0 takes the whole image at once."
            )
        if settings.refine not in ("none", "pamr"):
            raise UserError(
                f"{prefix}refine={settings.refine!r} belongs to the paper protocol: set "
                f"{prefix}refine to none or pamr."
            )
    for key, size in sizes.items():
        if size % patch_size:
            raise UserError(
                f"{prefix}{key}={size} must be a multiple of the patch size, which is {patch_size}."
            )


def _check_keys(config: Any, table: dict, prefix: str = "") -> None:
    """Checks that `config` has the keys of a table and no others, each within its range."""
    if not isinstance(config, ConfigDict):
        group = prefix.removesuffix(".") or "The configuration"
        keys = f" ({some(table)})" if table else ""
        raise UserError(f"{group} must be a group of keys{keys}, not {shown(config)}.")
    for key, declared in table.items():
        if key not in config:
            raise UserError(f"{prefix}{key} is missing: do not remove keys, set them.")
        if isinstance(declared, Key):
            declared.check(prefix + key, config[key])
        else:
            _check_keys(config[key], declared, f"{prefix}{key}.")
    for key in config:
        # An empty table stands for entries with names of their own.
        if table and key not in table:
            raise UserError(unknown_key(prefix + key, [prefix + known for known in table]))
