"""Plans of runs on hardware that is not here, made by the command as users call it."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from simseg_jax.data.text import load_tokenizer
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig, init_params
from simseg_jax.models.vit import ViTConfig
from simseg_jax.runtime.sharding import MIN_SHARDED_SIZE

CONFIG = """
from simseg_jax.config import data_set, default_config

def get_config():
    config = default_config()
    config.steps, config.batch_size, config.dtype = 100, 32, "float32"
    config.model.image.update(
        {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    )
    config.model.text.update(
        {"max_positions": 25, "width": 128, "depth": 2, "heads": 2, "mlp_width": 256}
    )
    config.model.embed_dim = 16
    config.data.train.shapes = data_set(format="shapes", split="train", size=64)
    config.data.update({"vocab": "shapes", "autoaugment": False})
    return config
"""
PARAMETERS = 4 * 307_937  # Bytes in float32.
EMBEDDINGS = 4 * 32 * 16
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu (extra tpu) is not installed"
)


@pytest.fixture
def run_plan(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)

    def run(*options):
        """(what is printed, figures of the plans)"""
        output = tmp_path / "out" / "plan.json"
        command = [sys.executable, "-m", "simseg_jax.plan", f"--config={config}", *options]
        done = subprocess.run(
            [*command, f"--output={output}"],
            capture_output=True,
            text=True,
            # Some that would spoil it: the command sets its own.
            env={**os.environ, "XLA_FLAGS": "--xla_no_such_flag", "JAX_PLATFORMS": "tpu"},
            check=False,
        )
        if done.returncode:
            return done.stderr, []
        return done.stdout, json.loads(output.read_text())["plans"]

    return run


@pytest.mark.slow
def test_a_plan_for_cpus(run_plan):
    printed, (plan,) = run_plan("--devices=cpu:4")
    assert "4 devices (cpu)" in printed
    assert plan["sent_bytes"]["all-gather"] == EMBEDDINGS * 3 / 4
    assert plan["state_bytes"] == pytest.approx(3 * PARAMETERS, rel=1e-3)  # And two moments.
    assert plan["fits"] is None
    assert plan["fused_attention_calls"] == 0
    assert plan["step_seconds"] is None
    assert "at best" not in printed


def test_mistakes_get_one_sentence(run_plan):
    printed, _ = run_plan("--devices=cpu:5")
    assert printed == "error: batch_size=32 must be a multiple of the 5 devices.\n"


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="libtpu is installed")
def test_a_missing_compiler_is_named(run_plan):
    printed, _ = run_plan("--devices=v5e:2x2")
    assert printed == "error: Compiling for v5e needs libtpu: pip install 'simseg-jax[tpu]'.\n"


@needs_libtpu
def test_a_plan_for_a_tpu_slice_sends_the_minimum(run_plan):
    printed, (plan,) = run_plan("--devices=v5e:2x2")
    assert "4 devices (TPU v5 lite)" in printed
    assert plan["fits"]
    sent = plan["sent_bytes"]
    assert sent.pop("all-gather") == EMBEDDINGS * 3 / 4
    # Every gradient once, that of the embeddings, three numbers per text, and some scalars. The
    # second token type, which no caption has, gets no gradient.
    least = 2 * 3 / 4 * (PARAMETERS - 4 * 128 + EMBEDDINGS + 3 * 4 * 32)
    assert least <= sent.pop("all-reduce") <= least + 200
    assert not sent
    bound = max(x for x in plan["seconds"].values() if x is not None)
    assert plan["step_seconds"] == bound > 0
    assert plan["hours"] == pytest.approx(100 * bound / 3600)


@needs_libtpu
def test_split_parameters_are_gathered_and_their_gradients_scattered(run_plan):
    _, (plan,) = run_plan("--devices=v5e:2x2", "--config.mesh.fsdp=4")
    architecture = SimSegConfig(
        image=ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=64),
        text=BertConfig(
            vocab_size=len(load_tokenizer("shapes")),
            **{"max_positions": 25, "width": 128, "depth": 2, "heads": 2, "mlp_width": 256},
        ),
        embed_dim=16,
    )
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    leaves = jax.tree.leaves(shapes)
    assert 4 * sum(leaf.size for leaf in leaves) == PARAMETERS
    split = 4 * sum(leaf.size for leaf in leaves if leaf.size >= MIN_SHARDED_SIZE)
    assert 0.8 * PARAMETERS < split < PARAMETERS
    sent = plan["sent_bytes"]
    # Most are kept for the backward pass, some gathered again.
    least = (split + EMBEDDINGS) * 3 / 4
    assert least <= sent["all-gather"] <= 1.5 * least
    # XLA sums some whole that one part would be enough of; the rest and the embeddings are whole.
    least = (split + 2 * (PARAMETERS - split + EMBEDDINGS)) * 3 / 4
    assert least <= sent["reduce-scatter"] + sent["all-reduce"] <= 1.3 * least
    assert set(sent) == {"all-gather", "reduce-scatter", "all-reduce"}


@needs_libtpu
def test_slices_sum_within_and_between(run_plan):
    """In float32; small arrays go whole over the network, the others a quarter from each device."""
    _, (plan,) = run_plan("--devices=v5e:2x2", "--slices=2")
    sent, network = plan["sent_bytes"], plan["network_bytes"]
    assert network == sum(size for kind, size in sent.items() if kind.startswith("network "))
    least = 2 * 1 / 2 * PARAMETERS / 4
    assert least <= network <= 1.5 * least
    within = sum(sent.values()) - network
    least = 2 * 3 / 4 * PARAMETERS
    assert least <= within <= 1.5 * least


@needs_libtpu
def test_bfloat16_halves_what_is_sent(run_plan):
    _, (single,) = run_plan("--devices=v5e:2x2", "--config.dtype=bfloat16")
    least = 2 * 3 / 4 * PARAMETERS
    assert least / 2 <= single["sent_bytes"]["all-reduce"] <= 0.55 * least
