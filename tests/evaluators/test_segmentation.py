import jax
import numpy as np
import pytest
from conftest import SHARED
from support import model_of, tiny_eval, tiny_model

from simseg_jax.evaluators.metrics import mean_iou
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.reports.statistics import class_table
from simseg_jax.runtime.errors import UserError

VOC = SHARED / "data" / "VOCdevkit" / "VOC2012"


@pytest.fixture(scope="module")
def model():
    return tiny_model(devices=8)


def evaluate(model, devices=8, **settings):
    model, params = model
    model = model_of(model.architecture, model.encoder, devices)
    with jax.set_mesh(model.mesh):
        evaluator = SegmentationEvaluator(model, tiny_eval(**settings))
        return dict(evaluator.run(params))


def test_result_does_not_depend_on_batch_size_or_devices(model):
    expected = evaluate(model)
    assert 0 < expected["miou"] < 1
    assert expected == evaluate(model, batch_size=16)
    assert expected == evaluate(model, batch_size=12)  # On 8 devices: rounded up.
    assert expected == evaluate(model, devices=1, batch_size=7)
    assert expected == evaluate(model, devices=1, batch_size=1)


def test_limit_and_names(model):
    results = evaluate(model, limit=5)
    assert "iou/background" in results
    classes = [value for name, value in results.items() if name.startswith("iou/")]
    assert np.mean(classes) == pytest.approx(results["miou"])
    assert results != evaluate(model, limit=6)


def test_perfect_predictions_score_one(model, monkeypatch):
    model, params = model
    evaluator = SegmentationEvaluator(model, tiny_eval(resolution=64))
    protocol, oracle = evaluator.engine.protocol, iter(range(24))
    original = protocol.finish

    def finish(started):
        masks, responses = original(started)
        # The batch is padded to 24 images.
        perfect = [evaluator.source[next(oracle) % evaluator.count]["mask"] for _ in masks[0]]
        return np.stack(perfect)[None], responses

    monkeypatch.setattr(protocol, "finish", finish)
    assert dict(evaluator.run(params))["miou"] == 1.0


@pytest.mark.parametrize("protocol", ["paper", "standard"])
def test_records_add_up_and_keep_every_pixel(model, protocol):
    settings = tiny_eval(protocol=protocol, window=32, limit=10)
    other = tiny_eval(protocol=protocol, window=32, limit=10, m_text=2)
    evaluator = SegmentationEvaluator(model[0], settings, other)
    records = list(evaluator.records(model[1]))
    assert sorted(record.name for record in records) == [f"val_{i:05d}" for i in range(10)]
    for record in records:
        assert [counts[:, 2].sum() for counts in record.counts] == [64 * 64] * 2
        assert record.scores[0].shape == (11,)
    scores = dict(evaluator.results(evaluator.measures(records)))
    ious = evaluator.ious(evaluator.confusion(records))
    assert scores["miou"] == pytest.approx(mean_iou(ious))
    assert scores == evaluate(model, protocol=protocol, window=32, limit=10)
    some = list(evaluator.records(model[1], [7, 2]))
    assert {record.name for record in some} == {"val_00002", "val_00007"}
    by_name = {record.name: record for record in records}
    for record in some:
        np.testing.assert_array_equal(record.counts[1], by_name[record.name].counts[1])


def test_class_embeddings_follow_the_parameters(model):
    model, params = model
    evaluator = SegmentationEvaluator(model, tiny_eval(limit=2))
    calls, embed = [], evaluator.engine.embed
    evaluator.engine.embed = lambda params, prompts: calls.append(params) or embed(params, prompts)
    others = jax.tree.map(lambda x: x + 0.1, params)
    for current in (params, params, others, params):
        list(evaluator.records(current))
    assert [c is params for c in calls] == [True, False, True]


def test_unusable_settings_are_explained(model):
    with pytest.raises(UserError, match="No VOC folder"):
        evaluate(model, data="voc", root="nowhere")


@pytest.mark.skipif(not VOC.is_dir(), reason=f"VOC images are missing: {VOC}")
def test_voc_in_its_official_layout(model):
    results = evaluate(model, data="voc", root=str(VOC), limit=12, prompts="plain")
    assert 0 < results["miou"] < 1


@pytest.mark.skipif(not VOC.is_dir(), reason=f"VOC images are missing: {VOC}")
@pytest.mark.parametrize("protocol", ["paper", "standard"])
def test_benchmark_without_background(model, protocol):
    results = evaluate(
        model, data="voc20", root=str(VOC), limit=4, protocol=protocol, window=32, prompts="plain"
    )
    assert "iou/none" not in results
    model, params = model
    settings = tiny_eval(data="voc20", root=str(VOC), limit=4, protocol=protocol, window=32)
    evaluator = SegmentationEvaluator(model, settings)
    records = list(evaluator.records(params))
    found = evaluator.measures(records)
    names = [row["class"] for row in class_table(records, evaluator.class_names, found)]
    assert "none" not in names
    assert len([name for name in results if name.startswith("iou/")]) >= 3
    classes = [value for name, value in results.items() if name.startswith("iou/")]
    assert np.mean(classes) == pytest.approx(results["miou"])
