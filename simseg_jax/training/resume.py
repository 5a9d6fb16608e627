"""What a run may change when it goes on from a checkpoint, and what identifies its inputs."""

import re
from typing import Any

from simseg_jax.data.pipeline import Examples
from simseg_jax.data.text import vocabulary_identity
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.settings import leaves
from simseg_jax.training.checkpoint import Record

# Keys and groups of keys that a run may change when it goes on from its own checkpoint: its length,
# how it computes, reads, reports and evaluates, and the two remedies for a loss that is not finite.
# Where data and vocabulary are found may change as well: their content is compared instead.
MAY_CHANGE = (
    *("steps", "epochs", "log_every", "eval_every", "pictures", "evals", "checkpoint", "init"),
    *("dtype", "remat", "micro_batch", "loss_chunk", "mesh", "optim.lr", "optim.clip_norm"),
    *("data.vocab", "data.threads", "data.workers", "data.prefetch", "data.cache"),
    *("data.max_bad", "data.max_pixels"),
)
CONTENT = re.compile(r"data\.train\.[^.]+\.(?!weight$)[^.]+")


def identity(tokenizer, examples: Examples) -> dict[str, Any]:
    """Identifies vocabulary and training data by content; every checkpoint stores it."""
    return {"vocabulary": vocabulary_identity(tokenizer), "data": examples.identity()}


def changes(
    saved: Record, config: dict[str, Any], now: dict[str, Any], where: str, own: bool
) -> list[str]:
    """What differs from the checkpoint, `key old -> new` each; a `UserError` for what must not.

    config: of this run, as nested dicts. now: its `identity`. where: names the checkpoint. own: it
    belongs to this very run; when it is another's (`checkpoint.resume`), only the model and the
    vocabulary must be the same.
    """
    advice = (
        "Set it back, or start a new run from this one: another --workdir and "
        "checkpoint.resume=this --workdir."
        if own
        else "Set it back: a run that goes on from another's checkpoint keeps its model."
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
        _compare_vocabularies(saved, config, now, where)
        other = _other_data(saved.identity["data"], now["data"])
        if other and own:
            raise UserError(f"{where} was trained on other data: {some(other)}. {advice}")
        found += other
    return found


def _differences(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Key -> (old, new) as text; an evaluation or data set that is there only once is one entry."""
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
    return bool(CONTENT.fullmatch(key)) or any(
        key == name or key.startswith(f"{name}.") for name in MAY_CHANGE
    )


def _compare_vocabularies(
    saved: Record, config: dict[str, Any], now: dict[str, Any], where: str
) -> None:
    there, here = (x["vocabulary"] for x in (saved.identity or now, now))
    if there != here:
        names = [
            f"data.vocab={name!r} ({x['tokens']} tokens, digest {x['digest']})"
            for name, x in ((saved.config["data"]["vocab"], there), (config["data"]["vocab"], here))
        ]
        raise UserError(
            f"{where} was trained with the vocabulary {names[0]}, this run has {names[1]}: words "
            "would get each other's embeddings. Set data.vocab back; the folder tokenizer of the "
            "run's --workdir holds it."
        )


def _other_data(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between the data sets of one name, in words."""
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
