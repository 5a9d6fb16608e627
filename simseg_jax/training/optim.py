"""AdamW, the warm-up and cosine schedule, and per-parameter rules by regular expression."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from simseg_jax.models.simseg import path_string
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import (
    BELOW_ONE,
    DECAY,
    LEARNING_RATE,
    SHARE,
    Accepts,
    number,
    several,
)
from simseg_jax.runtime.settings import setting

Rules = Sequence[tuple[str, float]]


def _is_rule(value: Any) -> bool:
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)):
        return False
    try:
        re.compile(value[0])
    except (re.error, RecursionError, OverflowError):
        return False
    return number(0, 1e6).allows(value[1])


RULES = several(
    Accepts("(a regular expression, a number from 0 to 1e+06)", _is_rule),
    range(1, 1001),
    "at least one rule",
)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning-rate schedule and the multipliers of single parameters."""

    lr: float = setting(3e-4, "peak learning rate", LEARNING_RATE)
    warmup: float = setting(0.025, "share of the steps with linear warm-up from 0", BELOW_ONE)
    final_lr: float = setting(
        0.1, "learning rate at the end of the cosine, as a share of the peak", SHARE
    )
    b1: float = setting(0.9, "AdamW beta 1", BELOW_ONE)
    b2: float = setting(0.98, "AdamW beta 2", BELOW_ONE)
    eps: float = setting(1e-6, "AdamW epsilon", number(1e-15, 0.1))
    weight_decay: float = setting(0.2, "decoupled weight decay", DECAY)
    clip_norm: float = setting(0.0, "bound on the global gradient norm; 0: none", number(0, 1e6))
    lr_rules: tuple[tuple[str, float], ...] = setting(
        ((".*", 1.0),), "(path pattern, lr multiplier), first match; 0 freezes", RULES
    )
    decay_rules: tuple[tuple[str, float], ...] = setting(
        ((".*", 1.0),), "(path pattern, weight-decay multiplier), first match", RULES
    )


def cosine_schedule(
    peak: float, steps: int, warmup_steps: int, final_fraction: float
) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup_steps`, then half a cosine to `final_fraction * peak`."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak, peak, warmup_steps, steps, end_value=final_fraction * peak
    )


def match_rules(rules: Rules, params, what: str):
    """The value of the first rule whose pattern fully matches each parameter's path.

    Paths are those of `path_string`. A `UserError` names a parameter without a rule and a rule
    without a parameter: a typo must not silently change a run. what: names the rules.
    """
    used, missed = set(), []

    def value(path, _leaf) -> float:
        name = path_string(path)
        for index, (pattern, factor) in enumerate(rules):
            if re.fullmatch(pattern, name):
                used.add(index)
                return float(factor)
        missed.append(name)
        return 0.0

    values = jax.tree_util.tree_map_with_path(value, params)
    unused = [pattern for index, (pattern, _) in enumerate(rules) if index not in used]
    if missed:
        raise UserError(f'{what} covers no {missed[0]}: add a last rule (".*", value).')
    if unused:
        raise UserError(f"{what} has a pattern that matches no parameter first: {unused[0]!r}.")
    return values


def frozen(lr_rules: Rules, params):
    """A bool per parameter: whether its learning rate is multiplied by 0."""
    factors = match_rules(lr_rules, params, "optim.lr_rules")
    return jax.tree.map(lambda factor: factor == 0, factors)


def adamw(optim: OptimConfig, schedule: optax.Schedule, params) -> optax.GradientTransformation:
    """AdamW whose rules multiply the learning rate and the weight decay per parameter.

    A learning-rate multiplier of 0 freezes a parameter: it has no moments and never changes.
    schedule: step -> learning rate before its multiplier. params: arrays or shape structs.
    """
    lr = match_rules(optim.lr_rules, params, "optim.lr_rules")
    decay = match_rules(optim.decay_rules, params, "optim.decay_rules")
    groups = jax.tree.map(lambda *factors: factors, lr, decay)
    labels = jax.tree.map(str, groups, is_leaf=lambda x: isinstance(x, tuple))

    def group_update(lr_factor: float, decay_factor: float) -> optax.GradientTransformation:
        if lr_factor == 0:
            return optax.set_to_zero()
        return optax.chain(
            optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
            optax.add_decayed_weights(optim.weight_decay * decay_factor),
            optax.scale_by_learning_rate(schedule),
            optax.scale(lr_factor),
        )

    pairs = set(zip(jax.tree.leaves(lr), jax.tree.leaves(decay), strict=True))
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        optax.partition({str(pair): group_update(*pair) for pair in pairs}, labels),
    )


def lars(
    schedule: optax.Schedule, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """LARS (You et al., 2017) as in the authors' linear probe, for every parameter, biases too.

    The gradient g, with weight decay added, is scaled by 0.001 * |parameter| / (|g| + 1e-8), or by
    1 if one of the norms is zero, and by the learning rate; then it is summed with momentum.
    """
    return optax.lars(schedule, weight_decay, eps=1e-8, momentum=momentum)
