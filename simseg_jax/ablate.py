"""Many training runs of one configuration, and the table of their results beside the paper's."""

import itertools
import json
from pathlib import Path
from typing import Any

from simseg_jax.config import RunConfig, load_config
from simseg_jax.data.pairs import content, open_source
from simseg_jax.data.testsets.labelled import labelled_source
from simseg_jax.data.testsets.segmentation import segmentation_source
from simseg_jax.data.text import load_tokenizer
from simseg_jax.evaluators.build import entries_of, summary
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
from simseg_jax.runtime.command_line import accepted, add_config_option, cache_programs, make_parser
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.files import digest, read_json, write_json
from simseg_jax.runtime.processes import exit_stopped
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.settings import changed, first_difference, to_json
from simseg_jax.train import open_examples, train
from simseg_jax.training.resume import identity

EPILOG = """examples:
  python -m simseg_jax.ablate --config=shapes --workdir=runs/loda --table=loda
  python -m simseg_jax.ablate --config=shapes --workdir=runs/temperature \\
      --set=model.temperature=0.03,0.07,0.2 --set=seed=0,1 --config.steps=300
  one run per job of a SLURM array; then the same command without --only writes the table:
  python -m simseg_jax.ablate --config=vits16 --workdir=runs/table12 \\
      --table=training --only=$SLURM_ARRAY_TASK_ID

Tables: training (table 12 of the paper: M^I x M^T in training), loda (LoDA, mean and CLS pooling:
segmentation, retrieval as in tables 6 and 7, classification as in table 8), padding (text pooling
with and without [PAD]). Every run has its own folder in --workdir; the same command skips finished
runs and continues the interrupted one. When all runs are done, table.csv and table.png are written
to --workdir.
"""
RESPONSES = (1, 3, 5)
# The paper's numbers are of ViT-S; it has none for CLS pooling and masked padding. RSUM is the sum
# of the recalls at 1, 5 and 10 in both directions, in percent (tables 6 and 7).
WITH_LODA, WITHOUT = ("loda",), ("mean",)
TABLES = {
    "training": Table(
        "Responses per channel in training (paper, table 12)",
        {"model.m_text": RESPONSES, "model.m_image": RESPONSES},
        paper_rows(
            list(itertools.product(RESPONSES, RESPONSES)),
            voc=(40.9, 48.7, 37.3, 54.1, 55.3, 51.9, 54.3, 56.3, 56.6),
        ),
    ),
    "loda": Table(
        "Pooling: locality-driven (LoDA), dense (mean), CLS tokens",
        {"model.pool": ("loda", "mean", "cls")},
        {
            **paper_rows(
                [WITH_LODA, WITHOUT],
                voc=(56.6, 19.1),
                context=(25.8, 11.0),
                coco_object=(27.2, 12.5),
            ),
            "flickr30k/rsum": {WITH_LODA: 507.7, WITHOUT: 506.2},
            "coco/rsum": {WITH_LODA: 384.6, WITHOUT: 376.3},
            "imagenet/top1": {WITH_LODA: 0.471, WITHOUT: 0.466},
        },
    ),
    "padding": Table(
        "Text pooling in training: with or without [PAD]",
        {"model.mask_padding": (False, True)},
        paper_rows([(False,)], voc=(56.6,)),
    ),
}


@report_user_errors
def main() -> None:
    """Trains the missing runs; prints and writes the table when all are done."""
    parser = make_parser("ablate", "Trains a configuration under several settings.", EPILOG)
    add_config_option(parser)
    parser.add_argument("--workdir", required=True, help="folder for all runs and the table")
    add_table_options(parser, TABLES)
    parser.add_argument(
        "--only", type=accepted(whole(0)), help="train only this run of the table, counted from 0"
    )
    args, overrides = parser.parse_known_args()
    cache_programs()
    check_table_options(args, TABLES)
    base = load_config(args.config, overrides)
    table = TABLES[args.table] if args.table else None
    table = table or Table("Ablation", parse_values(base, args.set), {})
    combinations = list(itertools.product(*table.values.values()))
    if args.only is not None and args.only >= len(combinations):
        raise UserError(f"--only={args.only}: the table has the runs 0 to {len(combinations) - 1}.")
    workdir = Path(args.workdir)
    rows, missing = [], 0
    for number, combination in enumerate(combinations):
        row = dict(zip(table.values, combination, strict=True))
        config = changed(base, row)
        folder = workdir / name_of(table, combination)
        inputs = inputs_of(config)
        results = finished(folder, config, inputs)
        if results is None and args.only in (None, number):
            print(f"Run {number + 1} of {len(combinations)}: {folder.name}", flush=True)
            results = run(config, folder, inputs)
        if results is None:
            missing += 1
            continue
        rows.append(row | summary(results) | paper_columns(table, combination))
    if missing:
        print(f"{len(rows)} of {len(combinations)} runs are done in {workdir}; {missing} to go.")
        return
    print(format_rows(table, rows))
    write_table(workdir, table, rows)
    print(f"{len(rows)} runs; table.csv and table.png are in {workdir}")


def name_of(table: Table, combination: tuple) -> str:
    """The folder of a run, such as "m_text=3,m_image=5"."""
    keys = (key.rpartition(".")[2] for key in table.values)
    return ",".join(f"{key}={value}" for key, value in zip(keys, combination, strict=True))


def inputs_of(config: RunConfig) -> dict[str, Any]:
    """Identifies the content of a run's inputs: vocabulary, training pairs and test sets."""
    tokenizer = load_tokenizer(config.data.vocab)
    _, examples = open_examples(config, tokenizer)
    evals = {}
    for prefix, settings in entries_of(config.evals).items():
        kind = prefix.partition("/")[0]
        if kind == "retrieval":
            evals[prefix] = content(settings, open_source(settings, config.data.cache))
        elif kind == "classification":
            evals[prefix] = labelled_source(settings).content
        else:
            source = segmentation_source(settings)
            evals[prefix] = digest([(n, source.stamp(i)) for i, n in enumerate(source.names)])
    return {**identity(tokenizer, examples), "evals": evals}


def finished(folder: Path, config: RunConfig, inputs: dict[str, Any]) -> dict[str, float] | None:
    """The results of a finished run, else None; a `UserError` if settings or inputs differ."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    record = read_json(file, "Remove it to train this run again.")
    if record["config"] != json.loads(to_json(config)):
        raise UserError(
            f"{folder} was trained with another configuration: choose another --workdir, or remove "
            "the folder."
        )
    other = first_difference(record.get("inputs", {}), inputs)
    if other:
        raise UserError(
            f"{folder} has results of other inputs, {other[0]} has changed since: choose another "
            "--workdir, or remove the folder."
        )
    return record["results"]


def run(config: RunConfig, folder: Path, inputs: dict[str, Any]) -> dict[str, float]:
    """Trains or continues a run and writes its result.json."""
    results = train(config, folder)
    if results is None:
        exit_stopped()
    if not results:
        raise UserError("An ablation compares evaluations: the configuration has none in evals.")
    record = {"results": results, "config": json.loads(to_json(config)), "inputs": inputs}
    write_json(folder / "result.json", record)
    return results


if __name__ == "__main__":
    main()
