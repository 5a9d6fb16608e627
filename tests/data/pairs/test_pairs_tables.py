import json

import pytest
from conftest import SHARED
from pairs_support import make_pairs, settings, write_coco, write_csv

from simseg_jax.data.pairs import BadExample, open_source
from simseg_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    write_csv(make_pairs(3), tmp_path)
    for number, letter in enumerate("abc"):
        (tmp_path / "Images" / f"0000{number}.jpg").rename(tmp_path / "Images" / f"{letter}.jpg")
    (tmp_path / "captions.csv").write_text(
        'image,caption\na.jpg,"A dog, running"\nb.jpg, A cat \na.jpg,Two dogs\nc.jpg, \n'
    )
    (tmp_path / "train.txt").write_text("b.jpg\na.jpg\n")
    return tmp_path


def captions(folder, **others):
    source = open_source(settings(folder / "captions.csv", **others))
    return [source[i]["captions"] for i in range(len(source))]


def fails(message, path, **others):
    with pytest.raises(UserError, match=message):
        open_source(settings(path, **others))


def test_images_come_with_all_their_captions(folder):
    assert captions(folder) == [("A dog, running", "Two dogs"), ("A cat",)]
    assert captions(folder, split="train.txt") == [("A cat",), ("A dog, running", "Two dogs")]
    problems = open_source(settings(folder / "captions.csv")).problems
    assert (problems.count, problems.first) == (1, ["c.jpg: empty caption"])


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("image,caption,image_id,caption_id", "a.jpg,A dog,7,1"),  # The authors' valid_anno.csv.
        ("title\tfilepath", "A dog\ta.jpg"),  # open_clip.
        ("\ufeffimage,caption", 'a.jpg,"A dog"'),
    ],
)
def test_layouts(folder, header, row):
    (folder / "captions.csv").write_text(f"{header}\n{row}\n")
    assert captions(folder) == [("A dog",)]


def test_columns_of_any_name(folder):
    (folder / "captions.csv").write_text("file,text\na.jpg,A dog\n")
    assert captions(folder, image_key="file", caption_key="text") == [("A dog",)]
    fails("no column image pic: set image_key to one of file, text", folder / "captions.csv",
          image_key="pic")  # fmt: skip


def test_names_that_leave_the_folder(folder):
    (folder / "captions.csv").write_text(
        "image,caption\n../train.txt,x\n/etc/passwd,x\n,x\na.jpg,A dog\nsub/../../b.jpg,x\n"
    )
    assert captions(folder) == [("A dog",)]
    problems = open_source(settings(folder / "captions.csv")).problems
    assert problems.count == 4
    assert problems.first[0] == "'../train.txt' is outside the image folder"


def test_a_vanished_image(folder):
    source = open_source(settings(folder / "captions.csv"))
    (folder / "Images" / "b.jpg").unlink()
    with pytest.raises(BadExample, match=r"Images/b.jpg: .*No such file"):
        source[1]
    assert source[0]["image"]


def test_mistakes_are_named(folder):
    table = folder / "captions.csv"
    fails(r"caption table is missing: no file .*nowhere.csv", folder / "nowhere.csv")
    fails("list of images is missing", table, split="nowhere.txt")
    fails(r"first training image is missing: no file .*Pictures/a.jpg", table, images="Pictures")
    (folder / "train.txt").write_text("b.jpg\nc.jpg\n")
    fails(r"1 images without a caption.*'c.jpg'", table, split="train.txt")
    table.write_text("file;text\n")
    fails(r"header line `image,caption`: it has no column image .*one of file;text", table)
    table.write_text("image,caption\na.jpg, \n")
    fails("no usable pair .* Left out: 1, first a.jpg: empty caption", table)
    table.write_bytes(b"image,caption\na.jpg,\xff\n")
    fails("Cannot read the caption table .*utf-8", table)
    table.write_text('image,caption\na.jpg,"' + "x" * 200_000)
    fails("after line 1: field larger than", table)
    table.write_text("")
    fails("must start with the header line", table)


def test_coco(folder):
    path = write_coco(make_pairs(3), folder)
    content = json.loads((folder / "captions.json").read_text())
    content["images"].insert(0, {"id": 99, "file_name": "silent.jpg"})
    content["annotations"].append({"image_id": 1234, "caption": "of nothing"})
    (folder / "captions.json").write_text(json.dumps(content))
    source = open_source(settings(path))
    assert len(source) == 3
    assert source.problems.first == [
        "annotation of the unknown image 1234",
        "silent.jpg: image without caption",
    ]
    for text in ("[]", "{", '{"images": [{"id": 1}], "annotations": []}'):
        (folder / "captions.json").write_text(text)
        fails("is no JSON of COCO captions", path)


def test_real_coco():
    table = SHARED / "data" / "coco" / "annotations" / "captions_val2017.json"
    if not table.is_file():
        pytest.skip(f"COCO is missing: {table}")
    source = open_source(settings(table, images="../val2017"))
    assert len(source) >= 100
    assert len(source[0]["captions"]) >= 5
