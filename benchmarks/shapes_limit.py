"""What limits the score of the embedded demo: the patch grid, the maps, or the choice of classes.

    python benchmarks/shapes_limit.py runs/shapes

For a finished WORKDIR, on the scenes it was evaluated on, the mean IoU of
- grid: the ground truth itself, by majority vote on the patch grid and upsampled (the bound of
  any model without refinement);
- foreground given: true object pixels, each labelled with the strongest map of a present class;
- classes given: the model's masks of exactly the classes that are present;
- as evaluated: the paper protocol, threshold included;
- with dense CRF: the same, refined (if pydensecrf is installed).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from simseg_jax.checkpoint import load_model
from simseg_jax.config import segmentation_eval
from simseg_jax.errors import UserError
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.masks.postprocess import closing, compose, min_max, resize_nearest, upsample
from simseg_jax.metrics import class_iou, confusion_matrix

ROWS = ("grid", "foreground given", "classes given", "as evaluated")


def majority_on_grid(truth: np.ndarray, size: int, patch: int, classes: int) -> np.ndarray:
    """Truth [H, W] as the best label map [size, size] that is constant on every patch."""
    one_hot = np.eye(classes, dtype=int)[resize_nearest(truth, size, size)]
    votes = one_hot.reshape(size // patch, patch, size // patch, patch, classes).sum(axis=(1, 3))
    return np.kron(votes.argmax(axis=-1), np.ones((patch, patch), int))


def with_truth(response, truths, patch: int, settings):
    """(masks of exactly the present classes, strongest present class everywhere) [B, S, S]."""
    classes = np.arange(response.scores.shape[1])
    present = jnp.array([np.isin(classes, truth) & (classes > 0) for truth in truths])
    drawn = jnp.take_along_axis(present, response.classes, axis=1)
    maps = min_max(response.similarity)
    masks = closing(upsample(maps > 0.5, patch), settings.closing)
    given = compose(masks, response.scores, response.classes, drawn)
    strongest = jnp.where(drawn[:, :, None, None], maps, -1).argmax(axis=1)
    labels = jnp.take_along_axis(response.classes[:, :, None, None], strongest[:, None], axis=1)
    return np.asarray(given), np.asarray(upsample(labels[:, 0], patch))


def all_confusions(model, settings) -> dict[str, np.ndarray]:
    """Row of the table -> confusion matrix, without the row that refines."""
    evaluator = evaluator_with(model, settings)
    classes = len(evaluator.class_names)
    # The oracles need the maps of all classes, not of the candidates only.
    everything = evaluator_with(model, settings, candidates=classes)
    patch, size = model.config.model.image.patch_size, settings.resolution
    confusions = {name: np.zeros((classes, classes), np.int64) for name in ROWS}
    batches = zip(
        evaluator.predictions(model.params), everything.predictions(model.params), strict=True
    )
    for (examples, predictions, _), (_, _, response) in batches:
        truths = [example["mask"] for example in examples]
        given, strongest = with_truth(response, truths, patch, settings)
        for i, truth in enumerate(truths):
            answers = (
                majority_on_grid(truth, size, patch, classes),
                np.where(resize_nearest(truth, size, size) > 0, strongest[i], 0),
                given[i],
                predictions[i],
            )
            for name, answer in zip(ROWS, answers, strict=True):
                answer = resize_nearest(answer, *truth.shape)
                confusions[name] += confusion_matrix(answer, truth, classes)
    return confusions


def evaluator_with(model, settings, **changes) -> SegmentationEvaluator:
    """The evaluator of a trained model with some of its settings changed."""
    changed = segmentation_eval(**{**settings, **changes})
    return SegmentationEvaluator(model.graphdef, model.mesh, model.encoder, changed)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What limits the score of configs/shapes.py.")
    parser.add_argument("workdir", help="folder of a finished run")
    model = load_model(parser.parse_args().workdir)
    settings = model.config.evals.seg.shapes
    with jax.set_mesh(model.mesh):
        evaluator = evaluator_with(model, settings)
        confusions = all_confusions(model, settings)
        scores = {name: class_iou(matrix) for name, matrix in confusions.items()}
        try:
            refined = dict(evaluator_with(model, settings, refine="pydensecrf").run(model.params))
            ious = [refined.get(f"iou/{name}", np.nan) for name in evaluator.class_names]
            scores["with dense CRF"] = np.array(ious)
        except UserError as error:
            print(error)
    print(f"{'mIoU':>24}  " + " ".join(f"{name[:6]:>6}" for name in evaluator.class_names))
    for name, ious in scores.items():
        print(f"{name:<17}{np.nanmean(ious):>7.4f}  " + " ".join(f"{x:6.3f}" for x in ious))
    for name in ("classes given", "as evaluated"):
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
