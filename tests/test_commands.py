"""The three commands as a user runs them, on one tiny checkpoint."""

import csv
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from support import message, run

from simseg_jax import convert, evaluate, main, segment
from simseg_jax.data.shapes import scene
from simseg_jax.runtime.command_line import cache_programs

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from support import message, run, tiny_config, tiny_eval

def get_config():
    config = tiny_config()
    config.evals.seg.shapes = tiny_eval()
    return config
"""


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for i, name in enumerate(("one.png", "inner/two.jpg")):
        Image.fromarray(scene(i, "val")[0]).resize((90, 70)).save(folder / name)
    Image.new("L", (30, 20)).save(folder / "grey.png")
    return folder


def test_train_command(monkeypatch, capsys, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(tests=str(sys.modules["support"].__file__).rsplit("/", 1)[0]))
    arguments = (f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.log_every=2")
    out = run(monkeypatch, capsys, main, *arguments)
    assert "seg/shapes/miou" in out
    assert str(tmp_path / "run") in out.splitlines()[-1]
    error = message(monkeypatch, capsys, main, *arguments, "--config.optim.lrr=1")
    assert error == "error: Unknown configuration key 'optim.lrr'; the nearest is 'optim.lr'."


def test_help_teaches(monkeypatch, capsys):
    for module in (main, evaluate, segment, convert):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, capsys, module, "--help")
        assert stop.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_evaluate_command(monkeypatch, capsys, workdir):
    out = run(monkeypatch, capsys, evaluate, f"--checkpoint={workdir}")
    folder = workdir / "evaluation-4"
    record = json.loads((folder / "result.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    trained = json.loads(lines[-1])
    # The same evaluator in the same float32: identical numbers.
    assert record["results"] == {k: v for k, v in trained.items() if k.startswith("seg/")}
    last = out.splitlines()[-1]
    assert f"{record['results']['seg/shapes/miou']:.4f}" in last
    assert str(folder) in last
    # What the data set decides is shown as decided.
    assert record["config"]["evals"]["seg"]["shapes"]["top_k"] == 10
    with (folder / "shapes" / "classes.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert float(rows["background"]["iou"]) == record["results"]["seg/shapes/iou/background"]
    assert rows["background"]["images"] == "20"
    for name in ("worst", "best"):
        with Image.open(folder / "shapes" / f"{name}.png") as picture:
            assert picture.height > 8 * 128


def test_intervals_and_comparisons(monkeypatch, capsys, workdir, tmp_path):
    changed = "--config.evals.seg.shapes.sigma_weight=0.5"
    run(
        monkeypatch,
        capsys,
        evaluate,
        f"--checkpoint={workdir}",
        f"--output={tmp_path / 'a'}",
        changed,
    )
    options = f"--checkpoint={workdir}", f"--output={tmp_path / 'b'}", "--pictures=0"
    against = f"--against=half={tmp_path / 'a'}"
    out = run(monkeypatch, capsys, evaluate, *options, against, "--bootstrap=200")
    assert "shapes: half was evaluated with sigma_weight=0.5\n" in out
    assert "shapes: 95 % intervals from 200 draws of its 20 images\n" in out
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    rows = result["intervals"]["seg/shapes"]
    compared = ["this", "no model", "this - no model", "half", "this - half"]
    # The last rows repeat the differences and leave one image out.
    stems = [row.partition(", without val_")[0] for row in rows]
    assert stems == [*compared, *compared[2::2]]
    assert ", without val_" in out
    for name, row in rows.items():
        for measure in ("miou", "miou_given", "pointing"):
            value, low, high = row[measure]
            assert low <= value <= high
            if name == "this":
                assert value == result["results"][f"seg/shapes/{measure}"]
    # The threshold has no influence on what is given the classes.
    assert rows["this - half"]["miou_given"] == rows["this - half"]["pointing"] == [0, 0, 0]
    with (tmp_path / "b" / "shapes" / "classes.csv").open() as file:
        for row in csv.DictReader(file):
            assert float(row["iou_low"]) <= float(row["iou"]) <= float(row["iou_high"])
    # What was written is found again by the same command without the option.
    out = run(monkeypatch, capsys, evaluate, *options)
    assert "20 of 20 images are done already" in out
    assert "95 % intervals" not in out
    assert json.loads((tmp_path / "b" / "result.json").read_text())["intervals"] == {}

    error = message(monkeypatch, capsys, evaluate, *options, against)
    assert error == "error: --against compares intervals: add --bootstrap."
    error = message(monkeypatch, capsys, evaluate, *options, "--bootstrap", "--against=none")
    assert error == "error: --against=none: there is no folder none."
    error = message(monkeypatch, capsys, evaluate, *options, "--bootstrap", against, against)
    assert error.startswith("error: Two rows would be called 'half': give one as --against=NAME=")


def test_a_converted_run_needs_nothing_else(monkeypatch, capsys, workdir, photos, tmp_path):
    model = tmp_path / "model"
    out = run(monkeypatch, capsys, convert, workdir, model, "--to=safetensors")
    assert "training run" in out
    arguments = (f"--checkpoint={model}", "--pictures=0", f"--output={tmp_path / 'numbers'}")
    run(monkeypatch, capsys, evaluate, *arguments)
    record = json.loads((tmp_path / "numbers" / "result.json").read_text())
    trained = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["results"] == {k: v for k, v in trained.items() if k.startswith("seg/")}
    card = (model / "README.md").read_text()
    assert f"results: seg/shapes/miou {trained['seg/shapes/miou']:.4f}" in card
    # Where the training data lay is nobody's business.
    assert json.loads((model / "config.json").read_text())["data"]["train"] == {}
    masks = tmp_path / "masks"
    options = ("--words=star,moon", f"--output={masks}")
    run(monkeypatch, capsys, segment, photos, f"--checkpoint={model}", *options)
    assert (masks / "one_mask.png").is_file()
    error = message(
        monkeypatch, capsys, segment, photos, f"--checkpoint={model}", "--step=2", *options
    )
    assert "leave --step out" in error


def test_a_killed_evaluation_continues(monkeypatch, capsys, workdir, tmp_path):
    arguments = (f"--checkpoint={workdir}", "--pictures=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(monkeypatch, capsys, evaluate, *arguments, f"--output={whole}")
    (killed / "shapes").mkdir(parents=True)
    content = (whole / "shapes" / "records-00000.jsonl").read_text()
    header, *lines = content.splitlines(keepends=True)
    cut = "".join((header, *lines[:9], lines[9][:20]))
    (killed / "shapes" / "records-00000.jsonl").write_text(cut)
    out = run(monkeypatch, capsys, evaluate, *arguments, f"--output={killed}")
    assert "shapes: 11 images in" in out
    first, second = (json.loads((f / "result.json").read_text()) for f in (whole, killed))
    assert first["results"] == second["results"]
    # With other settings the records do not fit; with fewer images they do.
    override = "--config.evals.seg.shapes."
    error = message(
        monkeypatch, capsys, evaluate, *arguments, f"--output={killed}", f"{override}m_image=1"
    )
    assert "settings.0.m_image=5, not 1: choose another --output" in error
    out = run(monkeypatch, capsys, evaluate, *arguments, f"--output={killed}", f"{override}limit=4")
    assert "shapes: 0 images in" in out


def test_evaluate_command_errors(monkeypatch, capsys, workdir, tmp_path):
    error = message(monkeypatch, capsys, evaluate, f"--checkpoint={tmp_path}")
    assert error.startswith("error: No finished checkpoint under")
    error = message(monkeypatch, capsys, evaluate, f"--checkpoint={workdir}", "--config.optim.lr=1")
    assert "only --config.evals" in error
    file = tmp_path / "file"
    file.touch()
    error = message(monkeypatch, capsys, evaluate, f"--checkpoint={workdir}", f"--output={file}")
    assert error == f"error: Cannot write into {file}: File exists."


def test_segment_command(monkeypatch, capsys, workdir, photos, tmp_path):
    out = tmp_path / "out"
    arguments = (f"--checkpoint={workdir}", "--words=star, moon", f"--output={out}")
    printed = run(monkeypatch, capsys, segment, *arguments, "--sigma_weight=-1", photos)
    assert f"Segmented 3 of 3 images; masks, overlays, scores.json in {out}" in printed
    with Image.open(out / "inner" / "two_mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (90, 70))
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
    with Image.open(out / "one_overlay.png") as overlay:
        assert overlay.height > 70
    record = json.loads((out / "scores.json").read_text())
    assert record["words"] == ["star", "moon"]
    assert "apple" in record["contrast"]
    assert "star" not in record["contrast"]
    for answer in record["images"].values():
        assert set(answer["scores"]) == {*record["words"], *record["contrast"]}
        for word in answer["drawn"]:
            assert answer["scores"][word] >= answer["threshold"]


def test_one_image_alone_equals_the_batch(monkeypatch, capsys, workdir, photos, tmp_path):
    arguments = (f"--checkpoint={workdir}", "--words=star,moon,apple", "--contrast=leaf")
    run(monkeypatch, capsys, segment, *arguments, f"--output={tmp_path / 'all'}", photos)
    run(monkeypatch, capsys, segment, *arguments, f"--output={tmp_path / 'a'}", photos / "one.png")
    first, second = (Image.open(tmp_path / f / "one_mask.png") for f in ("all", "a"))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_segment_command_errors(monkeypatch, capsys, workdir, photos, tmp_path):
    base = (f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}")

    def error(*arguments):
        return message(monkeypatch, capsys, segment, *base, *arguments)

    assert "at least one word" in error("--words= ", photos)
    assert "words are texts that are not empty" in error("--words=star, ", photos)
    assert "contrast are texts that are not empty" in error("--words=star", "--contrast=,", photos)
    assert "given twice" in error("--words=dog, dog", photos)
    assert "knows no word of: жук, 虫. Name others" in error("--words=dog, жук, 虫", photos)
    assert 'Leave out "background"' in error("--words=dog,background", photos)
    assert "No image or folder at" in error("--words=dog", photos / "lost.png")
    assert "multiple of the patch size" in error("--words=dog", "--resolution=33", photos)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in error("--words=dog", tmp_path / "empty")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "one.png").write_bytes((photos / "one.png").read_bytes())
    assert "would both be written" in error("--words=dog", photos, tmp_path / "others")


def test_a_corrupt_image_is_skipped_and_reported(monkeypatch, capsys, workdir, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"not a photograph")
    out = tmp_path / "out"
    error = message(
        monkeypatch,
        capsys,
        segment,
        f"--checkpoint={workdir}",
        "--words=star",
        f"--output={out}",
        photos,
    )
    assert "Cannot decode" in error
    assert "broken.jpg" in error
    assert (out / "one_mask.png").is_file()
    assert len(json.loads((out / "scores.json").read_text())["images"]) == 3


def test_without_a_place_for_programs_it_goes_on(monkeypatch, capsys, tmp_path):
    home = tmp_path / "home"
    home.touch()  # No folder can be made below a file, not even by root.
    monkeypatch.setenv("HOME", str(home))
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        cache_programs()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Compiled programs are not kept for the next start: Cannot write into")


def test_programs_are_kept_unless_jax_was_told_where(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        cache_programs()
        assert jax.config.values["jax_compilation_cache_dir"] == before
        jax.config.update("jax_compilation_cache_dir", None)
        cache_programs()
        expected = str(tmp_path / ".cache" / "simseg_jax" / "programs")
        assert jax.config.values["jax_compilation_cache_dir"] == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
