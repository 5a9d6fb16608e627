"""All evaluators of a configuration, by the prefix of their numbers, such as "seg/voc"."""

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
    """The test sets of a run, each under a name of its own."""

    seg: dict[str, SegmentationConfig] = entries(SegmentationConfig)
    retrieval: dict[str, RetrievalConfig] = entries(RetrievalConfig)
    classification: dict[str, ClassificationConfig] = entries(ClassificationConfig)


# Each has `headline`, `count`, and run(params, progress), which yields names and numbers.
KINDS: dict[str, Any] = {
    "seg": SegmentationEvaluator,
    "retrieval": RetrievalEvaluator,
    "classification": ClassificationEvaluator,
}


def entries_of(evals: EvalsConfig) -> dict[str, Any]:
    """Every entry of `evals` by its prefix."""
    return {
        f"{kind}/{name}": settings
        for kind in KINDS
        for name, settings in getattr(evals, kind).items()
    }


def summary(results: Mapping[str, float]) -> dict[str, float]:
    """The one number per test set that sums it up."""
    names = tuple(f"/{kind.headline}" for kind in KINDS.values())
    return {key: value for key, value in results.items() if key.endswith(names)}


def headlines(results: Mapping[str, float]) -> list[str]:
    """The numbers of `summary` as text."""
    return [f"{key} {value:.4f}" for key, value in summary(results).items()]


def make_evaluators(model: Model, test_sets: Mapping[str, Any], cache: str = "") -> dict[str, Any]:
    """test_sets: settings by prefix, as of `entries_of`. Missing data are found now.

    cache: folder for indexes and copies of image-caption pairs, as `config.data.cache`.
    """
    kinds = {**KINDS, "retrieval": functools.partial(RetrievalEvaluator, cache=cache)}
    return {
        prefix: kinds[prefix.partition("/")[0]](model, settings)
        for prefix, settings in test_sets.items()
    }
