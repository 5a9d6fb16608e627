import csv
import json

import numpy as np
import pytest
from PIL import Image
from support import segmentation_eval, tiny_config
from test_commands import message, run

from simseg_jax import evaluate, sweep
from simseg_jax.config import default_config
from simseg_jax.sweep import TABLES, fit, parse_values


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_the_paper(monkeypatch, capsys, workdir, tmp_path, table):
    arguments = (f"--checkpoint={workdir}", f"--table={table}", f"--output={tmp_path}")
    out = run(monkeypatch, capsys, sweep, *arguments)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == {"sigma": 8, "resolution": 5, "crf": 2, "responses": 9}[table]
    assert all(0 <= float(row["miou"]) <= 1 for row in rows)
    # The paper's default setting, VOC.
    assert {"sigma": "1.0", "resolution": "40", "crf": "crf", "responses": "1"}[table] in {
        next(iter(row.values())) for row in rows if round(float(row["paper voc"]), 4) == 0.566
    }
    assert out.splitlines()[0] == TABLES[table].title
    assert str(tmp_path) in out.splitlines()[-1]
    with Image.open(tmp_path / "table.png") as plot:
        assert plot.width > 900


def test_a_sweep_equals_single_evaluations_and_continues(monkeypatch, capsys, workdir, tmp_path):
    override = "--config.evals.seg.shapes."
    arguments = (f"--checkpoint={workdir}", "--set=m_text=1,2", "--set=sigma_weight=0,0.5")
    run(monkeypatch, capsys, sweep, *arguments, f"--output={tmp_path / 'sweep'}")
    with (tmp_path / "sweep" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = [(row["m_text"], float(row["sigma_weight"])) for row in rows]
    assert values == [("1", 0), ("1", 0.5), ("2", 0), ("2", 0.5)]
    # Everything after the encoder: one pass.
    assert [p.name for p in (tmp_path / "sweep").glob("pass-*")] == ["pass-1"]
    run(
        monkeypatch,
        capsys,
        evaluate,
        f"--checkpoint={workdir}",
        f"--output={tmp_path / 'single'}",
        f"{override}m_text=2",
        f"{override}sigma_weight=0.5",
    )
    single = json.loads((tmp_path / "single" / "result.json").read_text())["results"]
    assert float(rows[3]["miou"]) == single["seg/shapes/miou"]
    records = tmp_path / "sweep" / "pass-1" / "records-00000.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:5]))
    run(monkeypatch, capsys, sweep, *arguments, f"--output={tmp_path / 'sweep'}")
    with (tmp_path / "sweep" / "table.csv").open() as file:
        assert list(csv.DictReader(file)) == rows


def test_the_paper_is_beside_the_matching_settings():
    paper = TABLES["responses"].paper["voc"]
    assert paper[(1, 5)] == 56.6 / 100  # M^T = 1, M^I = 5: the headline.
    assert paper[(3, 1)] == 45.1 / 100
    assert paper[(5, 5)] == 33.0 / 100
    assert TABLES["sigma"].paper["voc"][(1.5,)] == 57.8 / 100


def test_resolutions_follow_the_size_of_the_model():
    image = default_config().model.image
    assert fit(TABLES["resolution"], image) == TABLES["resolution"]
    image = tiny_config().model.image
    fitted = fit(TABLES["resolution"], image)
    assert fitted.values["resolution"] == (32, 40, 48, 56, 64)
    assert list(fitted.paper["voc"].values()) == list(TABLES["resolution"].paper["voc"].values())


def test_values_have_the_type_of_their_key():
    values = parse_values(segmentation_eval(), ["refine=none,crf", "crf.iterations=1, 3"])
    assert values == {"refine": ("none", "crf"), "crf.iterations": (1, 3)}


def test_errors(monkeypatch, capsys, workdir):
    def error(*arguments):
        return message(monkeypatch, capsys, sweep, f"--checkpoint={workdir}", *arguments)

    assert "Give either --table" in error()
    assert "no test set 'voc' in evals, only: seg/shapes" in error("--test_set=voc", "--table=crf")
    assert "the nearest is 'sigma_weight'" in error("--set=sigmaweight=1")
    assert "Cannot read --set=top_k" in error("--set=top_k")
    assert "top_k=1 must be 0, for the test set" in error("--set=top_k=1,2")
    assert not np.any([p.name.startswith("sweep") for p in workdir.iterdir()])
