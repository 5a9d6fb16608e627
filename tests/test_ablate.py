import csv
import json
import math
import sys

import pytest
from support import message, run

from simseg_jax import ablate
from simseg_jax.ablate import TABLES
from simseg_jax.data import shapes
from simseg_jax.reports.tables import paper_columns

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from support import tiny_config, tiny_eval

def get_config():
    config = tiny_config()
    config.steps = 2
    config.evals.seg.shapes = tiny_eval(size=4)
    return config
"""


@pytest.fixture
def arguments(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(tests=str(sys.modules["support"].__file__).rsplit("/", 1)[0]))
    return (f"--config={file}", f"--workdir={tmp_path / 'runs'}", "--set=model.pool=loda,mean")


@pytest.mark.slow
def test_runs_are_trained_once_and_put_into_a_table(monkeypatch, capsys, tmp_path, arguments):
    folder = tmp_path / "runs"
    out = run(monkeypatch, capsys, ablate, *arguments, "--only=1")
    assert "1 of 2 runs are done" in out
    assert sorted(path.name for path in folder.iterdir()) == ["pool=mean"]
    record = json.loads((folder / "pool=mean" / "result.json").read_text())
    assert record["config"]["model"]["pool"] == "mean"
    out = run(monkeypatch, capsys, ablate, *arguments)
    assert "Run 1 of 2: pool=loda" in out
    assert "Run 2 of 2" not in out
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model.pool"] for row in rows] == ["loda", "mean"]
    assert float(rows[1]["seg/shapes/miou"]) == record["results"]["seg/shapes/miou"]
    assert (folder / "table.png").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "train", None)
        assert "2 runs; table.csv" in run(monkeypatch, capsys, ablate, *arguments)
    error = message(monkeypatch, capsys, ablate, *arguments, "--config.optim.lr=0.5")
    assert "was trained with another configuration" in error
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "version", lambda: "another program that draws other scenes")
        error = message(monkeypatch, capsys, ablate, *arguments)
        assert "has results of other inputs, evals.seg/shapes has changed since" in error
    error = message(monkeypatch, capsys, ablate, *arguments, "--only=2")
    assert "the table has the runs 0 to 1" in error
    error = message(monkeypatch, capsys, ablate, *arguments, "--table=loda")
    assert "Give either --table" in error


def test_the_papers_tables():
    table = TABLES["training"]
    assert list(table.values) == ["model.m_text", "model.m_image"]
    # Rows of method.md: M^T = 1 with M^I = 1, 3, 5; ...; M^T = M^I = 5 is the paper's model.
    voc = table.paper["voc"]
    assert [voc[1, 1], voc[3, 1], voc[5, 5]] == [40.9 / 100, 54.1 / 100, 56.6 / 100]
    loda = TABLES["loda"]
    assert loda.paper["voc"]["loda",] == voc[5, 5]
    # Rows of method.md: recalls of retrieval with and without LoDA, whose sums the paper rounds.
    recalls = {
        ("flickr30k/rsum", "loda"): (78.8, 94.3, 97.5, 61.2, 85.0, 90.9),
        ("flickr30k/rsum", "mean"): (78.7, 94.0, 97.3, 60.8, 84.9, 90.5),
        ("coco/rsum", "loda"): (51.8, 76.6, 85.4, 35.7, 62.3, 72.8),
        ("coco/rsum", "mean"): (49.9, 75.7, 83.8, 34.4, 60.9, 71.6),
    }
    for (name, pool), values in recalls.items():
        assert loda.paper[name][pool,] == pytest.approx(sum(values), abs=0.15)
    assert math.isnan(paper_columns(loda, ("cls",))["paper coco/rsum"])
