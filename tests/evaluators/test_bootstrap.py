from pathlib import Path

import numpy as np
import pytest

from simseg_jax.evaluators.earlier import Earlier
from simseg_jax.evaluators.measures import MEASURES, Quotients, measures, without_model
from simseg_jax.evaluators.metrics import class_iou, mean_iou
from simseg_jax.evaluators.records import Record, RecordStore, total_confusion
from simseg_jax.reports.bootstrap import (
    NO_MODEL,
    class_intervals,
    estimates,
    format_estimates,
    without_one_image,
)
from simseg_jax.runtime.errors import UserError

CLASSES = 4


def random_records(seed, count=30, better=0.0):
    """Records of images with the same truth for every seed; `better` of their pixels are right."""
    truths, rng = np.random.default_rng(0), np.random.default_rng(seed)
    records = []
    for number in range(count):
        truth = truths.choice([0, 0, *truths.integers(1, CLASSES, 2)], 200)
        counts = []
        for _ in range(2):
            guess = np.where(rng.random(200) < better, truth, rng.integers(0, CLASSES, 200))
            pairs, pixels = np.unique(np.stack([truth, guess], 1), axis=0, return_counts=True)
            counts.append(np.concatenate([pairs, pixels[:, None]], axis=1))
        shown = np.unique(truth[truth > 0])
        points = [(c, rng.random() < better, rng.random() < 0.3) for c in shown]
        arrays = counts[0], np.zeros(CLASSES), counts[1], np.array(points, int).reshape(-1, 3)
        records.append(Record(f"{number}", "", [arrays[0]], [arrays[1]], *arrays[2:]))
    return records


def miou(records, background=True):
    ious = class_iou(total_confusion(records, CLASSES))
    return mean_iou(ious if background else ious[1:])


@pytest.mark.parametrize("background", [True, False])
def test_values_are_those_of_the_metrics(background):
    records = random_records(1, better=0.3)
    weights = np.ones((1, len(records)))
    found = measures(records, CLASSES, background)
    assert found["miou"].mean(weights)[0] == pytest.approx(miou(records, background))
    given = [record._replace(counts=[record.given]) for record in records]
    assert found["miou_given"].mean(weights)[0] == pytest.approx(miou(given, background))
    points = np.concatenate([record.points for record in records])
    rates = [points[points[:, 0] == label, 1].mean() for label in (1, 2, 3)]
    assert found["pointing"].mean(weights)[0] == pytest.approx(np.mean(rates))
    # An image drawn twice counts twice.
    twice = np.ones((1, len(records)))
    twice[0, :5] = 2
    assert found["miou"].mean(twice)[0] == pytest.approx(miou(records + records[:5], background))


def test_what_needs_no_model():
    counts = np.array([[0, 0, 40], [0, 1, 20], [1, 1, 30], [2, 0, 10]])
    points = np.array([[1, 0, 1], [2, 1, 0]])
    record = Record("0", "", [counts], [np.zeros(CLASSES)], counts, points)
    found = without_model([record], CLASSES, background=True)
    one = np.ones((1, 1))
    np.testing.assert_allclose(found["miou"].of_classes(one)[0], [0.6, 0, 0, np.nan])
    np.testing.assert_allclose(found["miou_given"].of_classes(one)[0], [0, 0.3, 0, np.nan])
    np.testing.assert_allclose(found["pointing"].of_classes(one)[0], [np.nan, 1, 0, np.nan])
    found = without_model([record], CLASSES, background=False)
    np.testing.assert_allclose(found["miou"].of_classes(one)[0], [np.nan, 0, 0, np.nan])


def test_intervals_are_percentiles_over_draws():
    records = random_records(1, better=0.3)
    models = {"a": measures(records, CLASSES, True)}
    row = estimates(models, draws=400)["a"]["miou"]
    rng = np.random.default_rng(5)
    drawn = [miou([records[i] for i in rng.integers(30, size=30)]) for _ in range(400)]
    low, high = np.percentile(drawn, (2.5, 97.5)) - np.mean(drawn) + miou(records)
    # Another 400 draws: the ends vary by about a tenth of the width.
    assert row.low == pytest.approx(low, abs=0.25 * (high - low))
    assert row.high == pytest.approx(high, abs=0.25 * (high - low))
    assert row.value == pytest.approx(miou(records))
    assert estimates(models, draws=400)["a"]["miou"] == row


def test_classes_of_few_images_do_not_move_the_interval():
    """Of 30 classes with one image each a draw shows two thirds, so that the background's share of
    the mean grows.
    """
    records = []
    for label in range(1, 31):
        counts = np.array([[0, 0, 90], [label, 0, 10]])
        points = np.array([[label, 0, 0]])
        records.append(Record(str(label), "", [counts], [np.zeros(31)], counts, points))
    row = estimates({"a": measures(records, 31, True)}, draws=300)["a"]["miou"]
    assert row.value == pytest.approx(0.9 / 31)
    assert 0 < row.low < row.value < row.high < 2 * row.value


def test_differences_are_paired():
    """Of two equal models the difference is zero on every draw, however much each varies."""
    records, better = random_records(1, better=0.3), random_records(2, better=0.5)
    models = {name: measures(r, CLASSES, True) for name, r in (("a", better), ("b", records))}
    models["c"] = models["a"]
    rows = estimates(models, draws=200)
    assert list(rows) == ["a", "b", "a - b", "c", "a - c"]
    assert set(map(tuple, rows["a - c"].values())) == {(0, 0, 0)}
    difference, a, b = (rows[name]["miou"] for name in ("a - b", "a", "b"))
    assert difference.value == pytest.approx(a.value - b.value)
    assert 0 < difference.low < difference.value < difference.high
    text = format_estimates(rows).splitlines()
    assert len({len(line) for line in text}) == 1
    assert f"+{difference.value:.3f} ({difference.low:.3f} to" in text[3]


@pytest.mark.parametrize("sign", [1, -1])
def test_without_the_image_that_makes_most_of_a_difference(sign):
    rng = np.random.default_rng(0)
    trials = rng.uniform(1, 2, (20, 3))
    trials[:, 2] = 0
    trials[11, 2] = 1  # The only image of its class, which one model finds.
    found = {name: Quotients(trials * rng.uniform(0, 0.5, (20, 3)), trials) for name in "ab"}
    found["a"].hits[11, 2], found["b"].hits[11, 2] = 1, 0
    models = {name: dict.fromkeys(MEASURES, found[name]) for name in "ab"[::sign]}
    first, other = models
    # Equal models have no image that makes them differ.
    models["same"] = models[first]
    images = [f"{i}.png" for i in range(20)]
    ((row, estimate),) = without_one_image(models, images, draws=100).items()
    assert row == f"{first} - {other}, without 11.png"
    # Values of IoU without this image, by the definition.
    rest = np.delete(np.arange(20), 11)
    means = {n: np.mean(found[n].hits[rest, :2].sum(0) / trials[rest, :2].sum(0)) for n in "ab"}
    for value, low, high in estimate.values():
        assert value == pytest.approx(means[first] - means[other])
        assert low < value < high
    assert abs(value) < 0.2 < abs(found["a"].mean(np.ones(20)) - found["b"].mean(np.ones(20)))
    # Without its only image nothing is left.
    single = Quotients(trials[:1], trials[:1]), Quotients(0 * trials[:1], trials[:1])
    models = {name: dict.fromkeys(MEASURES, one) for name, one in zip("ab", single, strict=True)}
    assert without_one_image(models, images[:1], draws=9) == {}


def test_the_mean_without_each_image():
    records = random_records(3, count=7, better=0.4)
    found = measures(records, CLASSES, True)["miou"].mean_without_each()
    expected = [miou(records[:i] + records[i + 1 :]) for i in range(7)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_intervals_of_classes():
    hits = np.zeros((20, 3))
    trials = np.zeros((20, 3))
    trials[:, 0] = trials[0, 1] = 1
    hits[::2, 0] = hits[0, 1] = 1
    ends = class_intervals(Quotients(hits, trials), draws=300)
    assert 0.2 < ends[0, 0] < 0.4 < 0.6 < ends[0, 1] < 0.8
    np.testing.assert_array_equal(ends[1:], [[1, 1], [np.nan, np.nan]])


def test_an_earlier_evaluation(tmp_path, monkeypatch):
    records = random_records(1)
    folder = tmp_path / "mean" / "evaluation-7"
    identity = {"checkpoint": "x", "settings": {0: {"refine": "crf", "m_image": 5}}}
    list(RecordStore(folder / "voc", identity, "names").extend(random_records(2)[::-1]))
    earlier = Earlier.named(str(folder))
    assert earlier.name == "mean"
    assert Earlier.named(f"base={folder}") == ("base", folder)
    found, differing = earlier.records("voc", records, {"refine": "none", "m_image": 5})
    assert [record.name for record in found] == [record.name for record in records]
    assert differing == "refine='crf'"
    some, _ = earlier.records("voc", records[4:9], {})
    assert [record.name for record in some] == list("45678")

    with pytest.raises(UserError, match="there is no folder"):
        Earlier.named(f"{folder}x")
    with pytest.raises(UserError, match="coco holds no records"):
        earlier.records("coco", records, {})
    with pytest.raises(UserError, match=r"no result for 1 of 31 images, of new"):
        earlier.records("voc", [*records, records[0]._replace(name="new")], {})
    other = records[3]._replace(counts=[np.array([[0, 0, 199], [1, 0, 1]])])
    with pytest.raises(UserError, match="other masks or classes: 1 of 30"):
        earlier.records("voc", [*records[:3], other, *records[4:]], {})
    with monkeypatch.context() as patch:
        patch.setattr("simseg_jax.evaluators.records.FORMAT", 2)
        list(RecordStore(folder / "old", identity).extend(records))
    with pytest.raises(UserError, match="no records of this version"):
        earlier.records("old", records, {})


def test_no_model_comes_first():
    records = random_records(3, better=0.4)
    models = {
        "this": measures(records, CLASSES, True),
        NO_MODEL: without_model(records, CLASSES, True),
    }
    assert list(estimates(models, draws=100)) == ["this", "no model", "this - no model"]


def test_folders_with_an_equals_sign(tmp_path, monkeypatch):
    """The runs of ablate are called pool=mean and the like."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/pool=mean/evaluation-20")
    folder.mkdir(parents=True)
    assert Earlier.named(str(folder)) == ("pool=mean", folder)
    assert Earlier.named(f"twin={folder}") == ("twin", folder)
    with pytest.raises(UserError, match="there is no folder runs/pool=cls"):
        Earlier.named("twin=runs/pool=cls")
    Path("mean/evaluation-20").mkdir(parents=True)
    with pytest.raises(UserError, match="runs/pool=mean/evaluation-20 or mean/evaluation-20"):
        Earlier.named(str(folder))
    with pytest.raises(UserError, match="there is no folder twin="):
        Earlier.named("twin=")  # Not the folder of the command itself.
