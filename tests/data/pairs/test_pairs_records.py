import json
import random
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pairs_support import make_pairs, settings, write_array_record, write_tfds

from simseg_jax.data.pairs import BadExample, open_source, tf_example
from simseg_jax.runtime.errors import UserError

PAIRS = make_pairs(12)


def write_records(path, records) -> str:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def test_example_protos():
    values = {"a": [b"x", b""], "b": ["é"], "c": [1, -2, 2**40], "d": [0.5, -1.0], "e": []}
    parsed = tf_example.parse(tf_example.serialize(values))
    assert parsed == {**values, "b": ["é".encode()]}
    # {"a": [b"x"], "n": [3]} as TensorFlow serializes it.
    wire = bytes.fromhex("0a180a0a0a016112050a030a01780a0a0a016e12051a030a0103")
    assert tf_example.parse(wire) == {"a": [b"x"], "n": [3]}
    assert tf_example.serialize({"n": 3, "a": "x"}) == wire


# Theirs asks old versions of protobuf, which Apache Beam needs, for what is deprecated.
@pytest.mark.filterwarnings("ignore:label:DeprecationWarning")
def test_same_as_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    path = write_tfds(PAIRS, tmp_path)
    source = open_source(settings(path))
    builder = tfds.builder_from_directory(f"{path}/1.0.0")
    theirs = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == len(theirs) == 12
    for index in range(12):
        ours = source[index]
        assert ours["image"] == theirs[index]["image"]
        assert list(ours["captions"]) == [c.decode() for c in np.asarray(theirs[index]["captions"])]
        assert ours["name"].endswith(f"record {index}, {theirs[index]['name'].decode()}")


def test_the_feature_that_was_taken_is_said(tmp_path):
    values = {"Image": b"1", "text": "a", "raw": "b", "name": "n"}
    path = write_records(tmp_path / "a.array_record", [tf_example.serialize(values)])
    source = open_source(settings(path))
    assert source[0]["captions"] == ("a",)
    assert source.problems.notes == {"caption: feature text taken, raw left out": 1}


def test_bad_records(tmp_path):
    good = tf_example.serialize({"jpg": b"1", "txt": "a", "key": "k1"})
    path = write_records(
        tmp_path / "a.array_record",
        [
            good,
            tf_example.serialize({"jpg": b"2", "txt": " "}),
            tf_example.serialize({"jpg": b"", "txt": "c"}),
            tf_example.serialize({"txt": "d"}),
            tf_example.serialize({"jpg": b"5", "txt": b"\xff"}),
            b"\xffgarbage",
            good,
        ],
    )
    source = open_source(settings(path))
    assert source[6] == {"image": b"1", "captions": ("a",), "name": f"{path}, record 6, k1"}
    reasons = ("empty caption", "no image", "no image", "not UTF-8", "Error parsing")
    for index, reason in enumerate(reasons, start=1):
        with pytest.raises(BadExample, match=f"a.array_record, record {index}.*: .*{reason}"):
            source[index]


@pytest.mark.parametrize(
    "odd", [b"", b"\xffgarbage", tf_example.serialize({"x": 1}), tf_example.serialize({"image": 7})]
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_same_tolerance_whichever_record_is_odd(tmp_path, odd, place):
    records = [tf_example.serialize({"image": b"1", "text": "a"})] * 3
    path = write_records(tmp_path / "a.array_record", [*records[:place], odd, *records[place:]])
    source = open_source(settings(path))
    for index in range(4):
        if index == place:
            with pytest.raises(BadExample, match=f"record {place}"):
                source[index]
        else:
            assert source[index]["captions"] == ("a",)


@pytest.mark.parametrize(
    "split",
    [
        {"filepathTemplate": "{DATASET:>99999999999}"},
        {"filepathTemplate": "{0.__class__}"},
        {"filepathTemplate": "../../etc/{SPLIT}"},
        {"filepathTemplate": 7},
        {"shardLengths": "7"},
        {"shardLengths": [None]},
        {"shardLengths": 7},
        {"name": ["train"]},
    ],
    ids=str,
)
def test_odd_descriptions_of_splits(tmp_path, split):
    path = Path(write_tfds(PAIRS, tmp_path)) / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0] |= split
    path.write_text(json.dumps(info))
    with pytest.raises(UserError) as error:
        open_source(settings(path.parent))
    assert len(str(error.value)) < 600
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"Cannot read .*dataset_info.json"):
        open_source(settings(path.parent))


def test_damaged_shards(tmp_path):
    random.seed(0)
    pairs = [(name, random.randbytes(20_000), texts) for name, _, texts in PAIRS]
    home = Path(write_tfds(pairs, tmp_path, shards=3)) / "1.0.0"
    shards = sorted(home.glob("*array_record-*"))
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])
    shards[2].unlink()
    source = open_source(settings(home.parent))
    assert [source[i]["image"] for i in range(4)] == [image for _, image, _ in pairs[4:8]]
    assert (len(source), source.problems.count) == (4, 2)
    assert "00000-of-00003: unreadable shard with 4 records (" in source.problems.first[0]
    assert "open() failed: No such file" in source.problems.first[1]
    # Damage inside a shard costs only the records that it hits.
    middle = bytearray(shards[1].read_bytes())
    middle[30_000:31_000] = bytes(1000)
    shards[1].write_bytes(middle)
    source = open_source(settings(home.parent))
    with pytest.raises(BadExample, match=r"record 1: .*hash mismatch"):
        source[1]
    assert source[3]["image"] == pairs[7][1]
    shards[1].unlink()
    with pytest.raises(UserError, match=r"no usable pair .* Left out: 3"):
        open_source(settings(home.parent))


def test_mistakes_are_named(tmp_path):
    def fails(message, path, **others):
        with pytest.raises(UserError, match=message):
            open_source(settings(path, **others))

    path = Path(write_tfds(PAIRS, tmp_path))
    fails("no split 'val'; its splits are train", path, split="val")
    info = json.loads((path / "1.0.0" / "dataset_info.json").read_text())
    (path / "1.0.0" / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    fails("stored as tfrecord, which has no random access; convert it with `tfds", path)
    (path / "1.0.0" / "dataset_info.json").write_text("{}")
    fails("Cannot read .*dataset_info.json: KeyError", path / "1.0.0")
    fails("no tf.train.Example", write_records(tmp_path / "a.array_record", [b"pickled"]))
    numbers = tf_example.serialize({"image": [1, 2], "text": "a"})
    fails("holds numbers", write_records(tmp_path / "b.array_record", [numbers]))
    (tmp_path / "c").mkdir()
    fails("set caption_key", write_array_record(PAIRS, tmp_path / "c"), caption_key="z")
