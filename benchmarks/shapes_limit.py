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
import numpy as np

from simseg_jax.checkpoint import load_model
from simseg_jax.config import segmentation_eval
from simseg_jax.errors import UserError
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.masks.postprocess import closing, compose, min_max, resize_nearest, upsample
from simseg_jax.metrics import class_iou, confusion_matrix


def majority_on_grid(truth: np.ndarray, size: int, patch: int, classes: int) -> np.ndarray:
    """Truth [H, W] as the best label map [size, size] that is constant on every patch."""
    one_hot = np.eye(classes, dtype=int)[resize_nearest(truth, size, size)]
    votes = one_hot.reshape(size // patch, patch, size // patch, patch, classes).sum(axis=(1, 3))
    return np.kron(votes.argmax(axis=-1), np.ones((patch, patch), int))


def oracle_confusions(model, settings) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Confusion matrices by name; numbers of classes drawn, drawn rightly, present."""
    evaluator = evaluator_with(model, settings)
    classes = len(evaluator.class_names)
    everything = evaluator_with(model, settings, candidates=classes)
    patch, size = model.config.model.image.patch_size, settings.resolution
    names = ("grid", "foreground given", "classes given", "as evaluated")
    confusions = {name: np.zeros((classes, classes), np.int64) for name in names}
    counts = np.zeros(3, np.int64)
    batches = zip(
        evaluator.predictions(model.params), everything.predictions(model.params), strict=True
    )
    for (examples, predictions, used), (_, _, response) in batches:
        truths = [example["mask"] for example in examples]
        present = np.stack([np.isin(np.arange(classes), truth) for truth in truths])
        present[:, 0] = False
        drawn = np.take_along_axis(present, response.classes, axis=1)
        maps = min_max(response.similarity)
        masks = closing(upsample(maps > 0.5, patch), settings.closing)
        given = np.asarray(compose(masks, response.scores, response.classes, drawn))
        strongest = np.where(drawn[:, :, None, None], maps, -1).argmax(axis=1)
        labels = np.take_along_axis(response.classes[:, :, None, None], strongest[:, None], axis=1)
        labels = np.kron(labels[:, 0], np.ones((patch, patch), int))
        hits = np.take_along_axis(present, used.classes, axis=1) & used.drawn
        counts += (used.drawn.sum(), hits.sum(), present.sum())
        for i, truth in enumerate(truths):
            answers = (
                majority_on_grid(truth, size, patch, classes),
                np.where(resize_nearest(truth, size, size) > 0, labels[i], 0),
                given[i],
                predictions[i],
            )
            for name, answer in zip(names, answers, strict=True):
                answer = resize_nearest(answer, *truth.shape)
                confusions[name] += confusion_matrix(answer, truth, classes)
    return confusions, counts


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
        confusions, (drawn, hits, present) = oracle_confusions(model, settings)
        names = evaluator_with(model, settings).class_names
        scores = {name: class_iou(matrix) for name, matrix in confusions.items()}
        try:
            evaluator = evaluator_with(model, settings, refine="pydensecrf")
        except UserError:
            print("pydensecrf is not installed: no row with dense CRF.")
        else:
            refined = dict(evaluator.run(model.params))
            scores["with dense CRF"] = np.array([refined[f"iou/{name}"] for name in names])
    print(f"{'mIoU':>24}  " + " ".join(f"{name[:6]:>6}" for name in names))
    for name, ious in scores.items():
        print(f"{name:<17}{np.nanmean(ious):>7.4f}  " + " ".join(f"{x:6.3f}" for x in ious))
    print(f"Classes drawn: precision {hits / drawn:.3f}, recall {hits / present:.3f}.")


if __name__ == "__main__":
    main()
