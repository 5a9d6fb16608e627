"""Several processes that find each other through `jax.distributed`, as on several machines."""

import json
import os
import socket
import subprocess
import sys

import pytest
from support import tiny_config, tiny_eval

from simseg_jax.checkpoint import completed_steps
from simseg_jax.config import to_json
from simseg_jax.train import train

TRAIN = """
import json, sys, jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from simseg_jax import config, train
with open(sys.argv[3]) as file:
    print(json.dumps(train.train(config.from_dict(json.load(file)), sys.argv[4])))
"""
EVALUATE = """
import sys, jax
jax.distributed.initialize(f"localhost:{sys.argv.pop(1)}", 2, int(sys.argv.pop(1)))
from simseg_jax import evaluate
evaluate.main()
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def run_together(code, count, *arguments):
    """Standard output of every process."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(index), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in results]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    config = tiny_config()
    config.evals.seg.shapes = tiny_eval()
    config.evals.seg.windows = tiny_eval(protocol="standard", window=32, limit=7)
    results = train(config, path)
    return path, results


def test_two_processes_train_like_one(tmp_path):
    """The same global batches and dropout: the same losses, up to the order of summation."""
    config = tiny_config()
    config.data.update({"edit_rate": 0.5})
    train(config, tmp_path / "one")
    (tmp_path / "config.json").write_text(to_json(config))
    run_together(TRAIN, 2, tmp_path / "config.json", tmp_path / "two")
    one, two = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [r["step"] for r in two] == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]
    # What two wrote, one can continue.
    config.steps = 5
    train(config, tmp_path / "two")
    assert completed_steps(tmp_path / "two") == [2, 4, 5]


def test_two_processes_evaluate_like_one(workdir, tmp_path):
    path, expected = workdir
    arguments = (f"--checkpoint={path}", f"--output={tmp_path}", "--pictures=2")
    first, second = run_together(EVALUATE, 2, *arguments)
    assert json.loads((tmp_path / "result.json").read_text())["results"] == expected
    assert "shapes: 20 images in" in first
    assert "images in" not in second
    files = sorted(file.name for file in (tmp_path / "shapes").glob("*.jsonl"))
    assert files == ["records-00000.jsonl", "records-00001.jsonl"]
    lines = [(tmp_path / "shapes" / file).read_text().splitlines() for file in files]
    assert [len(x) for x in lines] == [11, 11]

    # One of them was killed half way; with the other's records only those are missing.
    (tmp_path / "shapes" / files[1]).write_text("\n".join(lines[1][:4]) + "\n")
    first, _ = run_together(EVALUATE, 2, *arguments, "--benchmark=shapes")
    assert "shapes: 7 images in" in first
    again = json.loads((tmp_path / "result.json").read_text())["results"]
    assert again == {key: value for key, value in expected.items() if "/shapes/" in key}
