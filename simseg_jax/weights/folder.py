"""The folder of a converted model: parameters, configuration, tokenizer, card, manifest.

    config.json         the configuration: architecture, text length, evaluation protocols
    tokenizer/          the vocabulary
    params/ (Orbax), model.safetensors or exported programs
    README.md           the model card
    manifest.json       format, origin and SHA-256 of every file

A folder is never incomplete: it is written under another name and then renamed.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError
from safetensors.numpy import save_file

import simseg_jax
from simseg_jax.config import RunConfig, published
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.runtime import errors
from simseg_jax.runtime.errors import UserError, one_line, some
from simseg_jax.runtime.files import appearing, sha256
from simseg_jax.runtime.settings import to_json
from simseg_jax.runtime.sharding import place
from simseg_jax.training.arrays import first_error_only, load_arrays, refuse_unusable
from simseg_jax.training.checkpoint import CONFIG, TOKENIZER
from simseg_jax.weights.containers import META, read_settings, read_weights
from simseg_jax.weights.read import architecture_json, fit, state_dict

MANIFEST, CARD = "manifest.json", "README.md"
# Values of "weights" in the manifest: what holds the parameters.
PARAMS, SAFETENSORS, PROGRAMS = "params", "model.safetensors", "programs"
FORMAT = "simseg_jax 1"


def is_model_folder(folder: Path) -> bool:
    """Whether `convert` wrote this folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; a `UserError` unless every file has the checksum in it."""
    manifest = read_settings(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} says format={manifest.get('format')!r}, this version of "
            f"simseg_jax reads {FORMAT!r}: install the version that wrote it."
        )
    files, origin = manifest.get("sha256"), manifest.get("origin")
    if not (isinstance(files, dict) and files and isinstance(origin, dict)):
        raise UserError(f"{folder / MANIFEST} lists no files or no origin: get the folder again.")
    outside = [n for n in files if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
    if outside:
        raise UserError(f"{folder / MANIFEST} leads out of its folder: {some(outside)}.")
    unlisted = [name for name in _used_files(folder) if name not in files]
    if unlisted:
        raise UserError(
            f"{folder} holds files that {MANIFEST} does not list ({some(unlisted)}): move them "
            "away or get the folder again."
        )
    wrong = [
        name
        for name, checksum in files.items()
        if not (folder / name).is_file() or sha256(folder / name) != checksum
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(files)} files in {folder} are missing or damaged "
            f"({some(wrong)}): get the folder again."
        )
    return manifest


def _used_files(folder: Path) -> list[str]:
    """The files that `load.load_model` may read, besides the manifest."""
    inside = [f for part in (TOKENIZER, PARAMS) for f in (folder / part).rglob("*") if f.is_file()]
    files = [*inside, *(folder / name for name in (CONFIG, SAFETENSORS))]
    return [f.relative_to(folder).as_posix() for f in files if f.is_file()]


def read_params(folder: Path, manifest: dict[str, Any], architecture: SimSegConfig, shapes) -> dict:
    """The parameters in float32; shapes: shape structs with shardings from `with_sharding`."""
    if manifest.get("weights") == PARAMS:
        return load_arrays(epath.Path(folder / PARAMS), {"params": shapes})["params"]
    if manifest.get("weights") == SAFETENSORS:
        tensors = read_weights(folder / SAFETENSORS).tensors
        return place(fit(tensors, architecture), shapes)
    raise UserError(
        f"{folder} holds exported programs, not parameters: take the model they were made from."
    )


@contextlib.contextmanager
def writing(
    folder: Path, config: RunConfig, tokenizer, origin: dict[str, Any], weights: str, card: str
) -> Iterator[Path]:
    """Yields a temporary folder for the parameters; on success completes and renames it.

    origin: where the parameters came from. weights: what holds them, `PARAMS`, `SAFETENSORS` or
    `PROGRAMS`. card: the text of the model card.
    """
    with complete(folder) as partial:
        yield partial
        (partial / CONFIG).write_text(to_json(published(config)) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(partial / TOKENIZER)
        (partial / CARD).write_text(card, encoding="utf-8")
        files = sorted(f for f in partial.rglob("*") if f.is_file() and f.name != CARD)
        manifest = {
            "format": FORMAT,
            "version": simseg_jax.__version__,
            "weights": weights,
            "origin": origin,
            # Without the card, which people edit.
            "sha256": {f.relative_to(partial).as_posix(): sha256(f) for f in files},
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def complete(path: Path, folder: bool = True) -> Iterator[Path]:
    """Yields a temporary folder or file, renamed to `path` on success; `path` must not exist."""
    refuse_existing(path)
    advice = "Nothing was written; name a destination with free space."
    with errors.writing(str(path), lambda: advice, (OSError, SafetensorError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as partial:
            if folder:
                partial.mkdir()
            yield partial


def refuse_existing(path: Path) -> None:
    """Raises a `UserError` if `path` is a file or a folder that is not empty."""
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} exists: name another destination, nothing is overwritten.")


def write_orbax(folder: Path, params: dict) -> None:
    """Writes parameters in their dtype, for `load_arrays`."""
    refuse_unusable(str(folder.absolute()))
    # Checked first, since on a full disk Orbax prints a traceback for every array.
    needed, free = sum(x.nbytes for x in jax.tree.leaves(params)), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed:,} bytes are needed, {free:,} are free")
    try:
        with first_error_only():
            ocp.save_checkpointables(str((folder / PARAMS).absolute()), {"params": params})
    except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk.
        raise OSError(one_line(error)) from error


def write_safetensors(folder: Path, params: dict, architecture: SimSegConfig) -> None:
    """Writes parameters under the authors' names, in PyTorch's layouts."""
    metadata = {"format": "pt", META: architecture_json(architecture)}
    save_file(state_dict(params), folder / SAFETENSORS, metadata)


def cast(params: dict, dtype) -> dict:
    """Parameters in another dtype, except the temperature, which stays float32."""
    return {
        k: v if k == "temperature" else jax.tree.map(lambda x: np.asarray(x).astype(dtype), v)
        for k, v in params.items()
    }
