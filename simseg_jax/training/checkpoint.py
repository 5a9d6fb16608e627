"""Orbax checkpoints of a run: saving, restoring, what is there.

WORKDIR/checkpoints/<step> holds `params` and `optimizer` (moments and step). Its metadata is a
`Record`: the resolved configuration, the position in the training stream, the identity of the
vocabulary and the data, and a checksum per array. WORKDIR/tokenizer holds the vocabulary.
`checkpoint.directory` replaces WORKDIR/checkpoints, for example by a folder on object storage.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from simseg_jax.runtime.errors import UserError, one_line, reading, some, writing
from simseg_jax.runtime.files import read_json
from simseg_jax.runtime.ranges import TEXT, whole
from simseg_jax.runtime.remote import is_remote
from simseg_jax.runtime.settings import setting

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
TOKENIZER = "tokenizer"
METADATA = "_CHECKPOINT_METADATA"
UNUSABLE = set("[]*?\\\0")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, where, and what a run goes on from."""

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

    config: the configuration as nested dicts. position: examples of the training stream that led
    to this state. identity: identifies the vocabulary and the data sets, see `resume.identity`.
    checksums, shapes: of every array by its path. Checkpoints of older versions lack these three.
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

        The checksums and shapes stored are those of `state`, whatever `record` has.
        """
        self.wait()
        trees = {
            "params": state["params"],
            "optimizer": {"opt": state["opt"], "step": state["step"]},
        }
        content = {
            "config": record.config,
            "position": record.position,
            "identity": record.identity,
            "checksums": checksums(trees),
            "shapes": _shapes(trees),
        }
        with self._writing():
            self._pending = self._checkpointer.save_checkpointables_async(
                step, trees, force=True, custom_metadata={**content, "digest": _digest(content)}
            )

    def wait(self) -> None:
        """Waits for the write in progress, whose failure is a `UserError`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            # Unless its result is taken, every response keeps a thread and three open files.
            with self._writing():
                pending.result()

    def read_back(self, shapes: dict) -> None:
        """Reads the newest parameters back, so that an unreadable checkpoint is found now.

        shapes: of the parameters, with shardings. Memory holds the parameters twice meanwhile.
        """
        self.wait()
        newest = self.latest
        if newest is not None:
            load_run(newest, {"params": shapes}, read_record(newest))

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        def advice() -> str:
            newest = self.latest
            kept = f"The newest complete one is {newest}" if newest else "None is complete yet"
            return f"{kept}: make room or mend the folder, then run again to continue."

        # Orbax, TensorStore and the file systems raise many kinds.
        return writing(f"a checkpoint to {self.folder}", advice, Exception)


def checkpoints_folder(workdir: Path, directory: str | None = None) -> epath.Path:
    """Where a run keeps its checkpoints.

    directory: `checkpoint.directory`, by default that of the run in this folder.
    """
    file = workdir / CONFIG
    if directory is None and file.is_file():
        advice = "Give the command of the run again, which writes it."
        with reading(str(file), advice):
            directory = read_json(file, advice)["checkpoint"]["directory"]
    if not (directory and is_remote(directory)):
        directory = str(Path(directory or workdir / CHECKPOINTS).expanduser().absolute())
    refuse_unusable(directory)
    with reading(directory, "Addresses need the drivers of `pip install simseg-jax[cloud]`."):
        folder = epath.Path(directory)
        folder.is_dir()
    return folder


def restore_state(
    path: epath.Path, abstract_state: dict, record: Record
) -> tuple[dict[str, Any], int]:
    """(state with the shardings of `abstract_state`, position in the stream) of one checkpoint."""
    loaded = load_run(
        path,
        {
            "params": abstract_state["params"],
            "optimizer": {"opt": abstract_state["opt"], "step": abstract_state["step"]},
        },
        record,
    )
    return {"params": loaded["params"], **loaded["optimizer"]}, record.position


def completed_steps(folder: epath.Path) -> list[int]:
    """Steps with a complete checkpoint, ascending; folders of interrupted writes do not count."""
    found = folder.iterdir() if folder.is_dir() else ()
    names = [f for f in found if f.name.isascii() and f.name.isdigit()]
    return sorted(int(f.name) for f in names if ocp.is_orbax_checkpoint(str(f)))


def read_record(path: epath.Path) -> Record:
    """The `Record` stored with a checkpoint; a damaged one is refused."""
    try:
        content = dict(read_metadata(path)["custom_metadata"])
        digest = content.pop("digest", None)
        if digest not in (None, _digest(content)):
            raise ValueError("its description differs from what was written")
        known = content if digest else {key: content[key] for key in ("config", "position")}
        record = Record(**known)
        if type(record.position) is not int or not 0 <= record.position < 2**62:
            raise ValueError(f"position={record.position!r} is no number of examples")
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(damaged(path, error)) from error
    return record


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """The metadata that Orbax stores: when it was written, our `custom_metadata`.

    Read as the JSON it is: Orbax's own reader opens every array for it and, where one is damaged,
    prints tracebacks from its threads.
    """
    try:
        content = json.loads((path / METADATA).read_text())
        if not isinstance(content["init_timestamp_nsecs"], int):
            raise ValueError("no time at which it was written")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(damaged(path, error)) from error
    return content


def with_sharding(shapes, shardings):
    """Shape structs that carry shardings: what a restore fills."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


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


def load_arrays(path: epath.Path, abstract: dict) -> dict:
    """The trees of arrays {"params": ...} in an Orbax folder, with the shardings of `abstract`."""
    refuse_unusable(str(path))
    try:
        with first_error_only():
            return ocp.load_checkpointables(str(path), abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for unreadable files.
        raise UserError(damaged(path, error)) from error


@contextlib.contextmanager
def first_error_only() -> Iterator[None]:
    """Silences asyncio's log, and after an error for good.

    When one array fails, Orbax goes on with the others, whose errors would bury the first one.
    """
    log = logging.getLogger("asyncio")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


def refuse_unusable(path: str) -> None:
    """Raises a `UserError` for a path below which Orbax cannot read what it writes."""
    if UNUSABLE & set(path):
        raise UserError(
            f"Checkpoints cannot be kept under {path!r}: the library that reads them takes [ ] * ? "
            "and \\ for wildcards. Choose a path without these characters."
        )


def checksums(trees) -> dict[str, str]:
    """A checksum of every array by its path, as hexadecimal digits.

    It depends on the bits of an array alone, not on how the array is split over devices and
    processes, all of which must call this together. Any single changed element is noticed, several
    with a probability of 1 - 2^-32.
    """
    sums = jax.device_get({name: _checksum(leaf) for name, leaf in _by_path(trees).items()})
    return {name: f"{int(value):08x}" for name, value in sums.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """uint32 []: the sum of all words, each scrambled together with its place."""
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    words ^= place * jnp.uint32(0x9E3779B1)
    # The finaliser of MurmurHash3: one to one, so that one changed word always changes the sum.
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compare_shapes(path: epath.Path, abstract: dict, saved: dict[str, list[int]]) -> None:
    """Refuses a checkpoint whose arrays are not those of `abstract`, before any is read."""
    wanted = _shapes(abstract)
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


def _shapes(trees) -> dict[str, list[int]]:
    return {name: list(leaf.shape) for name, leaf in _by_path(trees).items()}


def _by_path(tree) -> dict[str, Any]:
    """The leaves by names such as "params/image_encoder/pos_embed"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def damaged(path: epath.Path, error: Exception) -> str:
    """The sentence about a checkpoint that cannot be read."""
    return (
        f"The checkpoint {path} cannot be read ({type(error).__name__}: {one_line(error, 100)}). "
        "If it is damaged or incomplete, move it away: the next older one is used then."
    )
