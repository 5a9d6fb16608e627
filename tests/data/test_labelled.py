"""Images with one class each: what is a class and an image, and what is not."""

import json
from types import SimpleNamespace

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pairs_support import make_pairs

from simseg_jax.data.pairs import tf_example
from simseg_jax.data.testsets.labelled import labelled_source
from simseg_jax.runtime.errors import UserError

IMAGE = make_pairs(1)[0][1]
HIDDEN = (
    ".ipynb_checkpoints/a.jpg",
    ".git/a.png",
    "__MACOSX/cat/._a.jpg",
    "cat/._a.jpg",
    "cat/.DS_Store",
    "cat/.ipynb_checkpoints/a-checkpoint.jpg",
    "cat/Thumbs.db",
    "cat/__MACOSX/b.jpg",
    "._cat",
)


def source(root, split=""):
    return labelled_source(SimpleNamespace(data="folder", root=str(root), split=split))


@pytest.mark.parametrize("hidden", [*[[name] for name in HIDDEN], HIDDEN], ids=str)
def test_hidden_files_are_no_images_and_no_classes(tmp_path, hidden):
    # A hidden folder above the data is the user's choice.
    root = tmp_path / ".cache" / "val"
    for name in ("cat/a.jpg", "cat/deeper/b.JPG", "dog/c.png", *hidden):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    (root / "dog" / "folder.jpg").mkdir()
    found = source(root.parent, "val")
    assert found.classes == ("cat", "dog")
    names = [found[i]["name"].removeprefix(f"{root}/") for i in range(len(found))]
    assert names == ["cat/a.jpg", "cat/deeper/b.JPG", "dog/c.png"]
    assert found.labels.tolist() == [0, 0, 1]


def write_labelled(folder, records, names) -> None:
    writer = ArrayRecordWriter(str(folder / "x-val.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    split = {"name": "val", "shardLengths": [str(len(records))]}
    info = {"name": "x", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_bytes(names)


@pytest.mark.parametrize("names", [b"cat\ndog\n", b"cat\ndog", b"\xef\xbb\xbfcat\r\ndog\r\n"])
def test_names_of_classes(tmp_path, names):
    write_labelled(tmp_path, [tf_example.serialize({"image": IMAGE, "label": 1})], names)
    assert source(tmp_path, "val").classes == ("cat", "dog")


@pytest.mark.parametrize(
    "values", [{"label": 2}, {"label": -1}, {"label": 0.5}, {"label": b"1"}, {"image": 7}, {}]
)
def test_records_without_a_class_are_refused(tmp_path, values):
    good = {"image": IMAGE, "label": 1}
    odd = good | values if values else {}
    write_labelled(tmp_path, [tf_example.serialize(r) for r in (good, odd)], b"cat\ndog\n")
    found = source(tmp_path, "val")
    assert found[0]["label"] == 1
    with pytest.raises(UserError, match=r"record 1 cannot be read.*Prepare the data again"):
        found[1]


def test_damaged_descriptions(tmp_path):
    write_labelled(tmp_path, [b"\xffgarbage"], b"cat\ndog\n")
    with pytest.raises(UserError, match=r"Cannot read the first record of"):
        source(tmp_path, "val")
    write_labelled(tmp_path, [tf_example.serialize({"image": IMAGE, "label": 1})], b"caf\xe9\n")
    with pytest.raises(UserError, match=r"Cannot read the names of the classes .*UTF-8"):
        source(tmp_path, "val")
