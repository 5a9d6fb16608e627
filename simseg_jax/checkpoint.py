"""Orbax checkpoints of a run: saving, restoring, what is there.

WORKDIR/checkpoints/<step> holds `params` and `optimizer` (moments and step), with the resolved
configuration and the position in the training stream as metadata; WORKDIR/tokenizer the vocabulary.
`checkpoint.directory` takes the place of WORKDIR/checkpoints, on object storage for example.
"""

import json
import logging
from pathlib import Path
from typing import Any

import absl.logging
import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from simseg_jax import config as config_lib
from simseg_jax.config import Config
from simseg_jax.data.pairs.remote import is_remote
from simseg_jax.dotted import leaves
from simseg_jax.errors import UserError

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
TOKENIZER = "tokenizer"


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for pending writes on exit."""

    def __init__(self, folder: epath.Path, keep: int):
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(folder),
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_exception) -> None:
        self._checkpointer.close()

    @property
    def latest(self) -> epath.Path | None:
        """Folder of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return epath.Path(newest.path) if newest else None

    def save(self, step: int, state: dict, position: int, config: Config) -> None:
        """Writes in the background; the arrays are captured before it returns.

        position: examples of the training stream that led to this state.
        """
        self._checkpointer.save_checkpointables_async(
            step,
            {
                "params": state["params"],
                "optimizer": {"opt": state["opt"], "step": state["step"]},
            },
            force=True,
            custom_metadata={"config": config.to_dict(), "position": position},
        )


def checkpoints_folder(workdir: Path, directory: str | None = None) -> epath.Path:
    """Where a run keeps its checkpoints.

    directory: `checkpoint.directory`, by default that of the run in this folder.
    """
    file = workdir / CONFIG
    if directory is None and file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{file} is no JSON ({error}): give the command of the run again, which writes it."
            ) from error
        directory = content.get("checkpoint", {}).get("directory")
    if directory and is_remote(directory):
        return epath.Path(directory)
    return epath.Path(Path(directory or workdir / CHECKPOINTS).expanduser().absolute())


def restore_state(path: epath.Path, abstract_state: dict, config: Config) -> tuple[dict, int]:
    """(state with the shardings of `abstract_state`, position in the stream) of one checkpoint."""
    saved = saved_config(path)
    before = dict(leaves(saved.model))
    for key, value in leaves(config.model):
        old = before[key]
        if old != value:
            raise UserError(
                f"The checkpoint {path} has model.{key}={old!r}, the configuration {value!r}: "
                "set it back or choose another --workdir."
            )
    loaded = load_arrays(
        path,
        {
            "params": abstract_state["params"],
            "optimizer": {"opt": abstract_state["opt"], "step": abstract_state["step"]},
        },
    )
    state = {"params": loaded["params"], **loaded["optimizer"]}
    return state, read_metadata(path).custom_metadata["position"]


def completed_steps(folder: epath.Path) -> list[int]:
    """Steps with a complete checkpoint, ascending; folders of interrupted writes do not count."""
    found = folder.iterdir() if folder.is_dir() else ()
    steps = [int(f.name) for f in found if f.name.isdigit() and ocp.is_orbax_checkpoint(str(f))]
    return sorted(steps)


def saved_config(path: epath.Path) -> Config:
    """The resolved configuration stored with a checkpoint."""
    try:
        return config_lib.from_dict(read_metadata(path).custom_metadata["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(_damaged(path, error)) from error


def read_metadata(path: epath.Path) -> Any:
    """What Orbax knows of a checkpoint: when it was written, our `custom_metadata`."""
    verbosity = absl.logging.get_verbosity()
    try:
        # Orbax warns that the iterator's state has no metadata, which nobody asked for.
        absl.logging.set_verbosity(absl.logging.ERROR)
        return ocp.checkpointables_metadata(str(path))
    except (OSError, KeyError, TypeError, ValueError, ocp.errors.InvalidLayoutError) as error:
        raise UserError(_damaged(path, error)) from error
    finally:
        absl.logging.set_verbosity(verbosity)


def with_sharding(shapes, shardings):
    """Shape structs that carry shardings: what a restore fills."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def load_arrays(path: epath.Path, abstract: dict) -> dict:
    """The trees of arrays {"params": ...} in an Orbax folder, with the shardings of `abstract`."""
    try:
        return ocp.load_checkpointables(str(path), abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for unreadable files.
        # Reads of the other arrays go on and would bury the message under theirs.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise UserError(_damaged(path, error)) from error


def _damaged(path: epath.Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"The checkpoint {path} cannot be read ({type(error).__name__}: {reason}). If it is "
        "incomplete, move it away: the next older one is used then."
    )
