"""What a configuration cannot be: every check names the key and says what would work."""

from collections.abc import Sequence
from typing import Any

from simseg_jax.config_keys import (
    AT_LEAST_ONE,
    CHOICES,
    CLASSIFICATION_CHOICES,
    DATA_SET_AT_LEAST_ONE,
    DATA_SET_CHOICES,
    EMBEDDING_AT_LEAST_ONE,
    PROBE_AT_LEAST_ONE,
    PROBE_CHOICES,
    SEGMENTATION_AT_LEAST_ONE,
    SEGMENTATION_CHOICES,
)
from simseg_jax.dotted import get
from simseg_jax.errors import UserError


def validate(config: Any) -> None:
    """Raises a `UserError` naming the first key that cannot work."""
    _check_values(config, CHOICES, AT_LEAST_ONE)
    for name, entry in config.data.train.items():
        validate_data_set(entry, f"data.train.{name}.")
    if not 0 <= config.data.max_bad <= 1:
        raise UserError(f"data.max_bad={config.data.max_bad} is a share of the examples in [0, 1].")
    for name, entry in config.evals.seg.items():
        validate_segmentation(entry, config.model.image.patch_size, f"evals.seg.{name}.")
    for kind, choices in (
        ("retrieval", DATA_SET_CHOICES),
        ("classification", CLASSIFICATION_CHOICES),
    ):
        for name, entry in config.evals[kind].items():
            prefix = f"evals.{kind}.{name}."
            validate_embedding(entry, config.model.image.patch_size, prefix, choices)
    image, text = config.model.image, config.model.text
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
    if not 3 <= config.data.max_length <= text.max_positions:
        raise UserError(
            f"data.max_length={config.data.max_length} must lie between 3 and "
            f"model.text.max_positions={text.max_positions}."
        )
    if len(image.mean) != 3 or len(image.std) != 3 or min(image.std) <= 0:
        raise UserError("model.image.mean and model.image.std have three numbers; std positive.")
    if config.init.model and (config.init.image or config.init.text):
        raise UserError("init.model is a whole model: leave init.image and init.text empty.")
    if config.epochs <= 0 and config.steps < 1:
        raise UserError("Set steps or epochs to a positive number.")
    if not 0 <= config.optim.warmup < 1:
        raise UserError(f"optim.warmup={config.optim.warmup} is a share of the steps in [0, 1).")


def validate_data_set(settings: Any, prefix: str = "") -> None:
    """Checks one entry of `config.data.train`; `prefix` stands before its keys in the message."""
    _check_values(settings, DATA_SET_CHOICES, DATA_SET_AT_LEAST_ONE, prefix)
    if settings.weight <= 0:
        raise UserError(f"{prefix}weight={settings.weight} must be positive.")


def validate_segmentation(settings: Any, patch_size: int, prefix: str = "") -> None:
    """Checks one entry of `config.evals.seg`; `prefix` stands before its keys in the message."""
    _check_values(settings, SEGMENTATION_CHOICES, SEGMENTATION_AT_LEAST_ONE, prefix)
    if settings.top_k < 2:
        raise UserError(f"{prefix}top_k must be at least 2 for a standard deviation.")
    sizes = {"resolution": settings.resolution}
    if settings.protocol == "standard":
        sizes["window"] = settings.window
        if settings.window > settings.resolution:
            raise UserError(
                f"{prefix}window={settings.window} must not exceed the shorter side of the images, "
                f"{prefix}resolution={settings.resolution}."
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


def validate_embedding(settings: Any, patch_size: int, prefix: str, choices: dict) -> None:
    """Checks one entry of `config.evals.retrieval` or `config.evals.classification`."""
    _check_values(settings, choices, EMBEDDING_AT_LEAST_ONE, prefix)
    validate_crop(settings, patch_size, prefix)


def validate_crop(settings: Any, patch_size: int, prefix: str = "") -> None:
    """Checks resize and crop of images that a ViT embeds."""
    if settings.crop % patch_size or settings.crop > settings.resize:
        raise UserError(
            f"{prefix}crop={settings.crop} must be a multiple of the patch size, which is "
            f"{patch_size}, and at most {prefix}resize={settings.resize}."
        )


def validate_probe(settings: Any) -> None:
    """Raises a `UserError` naming the first key of a linear probe that cannot work."""
    _check_values(settings, PROBE_CHOICES, PROBE_AT_LEAST_ONE)
    if not 0 <= settings.warmup_epochs < settings.epochs:
        raise UserError(
            f"warmup_epochs={settings.warmup_epochs} must be less than epochs={settings.epochs}."
        )


def _check_values(config: Any, choices: dict, at_least_one: Sequence[str], prefix="") -> None:
    for key, allowed in choices.items():
        if get(config, key) not in allowed:
            name = f"{prefix}{key}={get(config, key)!r}"
            raise UserError(f"{name} must be one of: {', '.join(allowed)}.")
    for key in at_least_one:
        if get(config, key) < 1:
            raise UserError(f"{prefix}{key} must be at least 1, not {get(config, key)}.")
