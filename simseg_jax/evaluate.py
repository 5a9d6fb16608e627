"""The batch evaluation command: a checkpoint and its benchmarks -> a table and a JSON file."""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from simseg_jax.checkpoint import load_model
from simseg_jax.config import apply_overrides, load_config
from simseg_jax.errors import UserError, report_user_errors
from simseg_jax.evaluators.segmentation import SegmentationEvaluator

EPILOG = """examples:
  python -m simseg_jax.evaluate --checkpoint=runs/shapes
  python -m simseg_jax.evaluate --checkpoint=runs/shapes --config.evals.seg.shapes.sigma_weight=1.0
  python -m simseg_jax.evaluate --checkpoint=runs/f8k --config=configs/vits16.py \\
      --config.evals.seg.voc.root=data/VOCdevkit/VOC2012 --config.evals.seg.voc.refine=pydensecrf
"""


@report_user_errors
def main() -> None:
    """Evaluates a checkpoint, prints the table, writes the numbers with their settings."""
    parser = argparse.ArgumentParser(
        prog="python -m simseg_jax.evaluate",
        description="Evaluates a checkpoint on the benchmarks of its configuration (evals.seg).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="the --workdir of a training run")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--config", help="take evals from this file instead of the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type")
    parser.add_argument("--output", help="JSON file; default: CHECKPOINT/evaluation-STEP.json")
    args, overrides = parser.parse_known_args()
    for override in overrides:
        if not override.startswith("--config.evals."):
            raise UserError(
                f"{override!r} is no option here: the model is fixed by its checkpoint, only "
                "--config.evals... can be overridden (see --help)."
            )
    model = load_model(args.checkpoint, args.step, args.dtype and jnp.dtype(args.dtype))
    config = model.config
    if args.config:
        with config.unlocked():
            config.evals = load_config(args.config).evals
    config = apply_overrides(config, overrides)
    if not config.evals.seg:
        raise UserError(f"{args.checkpoint} was trained without benchmarks: give --config=FILE.")

    results = {}
    with jax.set_mesh(model.mesh):
        evaluators = {
            name: SegmentationEvaluator(model.graphdef, model.mesh, model.encoder, settings)
            for name, settings in config.evals.seg.items()
        }
        for name, evaluator in evaluators.items():

            def bar(batches, name=name):
                return tqdm(batches, desc=name, unit="batch", disable=jax.process_index() > 0)

            values = dict(evaluator.run(model.params, bar))
            results |= {f"seg/{name}/{key}": value for key, value in values.items()}
    if jax.process_index() > 0:
        return
    for key, value in results.items():
        print(f"{key:40s} {value:.4f}")
    output = Path(args.output or Path(args.checkpoint) / f"evaluation-{model.step}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "checkpoint": str(args.checkpoint),
        "step": model.step,
        "results": results,
        "config": config.to_dict(),
    }
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
