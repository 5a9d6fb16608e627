import jax
import numpy as np
import pytest
from conftest import SHARED
from support import tiny_config, tiny_eval

from simseg_jax.config import model_config
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.errors import UserError
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.models.simseg import init_params, make_model
from simseg_jax.sharding import make_mesh

VOC = SHARED / "data" / "VOCdevkit" / "VOC2012"


@pytest.fixture(scope="module")
def model():
    tokenizer = load_tokenizer("shapes")
    architecture = model_config(tiny_config(), len(tokenizer))
    params = init_params(architecture, jax.random.key(0))
    return make_model(architecture), params, TextEncoder(tokenizer, 25)


def evaluate(model, devices=8, **settings):
    graphdef, params, encoder = model
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        evaluator = SegmentationEvaluator(graphdef, mesh, encoder, tiny_eval(**settings))
        return dict(evaluator.run(params))


def test_result_does_not_depend_on_batch_size_or_devices(model):
    expected = evaluate(model)
    assert 0 < expected["miou"] < 1
    assert expected == evaluate(model, batch_size=16)
    assert expected == evaluate(model, devices=1, batch_size=3)


def test_limit_and_names(model):
    results = evaluate(model, limit=5)
    assert "iou/background" in results
    classes = [value for name, value in results.items() if name.startswith("iou/")]
    assert np.mean(classes) == pytest.approx(results["miou"])
    assert results != evaluate(model, limit=6)


def test_perfect_predictions_score_one(model, monkeypatch):
    graphdef, params, encoder = model
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        evaluator = SegmentationEvaluator(graphdef, mesh, encoder, tiny_eval(resolution=64))
        oracle = iter([evaluator.source[i]["mask"] for i in range(24)][:20])

        def predict(params, class_embeddings, images):
            _, response = original(params, class_embeddings, images)
            rows = [next(oracle, np.zeros((64, 64), int)) for _ in range(len(images))]
            return np.stack(rows), response

        original = evaluator.predict
        monkeypatch.setattr(evaluator, "predict", predict)
        assert dict(evaluator.run(params))["miou"] == 1.0


def test_unusable_settings_are_explained(model):
    with pytest.raises(UserError, match="multiple of the number of devices, which is 8"):
        evaluate(model, batch_size=12)
    with pytest.raises(UserError, match="No VOC folder"):
        evaluate(model, data="voc", root="nowhere")


@pytest.mark.skipif(not VOC.is_dir(), reason=f"VOC images are missing: {VOC}")
def test_voc_in_its_official_layout(model):
    results = evaluate(model, data="voc", root=str(VOC), limit=12, prompts="plain")
    assert 0 < results["miou"] < 1
