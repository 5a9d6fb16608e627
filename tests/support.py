"""Helpers of several tests."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simseg_jax.config import default_config, model_config, run_config
from simseg_jax.data.pairs import DataSetConfig
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.evaluators.classification import ClassificationConfig
from simseg_jax.evaluators.probe import ProbeConfig
from simseg_jax.evaluators.retrieval import RetrievalConfig
from simseg_jax.models.simseg import init_params, make_model
from simseg_jax.runtime.settings import plain, typed
from simseg_jax.runtime.sharding import make_mesh
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.settings import SegmentationConfig


def assert_close(actual, expected, tolerance: float = 1e-5):
    """Largest deviation relative to the largest expected magnitude: the float32 parity measure."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def assert_trees_equal(first, second):
    """Same structure and identical bits in every leaf."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for path, leaf in jax.tree_util.tree_leaves_with_path(first):
        other = dict(jax.tree_util.tree_leaves_with_path(second))[path]
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=str(path))


def golden_batch(golden):
    """Images NHWC float32, ids and mask of the reference batch."""
    images = golden["image"].astype(np.float32).transpose(0, 2, 3, 1)
    mask = jnp.asarray(golden["attention_mask"] > 0)
    return jnp.asarray(images), jnp.asarray(golden["input_ids"]), mask


def run(monkeypatch, capsys, module, *arguments):
    """Standard output of `python -m module arguments`; SystemExit passes through."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def message(monkeypatch, capsys, module, *arguments):
    """The error message of a command that must fail without a traceback."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, module, *arguments)
    errors = capsys.readouterr().err
    # 2: nothing a restart would mend; otherwise the message itself, with status 1.
    return errors.splitlines()[-1] if stop.value.code == 2 else str(stop.value.code)


def data_set(**settings):
    """A data set to train on, as code behind the configuration sees it; so are the next ones."""
    return typed(DataSetConfig, settings)


def segmentation_eval(**settings):
    return typed(SegmentationConfig, settings)


def retrieval_eval(**settings):
    return typed(RetrievalConfig, settings)


def classification_eval(**settings):
    return typed(ClassificationConfig, settings)


def probe_config(**settings):
    return typed(ProbeConfig, settings)


def tiny_config():
    """A configuration of the generated scenes that trains in a second."""
    config = default_config()
    config.steps = 4
    config.batch_size = 16
    config.log_every = 1
    config.pictures = 0
    config.model.image.update(
        {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2, "mlp_width": 64}
    )
    config.model.text.update(
        {"max_positions": 25, "width": 32, "depth": 1, "heads": 2, "mlp_width": 64}
    )
    config.model.embed_dim = 16
    config.optim.lr = 1e-3
    config.data.train.shapes = plain(data_set(format="shapes", split="train", size=64))
    # Its compilation would take longer than all the rest.
    config.data.update({"vocab": "shapes", "threads": 2, "prefetch": 32, "autoaugment": False})
    config.checkpoint.every = 2
    return config


def tiny_eval(**settings):
    """A small test set of generated scenes for `tiny_config`."""
    defaults = {"data": "shapes", "size": 20, "resolution": 32, "prompts": "shapes"}
    defaults["refine"] = "none"
    return segmentation_eval(**{**defaults, "batch_size": 8, **settings})


def model_of(architecture, encoder=None, devices=1):
    """An architecture as evaluators take it, in float32 on some of the fake devices."""
    encoder = encoder or TextEncoder(load_tokenizer("shapes"), 25)
    mesh = make_mesh(devices=jax.devices()[:devices])
    return Model(architecture, make_model(architecture), encoder, mesh)


def tiny_model(devices=1):
    """(model, parameters) of `tiny_config`."""
    tokenizer = load_tokenizer("shapes")
    architecture = model_config(run_config(tiny_config()), len(tokenizer))
    params = init_params(architecture, jax.random.key(0))
    return model_of(architecture, TextEncoder(tokenizer, 25), devices), params


def hub_environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a process that talks to `hub_server` only."""
    return {
        "PATH": "",
        "HF_HOME": str(folder / "home"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        **more,
    }


def interrupt_imports(*arguments: str) -> None:
    """Ctrl-C while a Python process with these arguments imports JAX ends it without traceback."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr
    while not re.search(r"\| +numpy$", process.stderr.readline()):
        pass  # JAX, which imports it, takes a second more.
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == -signal.SIGINT
