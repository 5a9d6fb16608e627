"""The same pairs in every format are the same examples."""

import csv
import importlib.util
import json
import shutil
import tarfile

import cloudpickle
import fsspec
import grain
import pairs_support as support
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import SHARED
from pairs_support import make_pairs, read_all, settings

from simseg_jax.data.pairs import BadExample, Problems, open_source, tf_example
from simseg_jax.data.pipeline import in_processes
from simseg_jax.runtime.errors import UserError

PAIRS = make_pairs(40)
EXPECTED = [(image, captions) for _, image, captions in PAIRS]
FORMATS = ("csv", "coco", "tar", "parquet", "array_record", "tfds")
FLICKR = SHARED / "data" / "flickr8k"


def write(form, pairs, folder):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    return getattr(support, f"write_{form}")(pairs, folder)


@pytest.mark.parametrize("form", FORMATS)
def test_same_examples(form, tmp_path):
    path = write(form, PAIRS, tmp_path)
    assert read_all(path, tmp_path / "cache") == EXPECTED
    # The second time from the cache, in a folder or as it is; names are told apart.
    assert read_all(path, tmp_path / "cache") == EXPECTED
    source = open_source(settings(path), str(tmp_path / "cache"))
    assert len({source[i]["name"] for i in range(40)}) == 40
    with pytest.raises(IndexError):
        source[40]
    copy = cloudpickle.loads(cloudpickle.dumps(source))
    assert (copy[39]["image"], copy[39]["captions"]) == EXPECTED[39]


@pytest.mark.parametrize("form", ["csv", "tar", "parquet", "array_record"])
def test_numbered_captions(form, tmp_path):
    """Every format whose captions have freely chosen keys takes numbered ones, by number."""
    numbers = (11, 0, 2, 10, 1)
    values = {f"caption_{k}": f"text {k}" for k in numbers} | {"caption_3": ""}
    image, name, path = PAIRS[0][1], "a.jpg", tmp_path / f"a.{form}"
    if form == "csv":
        (tmp_path / support.IMAGES).mkdir()
        (tmp_path / support.IMAGES / name).write_bytes(image)
        path.write_text(f"image,{','.join(values)}\n{name},{','.join(values.values())}\n")
    elif form == "tar":
        with tarfile.open(path, "w") as tar:
            support.add_member(tar, name, image)
            support.add_member(tar, "a.json", json.dumps({"url": "x"} | values).encode())
    elif form == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"image": image, **values}
        pq.write_table(pa.table({key: [value] for key, value in columns.items()}), path)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(tf_example.serialize({"image": image, **values}))
        writer.close()
    expected = tuple(f"text {k}" for k in sorted(numbers))
    source = open_source(settings(path), str(tmp_path / "cache"))
    assert (source[0]["image"], source[0]["captions"]) == (image, expected)
    assert not source.problems.notes


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_worker_processes(form, tmp_path):
    path = write(form, PAIRS, tmp_path)
    source = open_source(settings(path), str(tmp_path / "cache"))
    images = grain.MapDataset.source(source).map(lambda pair: pair["image"])
    images = in_processes(images.to_iter_dataset(), workers=1)
    assert list(images) == [image for image, _ in EXPECTED]


@pytest.mark.parametrize("form", FORMATS)
def test_remote_addresses(form, tmp_path):
    path = write(form, PAIRS, tmp_path)
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path), "/pairs", recursive=True)
    try:
        address = path.replace(str(tmp_path), "memory://pairs")
        assert read_all(address, tmp_path / "cache") == EXPECTED
    finally:
        system.rm("/pairs", recursive=True)


def test_file_address_and_shapes(tmp_path):
    path = support.write_csv(PAIRS, tmp_path)
    assert read_all(f"file://{path}", tmp_path / "cache") == EXPECTED
    shapes = open_source(settings("", "shapes", size=3))
    assert len(shapes) == 3
    assert shapes[2]["image"].shape == (64, 64, 3)
    assert shapes.problems == Problems()


def test_format_is_told_by_the_files(tmp_path):
    cache = tmp_path / "cache"
    tars, newer = tmp_path / "tars", tmp_path / "tfds"
    for folder in (tars, newer):
        folder.mkdir()
    # img2dataset leaves statistics beside its tars.
    support.write_tar(PAIRS, tars)
    (tars / "00000_stats.json").write_text("{}")
    (tars / "00000.parquet").write_bytes(b"")
    assert read_all(tars, cache) == EXPECTED
    assert read_all(f"{tars}/*.tar", cache) == EXPECTED
    assert read_all(f"{tars}/0000{{1..1}}.tar", cache) == EXPECTED[20:]
    # The newest version of a TFDS data set: 1.10.0 comes after 1.9.0.
    path = support.write_tfds(PAIRS[:4], newer)
    shutil.copytree(f"{path}/1.0.0", f"{path}/1.9.0")
    shutil.move(f"{path}/1.0.0", f"{path}/1.10.0")
    (newer / "pairs" / "1.9.0" / "dataset_info.json").write_text("broken")
    assert read_all(path, cache) == EXPECTED[:4]


def test_mistakes_are_named(tmp_path):
    def fails(message, path, form="auto", **others):
        with pytest.raises(UserError, match=message):
            open_source(settings(path, form, **others), str(tmp_path / "cache"))

    support.write_array_record(PAIRS, tmp_path)
    fails("path of the training data is empty", "")
    fails(r"No file matches .*nothing\.tar", tmp_path / "nothing.tar")
    fails(r"No file matches .*00007\.tar", f"{tmp_path}/{{00007..00008}}.tar")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("?")
    fails("The format of .* is unknown.*a.txt", tmp_path / "notes")
    fails("is no TFDS data set", tmp_path / "notes", "tfds")
    fails("nothere: Protocol not known|Cannot open nothere", "nothere://a/b.tar")
    fails(
        "no feature image named pixels, only .*: .*set image_key",
        tmp_path,
        image_key="pixels",
    )
    fails("no feature caption named label", tmp_path, caption_key="label")


@pytest.mark.skipif(bool(importlib.util.find_spec("s3fs")), reason="the driver s3fs is installed")
def test_missing_driver(tmp_path):
    with pytest.raises(UserError, match=r"Cannot open s3://bucket/a.tar: Install s3fs"):
        open_source(settings("s3://bucket/a.tar"), str(tmp_path))


def test_bad_example_survives_pickling():
    error = cloudpickle.loads(cloudpickle.dumps(BadExample("a.jpg", "no caption.")))
    assert str(error) == "a.jpg: no caption."


@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"Flickr8k is missing: {FLICKR}")
def test_real_flickr8k(tmp_path):
    source = open_source(settings(FLICKR / "captions.csv", split="train.txt"))
    assert len(source) == 6000
    with (FLICKR / "captions.csv").open(newline="") as file:
        texts: dict[str, list[str]] = {}
        for row in csv.DictReader(file):
            texts.setdefault(row["image"], []).append(row["caption"].strip())
    names = (FLICKR / "train.txt").read_text().split()[:1000]
    pairs = [(n, (FLICKR / "Images" / n).read_bytes(), tuple(texts[n])) for n in names]
    expected = [(image, captions) for _, image, captions in pairs]
    assert [(source[i]["image"], source[i]["captions"]) for i in range(1000)] == expected
    for form in FORMATS:
        (tmp_path / form).mkdir()
        path = write(form, pairs, tmp_path / form)
        assert read_all(path, tmp_path / "cache") == expected, form
    assert json.loads((tmp_path / "coco" / "captions.json").read_text())["images"]
