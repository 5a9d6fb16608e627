"""What limits the score of the embedded demo: the patch grid, the maps, or the choice of classes.

    python benchmarks/shapes_limit.py runs/shapes

For a finished WORKDIR, on the scenes it was evaluated on, the mean IoU of
- grid: the ground truth itself, by majority vote on the patch grid and upsampled (the bound of
  any model without refinement);
- foreground given: true object pixels, each labelled with the strongest map of a present class;
- classes given: the model's masks of exactly the classes that are present, with p > 0.5;
- without refinement: the paper protocol with p > 0.5, threshold included;
- with dense CRF: as evaluated.
"""

import argparse
import dataclasses

import jax.numpy as jnp
import numpy as np

from simseg_jax.data.testsets.classes import class_names
from simseg_jax.evaluators.metrics import class_iou, confusion_matrix
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.masks.postprocess import resize_nearest
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.weights.load import load_model
from simseg_jax.zeroshot.paper import min_max

ORACLES = ("grid", "foreground given")


def majority_on_grid(truth: np.ndarray, size: int, patch: int, classes: int) -> np.ndarray:
    """Truth [H, W] as the best label map [size, size] that is constant on every patch."""
    one_hot = np.eye(classes, dtype=int)[resize_nearest(truth, size, size)]
    votes = one_hot.reshape(size // patch, patch, size // patch, patch, classes).sum(axis=(1, 3))
    return np.kron(votes.argmax(axis=-1), np.ones((patch, patch), int))


def oracle_confusions(model, settings) -> dict[str, np.ndarray]:
    """Confusion matrix of every row of the table that is given part of the truth."""
    # The oracles need the maps of all classes, not of the candidates only.
    count = len(class_names(settings))
    evaluator = evaluator_with(model, settings, {"candidates": count, "refine": "none"})
    patch, size = model.config.model.image.patch_size, settings.resolution
    confusions = {name: np.zeros((count, count), np.int64) for name in ORACLES}
    for example, _, response in evaluator.predictions(model.params, range(evaluator.count)):
        truth = example["mask"]
        present = np.isin(response.classes, truth) & (response.classes > 0)
        maps = np.asarray(min_max(jnp.asarray(response.similarity)))
        strongest = response.classes[np.where(present[:, None, None], maps, -1).argmax(axis=0)]
        strongest = resize_nearest(strongest, size, size)
        answers = (
            majority_on_grid(truth, size, patch, count),
            np.where(resize_nearest(truth, size, size) > 0, strongest, 0),
        )
        for name, answer in zip(ORACLES, answers, strict=True):
            answer = resize_nearest(answer, *truth.shape)
            confusions[name] += confusion_matrix(answer, truth, count)
    return confusions


def evaluator_with(model, settings, *changes: dict) -> SegmentationEvaluator:
    """The evaluator of a trained model, under each set of changes to its settings."""
    variants = [dataclasses.replace(settings, **change) for change in changes]
    return SegmentationEvaluator(model, *variants)


@report_user_errors
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What limits the score of configs/shapes.py.")
    parser.add_argument("workdir", help="folder of a finished run")
    model = load_model(parser.parse_args().workdir)
    settings = model.config.evals.seg.get("shapes")
    if settings is None:
        raise UserError("The run has no test set evals.seg.shapes: train configs/shapes.py.")
    confusions = oracle_confusions(model, settings)
    evaluator = evaluator_with(model, settings, {"refine": "none"}, {"refine": "crf"})
    records = list(evaluator.records(model.params))
    given = [record._replace(counts=[record.given]) for record in records]
    confusions["classes given"] = evaluator.confusion(given)
    confusions["without refinement"] = evaluator.confusion(records, 0)
    confusions["with dense CRF"] = evaluator.confusion(records, 1)
    scores = {name: class_iou(matrix) for name, matrix in confusions.items()}
    print(f"{'mIoU':>25}  " + " ".join(f"{name[:6]:>6}" for name in evaluator.class_names))
    for name, ious in scores.items():
        print(f"{name:<18}{np.nanmean(ious):>7.4f}  " + " ".join(f"{x:6.3f}" for x in ious))
    for name in ("classes given", "without refinement", "with dense CRF"):
        matrix = confusions[name]
        objects = matrix[1:].sum()
        right, missed = np.diagonal(matrix)[1:].sum() / objects, matrix[1:, 0].sum() / objects
        print(
            f"{name}: of the object pixels {right:.1%} right, {missed:.1%} missed, "
            f"{1 - right - missed:.1%} another class; "
            f"painted ground adds {matrix[0, 1:].sum() / objects:.1%}."
        )


if __name__ == "__main__":
    main()
