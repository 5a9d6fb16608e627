import json

import numpy as np
import pytest

from simseg_jax.evaluators.measures import measures
from simseg_jax.evaluators.records import FORMAT, Record, RecordStore, gather
from simseg_jax.reports.statistics import class_table, format_table, image_ious
from simseg_jax.runtime.errors import UserError

NAMES = ("background", "dog", "person", "cat")


def record(number, counts, scores=(0.1, 0.2, 0.3, 0.4)):
    counts = np.array(counts)
    points = np.array([[label, 1, 0] for label in np.unique(counts[:, 0]) if label])
    return Record(f"image {number}", "1:2 3:4", [counts], [np.array(scores)], counts, points)


def assert_equal(first, second):
    assert (first.name, first.stamp) == (second.name, second.stamp)
    np.testing.assert_array_equal(first.counts, second.counts)
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.given, second.given)
    np.testing.assert_array_equal(first.points, second.points.reshape(first.points.shape))


def names(store):
    return [name for name, _ in store.read().records]


def test_what_is_written_comes_back(tmp_path):
    store = RecordStore(tmp_path / "set", {"step": 3, "settings": {"sigma": 1.0}})
    assert not any(store.read())
    written = [
        record(4, [[0, 0, 10], [1, 2, 3]], (np.nan, 0.25, 0.5, 0.125)),
        record(2, [[0, 1, 7]], (1 / 3, 0.1, 1e-7, -0.0)),
    ]
    assert list(store.extend(written)) == written
    more = [record(9, [[1, 1, 1]])]
    list(store.extend(more))
    found, unusable = RecordStore(tmp_path / "set", {"step": 3, "settings": {"sigma": 1.0}}).read()
    assert not unusable
    assert [name for name, _ in found] == ["image 4", "image 2", "image 9"]
    merged = gather(found.values())
    for expected in (written[0], *more):
        assert_equal(merged[expected.name], expected)
    assert list(merged) == ["image 2", "image 4", "image 9"]


def test_other_settings_are_refused(tmp_path):
    identity = {"a": {"b": 1}, "c": (2,)}
    list(RecordStore(tmp_path, identity).extend([record(0, [[0, 0, 1]])]))
    assert names(RecordStore(tmp_path, {"a": {"b": 1}, "c": (2,)})) == ["image 0"]
    with pytest.raises(UserError, match=r"results with a\.b=1, not 5: choose another --output"):
        RecordStore(tmp_path, {"a": {"b": 5}, "c": (2,)}).read()


def damaged(content, position):
    """Bytes with one bit flipped, with one byte missing, and without their end."""
    byte = content[position : position + 1]
    for changed in (bytes([byte[0] ^ 1]), bytes([byte[0] ^ 0x80]), b""):
        yield content[:position] + changed + content[position + 1 :]
    yield content[:position]


def test_a_damaged_record_is_forgotten_and_nothing_else(tmp_path):
    store = RecordStore(tmp_path, {"step": 3, "settings": {"sigma": 1.0}}, "prompts")
    written = [record(i, [[0, 0, 10 + i], [1, 2, 3]]) for i in range(3)]
    list(store.extend(written))
    file = tmp_path / "records-00000.jsonl"
    content = file.read_bytes()
    for position in range(0, len(content), 7):
        for changed in damaged(content, position):
            file.write_bytes(changed)
            found, unusable = store.read()
            for one in found.values():
                assert_equal(one, written[int(one.name[-1])])
            # Two lines at most: the end of a line may be what is lost.
            assert len(found) >= (1 if changed != content[:position] else 0)
            assert len(found) == 3 or unusable or len(changed) < len(content) - 1
    file.write_bytes(content[:-12])
    list(store.extend([record(2, [[0, 0, 2]])]))
    assert sorted(names(store)) == ["image 0", "image 1", "image 2"]


def test_records_of_other_inputs_are_not_used_but_come_back(tmp_path):
    identity = {"step": 3}
    list(RecordStore(tmp_path, identity, "old").extend([record(0, [[0, 0, 1]])]))
    store = RecordStore(tmp_path, identity, "new")
    assert store.read().unusable == {"of other class names or prompts": 1}
    list(store.extend([record(0, [[0, 0, 2]])]))
    for inputs, pixels in (("old", 1), ("new", 2)):
        (found,) = RecordStore(tmp_path, identity, inputs).read().records.values()
        assert found.counts[0].tolist() == [[0, 0, pixels]]


def test_records_of_an_earlier_version_are_not_used(tmp_path):
    (tmp_path / "records-00000.jsonl").write_text(
        '{"checkpoint": {"step": 1}, "settings": {}}\n[0, "image 0", [[[0, 0, 9]]], [[0.5]]]\n'
    )
    found, unusable = RecordStore(tmp_path, {"checkpoint": {"step": 1}, "settings": {}}).read()
    assert not found
    assert unusable == {"of an earlier version": 1}


def test_it_is_said_what_there_is_and_why_the_rest_is_not(tmp_path):
    store = RecordStore(tmp_path, {"step": 3})
    list(store.extend([record(i, [[0, 0, 1]]) for i in range(4)]))
    with (tmp_path / "records-00000.jsonl").open("a") as file:
        file.write("[[\n")
    kept = store.read()
    images = [("image 5", "1:2 3:4"), ("image 0", "1:2 3:4"), ("image 2", "1:2 3:5")]
    done = kept.of(images)
    assert list(done) == ["image 0"]
    listed = ("image 5", "image 0", "image 2", "image 3")
    said = kept.describe(1, ["image 5", "image 2"], listed)
    assert said == (
        "1 of 3 images are done already (1 changed since, 1 new, 1 no longer listed, 1 damaged)."
    )
    assert kept.describe(4, [], [f"image {i}" for i in range(4)]) == (
        "4 of 4 images are done already."
    )


def test_lines_are_plain_json(tmp_path):
    list(RecordStore(tmp_path, {}).extend([record(0, [[0, 1, 7]], (np.nan, 0.5, 1 / 3, 1))]))
    header, line = map(json.loads, (tmp_path / "records-00000.jsonl").read_text().splitlines())
    assert header["format"] == FORMAT
    scores = [[None, 0.5, 0.333333, 1.0]]
    assert line[:-1] == ["image 0", "1:2 3:4", [[[0, 1, 7]]], scores, [[0, 1, 7]], []]


def test_statistics_by_hand():
    records = [
        # The dog is found, the person is called dog.
        record(0, [[0, 0, 50], [1, 1, 30], [2, 1, 10], [2, 2, 10]], (0, 0.4, 0.1, 0)),
        record(1, [[0, 0, 60], [2, 0, 40]], (0, 0.2, 0.3, 0)),
    ]
    found = measures(records, len(NAMES), background=True)
    rows = {row["class"]: row for row in class_table(records, NAMES, found)}
    assert list(rows) == ["background", "dog", "person"]
    ious = [110 / 150, 30 / 40, 10 / 60]
    assert [row["iou"] for row in rows.values()] == pytest.approx(ious)
    person, dog = rows["person"], rows["dog"]
    assert (person["images"], person["drawn"]) == (2, 0.5)
    assert person["score_present"] == pytest.approx(0.2)
    assert person["deviation_present"] == pytest.approx(0.1)
    assert person["score_absent"] is None
    assert (dog["images"], dog["drawn"], dog["score_absent"]) == (1, 1.0, 0.2)
    text = format_table(list(rows.values()))
    assert len(text.splitlines()) == 4
    assert "person" in text
    expected = [np.mean([1, 30 / 40, 10 / 20]), np.mean([60 / 100, 0])]
    np.testing.assert_allclose(image_ious(records, 4), expected)
