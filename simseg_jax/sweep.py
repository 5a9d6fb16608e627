"""Evaluates many settings of one test set: the paper's evaluation tables and any others."""

import itertools
from pathlib import Path

from simseg_jax.evaluate import collect, evaluation_config, first_of
from simseg_jax.evaluators.metrics import mean_iou
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.models.vit import ViTConfig
from simseg_jax.reports.tables import (
    Table,
    add_table_options,
    check_table_options,
    format_rows,
    paper_columns,
    paper_rows,
    parse_values,
    write_table,
)
from simseg_jax.runtime.command_line import (
    add_checkpoint_options,
    add_evals_options,
    cache_programs,
    make_parser,
    results_folder,
)
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.files import make_writable
from simseg_jax.runtime.processes import keeping
from simseg_jax.runtime.settings import changed
from simseg_jax.weights.load import TrainedModel, load_model
from simseg_jax.zeroshot.engine import before_encoder
from simseg_jax.zeroshot.settings import SegmentationConfig

EPILOG = """examples:
  python -m simseg_jax.sweep --checkpoint=runs/shapes --table=sigma
  python -m simseg_jax.sweep --checkpoint=runs/shapes --set=top_k=5,10,20 --set=refine=none,crf

Tables of the paper: sigma (2), resolution (3), crf (4), responses (11: M^I x M^T at evaluation).
--set makes other tables, over all combinations of the values. A sweep evaluates one test set: the
first one, or the one that --test_set names. Settings that differ only after the encoder share one
pass over the images. --output receives table.csv, table.png and one record per image: the same
command continues a killed sweep and evaluates again images that have changed since.
"""
SIGMAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
RESOLUTIONS = (224, 288, 336, 384, 448)
RESPONSES = (1, 3, 5)
# mIoU on VOC, Context and COCO-Object with ViT-S (paper, tables 2, 3, 4 and 11), in percent.
TABLES = {
    "sigma": Table(
        "Weight of the standard deviation in the class threshold (paper, table 2)",
        {"sigma_weight": SIGMAS},
        paper_rows(
            [(sigma,) for sigma in SIGMAS], voc=(51.0, 53.0, 55.1, 56.6, 57.1, 57.8, 56.4, 51.7)
        ),
    ),
    "resolution": Table(
        "Resolution at evaluation (paper, table 3)",
        {"resolution": RESOLUTIONS},
        paper_rows([(size,) for size in RESOLUTIONS], voc=(55.9, 56.6, 56.2, 55.0, 54.4)),
    ),
    "crf": Table(
        "Mask refinement (paper, table 4)",
        {"refine": ("none", "crf")},
        paper_rows(
            [("none",), ("crf",)], voc=(53.8, 56.6), context=(23.5, 25.8), coco_object=(25.7, 27.2)
        ),
    ),
    "responses": Table(
        "Responses per channel at evaluation (paper, table 11)",
        {"m_text": RESPONSES, "m_image": RESPONSES},
        paper_rows(
            list(itertools.product(RESPONSES, RESPONSES)),
            voc=(55.4, 56.3, 56.6, 45.1, 45.2, 45.9, 33.3, 33.0, 33.0),
        ),
    ),
}


@report_user_errors
def main() -> None:
    """Evaluates all combinations, prints them beside the paper's numbers, writes CSV and a plot."""
    parser = make_parser(
        "sweep", "Evaluates a checkpoint under many settings of one test set.", EPILOG
    )
    add_checkpoint_options(parser)
    add_evals_options(parser)
    add_table_options(parser, TABLES)
    parser.add_argument("--output", help="folder; default: CHECKPOINT/sweep-STEP/TABLE")
    args, overrides = parser.parse_known_args()
    cache_programs()
    check_table_options(args, TABLES)
    model = load_model(args.checkpoint, args.step)
    config = evaluation_config(model.config, args.config, overrides)
    name, settings = first_of(config, args.test_set, "seg")
    if args.table:
        table = fit(TABLES[args.table], model.config.model.image)
    else:
        table = Table(f"Settings of {name}", parse_values(settings, args.set), {})
    title = args.table or "-".join(table.values)
    folder = Path(args.output or results_folder(args.checkpoint) / f"sweep-{model.step}" / title)
    with keeping(lambda: f"Records are kept in {folder}: the same command continues from there."):
        rows = sweep(model, settings, table, folder)
    print(format_rows(table, rows))
    write_table(folder, table, rows)
    print(f"{len(rows)} settings on {name}; table.csv and table.png are in {folder}")


def fit(table: Table, image: ViTConfig) -> Table:
    """The table with resolutions in proportion to the model's image size, 224 in the paper."""
    if "resolution" not in table.values or image.image_size == 224:
        return table
    patch = image.patch_size
    sizes = [round(s * image.image_size / 224 / patch) * patch for s in table.values["resolution"]]
    paper = {
        data: dict(zip(((size,) for size in sizes), row.values(), strict=True))
        for data, row in table.paper.items()
    }
    return table._replace(values={"resolution": tuple(sizes)}, paper=paper)


def sweep(
    model: TrainedModel, settings: SegmentationConfig, table: Table, folder: Path
) -> list[dict]:
    """One row per combination: its values, "miou" and the paper's numbers as "paper DATA"."""
    # Settings that agree in everything up to the encoder share a pass over the images.
    passes: dict[tuple, list[tuple]] = {}
    for combination in itertools.product(*table.values.values()):
        setting = changed(settings, dict(zip(table.values, combination, strict=True)))
        setting.check_patches(model.patch_size)
        passes.setdefault(before_encoder(setting), []).append((combination, setting))
    make_writable(folder)
    rows = []
    for number, group in enumerate(passes.values(), 1):
        evaluator = SegmentationEvaluator(model, *[settings for _, settings in group])
        name = f"pass {number} of {len(passes)}"
        records, _ = collect(model, evaluator, name, folder / f"pass-{number}")
        for number, (combination, _) in enumerate(group):
            miou = mean_iou(evaluator.ious(evaluator.confusion(records, number)))
            row = {**dict(zip(table.values, combination, strict=True)), "miou": miou}
            rows.append(row | paper_columns(table, combination))
    return rows


if __name__ == "__main__":
    main()
