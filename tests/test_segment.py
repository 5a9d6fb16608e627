"""Images and words of every form through `Segmenter` and its command."""

import errno
import io
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from support import message, run

from simseg_jax import Segmentation, segment
from simseg_jax.data.shapes import CATEGORIES, scene
from simseg_jax.data.words import check_words, split_words
from simseg_jax.runtime.errors import UserError
from simseg_jax.segment import find_images
from simseg_jax.segmenter import Segmenter
from simseg_jax.weights.load import load_model

WORDS = ["star", "moon"]
PHOTO = Image.fromarray(scene(0, "val")[0]).resize((90, 70))
FILES = [b"text", bytearray(b"text"), memoryview(b"text"), io.BytesIO(b"text")]


@pytest.fixture(scope="module")
def model(trained):
    return load_model(str(trained))


@pytest.fixture(scope="module")
def segmenter(model):
    return Segmenter(model, sigma_weight=-1)


# Images


def test_every_form_of_a_picture_gives_the_same_answer(segmenter, tmp_path):
    PHOTO.save(tmp_path / "x.png")
    colours = np.asarray(PHOTO)
    opaque = np.dstack([colours, np.full(colours.shape[:2], 255, np.uint8)])
    forms = [str(tmp_path / "x.png"), tmp_path / "x.png", (tmp_path / "x.png").read_bytes()]
    forms += [PHOTO, PHOTO.convert("RGBA"), PHOTO.convert("CMYK"), colours, opaque]
    forms += [colours / 255, colours.astype(np.uint16) * 257, np.asarray(opaque / np.float32(255))]
    grey = PHOTO.convert("L")
    values = np.asarray(grey)
    greys = [grey, grey.convert("RGB"), grey.convert("I"), grey.convert("F"), grey.convert("LA")]
    greys += [values, values[:, :, None], values / 255, values.astype(np.uint16) * 257]
    greys += [Image.fromarray(values.astype(np.uint16) * 257), grey.convert("P")]
    bits = grey.convert("1")
    binary = [bits, np.asarray(bits), bits.convert("RGB")]
    answers = list(segmenter.segment([*forms, *greys, *binary], WORDS))
    for begin, count in ((0, len(forms)), (len(forms), len(greys)), (-len(binary), len(binary))):
        first, *others = answers[begin:][:count]
        for answer in others:
            assert answer.scores == first.scores
            np.testing.assert_array_equal(answer.mask, first.mask)
    assert {a.mask.shape for a in answers} == {(70, 90)}
    assert {a.mask.dtype for a in answers} == {np.dtype(np.uint8)}


def test_masks_are_upright(segmenter, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    PHOTO.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        answers = list(
            segmenter.segment([PHOTO, tmp_path / "x.png", opened, opened.convert("RGB")], WORDS)
        )
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer.mask, answers[0].mask)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.full((4, 4, 3), 255.0), "floats must have values from 0 to 1"),
        (np.full((4, 4), np.nan), "floats must have values from 0 to 1"),
        (np.zeros((4, 4), int), "int64 is not uint8"),
        (np.zeros((3, 8, 9), np.uint8), r"shape \(3, 8, 9\) is not"),
        (np.zeros((0, 5), np.uint8), "an image of 5x0 has no pixels"),
        (b"text", "no image in a known format"),
        ("nowhere.png", r"nowhere\.png: no file is there"),
        (None, "NoneType of shape"),
        (
            io.BytesIO(b"text"),
            r"BytesIO of shape \(\) is not a path, the bytes of a file, a Pillow image",
        ),
        (
            bytearray(9),
            r"bytearray of shape \(9,\) is not a path, the bytes of a file, a Pillow image",
        ),
    ],
)
def test_what_is_no_image_is_refused(segmenter, image, reason):
    with pytest.raises(UserError, match=reason):
        list(segmenter.segment([image], WORDS))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("max_pixels", -1), ("max_pixels", "many"), ("max_pixels", None), ("batch_size", 0)),
        *(("resolution", 0), ("refine", "much"), ("sigma_weight", float("nan")), ("stdie", 1)),
    ],
)
def test_arguments_that_make_no_sense_are_refused(model, key, value):
    with pytest.raises(UserError, match=key):
        Segmenter(model, **{key: value})


@pytest.mark.parametrize("image", [PHOTO, np.asarray(PHOTO), "x.png", *FILES])
def test_one_image_in_place_of_a_list_is_refused(segmenter, image):
    with pytest.raises(UserError, match=r"for one image segment\(\[image\], \.\.\.\)"):
        segmenter.segment(image, WORDS)


# Words


def test_words_are_checked():
    assert check_words("dog") == ("dog",)
    assert check_words([" big \n dog "]) == ("big dog",)
    assert check_words([], "contrast") == ()
    with pytest.raises(UserError, match=r"give a list, either \['dog', 'cat'\] or, for one phrase"):
        check_words("dog, cat")
    no_words: list[Any] = [["dog", " "], ["dog", ""], ["dog", None], [7]]
    for words in no_words:
        with pytest.raises(UserError, match="words are texts that are not empty, not "):
            check_words(words)
    with pytest.raises(UserError, match="given twice: dog"):
        check_words(["dog", "cat", "dog "])
    with pytest.raises(UserError, match="at least one word"):
        check_words([])


def test_words_of_the_command_line():
    assert split_words(" dog, cafe\u0301 , big  cat") == ["dog", "cafe\u0301", "big  cat"]
    assert split_words(" ") == []
    for text in (",", "dog,", "dog, , cat"):
        with pytest.raises(UserError, match="contrast are texts that are not empty, not ''"):
            check_words(split_words(text), "contrast")
    undecoded = "café, 猫".encode().decode("ascii", "surrogateescape")
    assert split_words(undecoded) == ["café", "猫"]
    with pytest.raises(UserError, match=r"no text in UTF-8: set LC_ALL=C\.UTF-8"):
        split_words("caf\udce9")
    for text in ("apple;leaf", "apple\nleaf", "apple\uff0cleaf", '"red, apple", leaf', "a\tb"):
        with pytest.raises(UserError, match="may belong to a word or stand between two"):
            split_words(text)


def test_words_may_come_from_a_generator():
    assert check_words(word for word in ("dog", "cat")) == ("dog", "cat")
    for words in (None, 5, ["a\udcff"]):
        with pytest.raises(UserError, match="words are texts that are not empty, not "):
            check_words(words)


def test_words_that_are_one_to_the_model(model):
    classes = Segmenter(model).classes
    assert classes("star").words == ("star",)
    # The default contrast leaves out what is a word already.
    assert "star" not in classes(["Star"]).contrast
    for words, contrast in (
        (["star", "Star"], None),
        (["star", "STAR"], []),
        (["star"], ["star"]),
        (["star"], ["moon", "Star"]),
        (["star", "Background"], None),
        (["star"], ["BACKGROUND"]),
    ):
        with pytest.raises(UserError, match=r"are the same to this model|is in words and in"):
            classes(words, contrast)
    with pytest.raises(UserError, match='Leave out "background"'):
        classes(["star"], ["background"])
    with pytest.raises(UserError, match="contrast are texts"):
        classes(["star"], [""])


@pytest.mark.parametrize(
    "options",
    [
        {"sigma_weight": -1},
        {"protocol": "standard", "resolution": 32, "window": 32, "stride": 16, "refine": "none"},
    ],
    ids=lambda options: options.get("protocol", "paper"),
)
def test_more_than_255_words(model, tmp_path, options):
    """Words and contrast words keep their own pixels wherever they stand in the list."""
    phrases = [f"{a} {b} {c}" for a in CATEGORIES for b in CATEGORIES for c in CATEGORIES][:270]
    segmenter = Segmenter(model, prompts="plain", background_threshold=-1, **options)
    scores = segmenter(PHOTO, phrases, []).scores
    phrases.sort(key=lambda phrase: scores[phrase])  # Those that are drawn come last.
    everything = segmenter(PHOTO, phrases, [])
    assert everything.mask.dtype == np.uint16
    assert (everything.mask > 255).any()
    for count in (265, 150):
        part = segmenter(PHOTO, phrases[:count], phrases[count:])
        expected = np.where(everything.mask > count, 0, everything.mask)
        np.testing.assert_array_equal(part.mask, expected)
        assert part.mask.dtype == (np.uint16 if count > 255 else np.uint8)
    PHOTO.save(tmp_path / "photo.png")
    classes, files = segmenter.classes(phrases, []), {"x": tmp_path / "photo.png"}
    segment.segment_files(segmenter, classes, files, tmp_path, {}, {})
    with Image.open(tmp_path / "x_mask.png") as image:
        assert image.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(image), everything.mask)


# Files


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for name in ("x.jpg", "x.png", "Y.JPEG", "z.jfif", "inner/x.bmp", "two.dots.webp"):
        form = "JPEG" if name.endswith("jfif") else None
        PHOTO.save(folder / name, form)
    return folder


def test_every_image_has_a_name_of_its_own(photos):
    found, left_out = find_images([str(photos)])
    expected = {"x.jpg", "x.png", "Y", "z", "inner/x", "two.dots"}
    assert set(found) == expected
    assert not left_out
    # A file given twice is one image; one of another folder with the same name is another.
    assert set(find_images([str(photos), str(photos / "z.jfif")])[0]) == expected
    PHOTO.save(photos / "inner" / "x.png")
    with pytest.raises(UserError, match=r"would both be written as x\.png_mask\.png"):
        find_images([str(photos / "x.jpg"), str(photos / "x.png"), str(photos / "inner")])


def test_what_is_left_out_of_folders_is_counted(photos):
    (photos / ".hidden").mkdir()
    for name in (".hidden/a.png", "._x.jpg", "notes.txt", "b.heic", "c.heic", "README"):
        (photos / name).write_bytes(b"")
    found, left_out = find_images([str(photos)])
    assert len(found) == 6
    assert left_out == {"hidden": 2, ".txt": 1, ".heic": 2, "without a suffix": 1}
    # What is named itself is taken.
    assert set(find_images([str(photos / "README"), str(photos / ".hidden")])[0]) == {"README", "a"}


def test_links_are_followed_once(photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    PHOTO.save(tmp_path / "elsewhere" / "far.png")
    (photos / "link.png").symlink_to(photos / "x.png")
    (photos / "lost.png").symlink_to(photos / "nowhere.png")
    (photos / "inner" / "up").symlink_to(photos)
    (photos / "away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(photos)
    found, _ = find_images([str(photos)])
    assert set(found) >= {"link", "lost", "away/far", "x.png", "inner/x"}
    assert len(found) == 9


@pytest.fixture
def command(monkeypatch, capsys, model, tmp_path):
    """Runs the command with the tiny model: (words, images..., options) -> output or error."""
    monkeypatch.setattr(segment, "load_model", lambda *_: model)
    base = ("--checkpoint=tiny", "--sigma_weight=-1")

    def call(words, *arguments, out="out", fails=False):
        output = f"--output={tmp_path / out}"
        arguments = (*base, f"--words={words}", output, *arguments)
        return (message if fails else run)(monkeypatch, capsys, segment, *arguments)

    return call


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_the_output_may_lie_among_the_images(command, photos, tmp_path):
    assert "Segmented 6 of 6" in command("star,moon", photos, out="photos")
    assert (photos / "x.jpg_mask.png").is_file()
    printed = command("star,moon", photos, out="photos")
    assert "Segmented 6 of 6" in printed
    assert "12 of an earlier run, 1 .json" in printed
    # An image that only looks like a result is an image, and is not overwritten.
    PHOTO.save(photos / "z_mask.png")
    with Image.open(photos / "z_mask.png") as image:
        before = image.tobytes()
    assert "z_mask.png would be overwritten" in command("star", photos, out="photos", fails=True)
    with Image.open(photos / "z_mask.png") as image:
        assert image.tobytes() == before
    assert "Segmented 7 of 7" in command("star", photos)


def test_scores_belong_to_this_run(command, photos, tmp_path):
    command("star", photos)
    printed = command("moon", photos / "z.jfif")
    found = scores(tmp_path / "out")
    assert found["words"] == ["moon"]
    assert [entry["mask"] for entry in found["images"].values()] == ["z_mask.png"]
    assert "Not of this run" in printed
    assert "x.jpg_mask.png" in printed
    assert "Not of this run" not in command("moon", photos / "z.jfif")


def test_images_that_cannot_be_read_are_counted_and_named(command, photos, tmp_path):
    Image.new("L", (2000, 1000)).save(photos / "large.png")
    for i in range(8):
        (photos / f"bad{i}.jpg").write_bytes(b"no image")
    error = command("star", photos, "--max_pixels=100000", fails=True)
    assert error.startswith("error: 9 of 15 images could not be segmented: ")
    assert "bad0.jpg" in error
    assert "and 4 more" in error
    assert "no image in a known format" in error
    assert len(scores(tmp_path / "out")["images"]) == 6
    error = command("star", photos / "large.png", "--max_pixels=100000", fails=True)
    assert "2000x1000 are more than max_pixels=100000" in error


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_what_was_done_before_a_stop_is_kept(command, capsys, photos, tmp_path, monkeypatch, stop):
    save, saved = Segmentation.save, []

    def failing(*arguments):
        if len(saved) == 2:
            raise stop
        saved.append(save(*arguments))

    monkeypatch.setattr(Segmentation, "save", failing)
    if isinstance(stop, OSError):
        assert "What was finished before is kept: make" in command("star", photos, fails=True)
    else:
        with pytest.raises(SystemExit) as end:
            command("star", photos)
        assert end.value.code == 130
        printed = capsys.readouterr()
        assert "Segmented 2 of 6" in printed.out
        assert "Stopped. The same command starts again" in printed.err
    assert len(scores(tmp_path / "out")["images"]) == 2
    assert not list((tmp_path / "out").rglob(".*"))


def test_an_output_that_is_no_folder_is_refused(command, photos, tmp_path):
    (tmp_path / "file").touch()
    for out, why in (("file", "File exists"), ("file/below", "Not a directory")):
        error = command("star", photos, out=out, fails=True)
        assert error == f"error: Cannot write into {tmp_path / out}: {why}."


def test_a_mask_without_its_scores_is_removed(command, photos, tmp_path, monkeypatch):
    """Ctrl-C comes once the second mask is written, before it is noted."""
    save = Segmentation.save

    def stopping(answer, stem):
        save(answer, stem)
        if len(list((tmp_path / "out").rglob("*_mask.png"))) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Segmentation, "save", stopping)
    with pytest.raises(SystemExit):
        command("star", photos)
    out = tmp_path / "out"
    listed = {entry["mask"] for entry in scores(out)["images"].values()}
    assert len(listed) == 1
    assert {str(file.relative_to(out)) for file in out.rglob("*_mask.png")} == listed


@pytest.mark.slow
def test_memory_for_a_large_image(trained, tmp_path):
    """88 megapixels in 10 kB: the peak lies less than 1 GiB above that for a small image."""
    peaks = []
    for side in (64, 9400):
        image = tmp_path / f"{side}.png"
        Image.new("L", (side, side), 90).save(image)
        arguments = ["--words=star", f"--checkpoint={trained}", f"--output={tmp_path / 'out'}"]
        command = [sys.executable, "-m", "simseg_jax.segment", str(image), *arguments]
        process = subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": ""})
        _, process.returncode, used = os.wait4(process.pid, 0)
        assert process.returncode == 0
        peaks.append(used.ru_maxrss)
    assert peaks[1] - peaks[0] < 1 << 20  # KiB.
