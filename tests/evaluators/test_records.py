import json

import numpy as np
import pytest

from simseg_jax.errors import UserError
from simseg_jax.evaluators.records import Record, RecordStore, gather
from simseg_jax.evaluators.statistics import class_table, format_table, image_ious

NAMES = ("background", "dog", "person", "cat")


def record(index, counts, scores=(0.1, 0.2, 0.3, 0.4)):
    return Record(index, f"image {index}", [np.array(counts)], [np.array(scores)])


def assert_equal(first, second):
    assert first.index == second.index
    assert first.name == second.name
    np.testing.assert_array_equal(first.counts, second.counts)
    np.testing.assert_array_equal(first.scores, second.scores)


def test_what_is_written_comes_back(tmp_path):
    store = RecordStore(tmp_path / "set", {"step": 3, "settings": {"sigma": 1.0}})
    assert store.read() == {}
    written = [
        record(4, [[0, 0, 10], [1, 2, 3]], (np.nan, 0.25, 0.5, 0.125)),
        record(2, [[0, 1, 7]]),
    ]
    assert list(store.extend(written)) == written
    more = [record(9, [[1, 1, 1]])]
    list(store.extend(more))
    found = RecordStore(tmp_path / "set", store.identity).read()
    assert sorted(found) == [2, 4, 9]
    for expected in written + more:
        assert_equal(found[expected.index], expected)
        assert_equal(gather(found)[expected.index], expected)
    assert list(gather(found)) == [2, 4, 9]


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    store = RecordStore(tmp_path, {"step": 3})
    list(store.extend([record(0, [[0, 0, 1]]), record(1, [[0, 0, 2]])]))
    file = tmp_path / "records-00000.jsonl"
    file.write_text(file.read_text()[:-12])
    assert list(store.read()) == [0]
    list(store.extend([record(1, [[0, 0, 2]])]))
    assert list(store.read()) == [0, 1]


def test_other_settings_are_refused(tmp_path):
    list(RecordStore(tmp_path, {"a": {"b": 1}, "c": (2,)}).extend([record(0, [[0, 0, 1]])]))
    assert list(RecordStore(tmp_path, {"a": {"b": 1}, "c": (2,)}).read()) == [0]
    with pytest.raises(UserError, match=r"results with a\.b=1, not 5: choose another --output"):
        RecordStore(tmp_path, {"a": {"b": 5}, "c": (2,)}).read()
    (tmp_path / "records-00000.jsonl").write_text("no header")
    with pytest.raises(UserError, match="results with step=None"):
        RecordStore(tmp_path, {"step": 1}).read()


def test_lines_are_plain_json():
    line = record(0, [[0, 1, 7]], (np.nan, 0.5, 1 / 3, 1)).to_json()
    assert json.loads(line) == [0, "image 0", [[[0, 1, 7]]], [[None, 0.5, 0.333333, 1.0]]]


def test_statistics_by_hand():
    records = [
        # The dog is found, the person is called dog.
        record(0, [[0, 0, 50], [1, 1, 30], [2, 1, 10], [2, 2, 10]], (0, 0.4, 0.1, 0)),
        record(1, [[0, 0, 60], [2, 0, 40]], (0, 0.2, 0.3, 0)),
    ]
    ious = np.array([110 / 150, 30 / 40, 10 / 60, np.nan])
    rows = {row["class"]: row for row in class_table(records, ious, NAMES)}
    assert list(rows) == ["background", "dog", "person"]
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
