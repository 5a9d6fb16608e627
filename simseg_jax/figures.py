"""The paper's figures from a checkpoint or an evaluation: `python -m simseg_jax.figures KIND`."""

import argparse
import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from simseg_jax.config import first_segmentation
from simseg_jax.data.images import decode_image, resize
from simseg_jax.evaluate import evaluation_config, first_of
from simseg_jax.evaluators.retrieval import RetrievalEvaluator
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.models.simseg import bind, l2_normalize
from simseg_jax.reports.class_figures import draw_classes, draw_scores, read_table
from simseg_jax.reports.visualize import overlay, palette
from simseg_jax.runtime.command_line import (
    accepted,
    add_checkpoint_options,
    add_evals_options,
    add_setting,
    cache_programs,
    make_parser,
)
from simseg_jax.runtime.errors import UserError, report_user_errors, require_file
from simseg_jax.runtime.ranges import whole
from simseg_jax.weights.load import TrainedModel, load_model
from simseg_jax.zeroshot.settings import SegmentationConfig

EPILOG = """examples:
  figures 3 and 10, similarities of patches with their image and with captions:
    python -m simseg_jax.figures responses --checkpoint=runs/shapes --output=figures/responses \\
        --image=assets/scene.png --caption="a leaf and an apple on the water" \\
        --caption="a leaf and a wheel on the water"
  figures 11 to 13, masks with and without dense CRF:
    python -m simseg_jax.figures gallery --checkpoint=runs/shapes --count=6 --output=figures/gallery
  the images nearest to captions of a retrieval test set, each caption's own image framed:
    python -m simseg_jax.figures retrieved --checkpoint=runs/shapes --output=figures/retrieved
  figure 7, sorted IoU per class of one or several evaluations:
    python -m simseg_jax.figures classes --output=figures/classes \\
        --table=LoDA=runs/shapes/evaluation-700/shapes --table=mean=runs/mean/evaluation-700/shapes
  figure 14, scores of the classes on images that show them and on the others:
    python -m simseg_jax.figures scores --table=runs/shapes/evaluation-700/shapes \\
        --output=figures/scores

Every figure is written as OUTPUT.png and OUTPUT.pdf. --table takes the classes.csv that evaluate
writes, or its folder.
"""
CELL = 1.9  # Side of a panel in inches.


@report_user_errors
def main() -> None:
    """Draws the figure that the command line asks for."""
    parser = make_parser("figures", "Draws the paper's figures.", EPILOG)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    responses = kinds.add_parser("responses", help="similarity maps of an image for captions")
    add_checkpoint_options(responses)
    responses.add_argument("--image", required=True, help="image file")
    responses.add_argument("--caption", action="append", required=True, help="may be repeated")
    add_setting(responses, SegmentationConfig, "resolution", "side in pixels the model sees")
    gallery = kinds.add_parser("gallery", help="images, ground truth, masks without and with CRF")
    add_checkpoint_options(gallery)
    add_evals_options(gallery)
    gallery.add_argument(
        "--count",
        type=accepted(whole(1, 1000)),
        default=6,
        help="images, spread over the test set",
    )
    retrieved = kinds.add_parser("retrieved", help="captions and the images nearest to them")
    add_checkpoint_options(retrieved)
    add_evals_options(retrieved)
    retrieved.add_argument(
        "--count", type=accepted(whole(1, 1000)), default=6, help="captions, spread over all"
    )
    classes = kinds.add_parser("classes", help="sorted IoU per class")
    scores = kinds.add_parser("scores", help="scores of a class on images with and without it")
    for kind in (classes, scores):
        kind.add_argument(
            "--table", action="append", required=True, help="[NAME=]folder of an evaluation"
        )
    for kind in kinds.choices.values():
        kind.add_argument("--output", required=True, help="file name without suffix")
    args, overrides = parser.parse_known_args()
    if overrides and args.kind not in ("gallery", "retrieved"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    cache_programs()
    if args.kind == "responses":
        figure = draw_responses(args)
    elif args.kind == "gallery":
        figure = draw_gallery(args, overrides)
    elif args.kind == "retrieved":
        figure = draw_retrieved(args, overrides)
    elif args.kind == "classes":
        figure = draw_classes([read_table(text) for text in args.table])
    else:
        if len(args.table) > 1:
            raise UserError("One --table is enough: scores of two models have different scales.")
        figure = draw_scores(read_table(args.table[0]))
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_name(path.name + suffix), dpi=150)
    print(f"Wrote {path}.png and {path}.pdf")


class Responses(NamedTuple):
    """The responses of one image to itself and to n captions.

    self_map: float [g, g], s^I2I, the cosine of every patch and the image's own embedding. maps:
    [n, g, g], s^T2I of every caption. scores: [n], image-text scores.
    """

    image: np.ndarray
    self_map: np.ndarray
    maps: np.ndarray
    scores: np.ndarray


def responses_of(
    model: TrainedModel, image: Image.Image, captions: Sequence[str], settings: SegmentationConfig
) -> Responses:
    """Section 3.1 of the paper; settings: resolution, m_image and m_text of an evals.seg entry."""
    pixels = resize(image, settings.resolution)
    ids, mask = model.encoder.batch(captions)

    @jax.jit
    def respond(params, pixels, ids, mask):
        network = bind(model.graphdef, params)
        _, tokens = network.encode_image(network.normalize(pixels[None]))
        own = network.pool_image(tokens, settings.m_image)[0]
        texts = network.encode_text(ids, mask, m=settings.m_text, mask_padding=True)
        patches = l2_normalize(tokens[0, 1:])
        return patches @ own, texts @ patches.T, texts @ own

    self_map, maps, scores = map(np.asarray, respond(model.params, pixels, ids, mask))
    grid = settings.resolution // model.patch_size
    return Responses(pixels, self_map.reshape(grid, grid), maps.reshape(-1, grid, grid), scores)


def draw_responses(args: argparse.Namespace):
    """Figures 3 and 10: the image, s^I2I, and s^T2I of every caption on one scale."""
    file = require_file(Path(args.image), "the image")
    image = decode_image(file.read_bytes(), str(file))
    model = load_model(args.checkpoint, args.step)
    settings = first_segmentation(model.config)
    settings = dataclasses.replace(settings, resolution=args.resolution or settings.resolution)
    settings.check_patches(model.patch_size)
    answer = responses_of(model, image, args.caption, settings)
    figure, axes = _panels(1, 2 + len(args.caption), extra=0.6)
    axes[0, 0].imshow(answer.image)
    axes[0, 0].set_title("image", fontsize=8)
    axes[0, 1].imshow(answer.self_map)
    axes[0, 1].set_title("$s^{I2I}$", fontsize=8)
    # One scale for all captions, so that an edit that weakens the response shows.
    limits = {"vmin": answer.maps.min(), "vmax": answer.maps.max()}
    for axis, caption, values, score in zip(
        axes[0, 2:], args.caption, answer.maps, answer.scores, strict=True
    ):
        axis.imshow(values, **limits)
        axis.set_title(f"{textwrap.fill(caption, 24)}\n{score:.3f}", fontsize=8)
    return figure


def draw_gallery(args: argparse.Namespace, overrides: list[str]):
    """Figures 11 to 13: one row per image."""
    # Imported late: only figures need it, and it takes a second.
    from matplotlib.patches import Patch

    model = load_model(args.checkpoint, args.step)
    config = evaluation_config(model.config, args.config, overrides)
    _, settings = first_of(config, args.test_set, "seg")
    if settings.protocol != "paper":
        raise UserError("A gallery with and without dense CRF needs protocol=paper.")
    variants = [dataclasses.replace(settings, refine=refine) for refine in ("none", "crf")]
    evaluator = SegmentationEvaluator(model, *variants)
    count = min(args.count, evaluator.count)
    indices = np.linspace(0, evaluator.count - 1, count).round().astype(int).tolist()
    titles = ("image", "ground truth", "without CRF", "with CRF")
    figure, axes = _panels(count, len(titles), extra=0.5)
    seen: set[int] = set()
    for row, (example, masks, _) in enumerate(evaluator.predictions(model.params, indices)):
        image = np.asarray(decode_image(example["image"], example["name"]))
        truth = np.where(example["mask"] == 255, 0, example["mask"])
        shown = [truth, *masks]
        for column, picture in enumerate([image, *(overlay(image, m, 0.75) for m in shown)]):
            axes[row, column].imshow(picture)
            if row == 0:
                axes[row, column].set_title(titles[column], fontsize=9)
        labels = sorted({int(x) for mask in shown for x in np.unique(mask)} - {0})
        seen.update(labels)
        names = [evaluator.class_names[label] for label in labels]
        axes[row, 0].set_ylabel(textwrap.fill(", ".join(names), 22), fontsize=7)
    colours = palette() / 255
    patches = [
        Patch(facecolor=tuple(colours[label]), label=evaluator.class_names[label])
        for label in sorted(seen)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=7)
    return figure


def draw_retrieved(args: argparse.Namespace, overrides: list[str]):
    """One row per caption: the five images nearest to it; its own image is framed."""
    model = load_model(args.checkpoint, args.step)
    config = evaluation_config(model.config, args.config, overrides)
    _, settings = first_of(config, args.test_set, "retrieval")
    evaluator = RetrievalEvaluator(model, settings, config.data.cache)
    ranked = evaluator.rank(model.params, tqdm)
    count = min(args.count, len(ranked.texts))
    figure, axes = _panels(count, 5, extra=0.3 * count)
    for row, text in enumerate(np.linspace(0, len(ranked.texts) - 1, count).round().astype(int)):
        for axis, image in zip(axes[row], ranked.nearest[1][text, :5], strict=True):
            if image < 0:
                axis.set_axis_off()
                continue
            example = evaluator.source[int(image)]
            axis.imshow(np.asarray(decode_image(example["image"], str(example["name"]))))
            if image == ranked.owners[text]:
                for side in axis.spines.values():
                    side.set(edgecolor="tab:green", linewidth=4)
        title = textwrap.shorten(ranked.texts[text], 90)
        # The caption is as wide as the row: as a title it would push the second column aside. The
        # blank title keeps the line free.
        first = axes[row, 0]
        first.set_title(" ", fontsize=8)
        first.text(0, 1.04, title, fontsize=8, transform=first.transAxes, in_layout=False)
    return figure


def _panels(rows: int, columns: int, extra: float) -> tuple[Any, Any]:
    """A figure with a grid of square panels without ticks, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    size = (CELL * columns, CELL * rows + extra)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


if __name__ == "__main__":
    main()
