"""Every configuration key with its default and meaning, and the checks a configuration must pass.

A file in configs/ starts from `default_config()` and sets what differs; the command line overrides
single keys with `--config.optim.lr=1e-3`. Nothing else in the package knows a default.
"""

import re
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simseg_jax.data.classes import BENCHMARKS
from simseg_jax.dotted import assign, get, literal, unknown_key
from simseg_jax.errors import UserError
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import POOLS, SimSegConfig
from simseg_jax.models.vit import ViTConfig

# An `ml_collections.ConfigDict` whose keys are those of KEYS; its attributes have no static types.
Config = Any

# Each leaf: (default, meaning). The default fixes the type.
KEYS = {
    "seed": (0, "seeds parameters, data order, augmentation and dropout"),
    "steps": (1000, "training steps; ignored when epochs > 0"),
    "epochs": (0.0, "passes over the images; > 0 sets the number of steps"),
    "batch_size": (4096, "pairs per step over all devices: the contrastive batch"),
    "dtype": ("auto", "compute type: float32, bfloat16 or auto (bfloat16 on accelerators)"),
    "log_every": (10, "steps between two lines of metrics"),
    "eval_every": (0, "steps between evaluations; 0: only after training"),
    "pictures": (8, "images on the contact sheet written after training; 0: none"),
    "model": {
        "image": {
            "image_size": (224, "side of training images in pixels"),
            "patch_size": (16, "side of a patch in pixels"),
            "width": (384, "channels of the ViT"),
            "depth": (12, "blocks of the ViT"),
            "heads": (6, "attention heads of the ViT"),
            "mlp_width": (1536, "hidden channels of its MLPs"),
        },
        "text": {
            "vocab_size": (0, "rows of the word embedding; 0: the size of the vocabulary"),
            "max_positions": (512, "rows of the position embedding"),
            "width": (768, "channels of BERT"),
            "depth": (12, "layers of BERT"),
            "heads": (12, "attention heads of BERT"),
            "mlp_width": (3072, "hidden channels of its MLPs"),
            "dropout": (0.1, "dropout of embeddings, attention and residuals"),
        },
        "embed_dim": (512, "channels of the common embedding"),
        "pool": ("loda", "loda: top-M per channel; mean: dense alignment; cls: CLS tokens"),
        "m_image": (5, "M^I in training: responses per channel over patches"),
        "m_text": (5, "M^T in training: responses per channel over words"),
        "mask_padding": (False, "keep [PAD] out of text pooling in training; the authors do not"),
        "temperature": (0.07, "initial temperature"),
    },
    "optim": {
        "lr": (3e-4, "peak learning rate"),
        "warmup": (0.025, "share of the steps with linear warm-up from 0"),
        "final_lr": (0.1, "learning rate at the end of the cosine, as a share of the peak"),
        "b1": (0.9, "AdamW beta 1"),
        "b2": (0.98, "AdamW beta 2"),
        "eps": (1e-6, "AdamW epsilon"),
        "weight_decay": (0.2, "decoupled weight decay"),
        "clip_norm": (0.0, "bound on the global gradient norm; 0: none"),
        "lr_rules": (((".*", 1.0),), "(path pattern, lr multiplier), first match; 0 freezes"),
        "decay_rules": (((".*", 1.0),), "(path pattern, weight-decay multiplier), first match"),
    },
    "data": {
        "source": ("folder", "folder: images and a caption table; shapes: generated scenes"),
        "root": ("", "folder: where the images and tables are"),
        "images": ("Images", "folder: name of the image folder under root"),
        "captions": ("captions.csv", "folder: CSV under root with columns image, caption"),
        "split": ("train.txt", "folder: list of image names, '' for all; shapes: train, val, test"),
        "size": (8192, "shapes: number of scenes"),
        "vocab": ("bert-base-uncased", "vocabulary: hub name, vocab.txt, tokenizer folder, shapes"),
        "max_length": (25, "tokens per caption, [CLS] and [SEP] included"),
        "edit_rate": (0.2, "share of word pieces masked (50 %), replaced (10 %), deleted (40 %)"),
        "crop_area": ((0.6, 1.0), "RandomResizedCrop: range of the area kept"),
        "crop_aspect": ((3 / 4, 4 / 3), "RandomResizedCrop: range of width / height"),
        "autoaugment": (True, "AutoAugment, ImageNet policy"),
        "threads": (16, "threads that read and prepare examples"),
        "workers": (0, "processes that do so (0: threads of this process only)"),
        "prefetch": (500, "examples prepared ahead"),
    },
    "mesh": {"fsdp": (1, "devices that share one copy of the parameters; the rest is data")},
    "checkpoint": {
        "every": (1000, "steps between checkpoints; the last step is always saved"),
        "keep": (3, "newest checkpoints kept"),
        "resume": ("", "WORKDIR of another run to start from when this one has no checkpoint"),
    },
    "evals": {"seg": {}},
}

# Keys of each entry of evals.seg: one zero-shot segmentation benchmark.
SEGMENTATION_KEYS = {
    "data": ("voc", f"one of {', '.join(BENCHMARKS)} (shapes: generated scenes)"),
    "root": ("", "the benchmark's folder, such as VOC2012, VOC2010 or ADEChallengeData2016"),
    "split": ("val", "name of a list or folder of the benchmark; shapes: train, val, test"),
    "names": ("original", "class names in prompts: original (the authors'), synonyms, a text file"),
    "size": (256, "shapes: number of scenes"),
    "limit": (0, "use the first so many images; 0: all"),
    "resolution": (288, "side the image is resized to, aspect not kept"),
    "prompts": ("imagenet", "templates: imagenet (the 80 of CLIP), plain, shapes"),
    "m_image": (5, "M^I: responses per channel over patches"),
    "m_text": (1, "M^T: responses per channel over words, padding masked"),
    "top_k": (10, "class scores that set the threshold; 30 for many classes"),
    "sigma_weight": (1.0, "threshold = mean + sigma_weight * standard deviation of those"),
    "candidates": (5, "classes an image can show at most"),
    "refine": ("none", "none: p > 0.5; pydensecrf: dense CRF (extra `crf`)"),
    "closing": (7, "side in pixels of the square that closes small holes; 1: none"),
    "batch_size": (32, "images per batch over all devices"),
}

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "model.pool": POOLS,
    "data.source": ("folder", "shapes"),
    "data": tuple(BENCHMARKS),
    "prompts": ("imagenet", "plain", "shapes"),
    "refine": ("none", "pydensecrf"),
}

# fmt: off
AT_LEAST_ONE = (
    "batch_size", "log_every", "model.embed_dim", "model.m_image", "model.m_text", "data.size",
    "data.threads", "data.prefetch", "checkpoint.every", "checkpoint.keep",
)
# fmt: on


def default_config() -> Config:
    """The paper's settings with no data source and no evaluation yet."""
    config = _from_table(KEYS).lock()
    # The set of evaluations is the one place where a configuration names keys of its own.
    config.evals.seg.unlock()
    return config


def segmentation_eval(**settings) -> Config:
    """One entry of `config.evals.seg`: the paper protocol with `settings` changed."""
    config = _from_table(SEGMENTATION_KEYS).lock()
    _update(config, settings)
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Runs `get_config()` of a configuration file, applies overrides, checks everything."""
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
    return apply_overrides(config, overrides)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Sets the keys of `--config.key=value` arguments in `config` and checks the result."""
    for argument in overrides:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(f"Cannot read {argument!r}: overrides look like --config.key=value.")
        assign(config, name, text if isinstance(get(config, name), str) else literal(name, text))
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raises a `UserError` naming the first key that cannot work."""
    _check_table(config, KEYS, "")
    for name, entry in config.evals.seg.items():
        validate_segmentation(entry, config.model.image.patch_size, f"evals.seg.{name}.")
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
    for name in AT_LEAST_ONE:
        if get(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {get(config, name)}.")
    if not 3 <= config.data.max_length <= text.max_positions:
        raise UserError(
            f"data.max_length={config.data.max_length} must lie between 3 and "
            f"model.text.max_positions={text.max_positions}."
        )
    if config.epochs <= 0 and config.steps < 1:
        raise UserError("Set steps or epochs to a positive number.")
    if not 0 <= config.optim.warmup < 1:
        raise UserError(f"optim.warmup={config.optim.warmup} is a share of the steps in [0, 1).")


def validate_segmentation(settings: Config, patch_size: int, prefix: str = "") -> None:
    """Checks one entry of `config.evals.seg`; `prefix` stands before its keys in the message."""
    _check_table(settings, SEGMENTATION_KEYS, prefix)
    if settings.top_k < 2:
        raise UserError(f"{prefix}top_k must be at least 2 for a standard deviation.")
    if settings.resolution < 1 or settings.resolution % patch_size:
        raise UserError(
            f"{prefix}resolution={settings.resolution} must be a multiple of the patch size, "
            f"which is {patch_size}."
        )


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
    _update(config, {key: value for key, value in saved.items() if key != "evals"})
    for name, settings in saved["evals"]["seg"].items():
        config.evals.seg[name] = segmentation_eval(**settings)
    validate(config)
    return config


def compute_dtype(config: Config) -> jnp.dtype:
    """The type of matrix products: `config.dtype`, where auto is bfloat16 on accelerators."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def describe() -> str:
    """All keys, one per line with default and meaning: the end of the command line's help."""
    return "\n".join(
        f"  {key} = {default!r}\n      {text}"
        for table, prefix in ((KEYS, ""), (SEGMENTATION_KEYS, "evals.seg.<name>."))
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


def _check_table(config: Config, table: dict, prefix: str) -> None:
    for key, entry in table.items():
        if isinstance(entry, dict):
            _check_table(config[key], entry, f"{prefix}{key}.")
            continue
        name, value = prefix + key, config[key]
        choices = CHOICES.get(key if table is SEGMENTATION_KEYS else name)
        if choices and value not in choices:
            raise UserError(f"{name}={value!r} must be one of: {', '.join(choices)}.")
