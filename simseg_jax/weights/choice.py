"""Choosing one of the models in a file.

A checkpoint may hold a model several times, such as raw and averaged or student and teacher. The
names of their tensors have different prefixes. The user's key chooses one; without a key the
averaged model is taken.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection

import numpy as np

from simseg_jax.models.layers import BLOCKS
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.weights.containers import Tensors
from simseg_jax.weights.formats import VARIANTS

# Prefixes of averaged parameters, which authors usually evaluate.
AVERAGED = r"(^|[._/])(ema|teacher)([._/]|$)"
# Moments of an optimiser have the names of parameters, but are no model.
OPTIMIZER = r"(^|[./])opt(im|imizer|imizer_state|_state)?[./]"


def usual_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors under the names that `formats` knows, with stacked blocks split."""
    usual: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        for variant, known in VARIANTS.items():
            name = re.sub(variant, known, name)
        parts = {name: tensor}
        stacked = re.match(r"(.*Transformer/encoderblock)/(.*)", name)
        if stacked and tensor.ndim and len(tensor) <= BLOCKS:
            # big_vision can stack the parameters of all blocks in one array.
            parts = {f"{stacked[1]}_{i}/{stacked[2]}": part for i, part in enumerate(tensor)}
        twice = usual.keys() & parts.keys()
        if twice:
            raise UserError(
                f"The weights hold {some(sorted(twice))} twice, under two names that mean the same "
                "(such as with and without DDP's prefix module.)."
            )
        usual |= parts
    return usual


def prefixes(tensors: Tensors, signature: str) -> list[str]:
    """The prefixes ("", "teacher.", ...) of all models that have a tensor named `signature`."""
    cut = [name.removesuffix(signature) for name in tensors if name.endswith(signature)]
    return [p for p in cut if (not p or p[-1] in "./") and not re.search(OPTIMIZER, p)]


def choose(found: Collection[str], key: str, what: str) -> str:
    """The prefix in `found` that `key` names; without a key the only one or the averaged one.

    key: see `sources.split_key`. what: names the models in messages, such as "image encoder".
    """
    exact = [prefix for prefix in found if label(prefix) == key]
    within = [prefix for prefix in found if f".{key}." in f".{prefix}".replace("/", ".")]
    fitting = (exact or within) if key else list(found)
    if not fitting:
        raise UserError(
            f"There is no {what} under #{key}, only under {some(map(label, found))}: choose with "
            "FILE#KEY."
        )
    averaged = [prefix for prefix in fitting if re.search(AVERAGED, prefix)]
    if len(fitting) > 1:
        fitting = averaged or fitting
    if len(fitting) > 1:
        raise UserError(
            f"There is not one {what} but {len(fitting)}, under {some(map(label, fitting))}: "
            f"choose one with FILE#KEY, such as #{label(fitting[0])}."
        )
    return fitting[0]


def take(
    tensors: Tensors, prefix: str, found: Collection[str], unused: str
) -> tuple[dict[str, np.ndarray], str]:
    """(tensors of the model with this prefix, a sentence on which were taken and which ignored).

    The returned names lack the prefix. found: the prefixes of all models in the file. unused: a
    pattern for the names that the method does not need.
    """
    others = tuple(p for p in found if p != prefix and p.startswith(prefix))
    taken, rest = {}, []
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        foreign = not name.startswith(prefix) or name.startswith(others)
        if foreign or re.match(OPTIMIZER, inner) or re.fullmatch(unused, inner):
            rest.append(name)
        else:
            taken[inner] = tensor
    groups = Counter(_group(name, prefix) for name in rest)
    ignored = some(f"{name} ({count})" for name, count in groups.items()) or "none"
    where = f" under {label(prefix)}" if prefix else ""
    return taken, f"Taken: {len(taken)} tensors{where}; ignored: {ignored}."


def label(prefix: str) -> str:
    """The name of a prefix in messages and in `#KEY`."""
    return prefix.rstrip("./") or "."


def _group(name: str, prefix: str) -> str:
    """The name of an ignored tensor up to the first part that differs from `prefix`."""
    parts, others = re.split(r"[./]", name), re.split(r"[./]", prefix)
    pairs = zip(parts, others, strict=False)
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return ".".join(parts[: common + 1])
