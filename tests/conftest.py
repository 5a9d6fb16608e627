"""Test set-up: 8 fake CPU devices, float32 products, warnings as errors (pyproject.toml)."""

import atexit
import os
import shutil
import signal
import tempfile
import zlib
from importlib.metadata import version

# Compiling takes longer than running here: without optimisation, and with the older code generator
# of fusions, a training step compiles in less than half the time. CI runs the parity tests with
# SIMSEG_JAX_TEST_OPTIMIZED=1 once more, as XLA compiles for users. JAX 0.11 has no older generator
# and would end at once if it was asked for it.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *(
            "--xla_backend_optimization_level=0",
            *["--xla_cpu_use_fusion_emitters=false"]
            * version("jaxlib").startswith(("0.9.", "0.10.")),
        )
        * (not os.environ.get("SIMSEG_JAX_TEST_OPTIMIZED")),
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Small programs as well go into the cache below, also those of processes that tests start.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # No test asks the network.
# The processes that share the tests inherit it.
if "SIMSEG_JAX_TEST_CACHE" not in os.environ:
    folder = tempfile.mkdtemp(prefix="simseg_jax_tests_")
    os.environ["SIMSEG_JAX_TEST_CACHE"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import tiny_config, tiny_eval

from simseg_jax.models.simseg import make_model
from simseg_jax.train import train
from simseg_jax.weights.containers import read_weights
from simseg_jax.weights.read import read_model

# A shell starts jobs in the background with Ctrl-C ignored; processes of tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests train the same tiny model: compile it once per session.
jax.config.update("jax_compilation_cache_dir", os.environ["SIMSEG_JAX_TEST_CACHE"])

GOLDENS = Path(__file__).parent / "goldens"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a tiny run with a test set of 20 generated scenes: for reading only."""
    path = tmp_path_factory.mktemp("trained")
    config = tiny_config()
    config.evals.seg.shapes = tiny_eval()
    train(config, path)
    return path


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of `trained` for the tests of one file, which may write into it."""
    path = tmp_path_factory.mktemp("workdir") / "run"
    shutil.copytree(trained, path)
    return path


@pytest.fixture(scope="session")
def golden():
    """Reference outputs of the authors' code (see tests/goldens/README.md)."""
    return dict(np.load(GOLDENS / "reference.npz"))


@pytest.fixture(scope="session")
def photographs():
    """Two photographs through a second implementation, made by tests/goldens/make_photographs.py.

    With the pixels of each as "PHOTO/image", uint8 [H, W, 3].
    """
    stored = dict(np.load(GOLDENS / "photographs.npz"))
    for photo in ("rocket", "coffee"):
        with Image.open(GOLDENS / f"{photo}.jpg") as file:
            image = np.asarray(file)
        message = f"{photo}.jpg is decoded to other pixels than when the goldens were written"
        assert zlib.crc32(image.tobytes()) == stored[f"{photo}/pixels/checksum"], message
        stored[f"{photo}/image"] = image
    return stored


@pytest.fixture(scope="session")
def golden_model():
    """(config, graphdef, params) of the authors' miniature model behind the reference outputs."""
    _, config, _, params, _ = read_model(read_weights(GOLDENS / "model.pth"), "model", 3, 2)
    return config, make_model(config), jax.tree.map(jnp.asarray, params)
