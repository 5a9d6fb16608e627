"""The evaluation command: a checkpoint and its test sets -> tables, JSON, CSV and pictures."""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from simseg_jax.config import RunConfig, load_config, resolved
from simseg_jax.evaluators.build import entries_of, headlines, make_evaluators
from simseg_jax.evaluators.earlier import Earlier
from simseg_jax.evaluators.measures import without_model
from simseg_jax.evaluators.records import Record, RecordStore, gather, material
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.reports.bootstrap import (
    NO_MODEL,
    Estimate,
    estimates,
    format_estimates,
    without_one_image,
)
from simseg_jax.reports.statistics import class_table, format_table, image_ious, write_csv
from simseg_jax.reports.visualize import write_contact_sheet
from simseg_jax.runtime.command_line import (
    accepted,
    add_checkpoint_options,
    add_evals_options,
    cache_programs,
    image_bar,
    make_parser,
    results_folder,
)
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.files import make_writable, write_json
from simseg_jax.runtime.processes import add_distributed_option, join_processes, keeping, only_run
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.settings import overridden, plain
from simseg_jax.weights.load import TrainedModel, load_model

EPILOG = """examples:
  python -m simseg_jax.evaluate --checkpoint=runs/shapes
  python -m simseg_jax.evaluate --checkpoint=runs/shapes --config.evals.seg.shapes.refine=none
  python -m simseg_jax.evaluate --checkpoint=runs/shapes --bootstrap \\
      --against=runs/mean/evaluation-700
  python -m simseg_jax.evaluate --checkpoint=runs/f8k --config=vits16 \\
      --config.evals.seg.voc.root=data/VOCdevkit/VOC2012 --output=runs/f8k/voc

--output receives result.json (numbers and settings) and, for segmentation, classes.csv, pictures of
the worst and best images, and one record per image. The same command continues a killed job. It
evaluates an image again if the size or modification time of the image or mask file has changed, and
all images if class names have changed. A mask that has the stored size of its image is rotated with
the image as EXIF says; where the size does not decide this, masks are counted and named. A test set
that cannot be evaluated does not stop the others, but the exit status is 2. With --distributed each
process of a SLURM job, TPU pod or MPI launch takes its share.

Segmentation is also measured with the classes of each image given: by the IoU of masks of exactly
these classes, without refinement (given), and by how often the patch most similar to a class lies
on it (points). --bootstrap adds 95 % intervals over draws of the images, and compares with what
needs no model: an empty mask, the image's largest class everywhere, the patch in its middle.
--against compares with another evaluation of the same images, of another model or under other
settings. The last rows repeat each difference without the image that adds most to it.
"""
WRITTEN = ("classes.csv", "worst.png", "best.png")  # For every segmentation test set.


@report_user_errors
def main() -> None:
    """Evaluates a checkpoint, prints the tables and writes everything into a folder."""
    parser = make_parser(
        "evaluate",
        "Evaluates a checkpoint on the test sets of its configuration (evals).",
        EPILOG,
    )
    add_checkpoint_options(parser)
    add_evals_options(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type")
    parser.add_argument("--output", help="folder; default: CHECKPOINT/evaluation-STEP")
    parser.add_argument(
        "--pictures",
        type=accepted(whole(0, 1000)),
        default=8,
        help="worst and best images; 0: none",
    )
    parser.add_argument(
        "--bootstrap",
        nargs="?",
        const=1000,
        default=0,
        type=accepted(whole(100, 100_000)),
        metavar="DRAWS",
        help="95 %% intervals from this many draws of the images, by default 1000",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="with --bootstrap: an --output to compare with, image by image; may be repeated",
    )
    add_distributed_option(parser)
    args, overrides = parser.parse_known_args()
    if args.distributed:
        join_processes()
    cache_programs()
    model = load_model(args.checkpoint, args.step, args.dtype and jnp.dtype(args.dtype))
    config = resolved(evaluation_config(model.config, args.config, overrides))
    test_sets = choose(config, args.test_set)
    folder = Path(args.output or results_folder(args.checkpoint) / f"evaluation-{model.step}")
    against = [Earlier.named(text) for text in args.against]
    _require_different(["this", NO_MODEL, *(earlier.name for earlier in against)])
    if against and not args.bootstrap:
        raise UserError("--against compares intervals: add --bootstrap.")
    make_writable(folder)
    failed = Failures(len(test_sets))
    record = {"checkpoint": str(args.checkpoint), "step": model.step, "config": plain(config)}
    results, intervals, evaluators = {}, {}, {}
    kept = f"What was done is kept in {folder}: the same command continues from there."
    with only_run(folder), keeping(lambda: kept):
        if jax.process_index() == 0:
            _remove_result(folder, record, test_sets)
        # All evaluators are built first, so that a missing file is found now.
        for prefix, settings in test_sets.items():
            with failed.set_aside(prefix):
                evaluators |= make_evaluators(model, {prefix: settings}, config.data.cache)
        for prefix, evaluator in evaluators.items():
            kind, name = prefix.split("/")
            with failed.set_aside(prefix):
                if kind == "seg":
                    options = args.pictures, args.bootstrap, against
                    numbers, found = evaluate(model, evaluator, name, folder / name, *options)
                    intervals |= {prefix: found} if found else {}
                else:
                    numbers = measure(model, evaluator, name)
                results |= {f"{prefix}/{key}": value for key, value in numbers.items()}
                if jax.process_index() == 0:
                    # Written now and not at the end, in case the next test set fails.
                    everything = {**record, "results": results, "intervals": intervals}
                    write_json(folder / "result.json", everything)
    if jax.process_index() == 0 and results:
        print(f"{', '.join(headlines(results))}. Numbers, tables and pictures are in {folder}")
    failed.report()


def _require_different(names: Sequence[str]) -> None:
    """Refuses two rows of one name in the table of intervals: one would replace the other."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(
            f"Two rows would be called {twice[0]!r}: give one as --against=NAME=FOLDER."
        )


def _remove_result(folder: Path, record: dict, test_sets: Iterable[str]) -> None:
    """Removes results that the same command wrote earlier: images may have changed since."""
    path = folder / "result.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        before = json.loads(path.read_text(encoding="utf-8"))
        before.pop("results", None)
        before.pop("intervals", None)
        if before == json.loads(json.dumps(record)):
            path.unlink()
            for prefix, name in itertools.product(test_sets, WRITTEN):
                (folder / prefix.partition("/")[2] / name).unlink(missing_ok=True)


class Failures:
    """Collects the errors of single test sets (of `count`) until the others are evaluated."""

    def __init__(self, count: int):
        self.count = count
        self.messages: list[str] = []

    @contextlib.contextmanager
    def set_aside(self, prefix: str) -> Iterator[None]:
        """Keeps a `UserError` for `report`; with one test set or several processes it re-raises."""
        try:
            yield
        except UserError as error:
            # Other processes may have no error and would wait for this one.
            if self.count == 1 or jax.process_count() > 1:
                raise
            self.messages.append(f"{prefix}: {error}")
            tqdm.write(f"Left out: {self.messages[-1]}", file=sys.stderr)

    def report(self) -> None:
        """Raises a `UserError` with the number of errors and the first one, if there are any."""
        if self.messages:
            raise UserError(
                f"{len(self.messages)} of {self.count} test sets could not be evaluated, the "
                f"first is {self.messages[0]}"
            )


def evaluation_config(config: RunConfig, file: str | None, overrides: list[str]) -> RunConfig:
    """The configuration of a checkpoint with its evals from `file` (if any) and overrides."""
    for override in overrides:
        if not override.startswith(("--config.evals.", "--config.data.cache=")):
            raise UserError(
                f"{override!r} is no option here: the model is fixed by its checkpoint, only "
                "--config.evals... and --config.data.cache can be overridden (see --help)."
            )
    if file:
        config = dataclasses.replace(config, evals=load_config(file).evals)
    return overridden(RunConfig, plain(config), overrides)


def choose(config: RunConfig, names: str | None) -> dict[str, Any]:
    """The settings of the named test sets (comma-separated; default: all), by prefix.

    "voc" stands for the test sets of that name of every kind, "seg/voc" for a single one.
    """
    test_sets = entries_of(config.evals)
    known = ", ".join(test_sets)
    if not test_sets:
        raise UserError("The checkpoint was trained without test sets: give --config=FILE.")
    if not names:
        return test_sets
    chosen = {}
    for name in map(str.strip, names.split(",")):
        found = {p: s for p, s in test_sets.items() if name in (p, p.partition("/")[2])}
        if not found:
            raise UserError(f"There is no test set {name!r} in evals, only: {known}.")
        chosen |= found
    return chosen


def first_of(config: RunConfig, names: str | None, kind: str) -> tuple[str, Any]:
    """(name, settings) of the first test set of a kind among those that `choose` gives."""
    chosen = choose(config, names)
    for prefix, settings in chosen.items():
        if prefix.startswith(f"{kind}/"):
            return prefix.removeprefix(f"{kind}/"), settings
    raise UserError(f"There is no test set of the kind {kind} among {', '.join(chosen)}.")


def measure(model: TrainedModel, evaluator, name: str) -> dict[str, float]:
    """Evaluates one test set of retrieval or classification, prints and returns its numbers."""
    began = time.monotonic()
    numbers = dict(evaluator.run(model.params, image_bar(name)))
    if jax.process_index() == 0:
        listed = ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
        seconds = time.monotonic() - began
        print(f"{name}: {listed}; {evaluator.count} images in {seconds:.1f} s\n")
    return numbers


def evaluate(
    model: TrainedModel,
    evaluator: SegmentationEvaluator,
    name: str,
    folder: Path,
    pictures: int = 0,
    draws: int = 0,
    against: Sequence[Earlier] = (),
) -> tuple[dict[str, float], dict[str, dict[str, Estimate]]]:
    """(numbers, 95 % intervals) of one segmentation test set; without `draws` no intervals.

    Process 0 prints them and writes tables and pictures into `folder`. Images with a record there
    are not evaluated again, unless they have changed since.
    """
    began = time.monotonic()
    records, fresh = collect(model, evaluator, name, folder)
    seconds = time.monotonic() - began
    names = evaluator.class_names
    ranked = np.argsort(image_ious(records, len(names)), kind="stable")
    places = {name: index for index, (name, _) in enumerate(evaluator.images)}
    indices = [places[records[i].name] for i in ranked if len(records[i].counts[0])]
    for title, chosen in (("worst", indices[:pictures]), ("best", indices[: -pictures - 1 : -1])):
        if chosen and pictures:
            write_contact_sheet(folder / f"{title}.png", evaluator, model.params, chosen)
        elif fresh and jax.process_index() == 0:
            # The file is of an earlier evaluation, whose images may have changed.
            (folder / f"{title}.png").unlink(missing_ok=True)
    found = evaluator.measures(records)
    numbers = dict(evaluator.results(found))
    intervals, notes = {}, {}
    if draws:
        baseline = without_model(records, len(names), evaluator.background)
        models = {"this": found, NO_MODEL: baseline}
        for earlier in against:
            paired, notes[earlier.name] = earlier.records(
                name, records, material(evaluator.settings)
            )
            models[earlier.name] = evaluator.measures(paired)
        images = [record.name for record in records]
        intervals = estimates(models, draws) | without_one_image(models, images, draws)
    if jax.process_index() == 0:
        rows = class_table(records, names, found, draws)
        write_csv(folder / "classes.csv", rows)
        print(format_table(rows))
        print(f"{name}: {fresh} images in {seconds:.1f} s\n")
        if intervals:
            for other, differing in filter(all, notes.items()):
                print(f"{name}: {other} was evaluated with {differing}")
            print(f"{name}: 95 % intervals from {draws} draws of its {len(records)} images")
            print(f"{format_estimates(intervals)}\n")
    return numbers, intervals


def collect(
    model: TrainedModel, evaluator: SegmentationEvaluator, name: str, folder: Path
) -> tuple[list[Record], int]:
    """The records of all images of a test set, sorted by name, and how many of them are new.

    Records that `folder` holds for unchanged files are reused; new ones are appended at once.
    """
    settings = dict(enumerate(map(material, evaluator.several)))
    identity = {"checkpoint": model.identity, "settings": settings}
    store = RecordStore(folder, identity, evaluator.inputs)
    kept = store.read()
    records = gather(kept.of(evaluator.images).values())
    remaining = [i for i, (image, _) in enumerate(evaluator.images) if image not in records]
    if any(kept) and jax.process_index() == 0:
        missing = [evaluator.images[index][0] for index in remaining]
        note = kept.describe(len(records), missing, evaluator.source.names)
        tqdm.write(f"{name}: {note}")

    fresh = store.extend(evaluator.records(model.params, remaining, image_bar(name)))
    records = gather([*records.values(), *fresh])
    return list(records.values()), len(remaining)


if __name__ == "__main__":
    main()
