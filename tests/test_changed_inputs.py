"""An evaluation whose inputs change between two runs gives the numbers of a fresh one."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import ExifTags, Image
from support import tiny_eval

from simseg_jax import evaluate
from simseg_jax.config import default_config, run_config
from simseg_jax.data.shapes import scene
from simseg_jax.data.testsets.segmentation import segmentation_source
from simseg_jax.evaluate import evaluation_config
from simseg_jax.evaluators.records import Kept, RecordStore
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.processes import only_run
from simseg_jax.weights.load import load_model
from simseg_jax.zeroshot import engine
from simseg_jax.zeroshot.paper import PaperProtocol

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from support import tiny_config, tiny_eval

def get_config():
    config = tiny_config()
    for name in {names!r}:
        root = {home!r} + "/" + name
        config.evals.seg[name] = tiny_eval(
            data="voc", root=root, prompts="plain", names={home!r} + "/names.txt"
        )
    return config
"""
NAMES = ["b", "d", "f", "h"]


def write_scene(root, name, number):
    image, mask, _ = scene(number, "val")
    for folder, suffix, pixels in (
        ("JPEGImages", "jpg", image),
        ("SegmentationClass", "png", mask),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / folder / f"{name}.{suffix}")


def write_list(root, content):
    path = root / "ImageSets" / "Segmentation" / "val.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else "\n".join(content).encode())
    return path


def make_set(root, count=4):
    for number, name in enumerate(NAMES[:count]):
        write_scene(root, name, number)
    write_list(root, NAMES[:count])


@pytest.fixture
def home(tmp_path):
    make_set(tmp_path / "set")
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(20)))
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """All evaluations of this file share the model and what is compiled for it."""
    with pytest.MonkeyPatch.context() as patch:
        load, embedder = functools.cache(load_model), functools.cache(engine.class_embedder)
        made = {}

        class Protocol(PaperProtocol):
            def __new__(cls, *arguments):
                return made.setdefault(arguments[0], super().__new__(cls))

            def __init__(self, *arguments):
                if not vars(self):
                    super().__init__(*arguments)

        patch.setattr(evaluate, "load_model", load)
        patch.setattr(engine, "class_embedder", embedder)
        patch.setitem(engine.PROTOCOLS, "paper", Protocol)
        yield


@pytest.fixture
def evaluated(monkeypatch, capsys, workdir, home):
    """evaluated(output, checkpoint, *sets) -> (result.json, what was printed, with stderr)."""

    def call(output="out", checkpoint=workdir, names=("set",), *more):
        file = home / "config.py"
        tests = os.path.dirname(sys.modules["support"].__file__)
        file.write_text(CONFIG.format(tests=tests, home=str(home), names=names))
        arguments = (f"--checkpoint={checkpoint}", f"--config={file}", f"--output={home / output}")
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), "--pictures=0", *more])
        evaluate.main()
        printed = capsys.readouterr()
        record = json.loads((home / output / "result.json").read_text())
        return record["results"], printed.out + printed.err

    return call


def repair_mask(home):
    path = home / "set" / "SegmentationClass" / "d.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[:, :20] = 3
    Image.fromarray(mask).save(path)


def replace_image(home):
    write_scene(home / "other", "d", 9)
    shutil.copy(home / "other" / "JPEGImages" / "d.jpg", home / "set" / "JPEGImages" / "d.jpg")


def insert_in_front(home):
    write_scene(home / "set", "a", 7)
    write_list(home / "set", ["a", *NAMES])


def remove(home):
    write_list(home / "set", NAMES[1:])


def reorder(home):
    write_list(home / "set", NAMES[::-1])


def rename_classes(home):
    (home / "names.txt").write_text("".join(f"thing {i}: thing {i}, what {i}\n" for i in range(20)))


def cut_off(home):
    path = home / "out" / "set" / "records-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-40])


def garble(home):
    path = home / "out" / "set" / "records-00000.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"1", b"2")
    path.write_bytes(b"\n".join(lines))


def behead(home):
    path = home / "out" / "set" / "records-00000.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([b"\xff" + lines[0], *lines[1:]]))


@pytest.mark.parametrize(
    ("change", "said", "computed"),
    [
        (repair_mask, "3 of 4 images are done already (1 changed since)", 1),
        (replace_image, "3 of 4 images are done already (1 changed since)", 1),
        (insert_in_front, "4 of 5 images are done already (1 new)", 1),
        (remove, "3 of 3 images are done already (1 no longer listed)", 0),
        (reorder, "4 of 4 images are done already.", 0),
        (rename_classes, "0 of 4 images are done already (4 new, 4 of other class names", 4),
        (cut_off, "3 of 4 images are done already (1 new, 1 damaged)", 1),
        (garble, "3 of 4 images are done already (1 new, 1 damaged)", 1),
        (behead, "4 of 4 images are done already.", 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_numbers_are_those_of_a_fresh_evaluation(home, evaluated, change, said, computed):
    before, _ = evaluated()
    change(home)
    after, printed = evaluated()
    assert f"set: {said}" in printed
    assert f"set: {computed} images in" in printed
    fresh, _ = evaluated("fresh")
    assert after == fresh
    tables = [(home / f / "set" / "classes.csv").read_text() for f in ("out", "fresh")]
    assert tables[0] == tables[1]
    if change in (repair_mask, replace_image, insert_in_front, remove):
        assert after != before
    again, printed = evaluated()
    assert again == fresh
    assert "set: 0 images in" in printed


def test_another_checkpoint_is_another_evaluation(monkeypatch, capsys, evaluated):
    """Of the same step in the same folder, as after training once more."""
    evaluated()
    load = evaluate.load_model

    def again(*arguments):
        model = load(*arguments)
        return dataclasses.replace(model, identity={**model.identity, "written": 1})

    monkeypatch.setattr(evaluate, "load_model", again)
    with pytest.raises(SystemExit) as stop:
        evaluated()
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds results with checkpoint.written=" in error
    assert "choose another --output, or delete that folder" in error


def test_a_set_without_a_labelled_pixel_costs_no_other(capsys, home, evaluated):
    expected, _ = evaluated("alone")
    make_set(home / "void", 2)
    for path in (home / "void" / "SegmentationClass").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    with pytest.raises(SystemExit) as stop:
        evaluated("out", names=("void", "set"))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 test sets could not be evaluated, the first is seg/void: " in error
    assert "has no labelled pixel: its masks are 255" in error
    assert json.loads((home / "out" / "result.json").read_text())["results"] == expected
    with pytest.raises(SystemExit):
        evaluated("only", names=("void",))
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: The test set voc in")


def test_a_failed_evaluation_leaves_no_earlier_result(capsys, home, evaluated):
    evaluated()
    (home / "out" / "set" / "worst.png").touch()
    for path in (home / "set" / "SegmentationClass").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    with pytest.raises(SystemExit):
        evaluated()
    assert "has no labelled pixel" in capsys.readouterr().err
    assert not (home / "out" / "result.json").exists()
    assert [path.suffix for path in (home / "out" / "set").iterdir()] == [".jsonl"]


def test_what_else_is_called_result_is_no_obstacle(home, evaluated):
    (home / "out").mkdir()
    (home / "out" / "result.json").write_text("[1]")
    assert "seg/set/miou" in evaluated()[0]


def test_masks_turned_on_trust_are_counted_and_named(home, evaluated):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for name in NAMES[1:]:
        path = home / "set" / "JPEGImages" / f"{name}.jpg"
        with Image.open(path) as image:
            image.save(path, exif=exif)
    assert evaluated()[1].count("with their images: 3, of d.jpg, f.jpg, h.jpg. Their size") == 1
    assert "with their images" not in evaluated()[1]  # All of them are done already.


def test_an_image_damaged_on_the_way_costs_no_other(capsys, home, evaluated):
    expected, _ = evaluated("alone")
    make_set(home / "bad")
    (home / "bad" / "JPEGImages" / "h.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        evaluated("out", names=("bad", "set"))
    assert "h.jpg is damaged" in capsys.readouterr().err
    assert json.loads((home / "out" / "result.json").read_text())["results"] == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xef\xbb\xbfb\r\nd\r\n", None),
        (b"\n\n b \n\nd.jpg\n  \n", None),
        ("b\nd\nb\n".encode("utf-16"), "It must be UTF-8 with one name per line"),
        (b"b\nd\xe9\n", "It must be UTF-8 with one name per line"),
        (b"b 1\nd -1\n", "lines of several words, such as 'b 1'"),
        (b"b\nd\nb\n", "names b more than once"),
        (b"b\nd\nb.jpg\n", "names b more than once"),
        (b"b\nlost\n", "The mask is missing: no file"),
        (None, "The list of images is missing: no file"),
    ],
)
def test_lists_are_right_or_refused(home, content, problem):
    path = write_list(home / "set", content or "")
    if content is None:
        path.unlink()

    def images():
        source = segmentation_source(tiny_eval(data="voc", root=str(home / "set")))
        return [(name, source.stamp(index)) for index, name in enumerate(source.names)]

    if problem is None:
        assert [name for name, _ in images()] == ["b", "d"]
        return
    with pytest.raises(UserError, match=problem) as error:
        images()
    assert len(str(error.value)) < 400 + len(str(home))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_done_before_a_signal_is_kept(monkeypatch, capsys, home, evaluated, number):
    expected, _ = evaluated("whole")
    original = SegmentationEvaluator.records

    def records(self, *arguments, **options):
        for done, record in enumerate(original(self, *arguments, **options)):
            if done == 2:
                os.kill(os.getpid(), number)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationEvaluator, "records", records)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            evaluated()
    error = capsys.readouterr().err
    assert f"Stopped. What was done is kept in {home / 'out'}" in error
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again, printed = evaluated()
    assert again == expected
    assert "2 of 4 images are done already (2 new)" in printed


def test_a_folder_of_results_belongs_to_one_job_at_a_time(capsys, home, evaluated):
    with only_run(home / "out"), pytest.raises(SystemExit) as stop:
        evaluated()
    assert stop.value.code == 2
    assert "out belongs to another run, process " in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(monkeypatch, capsys, home, evaluated):
    (home / "out" / "set").mkdir(parents=True)
    (home / "out" / "set" / "records-00000.jsonl").symlink_to("/dev/full")
    # Reading that device would never end.
    monkeypatch.setattr(RecordStore, "read", lambda _: Kept({}, Counter()))
    with pytest.raises(SystemExit) as stop:
        evaluated()
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: No space left on device: ")
    assert "records-00000.jsonl. What was finished before is kept" in error


def test_the_configuration_of_the_model_stays_as_it_is(tmp_path):
    config = run_config(default_config())
    file = tmp_path / "config.py"
    tests = os.path.dirname(sys.modules["support"].__file__)
    file.write_text(CONFIG.format(tests=tests, home=str(tmp_path), names=("set",)))
    changed = evaluation_config(config, str(file), ["--config.evals.seg.set.m_image=1"])
    assert config == run_config(default_config())
    assert changed.evals.seg["set"].m_image == 1
