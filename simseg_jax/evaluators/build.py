"""The evaluators of a configuration, each under a prefix for its results, such as "seg/voc"."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from simseg_jax.evaluators.classification import ClassificationConfig, ClassificationEvaluator
from simseg_jax.evaluators.retrieval import RetrievalConfig, RetrievalEvaluator
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.runtime.settings import entries
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.settings import SegmentationConfig


@dataclasses.dataclass(frozen=True)
class EvalsConfig:
    """The test sets of a run, by name."""

    seg: dict[str, SegmentationConfig] = entries(SegmentationConfig)
    retrieval: dict[str, RetrievalConfig] = entries(RetrievalConfig)
    classification: dict[str, ClassificationConfig] = entries(ClassificationConfig)


# Evaluators by kind. Each has `headline` (the name of its main result), `count` (of images) and
# run(params, progress), which yields (name, number).
KINDS: dict[str, Any] = {
    "seg": SegmentationEvaluator,
    "retrieval": RetrievalEvaluator,
    "classification": ClassificationEvaluator,
}


def entries_of(evals: EvalsConfig) -> dict[str, Any]:
    """Prefix -> settings of every test set."""
    return {
        f"{kind}/{name}": settings
        for kind in KINDS
        for name, settings in getattr(evals, kind).items()
    }


def summary(results: Mapping[str, float]) -> dict[str, float]:
    """The main result of every test set."""
    names = tuple(f"/{kind.headline}" for kind in KINDS.values())
    return {key: value for key, value in results.items() if key.endswith(names)}


def headlines(results: Mapping[str, float]) -> list[str]:
    """The results of `summary` as text."""
    return [f"{key} {value:.4f}" for key, value in summary(results).items()]


def make_evaluators(model: Model, test_sets: Mapping[str, Any], cache: str = "") -> dict[str, Any]:
    """Prefix -> evaluator. Raises a `UserError` now if data are missing.

    test_sets: prefix -> settings, see `entries_of`. cache: folder for indexes and copies of
    image-caption pairs, see `config.data.cache`.
    """
    kinds = {**KINDS, "retrieval": functools.partial(RetrievalEvaluator, cache=cache)}
    return {
        prefix: kinds[prefix.partition("/")[0]](model, settings)
        for prefix, settings in test_sets.items()
    }
