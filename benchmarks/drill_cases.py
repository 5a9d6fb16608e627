"""What the drills run: for every kind of case what to damage and what is right afterwards.

A function of a kind takes the folder with the undisturbed run and its configuration, prepares what
its cases share, and returns the function that runs one of them in a folder of its own.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import damage
import numpy as np
from PIL import Image

from simseg_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
CONFIG = """
from simseg_jax.config import data_set, default_config, segmentation_eval

def get_config():
    config = default_config()
    config.steps = 40
    config.batch_size = 16
    config.log_every = 1
    config.pictures = 0
    config.model.image.update({"image_size": 32, "patch_size": 8, "width": 32, "depth": 1})
    config.model.image.update({"heads": 2, "mlp_width": 64})
    config.model.text.update({"max_positions": 25, "width": 32, "depth": 1, "heads": 2})
    config.model.text.mlp_width = 64
    config.model.embed_dim = 16
    config.data.train.shapes = data_set(format="shapes", split="train", size=64)
    config.data.update({"vocab": "shapes", "threads": 2, "prefetch": 32, "autoaugment": False})
    config.checkpoint.update({"every": 4, "keep": 3})
    config.evals.seg.shapes = segmentation_eval(
        data="shapes", size=4, resolution=32, prompts="shapes", refine="none", batch_size=4
    )
    return config
"""

Case = Callable[[np.random.Generator, Path], None]


class WrongError(Exception):
    """What went on without a word and is not right."""


class StartedError(Exception):
    """A run would start now."""


def train(home: Path, workdir: Path) -> subprocess.Popen:
    """A training in a process of its own."""
    command = [sys.executable, "-m", "simseg_jax.main", f"--config={home / 'config.py'}"]
    with (workdir.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=ROOT, stdout=output, stderr=output
        )


def metrics(workdir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of metrics that has a loss."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], value) for line in lines for k, value in line.items() if "loss" in k]


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a tree by its path."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def same(first: Any, second: Any) -> bool:
    """Whether two trees have the same bits."""
    one, two = arrays(first), arrays(second)
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and one[name].tobytes() == two[name].tobytes()
        for name in one
    )


def kills(home: Path) -> Case:
    """Kill -9 somewhere, then the same command again: the result of an undisturbed run."""
    from simseg_jax.weights.load import load_model

    expected, lines = load_model(home / "run").params, metrics(home / "run")
    seconds = float((home / "seconds.txt").read_text())

    def case(rng: np.random.Generator, place: Path) -> None:
        workdir = place / "run"
        for _ in range(2):
            process = train(home, workdir)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds * rng.uniform(0.2, 0.8))
            process.kill()
            process.wait()
        if train(home, workdir).wait():
            raise WrongError(f"it does not end well: {(place / 'output.txt').read_text()[-2000:]}")
        if not same(load_model(workdir).params, expected):
            raise WrongError("other parameters than those of the undisturbed run")
        if metrics(workdir) != lines:
            raise WrongError("other metrics than those of the undisturbed run")

    return case


def checkpoints(home: Path) -> Case:
    """A damaged file in a run folder: a start from the right state of some step, or refused."""
    from simseg_jax import train as train_lib
    from simseg_jax.config import load_config

    config = load_config(home / "config.py")

    def start(workdir: Path):
        """The state and the position in the data from which a training continues."""
        restored: list = []

        def restore(path, shapes, record):
            restored.append((restore_state(path, shapes, record), record.position))
            raise StartedError

        restore_state = train_lib.restore_state
        with (
            mock.patch.object(train_lib, "restore_state", restore),
            contextlib.suppress(StartedError),
        ):
            train_lib.train(config, workdir)
        return restored[0] if restored else None

    truth = {}
    for folder in sorted((home / "run" / "checkpoints").iterdir()):
        if folder.name.isdigit():
            copy = home / "truth" / f"{os.getpid()}-{folder.name}"
            shutil.copytree(home / "run", copy)
            for other in (copy / "checkpoints").iterdir():
                if other.name != folder.name:
                    shutil.rmtree(other)
            truth[int(folder.name)] = start(copy)

    def case(rng: np.random.Generator, place: Path) -> None:
        shutil.copytree(home / "run", place / "run")
        folder = place / "run"
        if rng.random() < 0.8:
            folder = folder / "checkpoints" / str(max(truth))
        note = damage.damage_tree(folder, rng)
        (place / "damage.txt").write_text(f"{note}\n")
        found = start(place / "run")
        if found is None:
            raise WrongError("it starts from nothing")
        if not any(same(found, state) for state in truth.values()):
            raise WrongError("it starts from another state")

    return case


def settings(home: Path) -> Case:
    """A nonsense value of any key, or a damaged file: refused by name, or the model can be made."""
    import jax

    from simseg_jax import train as train_lib
    from simseg_jax.config import RunConfig, load_config
    from simseg_jax.runtime.settings import declared

    # Of the entries the configuration has data.train.shapes and evals.seg.shapes.
    keys = [
        (name.replace("<name>", "shapes"), field.default)
        for name, field in declared(RunConfig)
        if not name.startswith(("evals.retrieval.", "evals.classification."))
    ]

    def value(rng: np.random.Generator, default: Any) -> str:
        odd = ["", "nan", "1e400", "-1", "0", "None", "()", "(1,)", "[[]]", "'", "-" * 3000 + "1"]
        odd += ["9" * 5000, "(('[', 1),)", "(0.5, 'a')", "True", "²", "gs://x", "{[]: 1}"]
        if rng.random() < 0.5:
            return str(rng.choice(odd))
        if isinstance(default, bool):
            return str(not default)
        if isinstance(default, int | float):
            scale = float(rng.choice([-1, 0.5, 2, 3, 10, 1e3, 1e10, 1e300]))
            return str(type(default)(default * scale))
        return str(default) + str(rng.choice(["", "x", ","]))

    def start(config) -> None:
        """As far as a training goes before it takes memory for the model."""
        seen: dict = {}

        def sharding(shapes, mesh):
            seen["state"] = shapes
            return {"params": None}

        def jitted(update, *_):
            seen["update"] = update

        patches = {"state_sharding": sharding, "jit_update": jitted}
        with contextlib.ExitStack() as stack:
            for name, function in patches.items():
                stack.enter_context(mock.patch.object(train_lib, name, function))
            stack.enter_context(
                mock.patch.object(train_lib, "make_evaluators", side_effect=StartedError)
            )
            stack.enter_context(contextlib.suppress(StartedError))
            train_lib.train(config, home / "unused")
        jax.eval_shape(seen["update"], seen["state"], train_lib.batch_shapes(config))

    def case(rng: np.random.Generator, place: Path) -> None:
        text = CONFIG.encode()
        (place / "config.py").write_bytes(damage.damaged(text, rng) if rng.random() < 0.2 else text)
        name, default = keys[int(rng.integers(len(keys)))]
        override = f"--config.{name}={value(rng, default)}"
        (place / "override.txt").write_text(override)
        start(load_config(place / "config.py", [override]))

    return case


def images(home: Path) -> Case:
    """Damaged images: decoded to the size asked for or refused; segmented or named."""
    from simseg_jax import segment
    from simseg_jax.data.crops import read_crop
    from simseg_jax.data.images import IMAGE_SUFFIXES, decode_image

    def whole_folder(place: Path) -> None:
        arguments = ["segment", str(place), "--words=red square,blue circle"]
        arguments += [f"--checkpoint={home / 'run'}", f"--output={place / 'out'}"]
        said, status = io.StringIO(), None
        with (
            mock.patch.object(sys, "argv", arguments),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            try:
                segment.main()
            except SystemExit as stop:
                status = stop.code
        (place / "output.txt").write_text(f"{said.getvalue()}\n{status}\n")
        if status == 2:
            raise UserError(said.getvalue())
        told = said.getvalue() + str(status) + (place / "out" / "scores.json").read_text()
        missing = [f.name for f in place.glob("[0-9]*") if f.name not in told]
        if missing:
            raise WrongError(f"neither segmented nor named: {missing}")

    # Threads and programs of later calls, before the memory is limited.
    with tempfile.TemporaryDirectory() as sound:
        for number in range(8):
            Image.new("RGB", (30, 20)).save(Path(sound) / f"{number}.png")
        whole_folder(Path(sound))

    def case(rng: np.random.Generator, place: Path) -> None:
        if rng.random() < 0.04:
            for number in range(6):
                name, data = damage.image(rng)
                data = damage.damaged(data, rng) if number else data
                suffix = Path(name).suffix
                suffix = suffix if suffix in IMAGE_SUFFIXES else ".png"
                (place / f"{number}{suffix}").write_bytes(data)
            return whole_folder(place)
        name, data = damage.image(rng)
        data = damage.damaged(data, rng)
        (place / name).write_bytes(data)
        with contextlib.suppress(UserError):
            decode_image(data, name).load()
        try:
            array = read_crop(data, 32, lambda width, height: (0, 0, width, height), 2**24)
        except ValueError as error:
            raise UserError(str(error)) from error
        if array.shape != (32, 32, 3) or array.dtype != np.uint8:
            raise WrongError(f"{array.dtype} {array.shape}")

    return case


def captions(_home: Path) -> Case:
    """Damaged tables, archives and Parquet: every example is whole, or left out."""
    from simseg_jax.data.pairs import BadExample, PairsConfig, open_source

    def case(rng: np.random.Generator, place: Path) -> None:
        path = damage.captions(place, rng)
        source = open_source(PairsConfig(path=str(path)), str(place / "cache"))
        for index in range(len(source)):
            with contextlib.suppress(BadExample):
                texts = source[index]["captions"]
                if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                    raise WrongError(f"captions of example {index}: {texts!r}")

    return case


def weights(home: Path) -> Case:
    """Damaged weights: whole and finite, or refused; with checksums the very same."""
    from simseg_jax.weights.load import load_model, open_source
    from simseg_jax.weights.read import parts_in, read_model

    sources = [*sorted((GOLDENS / "neighbours").glob("*/")), GOLDENS / "model.pth"]
    converted = home / "converted"
    expected = load_model(converted).params if converted.is_dir() else None

    def read(path: Path) -> list:
        """The parameters that every reader finds in a file or folder of weights."""
        _, weights = open_source(path)
        if weights is None:
            return [load_model(path).params]
        return [read_model(weights, part).params for part in parts_in(weights) or ("image",)]

    def case(rng: np.random.Generator, place: Path) -> None:
        if expected is not None and rng.random() < 0.3:
            shutil.copytree(converted, place / "model")
            (place / "damage.txt").write_text(damage.damage_tree(place / "model", rng) + "\n")
            if not same(load_model(place / "model").params, expected):
                raise WrongError("other parameters than those converted")
            return
        source = sources[int(rng.integers(len(sources)))]
        whole = source.is_file()
        (shutil.copy if whole else shutil.copytree)(source, place / source.name)
        files = [place / source.name] if whole else sorted((place / source.name).iterdir())
        damage.weights(files[int(rng.integers(len(files)))], rng)
        for params in read(place / source.name):
            if not all(np.isfinite(array).all() for array in arrays(params).values()):
                raise WrongError("parameters that are not finite")

    return case


def leaks(home: Path) -> Case:
    """200 checkpoints in a row leave no files open."""
    import jax.numpy as jnp

    from simseg_jax.config import load_config
    from simseg_jax.runtime.settings import plain
    from simseg_jax.training.checkpoint import Checkpoints, Record, checkpoints_folder

    config = plain(load_config(home / "config.py"))

    def case(_rng: np.random.Generator, place: Path) -> None:
        state = {"params": {"x": jnp.ones(3)}, "opt": {"y": jnp.ones(3)}, "step": jnp.int32(0)}
        counts = []
        with Checkpoints(checkpoints_folder(place), 2) as kept:
            for step in range(200):
                kept.save(step, state, Record(config, step))
                counts.append(len(os.listdir("/proc/self/fd")))
        if max(counts[150:]) > max(counts[:50]) + 10:
            raise WrongError(f"open files grow from {max(counts[:50])} to {max(counts[150:])}")

    return case
