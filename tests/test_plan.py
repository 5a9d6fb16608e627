"""Plans of runs on hardware that is not here, made by the command as users call it."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from simseg_jax import plan
from simseg_jax.config import load_config
from simseg_jax.reports.plans import describe, recommendation
from simseg_jax.runtime.errors import UserError

CONFIG = """
from simseg_jax.config import data_set, default_config, retrieval_eval, segmentation_eval

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
    config.evals.seg.shapes = segmentation_eval(data="shapes", resolution=64, batch_size=3)
    config.evals.retrieval.shapes = retrieval_eval(format="shapes", crop=32, batch_size=3)
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
    printed, (row,) = run_plan("--devices=cpu:4")
    assert "4 devices (cpu)" in printed
    assert row["sent_bytes"]["all-gather"] == EMBEDDINGS * 3 / 4
    assert row["state_bytes"] == pytest.approx(3 * PARAMETERS, rel=1e-3)  # And two moments.
    assert row["fits"] is None
    assert row["fused_attention_calls"] == 0
    assert row["step_seconds"] is None
    assert "at best" not in printed


def test_mistakes_get_one_sentence(run_plan):
    printed, _ = run_plan("--devices=cpu:5")
    assert printed == "error: batch_size=32 must be a multiple of the 5 devices.\n"


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="libtpu is installed")
def test_a_missing_compiler_is_named(run_plan):
    printed, _ = run_plan("--devices=v5e:2x2")
    assert printed == "error: Compiling for v5e needs libtpu: pip install 'simseg-jax[tpu]'.\n"


@pytest.mark.slow
def test_programs_of_an_evaluation(run_plan):
    """The encoder, the CRF on the devices and the composition; several devices share a batch."""
    options = ("--what=evaluate", "--devices=cpu:2", "--config.evals.seg.shapes.crf.backend=jax")
    _, plans = run_plan(*options)
    names = [row["program"] for row in plans]
    assert names == [
        "seg/shapes, encoder and responses",
        "seg/shapes, crf",
        "seg/shapes, composition",
        "retrieval/shapes, encoder",
    ]
    assert all(row["options"] == {"batch_size": 4} for row in plans)  # 3, rounded up.
    assert [row["flops"] > 0 for row in plans] == [True, False, False, True]
    first, crf, *_ = plans
    assert crf["temporary_bytes"] > 10 * first["temporary_bytes"]


def test_an_evaluation_needs_a_test_set(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text("".join(line for line in CONFIG.splitlines(True) if "evals." not in line))
    with pytest.raises(UserError, match=r"needs a test set in config.evals"):
        list(plan.compile_evaluation(load_config(path, []), 100, jax.devices()))


@needs_libtpu
def test_a_plan_for_a_tpu_slice_sends_the_minimum(run_plan):
    printed, (row,) = run_plan("--devices=v5e:2x2")
    assert "4 devices (TPU v5 lite)" in printed
    assert row["fits"]
    assert row["sent_by_axis"].keys() == {"data"}
    sent = row["sent_bytes"]
    total = sum(sent.values())
    assert sent.pop("all-gather") == EMBEDDINGS * 3 / 4
    # Every gradient once, that of the embeddings, three numbers per text, and some scalars. The
    # second token type, which no caption has, gets no gradient.
    least = 2 * 3 / 4 * (PARAMETERS - 4 * 128 + EMBEDDINGS + 3 * 4 * 32)
    assert least <= sent.pop("all-reduce") <= least + 200
    assert not sent
    # It sums the embeddings' gradient whole, of which a part would do.
    assert total == pytest.approx(row["least_sent_bytes"] + EMBEDDINGS * 3 / 4, abs=200)
    bound = max(x for x in row["seconds"].values() if x is not None)
    assert row["step_seconds"] == bound > 0
    assert row["hours"] == pytest.approx(100 * bound / 3600)


@needs_libtpu
@pytest.mark.parametrize("options", [[], ["--config.mesh.fsdp=4"]], ids=str)
def test_a_plan_in_bfloat16_sends_the_minimum(run_plan, options):
    """With split parameters, too: gathered for both passes in the type of products."""
    _, (row,) = run_plan("--devices=v5e:2x2", "--config.dtype=bfloat16", *options)
    sent = row["sent_bytes"]
    whole = EMBEDDINGS * 3 / 4  # As above.
    assert sum(sent.values()) == pytest.approx(row["least_sent_bytes"] + whole, abs=300)
    assert row["sent_by_axis"].keys() <= {"data", "fsdp"}
    assert ("reduce-scatter" in sent) == bool(options)


@needs_libtpu
def test_slices_sum_within_and_between(run_plan):
    """In float32; small arrays go whole over the network, the others a quarter from each device."""
    _, (row,) = run_plan("--devices=v5e:2x2", "--slices=2")
    sent, network = row["sent_bytes"], row["network_bytes"]
    assert network == sum(size for kind, size in sent.items() if kind.startswith("network "))
    least = 2 * 1 / 2 * PARAMETERS / 4
    assert least <= network <= 1.5 * least
    within = sum(sent.values()) - network
    least = 2 * 3 / 4 * PARAMETERS
    assert least <= within <= 1.5 * least


@needs_libtpu
def test_an_evaluation_on_several_hosts_uses_one_chip_of_each(run_plan):
    """XLA refuses a program for the four chips of one of the eight hosts."""
    _, plans = run_plan("--what=evaluate", "--devices=v5e:4x8")
    assert [row["program"] for row in plans] == [
        "seg/shapes, encoder and responses",
        "seg/shapes, composition",
        "retrieval/shapes, encoder",
    ]
    assert all(row["options"] == {"batch_size": 3} and not row["sent_bytes"] for row in plans)


# ---- the search, with figures made up


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """(options tried, recommendation) of a search on eight devices, given what fits."""

    def run(fits, excess):
        def compile_step(config, vocabulary, devices, pairs):
            options = plan.options_of(config)
            fitting = fits(options)
            return {
                "program": "training step",
                "options": options,
                "state_bytes": 300,
                "fits": fitting,
                "excess_bytes": 0 if fitting else excess,
            }

        monkeypatch.setattr(plan, "compile_step", compile_step)
        path = tmp_path / "tiny.py"
        path.write_text(CONFIG)
        config = load_config(path, [])
        rows = list(plan.search(config, 100, jax.devices(), None))
        tried = [{k: v for k, v in row["options"].items() if k != "batch_size"} for row in rows]
        return tried, recommendation(rows, plan.options_of(config))

    return run


NONE = {"remat": "none", "micro_batch": 0, "loss_chunk": 0, "mesh.fsdp": 1}


def test_a_search_ends_with_the_first_that_fits(searched):
    tried, advice = searched(lambda options: options["remat"] == "full", excess=1000)
    assert tried == [NONE, NONE | {"remat": "dots"}, NONE | {"remat": "full"}]
    assert advice == "Recommended: --config.remat=full"
    tried, advice = searched(lambda _: True, excess=0)
    assert tried == [NONE]
    assert advice == "Recommended: the configuration as it is"


def test_a_search_splits_parameters_where_that_may_be_enough(searched):
    tried, advice = searched(lambda options: options["mesh.fsdp"] > 1, excess=399)
    assert tried == [NONE, NONE | {"mesh.fsdp": 8}]
    assert advice == "Recommended: --config.mesh.fsdp=8"


def test_a_search_ends_with_mistakes_that_no_option_mends(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    config = load_config(path, ["--config.mesh.fsdp=3"])
    with pytest.raises(UserError, match="must divide the number of devices"):
        next(plan.search(config, 100, jax.devices(), None))


def test_a_search_without_success_says_so(searched):
    tried, advice = searched(lambda _: False, excess=401)
    assert len(tried) == 3  # Micro-batches of 256 are more than the 4 pairs of a device.
    assert advice.startswith("Nothing fits: ")
    tried, advice = searched(lambda _: None, excess=0)
    assert len(tried) == 1
    assert "not known" in advice


def test_figures_as_text():
    row = {
        "program": "training step",
        "options": {"batch_size": 64, "remat": "none", "micro_batch": 0},
        "unit": "pairs",
        "state_bytes": 2**30,
        "argument_bytes": 2**30 + 2**20,
        "temporary_bytes": 2**30,
        "result_bytes": 0,
        "gpu": True,
        "memory_bytes": 4 * 2**30,
        "fits": True,
        "flops": 1e12,
        "fused_attention_calls": 24,
        "seconds_to_compile": 2.6,
        "sent_bytes": {"all-gather": 1e6, "all-reduce": 3e6},
        "sent_by_axis": {"data": 3e6, "fsdp": 1e6},
        "least_sent_bytes": 4e6,
        "network_bytes": 0,
        "seconds": {"products": 0.001, "memory": 0.002, "links": None, "network": None},
        "step_seconds": 0.002,
        "steps": 1000,
        "hours": 0.5,
    }
    assert describe(row).splitlines() == [
        "training step: batch_size=64, remat=none",
        "  memory      1.00 GiB state, 1.0 MiB batch, 1.00 GiB temporaries: 2.00 GiB in all, of "
        "4.00 GiB on the device: fits with 2.00 GiB to spare",
        "  products    1 TFLOP of the model",
        "  sent        4 MB (all-gather 1, all-reduce 3), over data 3, fsdp 1; 4 MB is the minimum",
        "  attention   24 calls of cuDNN in the program",
        "  compiled    in 3 s here",
        "  at best     2 ms (products 1, memory 2), 32,000 pairs/s, 0.5 hours for 1,000 steps; "
        "a bound, not a measurement",
    ]
    assert "1.00 GiB more than the 4.00 GiB" in describe(row | {"temporary_bytes": 4 * 2**30})
    failed = {"program": "training step", "options": {"batch_size": 8}, "error": "No."}
    assert describe(failed) == "training step: batch_size=8\n  not possible: No."
    assert describe(failed | {"fits": False}).endswith("\n  does not fit: No.")
    large = row | {"result_bytes": 3 * 2**29}
    assert ", 1.50 GiB results: 3.50 GiB in all" in describe(large)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in describe(large)  # 0.875 of the memory.
    assert "XLA_PYTHON" not in describe(large | {"gpu": False})
    network = row | {"network_bytes": 5e5}
    assert "over data 3, fsdp 1, 0.5 MB of it over the network;" in describe(network)
