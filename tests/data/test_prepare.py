"""The prepare command: round trips, counts, resuming, processes, Beam."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from pairs_support import IMAGES, make_pairs, write_csv, write_tar
from PIL import ExifTags, Image
from support import data_set

from simseg_jax.data.images import decode_image, read_header
from simseg_jax.data.pairs import open_source
from simseg_jax.data.prepare import __main__ as prepare
from simseg_jax.data.prepare import assemble, shards
from simseg_jax.data.prepare import card as card_lib
from simseg_jax.data.text import load_tokenizer

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def home(tmp_path, monkeypatch):
    # Indexes lie in the home folder by default.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "source").mkdir()
    return tmp_path


def jpeg(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def run(*arguments):
    prepare.main([*map(str, arguments), "--processes=1"])


def message(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        prepare.main([*map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def examples(folder):
    source = open_source(data_set(path=str(folder)))
    return [(source[i]["image"], source[i]["captions"]) for i in range(len(source))]


def records(folder):
    """Content of the shards by name."""
    files = (folder / "1.0.0").glob("*.array_record*")
    return {file.name: file.read_bytes() for file in files}


def card(folder):
    return json.loads((folder / "card.json").read_text())


# Of tensorflow-datasets with the protobuf that Apache Beam asks for.
@pytest.mark.filterwarnings("ignore:label\\(\\) is deprecated:DeprecationWarning")
def test_the_round_trip_keeps_order_bytes_and_captions(home, capsys):
    pairs = make_pairs(25)
    table = write_csv(pairs, home / "source")
    options = ("--short_side=0", "--no-shuffle", "--shards=3", f"--images={IMAGES}")
    run(table, f"--output={home / 'out'}", *options)
    expected = [(image, captions) for _, image, captions in pairs]
    assert examples(home / "out") == expected
    builder = tfds.builder_from_directory(str(home / "out" / "1.0.0"))
    skip = {"image": tfds.decode.SkipDecoding()}
    read = builder.as_data_source("train", decoders=skip)
    assert [(x["image"], tuple(c.decode() for c in x["captions"])) for x in read] == expected
    assert "tensorflow" not in sys.modules
    facts = card(home / "out")
    assert (facts["images"], facts["captions"]) == (25, sum(len(c) for _, _, c in pairs))
    assert facts["bytes_in"] == facts["bytes_out"] == sum(len(image) for _, image, _ in pairs)
    assert facts["short_side_before"] == {"min": 16, "median": 16, "mean": 16.0, "max": 16}
    assert (home / "out" / "card.png").stat().st_size > 10_000
    assert "25 images with" in capsys.readouterr().out
    run(table, f"--output={home / 'out'}", *options)
    assert "is already done" in capsys.readouterr().out


def test_shuffling_and_shards(home):
    pairs = make_pairs(40)
    path = write_tar(pairs, home / "source")
    run(path, f"--output={home / 'a'}", "--short_side=0", "--shards=4")
    run(path, f"--output={home / 'b'}", "--short_side=0", "--shards=4", "--name=a")
    run(path, f"--output={home / 'c'}", "--short_side=0", "--shards=4", "--name=a", "--seed=1")
    assert len(records(home / "a")) == 4
    assert records(home / "a") == records(home / "b") != records(home / "c")
    unchanged = [(image, captions) for _, image, captions in pairs]
    assert examples(home / "a") != unchanged
    assert sorted(examples(home / "a")) == sorted(unchanged) == sorted(examples(home / "c"))


def test_large_images_are_reencoded_and_others_kept(home):
    file = io.BytesIO()
    Image.new("RGBA", (30, 20), (255, 0, 0, 255)).save(file, "WEBP")
    images = [jpeg(120, 60), jpeg(40, 30), file.getvalue()]
    pairs = [(f"{i}.jpg", image, ("words",)) for i, image in enumerate(images)]
    table = write_csv(pairs, home / "source")
    options = ("--short_side=40", "--no-shuffle", f"--images={IMAGES}")
    run(table, f"--output={home / 'out'}", *options)
    written = [image for image, _ in examples(home / "out")]
    assert Image.open(io.BytesIO(written[0])).size == (80, 40)
    assert written[1] == images[1]
    assert Image.open(io.BytesIO(written[2])).format == "JPEG"
    assert card(home / "out")["reencoded_images"] == 2


def test_images_are_written_upright(home):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = []
    for size, form in (((60, 120), "JPEG"), ((30, 40), "JPEG"), ((30, 36), "WEBP")):
        files.append(io.BytesIO())
        Image.new("RGB", size, "red").save(files[-1], form, exif=exif)
    images = [file.getvalue() for file in files]
    pairs = [(f"{i}.jpg", image, ("words",)) for i, image in enumerate(images)]
    table = write_csv(pairs, home / "source")
    run(table, f"--output={home / 'out'}", "--short_side=40", "--no-shuffle", f"--images={IMAGES}")
    written = [image for image, _ in examples(home / "out")]
    assert [decode_image(image).size for image in written] == [(80, 40), (40, 30), (36, 30)]
    assert written[1] == images[1]
    assert [read_header(image)[2] for image in written] == [1, 6, 1]
    facts = card(home / "out")
    assert (facts["long_side_before"]["max"], facts["short_side_before"]["min"]) == (120, 30)


def damaged_pairs():
    pairs = make_pairs(30)
    pairs[3] = ("3.jpg", pairs[3][1][:60], ("cut",))
    pairs[7] = ("7.jpg", b"text", ("no image",))
    pairs[11] = ("11.jpg", pairs[11][1], ("  ",))
    pairs[20] = ("20.jpg", *pairs[5][1:])
    pairs[21] = ("21.jpg", pairs[5][1], ("Another caption",))
    return pairs


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_what_is_damaged_or_double_is_counted_and_named(home, duplicates):
    path = write_tar(damaged_pairs(), home / "source")
    run(path, f"--output={home / 'out'}", f"--duplicates={duplicates}", "--shards=2")
    facts = card(home / "out")
    assert facts["corrupt_images"]["count"] == 2
    assert any("3.jpg" in name for name in facts["corrupt_images"]["first"])
    assert facts["left_out_by_the_index"]["count"] + facts["unusable_examples"]["count"] == 1
    assert facts["duplicates"] == {"count": 1, "kept": duplicates == "keep"}
    assert facts["images"] == len(examples(home / "out")) == (27 if duplicates == "keep" else 26)


def test_too_much_damage_stops_it(home, capsys):
    pairs = [(f"{i}.jpg", b"no image", ("words",)) for i in range(30)] + make_pairs(10)
    path = write_tar(pairs, home / "source")
    error = message(capsys, path, f"--output={home / 'out'}", "--processes=1", "--shards=2")
    assert "more than --max_bad=0.1" in error
    assert "Repair the data or raise --max_bad" in error


def test_an_interrupted_job_keeps_its_finished_shards(home, monkeypatch, capsys):
    path = write_tar(make_pairs(40), home / "source")
    arguments = (path, f"--output={home / 'out'}", "--shards=4")
    original = shards.write_shard

    def die(job, folder, index):
        if index == 2:
            raise KeyboardInterrupt
        original(job, folder, index)

    monkeypatch.setattr(assemble, "write_shard", die)
    with pytest.raises(SystemExit, match="130"):
        run(*arguments)
    monkeypatch.setattr(assemble, "write_shard", original)
    work = home / "out" / "1.0.0.incomplete"
    first = next(work.glob("*00000-of-00004"))
    before = first.stat().st_mtime_ns
    assert not list(work.glob("*00002-of-00004"))
    error = message(capsys, *arguments, "--quality=50")
    assert "holds another job, with quality=90 instead of 50" in error
    capsys.readouterr()
    run(*arguments)
    assert "Continuing: 2 of 4 shards are there" in capsys.readouterr().out
    finished = home / "out" / "1.0.0" / first.name
    assert finished.stat().st_mtime_ns == before
    assert len(examples(home / "out")) == 40
    assert not list((home / "out" / "1.0.0").glob("statistics*"))


def replace_image(home):
    (home / "source" / IMAGES / "00007.jpg").write_bytes(make_pairs(1, seed=5)[0][1])


def correct_caption(home):
    path = home / "source" / "captions.csv"
    path.write_text(path.read_text().replace("seen", "shown"))


def remove_image(home):
    (home / "source" / IMAGES / "00007.jpg").unlink()


def write_again(home):
    write_tar(make_pairs(20, seed=9), home / "source")


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (write_csv, replace_image),
        (write_csv, correct_caption),
        (write_csv, remove_image),
        (write_tar, write_again),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_source_is_noticed(home, monkeypatch, capsys, write, change, finished):
    monkeypatch.setattr(card_lib, "write_picture", lambda *_: None)
    path = write(make_pairs(20), home / "source")
    arguments = (path, f"--output={home / 'out'}", f"--images={IMAGES}", "--shards=2")
    if finished:
        run(*arguments)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(assemble, "write_shard", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(*arguments)
    change(home)
    assert "The files of the source have changed since" in message(capsys, *arguments)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*00001-of-00003", cut),
        ("*00001-of-00003", lambda path: path.unlink()),
        ("statistics-00001.json", cut),
        ("digests-00001.npy", cut),
    ],
)
def test_a_damaged_shard_is_written_again(home, monkeypatch, capsys, pattern, damage):
    monkeypatch.setattr(card_lib, "write_picture", lambda *_: None)
    path = write_tar(make_pairs(15), home / "source")
    options = ("--shards=3", "--name=same")
    run(path, f"--output={home / 'whole'}", *options)
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(path, f"--output={home / 'out'}", *options)
    work = home / "out" / "1.0.0.incomplete"
    damage(next(work.glob(pattern)))
    (work / ".left.over").write_bytes(b"of a killed process")
    capsys.readouterr()
    run(path, f"--output={home / 'out'}", *options)
    assert "Continuing: 2 of 3 shards are there" in capsys.readouterr().out
    assert records(home / "out") == records(home / "whole")
    assert not list((home / "out" / "1.0.0").glob(".*"))


def test_a_full_disk_is_one_sentence(home, monkeypatch, capsys):
    class Full(shards.ArrayRecordWriter):
        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

    path = write_tar(make_pairs(5), home / "source")
    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    error = message(capsys, path, f"--output={home / 'out'}", "--processes=1").splitlines()[-1]
    assert error.startswith("error: Cannot write ")
    assert "No space left on device. Make room there and run the same command again" in error


def test_what_was_done_before_ctrl_c_is_said(home, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    path = write_tar(make_pairs(5), home / "source")
    monkeypatch.setattr(assemble, "write_shard", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(path, f"--output={home / 'out'}")
    said = f"Stopped. Finished shards in {home / 'out'} are kept for the same command."
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("runner", ["--processes=2", "--beam=--runner=DirectRunner"])
def test_processes_and_beam_write_the_same_bytes(home, runner):
    if "beam" in runner:
        pytest.importorskip("apache_beam")
    path = write_tar(make_pairs(12), home / "source")
    run(path, f"--output={home / 'one'}", "--shards=3", "--name=same")
    prepare.main([path, f"--output={home / 'two'}", "--shards=3", "--name=same", runner])
    assert records(home / "one") == records(home / "two")
    one, two = card(home / "one"), card(home / "two")
    assert {**one, "date": ""} == {**two, "date": ""}


def test_a_vocabulary_of_the_captions(home):
    path = write_tar(make_pairs(12), home / "source")
    run(path, f"--output={home / 'out'}", "--train_vocab=60")
    tokenizer = load_tokenizer(str(home / "out" / "vocab.txt"))
    assert "seen" in tokenizer.get_vocab()


def test_mistakes_are_explained(home, capsys):
    out = f"--output={home / 'out'}"
    path = write_tar(make_pairs(5), home / "source")
    assert "--quality: '0' must be a whole number from 1" in message(
        capsys, path, out, "--quality=0"
    )
    assert "--shards=9 are more than the 5 images" in message(capsys, path, out, "--shards=9")
    assert "--name='1 2' must be letters" in message(capsys, path, out, "--name=1 2")
    assert "No file matches" in message(capsys, home / "nowhere.tar", out)
    assert "must be a folder here" in message(capsys, path, "--output=gs://bucket/x")
    shutil.copytree(home / "source", home / "out" / "1.0.0")
    assert "was not made by prepare" in message(capsys, path, out)
