"""What a run may change when it continues from a checkpoint, and what identifies its inputs."""

import re
from typing import Any

from simseg_jax.data.pipeline import Examples
from simseg_jax.data.text import vocabulary_identity
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.settings import leaves
from simseg_jax.training.checkpoint import Record

# Keys and groups of keys that a run may change when it continues from its own checkpoint: its
# length, how it computes, reads, reports and evaluates, and the two remedies for a loss that is not
# finite. Of the vocabulary and the data sets the location may change: their content is compared.
MAY_CHANGE = (
    *("steps", "epochs", "log_every", "eval_every", "pictures", "evals", "checkpoint", "init"),
    *("dtype", "gradient_dtype", "remat", "micro_batch", "loss_chunk", "mesh"),
    *("optim.lr", "optim.clip_norm"),
    *("data.vocab", "data.threads", "data.workers", "data.prefetch", "data.cache"),
    *("data.max_bad", "data.max_pixels"),
)
LOCATION = re.compile(r"data\.train\.[^.]+\.(?!(?:weight|collage)$)[^.]+")


def identity(tokenizer, examples: Examples) -> dict[str, Any]:
    """Identifies the vocabulary and the training data by content; every checkpoint stores it."""
    return {"vocabulary": vocabulary_identity(tokenizer), "data": examples.identity()}


def changes(
    saved: Record, config: dict[str, Any], now: dict[str, Any], where: str, own: bool
) -> list[str]:
    """What differs from the checkpoint, as "key old -> new" or a sentence.

    A `UserError` refuses differences that are not allowed. config: of this run, as nested dicts.
    now: the run's `identity`. where: names the checkpoint. own: whether it belongs to this run; if
    it belongs to another one (`checkpoint.resume`), only model and vocabulary must be the same.
    """
    advice = (
        "Set it back, or start a new run from this one: another --workdir and "
        "checkpoint.resume=this --workdir."
        if own
        else "Set it back: a run that starts from another run's checkpoint keeps its model."
    )
    differences = _differences(saved.config, config)
    refused = [
        f"{key}={old}, the configuration {new}"
        for key, (old, new) in differences.items()
        if (not _may_change(key) if own else key.startswith("model."))
    ]
    if refused:
        raise UserError(f"{where} has {some(refused)}. {advice}")
    found = [f"{key} {old} -> {new}" for key, (old, new) in differences.items()]
    if differences.keys() & {"steps", "epochs"}:
        found.append("the learning rate follows the new length")
    if saved.identity is not None:
        old, new = saved.identity["vocabulary"], now["vocabulary"]
        if old != new:
            raise UserError(
                f"{where} was trained with the vocabulary {_vocabulary(saved.config, old)}, this "
                f"run has {_vocabulary(config, new)}: words would get each other's embeddings. Set "
                "data.vocab back; the folder tokenizer of the run's --workdir holds it."
            )
        other = _other_data(saved.identity["data"], now["data"])
        if other and own:
            raise UserError(f"{where} was trained on other data: {some(other)}. {advice}")
        found += other
    return found


def _differences(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Key -> (old, new) as text; a test set or data set that only one side has is a single key."""
    before, after = dict(leaves(saved)), dict(leaves(config))
    different = {}
    for key in sorted({*before, *after}):
        if key not in before or key not in after:
            group = re.match(r"(data\.train|evals\.\w+)\.[^.]+", key)
            different[group[0] if group else key] = tuple(
                "present" if key in side else "absent" for side in (before, after)
            )
        elif before[key] != after[key]:
            different[key] = repr(before[key]), repr(after[key])
    return different


def _may_change(key: str) -> bool:
    return bool(LOCATION.fullmatch(key)) or any(
        key == name or key.startswith(f"{name}.") for name in MAY_CHANGE
    )


def _vocabulary(config: dict[str, Any], identity: dict[str, Any]) -> str:
    name = config["data"]["vocab"]
    return f"data.vocab={name!r} ({identity['tokens']} tokens, digest {identity['digest']})"


def _other_data(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between data sets of the same name, as sentences."""
    found = []
    for name in here.keys() & there.keys():
        old, new = there[name], here[name]
        if old["examples"] != new["examples"]:
            found.append(
                f"data.train.{name} had {old['examples']:,} examples, now {new['examples']:,}"
            )
            continue
        pairs = [(a, b) for a, b in zip(old["sample"], new["sample"], strict=False) if a and b]
        other = sum(a != b for a, b in pairs)
        if other:
            found.append(f"{other} of {len(pairs)} compared examples of data.train.{name} differ")
    return sorted(found)
