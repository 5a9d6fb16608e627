"""Linear probing: a classifier on cached features of the frozen image encoder (tables 9 and 10)."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simseg_jax.config import load_config
from simseg_jax.data.testsets.labelled import labelled_source, loader
from simseg_jax.evaluators.classification import ClassificationConfig
from simseg_jax.evaluators.embedding import ImageEmbedder
from simseg_jax.evaluators.metrics import top_accuracy
from simseg_jax.evaluators.probe import ProbeConfig, probe
from simseg_jax.runtime.command_line import (
    add_checkpoint_options,
    cache_programs,
    image_bar,
    make_parser,
    results_folder,
)
from simseg_jax.runtime.errors import one_line, report_user_errors
from simseg_jax.runtime.files import appearing, make_writable, write_json
from simseg_jax.runtime.processes import add_distributed_option, join_processes, keeping
from simseg_jax.runtime.settings import describe, first_difference, plain
from simseg_jax.runtime.sharding import gather_bytes
from simseg_jax.weights.load import TrainedModel, load_model

EPILOG = """examples:
  python -m simseg_jax.linear_probe --checkpoint=runs/shapes --config=linear_probe \\
      --config.data=shapes --config.resize=64 --config.crop=64
  python -m simseg_jax.linear_probe --checkpoint=runs/vits16 --config=linear_probe \\
      --config.root=imagenet --config.feature=embedding

Features are computed once and kept in --output (train.npz, val.npz); the same command with another
learning rate reuses them. They are computed again if the checkpoint, a setting that they depend on,
or the size or time of an image file changes. result.json holds accuracies and settings. Keys and
defaults:
"""
# Keys that the features depend on.
OF_FEATURES = ("data", "root", "feature", "resize", "crop", "aspect", "m_image")


@report_user_errors
def main() -> None:
    """Embeds both splits, trains the classifier and prints top-1 and top-5 accuracy."""
    parser = make_parser(
        "linear_probe",
        "Trains a linear classifier on frozen features.",
        EPILOG + describe(ProbeConfig),
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--config", required=True, help="settings: a file, or linear_probe, which is packaged"
    )
    parser.add_argument("--output", help="folder; default: CHECKPOINT/linear_probe-STEP/FEATURE")
    add_distributed_option(parser)
    args, overrides = parser.parse_known_args()
    if args.distributed:
        join_processes()
    cache_programs()
    settings = load_config(args.config, overrides, ProbeConfig)
    model = load_model(args.checkpoint, args.step)
    folder = results_folder(args.checkpoint) / f"linear_probe-{model.step}" / settings.feature
    folder = Path(args.output or folder)
    make_writable(folder)
    began = time.monotonic()
    with keeping(lambda: f"Features of finished splits are kept in {folder} and will be reused."):
        train, val = (features_of(model, settings, split, folder) for split in ("train", "val"))
        classes = int(max(train["labels"].max(), val["labels"].max())) + 1
        scores = probe(settings, train, val["features"], classes)
    result = {f"top{k}": top_accuracy(scores, val["labels"], k) for k in (1, 5)}
    if jax.process_index() > 0:
        return
    record = {
        "checkpoint": str(args.checkpoint),
        "step": model.step,
        "results": result,
        "config": plain(settings),
    }
    write_json(folder / "result.json", record)
    listed = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
    print(
        f"{listed} of {len(val['labels'])} images in {classes} classes, trained on "
        f"{len(train['labels'])}, in {time.monotonic() - began:.0f} s. Everything is in {folder}"
    )


def features_of(
    model: TrainedModel, settings: ProbeConfig, split: str, folder: Path
) -> dict[str, np.ndarray]:
    """{"features": float32 [N, D], "labels": int [N]} of a split, kept in `folder` for reuse.

    split: "train" or "val".
    """
    path = folder / f"{split}.npz"
    size = "size" if split == "train" else "val_size"
    images = ClassificationConfig(
        data=settings.data,
        root=settings.root,
        split=getattr(settings, split),
        size=getattr(settings, size),
    )
    source = labelled_source(images)
    chosen = {key: getattr(settings, key) for key in (*OF_FEATURES, size, split)}
    identity = {"checkpoint": model.identity, **chosen, "images and classes": source.content}
    kept = _kept(path, identity)
    # All processes embed together, so it is only skipped if every one of them has its file.
    if all(found == b"kept" for found in gather_bytes(b"kept" if kept else b"")):
        return kept
    settings.check_patches(model.patch_size)
    embed = ImageEmbedder(model, settings, settings.images, settings.feature)
    indices = range(len(source))
    features, found = embed(model.params, indices, loader(source), image_bar(split))
    labels = np.array(found)
    if jax.process_index() == 0:
        with appearing(path) as partial, partial.open("wb") as file:
            arrays = {"features": features, "labels": labels}
            np.savez(file, identity=np.array(json.dumps(identity)), **arrays)
    return {"features": features, "labels": labels}


def _kept(path: Path, identity: dict[str, Any]) -> dict[str, np.ndarray]:
    """The features in a file if they have this identity; else {}, after printing why."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            found = json.loads(str(file["identity"]))
            arrays = {name: file[name] for name in ("features", "labels")}
        difference = first_difference(found, json.loads(json.dumps(identity)))
        reason = f"{difference[0]} changed since" if difference else ""
    # NumPy and zipfile raise errors of any kind for damaged files.
    except Exception as error:
        arrays, reason = {}, f"it is damaged: {one_line(error)}"
    if reason:
        print(f"The features in {path} are computed again ({reason}).", flush=True)
    return {} if reason else arrays


if __name__ == "__main__":
    main()
