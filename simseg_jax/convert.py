"""Weights in and out: `python -m simseg_jax.convert SOURCE [DESTINATION]`."""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from simseg_jax.config import first_segmentation, of_architecture
from simseg_jax.data.text import load_tokenizer
from simseg_jax.data.words import split_words
from simseg_jax.evaluators.build import headlines
from simseg_jax.models.layers import HEADS
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.runtime.command_line import accepted, cache_programs, make_parser
from simseg_jax.runtime.errors import UserError, reading, report_user_errors, some
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.settings import changed
from simseg_jax.runtime.sharding import place
from simseg_jax.segmenter import Segmenter, add_protocol_options, protocol_settings, words_of
from simseg_jax.weights import export, folder, hub
from simseg_jax.weights.card import FOLDER_USE, PROGRAMS_USE, PYTORCH_USE, model_card
from simseg_jax.weights.containers import ARCHITECTURE, META
from simseg_jax.weights.formats import AUTHORS
from simseg_jax.weights.load import TrainedModel, assemble_model, load_model, open_source
from simseg_jax.weights.read import (
    architecture_json,
    parts_in,
    read_model,
    refuse_infinite,
    state_dict,
)
from simseg_jax.weights.torch_file import save_tensors

FORMATS = ("orbax", "safetensors", "pth", "stablehlo", "hub")
EPILOG = """examples:
  print what a file holds (format, architecture, how to use it):
    python -m simseg_jax.convert simseg.vit-s.pth
  the authors' checkpoint as a folder for segment, evaluate and config.init.model:
    python -m simseg_jax.convert simseg.vit-s.pth models/simseg-vits
  a training run, to share it:
    python -m simseg_jax.convert runs/shapes models/shapes --to=safetensors --dtype=bfloat16
  to a repository on the hub, which it makes (log in with "hf auth login" before):
    python -m simseg_jax.convert runs/shapes owner/name --to=hub --private
  for the authors' PyTorch code:
    python -m simseg_jax.convert runs/shapes shapes.pth --to=pth
  exported programs for CPUs, NVIDIA GPUs and TPUs, which need only JAX:
    python -m simseg_jax.convert runs/shapes programs/ --to=stablehlo --words="star, heart"

SOURCE is the --workdir of a run, a converted folder or a weights file (.pth, .safetensors, .npz;
recognised by content), given as a local path, a URL (gs://, s3://) or a repository on the hub
(owner/name, owner/name@revision). If a file holds several models (student and teacher, raw and
averaged weights), the averaged one is taken and the output says so. FILE#KEY takes another, such as
checkpoint.pth#student; FILE#. takes the model whose tensors have no prefix.

A single encoder (timm; ViT, CLIP and BERT of transformers; open_clip; big_vision and AugReg) is
only described: start a run from it with --config.init.image=SOURCE or --config.init.text=SOURCE.
"""


@report_user_errors
def main() -> None:
    """Describes SOURCE or writes it as DESTINATION."""
    parser = make_parser("convert", "Converts trained models between formats.", EPILOG)
    parser.add_argument("source", help="what to convert")
    parser.add_argument(
        "destination", nargs="?", help="what to write; without it SOURCE is described"
    )
    parser.add_argument(
        "--to",
        choices=FORMATS,
        default="orbax",
        help="format to write, default: orbax; hub: upload safetensors to the repository "
        "DESTINATION",
    )
    parser.add_argument(
        "--private", action="store_true", help="--to=hub: only you see the repository"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the written parameters; default: float32",
    )
    parser.add_argument(
        "--step", type=accepted(whole(0)), help="checkpoint of a run; default: the newest"
    )
    group = parser.add_argument_group("what the authors' .pth files do not contain")
    group.add_argument(
        "--vocab", default="bert-base-uncased", help="vocabulary, as data.vocab of a run"
    )
    group.add_argument("--image_heads", type=accepted(HEADS), help="default: one per 64 channels")
    group.add_argument("--text_heads", type=accepted(HEADS), help="default: one per 64 channels")
    group = parser.add_argument_group("--to=stablehlo")
    group.add_argument("--words", help="classes in classes.npz; default: the test set's")
    group.add_argument(
        "--platforms", default=",".join(export.PLATFORMS), help="separated by commas"
    )
    add_protocol_options(group)
    args = parser.parse_args()
    cache_programs()
    if args.destination is None:
        describe(args)
        return
    began = time.monotonic()
    if args.to == "hub":
        hub.refuse_existing(args.destination)
        model = read(args)
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary) / args.destination
            write(model, local, args)
            address = hub.upload(local, args.destination, args.private)
        seconds = time.monotonic() - began
        print(f"Uploaded {args.source} in {seconds:.1f} s: {args.dtype} in {address}")
        return
    destination = Path(args.destination)
    folder.refuse_existing(destination)
    model = read(args)
    write(model, destination, args)
    files = [destination] if destination.is_file() else list(destination.rglob("*"))
    size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    seconds = time.monotonic() - began
    print(
        f"Converted {args.source} ({model.origin['format']}) in {seconds:.1f} s: {args.to}, "
        f"{args.dtype}, {size:.1f} MB in {destination}"
    )


def read(args: argparse.Namespace) -> TrainedModel:
    """The model at `args.source`."""
    path, weights = open_source(args.source)
    if weights is None:
        model = load_model(path, args.step, jnp.dtype(jnp.float32))
        refuse_infinite(model.params)
        return dataclasses.replace(model, origin=model.origin | _results(path))
    found = read_model(weights, "model", args.image_heads, args.text_heads)
    assert isinstance(found.config, SimSegConfig)
    print(found.note)
    config = changed(of_architecture(found.config), {"data.vocab": args.vocab})
    meta = {key: value for key, value in weights.meta.items() if key != META}
    files = weights.origin
    origin = {"source": args.source, "format": AUTHORS.name, **files, **meta}
    return assemble_model(
        config,
        load_tokenizer(args.vocab),
        lambda _, shapes: place(found.params, shapes),
        step=0,
        identity=files,
        origin=origin,
        dtype=jnp.dtype(jnp.float32),
    )


def write(model: TrainedModel, destination: Path, args: argparse.Namespace) -> None:
    """Writes `model` in the format `args.to` with parameters of type `args.dtype`."""
    architecture, dtype = model.architecture, jnp.dtype(args.dtype)
    params = folder.cast(model.params, dtype)
    if args.to == "pth":
        meta = {ARCHITECTURE: architecture_json(architecture)}
        content = {"state_dict": state_dict(params), META: meta}
        with folder.complete(destination, folder=False) as partial:
            save_tensors(partial, content)
        return
    segmenter, classes, platforms = None, None, args.platforms.split(",")
    name = args.destination if args.to == "hub" else destination.name
    weights, use = folder.PARAMS, FOLDER_USE.format(name=name)
    if args.to in ("safetensors", "hub"):
        weights, use = folder.SAFETENSORS, use + PYTORCH_USE
    elif args.to == "stablehlo":
        names = words_of(first_segmentation(model.config))
        words = split_words(args.words) if args.words else names
        segmenter = Segmenter(model, **protocol_settings(args))
        classes = segmenter.classes(words)
        weights, use = folder.PROGRAMS, _programs_use(model, segmenter, platforms)
    card = model_card(name, architecture, model.origin, use)
    with folder.writing(
        destination, model.config, model.tokenizer, model.origin, weights, card
    ) as partial:
        if segmenter and classes:
            names, embeddings = classes.names, classes.embeddings
            settings = segmenter.settings
            export.write_programs(partial, model, settings, names, embeddings, platforms, dtype)
        elif weights == folder.SAFETENSORS:
            folder.write_safetensors(partial, params, architecture)
        else:
            folder.write_orbax(partial, params)


def describe(args: argparse.Namespace) -> None:
    """Prints the format and architecture of `args.source`."""
    path, weights = open_source(args.source)
    if weights is None:
        model = load_model(path, args.step)
        _print_model(model.architecture, model.origin)
        return
    parts = parts_in(weights)
    if not parts:
        raise UserError(
            f"{args.source} is in no format known here; its tensors: {some(weights.tensors)}."
        )
    for part in parts:
        found = read_model(weights, part, args.image_heads, args.text_heads)
        if isinstance(found.config, SimSegConfig):
            _print_model(found.config, {"format": found.format, **weights.origin})
            print(found.note)
        else:
            _print_fields(f"{found.format} ({part} encoder)", found.fields)
            print(f"{found.note} Start from it with --config.init.{part}={args.source}")


def _print_model(architecture: SimSegConfig, origin: dict[str, Any]) -> None:
    fields = dataclasses.asdict(architecture)
    for side in ("image", "text"):
        _print_fields(f"{side} encoder", fields.pop(side))
    _print_fields("model", fields)
    _print_fields("origin", origin)


def _print_fields(title: str, fields: dict[str, Any]) -> None:
    print(f"{title}: " + ", ".join(f"{key}={value}" for key, value in fields.items()))


def _programs_use(model: TrainedModel, segmenter: Segmenter, platforms: list[str]) -> str:
    return PROGRAMS_USE.format(
        platforms=", ".join(platforms),
        settings=segmenter.settings,
        least=export.least_classes(segmenter.settings),
        width=model.architecture.embed_dim,
        length=model.config.data.max_length,
    )


def _results(path: Path) -> dict[str, Any]:
    """The results of a run's last evaluation, for the model card."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return {}
    with reading(str(file), "Move it away: only the model card quotes it."):
        for line in reversed(file.read_text(encoding="utf-8").splitlines()):
            found = headlines(json.loads(line))
            if found:
                return {"results": ", ".join(found)}
    return {}


if __name__ == "__main__":
    main()
