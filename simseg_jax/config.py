"""The configuration of a run: composed of the settings of the subpackages, and read from files.

A file in configs/ starts from `default_config()` and changes some keys; the command line overrides
single keys with `--config.optim.lr=1e-3`. `load_config` turns both into a `RunConfig`. The files in
configs/ are installed as `simseg_jax.configs` and have short names: `--config=shapes`.
"""

import contextlib
import dataclasses
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simseg_jax.data.pairs import DataSetConfig
from simseg_jax.data.pipeline import DataConfig
from simseg_jax.evaluators.build import EvalsConfig
from simseg_jax.evaluators.classification import ClassificationConfig
from simseg_jax.evaluators.probe import ProbeConfig
from simseg_jax.evaluators.retrieval import RetrievalConfig
from simseg_jax.models.layers import REMAT
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.runtime.errors import UserError, one_line
from simseg_jax.runtime.files import read_json
from simseg_jax.runtime.ranges import SEED, TEXT, number, one_of, shown, whole
from simseg_jax.runtime.settings import (
    checked,
    complete,
    declared,
    editable,
    group,
    override,
    setting,
    typed,
    unknown_key,
)
from simseg_jax.runtime.sharding import MeshConfig
from simseg_jax.training.arrays import damaged
from simseg_jax.training.checkpoint import CheckpointConfig, Record, read_record
from simseg_jax.training.optim import OptimConfig
from simseg_jax.zeroshot.settings import SegmentationConfig

T = TypeVar("T")
# The type that files in configs/ return: an `ml_collections.ConfigDict`, with untyped attributes.
Config = Any
# The files of configs/ are installed in the package; in a clone they lie beside it.
CONFIGS = Path(__file__).with_name("configs")
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The weights from which a run starts."""

    model: str = setting(
        "",
        "start from a whole model: WORKDIR, converted folder, the authors' .pth, URL or hub id",
        TEXT,
    )
    image: str = setting(
        "",
        "start the ViT from this file, folder, URL or hub id; it decides model.image except keep "
        "and image_size, to which the position embedding is resized",
        TEXT,
    )
    text: str = setting(
        "",
        "start BERT from this file, folder, URL or hub id; it decides model.text except dropout",
        TEXT,
    )

    def check(self, prefix: str) -> None:
        """Raises a `UserError` if fields contradict each other; prefix: precedes their names."""
        if self.model and (self.image or self.text):
            raise UserError(
                f"{prefix}model is a whole model: leave {prefix}image and {prefix}text empty."
            )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run; the defaults are the paper's recipe, without data and test sets."""

    seed: int = setting(0, "seed of parameters, data order, augmentation and dropout", SEED)
    steps: int = setting(1000, "training steps; ignored when epochs > 0", whole(0))
    epochs: float = setting(
        0.0, "passes over the images; > 0 sets the number of steps", number(0, 1e6)
    )
    batch_size: int = setting(
        4096, "pairs per step over all devices: the contrastive batch", whole(2, 2**20)
    )
    dtype: str = setting(
        "auto",
        "type of matrix products; auto: bfloat16 on accelerators, else float32",
        one_of("auto", "float32", "bfloat16"),
    )
    gradient_dtype: str = setting(
        "products",
        "type in which gradients of weights are summed over devices; products: as in dtype",
        one_of("products", "float32"),
    )
    remat: str = setting(
        "none",
        "what the gradient computes again; none: at most cheap operations; dots: all but products "
        "with weights; full: whole blocks",
        one_of(*REMAT),
    )
    micro_batch: int = setting(
        0, "gradient cache: pairs per device embedded at a time; 0: all at once", whole(0)
    )
    loss_chunk: int = setting(
        0, "images per device compared with all texts at a time; 0: all at once", whole(0)
    )
    positives: str = setting(
        "pair",
        "what belongs together; pair: image and own caption; caption: all pairs of equal captions",
        one_of("pair", "caption"),
    )
    log_every: int = setting(10, "steps between two lines of metrics", whole(1))
    eval_every: int = setting(0, "steps between evaluations; 0: only after training", whole(0))
    pictures: int = setting(
        8,
        "images on the contact sheet of each evals.seg, made after training; 0: none",
        whole(0, 1000),
    )
    model: SimSegConfig = group(SimSegConfig)
    init: InitConfig = group(InitConfig)
    optim: OptimConfig = group(OptimConfig)
    data: DataConfig = group(DataConfig)
    mesh: MeshConfig = group(MeshConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    evals: EvalsConfig = group(EvalsConfig)

    def check(self, prefix: str = "") -> None:
        """Raises a `UserError` if settings of different groups contradict each other."""
        patch = self.model.image.patch_size
        for kind in ("seg", "retrieval", "classification"):
            for name, entry in getattr(self.evals, kind).items():
                entry.check_patches(patch, f"{prefix}evals.{kind}.{name}.")
        if self.data.max_length > self.model.text.max_positions:
            raise UserError(
                f"data.max_length={self.data.max_length} must not exceed "
                f"model.text.max_positions={self.model.text.max_positions}."
            )
        for name, entry in self.data.train.items():
            if entry.collage and self.model.image.image_size % 2:
                raise UserError(
                    f"data.train.{name}.collage={entry.collage} needs an even "
                    f"model.image.image_size, not {self.model.image.image_size}."
                )
        if not (self.epochs or self.steps):
            raise UserError("Set steps or epochs to a positive number.")
        if self.data.train and self.model.pool == "loda":
            patches = self.model.image.kept((self.model.image.image_size // patch) ** 2)
            bounds = {"m_image": (patches, "patches"), "m_text": (self.data.max_length, "words")}
            for key, (most, what) in bounds.items():
                value = getattr(self.model, key)
                if value > most:
                    raise UserError(f"model.{key}={value} must not exceed the {most} {what}.")


# ---- functions for files in configs/


def default_config() -> Config:
    """The paper's settings, without data sets and test sets."""
    return editable(RunConfig)


def data_set(**settings) -> Config:
    """One entry of `config.data.train`: a data set of image-caption pairs."""
    return editable(DataSetConfig, **settings)


def segmentation_eval(**settings) -> Config:
    """One entry of `config.evals.seg`: the paper protocol with these settings changed."""
    return editable(SegmentationConfig, **settings)


def retrieval_eval(**settings) -> Config:
    """One entry of `config.evals.retrieval`."""
    return editable(RetrievalConfig, **settings)


def classification_eval(**settings) -> Config:
    """One entry of `config.evals.classification`."""
    return editable(ClassificationConfig, **settings)


def probe_config(**settings) -> Config:
    """The settings of a linear probe; see configs/linear_probe.py."""
    return editable(ProbeConfig, **settings)


# ---- reading


def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[T] = RunConfig) -> T:
    """Runs `get_config()` of a configuration file, applies `overrides` and checks everything.

    path: a file, or the name of a packaged one, such as "shapes". overrides: arguments such
    as "--config.optim.lr=1e-3". kind: the class of the settings. Raises a `UserError` that names
    the file, the key and its valid values.
    """
    path = _file(str(path))
    values = override(_run(path).to_dict(), overrides)
    try:
        return complete(kind, values)
    except UserError as error:
        raise UserError(f"{path}{' and --config...' if overrides else ''}: {error}") from error


def _file(name: str) -> Path:
    """The configuration file of this path or, without `/` and `.py`, of this packaged name."""
    packaged = CONFIGS / f"{name}.py"
    if "/" in name or name.endswith(".py") or not packaged.is_file():
        if Path(name).is_file():
            return Path(name)
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py")))
        raise UserError(f"No configuration file at {name}; the packaged ones are {names}.")
    for own in (Path(name), Path(f"{name}.py")):
        if own.is_file() and not own.samefile(packaged):
            raise UserError(
                f"--config={name} may be ./{own} or the packaged {packaged}: write the path of the "
                "one that you mean."
            )
    return packaged


def _run(path: Path) -> ConfigDict:
    """What `get_config()` of a file returns; a `UserError` gives the line of an error in it."""
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if not callable(get_config):
            raise UserError("it does not define get_config()")
        config = get_config()
    # A configuration file is a program: it can raise anything, or exit.
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else path
        raise UserError(f"{where}: {_reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() returns {shown(config)}; it must return the default_config() "
            "that it has changed."
        )
    return config


def _reason(error: BaseException) -> str:
    unknown = re.search(r'Key \\?"(\w+)\\?" does not exist', str(error))
    if unknown:
        return unknown_key(unknown[1], [name.split(".")[-1] for name, _ in declared(RunConfig)])
    message = one_line(error)
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"


def run_config(config: "ConfigDict | RunConfig | dict[str, Any]") -> RunConfig:
    """Checked settings from a changed `default_config()`, a stored dict or a `RunConfig`."""
    if isinstance(config, RunConfig):
        return checked(config)
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    if not (isinstance(values, dict) and {"model", "data", "evals"} <= values.keys()):
        raise UserError("model, data or evals is missing: this is not the configuration of a run.")
    return typed(RunConfig, values)


def from_file(path: Path) -> RunConfig:
    """The configuration in a JSON file that a run or `convert` wrote."""
    try:
        return run_config(read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def of_checkpoint(path: epath.Path) -> tuple[RunConfig, Record]:
    """(configuration, record) of a checkpoint; a `UserError` if one of them is damaged."""
    record = read_record(path)
    try:
        return run_config(record.config), record
    except UserError as error:
        raise UserError(damaged(path, error)) from error


# ---- values derived from a configuration


def resolved(config: RunConfig) -> RunConfig:
    """A copy in which `top_k=0` of every segmentation test set is replaced by its actual value.

    A run's configuration keeps 0, which adapts to a change of the test set; results record the
    number that was used. A test set whose classes cannot be read keeps 0: its evaluator says why.
    """
    seg = dict(config.evals.seg)
    for name, settings in seg.items():
        with contextlib.suppress(UserError, OSError):
            seg[name] = dataclasses.replace(settings, top_k=settings.class_scores)
    return dataclasses.replace(config, evals=dataclasses.replace(config.evals, seg=seg))


def first_segmentation(config: RunConfig) -> SegmentationConfig:
    """The first entry of `config.evals.seg`, or the paper protocol if there is none.

    A folder of the user's has VOC's classes here: a model must work where its list of classes is
    not.
    """
    first = next(iter(config.evals.seg.values()), SegmentationConfig())
    if first.data != "folder":
        return first
    return dataclasses.replace(first, data="voc", names="original")


def model_config(config: RunConfig, vocab_size: int) -> SimSegConfig:
    """The architecture of a run; vocab_size: replaces model.text.vocab_size=0."""
    rows = config.model.text.vocab_size or vocab_size
    if rows < vocab_size:
        raise UserError(
            f"model.text.vocab_size={rows} is smaller than the vocabulary: {vocab_size} tokens."
        )
    text = dataclasses.replace(config.model.text, vocab_size=rows)
    return dataclasses.replace(config.model, text=text)


def of_architecture(architecture: SimSegConfig) -> RunConfig:
    """The paper's settings with this model and the paper's evaluation on VOC."""
    patch = architecture.image.patch_size
    voc = SegmentationConfig(
        data="voc", root="VOCdevkit/VOC2012", resolution=round(288 / patch) * patch
    )
    data = DataConfig(max_length=min(DataConfig.max_length, architecture.text.max_positions))
    return checked(RunConfig(model=architecture, data=data, evals=EvalsConfig(seg={"voc": voc})))


def published(config: RunConfig) -> RunConfig:
    """A copy without the settings that only matter to the training run: its data and folders."""
    data = dataclasses.replace(config.data, train={}, cache="")
    return dataclasses.replace(config, checkpoint=CheckpointConfig(), init=InitConfig(), data=data)


def compute_dtype(config: RunConfig, mesh: Mesh) -> jnp.dtype:
    """The type of matrix products: `config.dtype`, where auto is bfloat16 on accelerators."""
    if config.dtype == "auto":
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
    return jnp.dtype(config.dtype)
