"""Orbax checkpoints of a run: finding, saving, restoring and checking them.

WORKDIR/checkpoints/<step> holds `params` and `optimizer` (moments and step), with a `Record` as
metadata. `checkpoint.directory` replaces WORKDIR/checkpoints, for example by a folder on object
storage.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from simseg_jax.runtime.errors import UserError, reading, some, writing
from simseg_jax.runtime.files import read_json
from simseg_jax.runtime.ranges import TEXT, whole
from simseg_jax.runtime.remote import is_remote
from simseg_jax.runtime.settings import setting
from simseg_jax.training.arrays import checksums, damaged, load_arrays, refuse_unusable, shapes

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
TOKENIZER = "tokenizer"
METADATA = "_CHECKPOINT_METADATA"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When and where checkpoints are written, and which one a new run starts from."""

    every: int = setting(1000, "steps between checkpoints; the last step is always saved", whole(1))
    keep: int = setting(3, "newest checkpoints kept", whole(1))
    directory: str = setting(
        "", "folder or URL (gs://) of the checkpoints; '': WORKDIR/checkpoints", TEXT
    )
    resume: str = setting(
        "", "WORKDIR of another run to start from when this one has no checkpoint", TEXT
    )


@dataclasses.dataclass(frozen=True)
class Record:
    """The metadata of a checkpoint.

    config: the configuration as nested dicts. position: how many examples of the training stream
    were used. identity: identifies the vocabulary and the data sets, see `resume.identity`; None in
    checkpoints of older versions. checksums, shapes: of every array by its path; None likewise.
    """

    config: dict[str, Any]
    position: int
    identity: dict[str, Any] | None = None
    checksums: dict[str, str] | None = None
    shapes: dict[str, list[int]] | None = None


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for pending writes on exit."""

    def __init__(self, folder: epath.Path, keep: int):
        self.folder, self._pending = folder, None
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        with self._writing():
            self._checkpointer = ocp.training.Checkpointer(
                str(folder), preservation_policy=newest, cleanup_tmp_directories=True
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_exception) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:  # An earlier error counts more.
                raise
        finally:
            with contextlib.suppress(Exception):  # It raises again what `wait` has raised.
                self._checkpointer.close()

    @property
    def latest(self) -> epath.Path | None:
        """Folder of the newest complete checkpoint."""
        steps = completed_steps(self.folder)
        return self.folder / str(steps[-1]) if steps else None

    def save(self, step: int, state: dict, record: Record) -> None:
        """Writes in the background; the arrays are captured before it returns.

        The checksums and shapes of `record` are replaced by those of `state`.
        """
        self.wait()
        trees = _trees(state)
        content = {**vars(record), "checksums": checksums(trees), "shapes": shapes(trees)}
        with self._writing():
            self._pending = self._checkpointer.save_checkpointables_async(
                step, trees, force=True, custom_metadata={**content, "digest": _digest(content)}
            )

    def wait(self) -> None:
        """Waits for the write in progress, whose failure is a `UserError`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            # A response keeps a thread and three open files until its result is taken.
            with self._writing():
                pending.result()

    def read_back(self, shapes: dict) -> None:
        """Reads the newest parameters back, so that an unreadable checkpoint is found now.

        shapes: of the parameters, with shardings. Meanwhile memory holds the parameters twice.
        """
        self.wait()
        newest = self.latest
        if newest is not None:
            load_run(newest, {"params": shapes}, read_record(newest))

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        def advice() -> str:
            newest = self.latest
            kept = f"The newest complete one is {newest}" if newest else "None is complete yet"
            return f"{kept}: make room or repair the folder, then run the same command again."

        # Orbax, TensorStore and the file systems raise errors of many types.
        return writing(f"a checkpoint to {self.folder}", advice, Exception)


def checkpoints_folder(workdir: Path, directory: str | None = None) -> epath.Path:
    """Where a run keeps its checkpoints.

    directory: `checkpoint.directory`; by default as the run in `workdir` was configured.
    """
    file = workdir / CONFIG
    if directory is None and file.is_file():
        advice = "Run its command again, which writes this file."
        with reading(str(file), advice):
            directory = read_json(file, advice)["checkpoint"]["directory"]
    if not (directory and is_remote(directory)):
        directory = str(Path(directory or workdir / CHECKPOINTS).expanduser().absolute())
    refuse_unusable(directory)
    with reading(directory, "URLs need the drivers from `pip install simseg-jax[cloud]`."):
        folder = epath.Path(directory)
        folder.is_dir()
    return folder


def restore_state(path: epath.Path, abstract_state: dict, record: Record) -> dict[str, Any]:
    """The state in a checkpoint with the shardings of `abstract_state`."""
    loaded = load_run(path, _trees(abstract_state), record)
    return {"params": loaded["params"], **loaded["optimizer"]}


def _trees(state: dict) -> dict[str, Any]:
    """The two parts of a state that a checkpoint keeps apart: inference reads only the first."""
    return {"params": state["params"], "optimizer": {"opt": state["opt"], "step": state["step"]}}


def completed_steps(folder: epath.Path) -> list[int]:
    """Steps with a complete checkpoint, ascending; folders of interrupted writes do not count."""
    found = folder.iterdir() if folder.is_dir() else ()
    numbered = [f for f in found if f.name.isascii() and f.name.isdigit()]
    return sorted(int(f.name) for f in numbered if ocp.is_orbax_checkpoint(str(f)))


def read_record(path: epath.Path) -> Record:
    """The `Record` stored with a checkpoint; a `UserError` if it is damaged."""
    try:
        content = dict(read_metadata(path)["custom_metadata"])
        digest = content.pop("digest", None)
        if digest not in (None, _digest(content)):
            raise ValueError("its metadata differs from what was written")
        known = content if digest else {key: content[key] for key in ("config", "position")}
        record = Record(**known)
        if type(record.position) is not int or not 0 <= record.position < 2**62:
            raise ValueError(f"position={record.position!r} is not a number of examples")
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(damaged(path, error)) from error
    return record


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """The metadata that Orbax stores, with the time of writing and our `custom_metadata`.

    Read as plain JSON, because Orbax's own reader also opens every array and, if one is damaged,
    prints tracebacks from its threads.
    """
    try:
        content = json.loads((path / METADATA).read_text())
        if not isinstance(content["init_timestamp_nsecs"], int):
            raise ValueError("it has no time of writing")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(damaged(path, error)) from error
    return content


def load_run(path: epath.Path, abstract: dict, record: Record) -> dict:
    """`load_arrays` of a run's checkpoint, compared with the checksums of its record."""
    if record.shapes is not None:
        _compare_shapes(path, abstract, record.shapes)
    loaded = load_arrays(path, abstract)
    expected = record.checksums
    if expected is None:
        if jax.process_index() == 0:
            note = "has no checksums, as an older version wrote it: damage goes unnoticed."
            tqdm.write(f"The checkpoint {path} {note}", file=sys.stderr)
        return loaded
    wrong = [name for name, value in checksums(loaded).items() if expected.get(name) != value]
    if wrong:
        raise UserError(
            f"The checkpoint {path} is damaged, not what was saved: {some(wrong)}. Move it away: "
            "the next older one is used then."
        )
    return loaded


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compare_shapes(path: epath.Path, abstract: dict, saved: dict[str, list[int]]) -> None:
    """Refuses a checkpoint whose arrays are not those of `abstract`, before any is read."""
    wanted = shapes(abstract)
    saved = {name: shape for name, shape in saved.items() if name.split("/")[0] in abstract}
    different = [
        f"{name} is {saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"The checkpoint {path} does not fit: {different[0]}, {len(different)} such arrays in "
            "all. The vocabulary, the model and the rules of optim must be those it was trained "
            "with: set them back."
        )
