import dataclasses

import numpy as np
import pytest
from PIL import Image
from support import assert_close, tiny_eval, tiny_model

from simseg_jax.data.shapes import scene
from simseg_jax.data.testsets.classes import class_names, prompt_names
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.runtime.errors import UserError
from simseg_jax.zeroshot.classifier import class_embedder, tokenize_prompts, unknown_words
from simseg_jax.zeroshot.engine import Engine
from simseg_jax.zeroshot.prompts import TEMPLATES


def test_templates_and_classes():
    assert len(TEMPLATES["imagenet"]) == len(set(TEMPLATES["imagenet"])) == 80
    assert all(t.count("{}") == 1 for templates in TEMPLATES.values() for t in templates)
    voc = class_names(tiny_eval(data="voc"))
    assert len(voc) == 21
    assert voc[0] == class_names(tiny_eval())[0] == "background"
    # The original's spelling, which the reported numbers depend on.
    assert {"plant", "monitor", "table"} <= set(voc)


@pytest.fixture(scope="module")
def model():
    model, params = tiny_model(devices=2)
    return dataclasses.replace(model, encoder=TextEncoder(load_tokenizer("shapes"), 12)), params


def test_chunks_do_not_change_class_embeddings(model, monkeypatch):
    model, params = model
    prompts = tokenize_prompts(model.encoder, prompt_names(tiny_eval()), TEMPLATES["shapes"])
    assert prompts.ids.shape == prompts.mask.shape == (44, 12)
    whole = class_embedder(model)(params, prompts, 1)
    assert whole.shape == (11, 16)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-6)
    monkeypatch.setattr("simseg_jax.zeroshot.classifier.CHUNK", 7)
    assert_close(class_embedder(model)(params, prompts, 1), whole, 1e-6)


def test_synonyms_share_a_class(model):
    model, params = model
    embed = class_embedder(model)
    alone = embed(params, tokenize_prompts(model.encoder, [("star",), ("moon",)], ("a {}",)), 1)
    names = [("star", "moon"), ("heart",)]
    both = embed(params, tokenize_prompts(model.encoder, names, ("a {}",)), 1)
    mean = np.asarray(alone).mean(axis=0)
    assert_close(both[0], mean / np.linalg.norm(mean), 1e-6)


@pytest.mark.parametrize("in_order", [True, False])
def test_engine_batches_images_of_equal_shape(model, in_order):
    """Order, padding and grouping, with the standard protocol, whose inputs differ in size."""
    model, params = model
    settings = tiny_eval(protocol="standard", resolution=32, window=32, stride=16, batch_size=4)
    engine = Engine(model, [settings])
    classes = engine.embed(params, engine.prompts(prompt_names(tiny_eval())))
    sizes = [(40, 32), (60, 32), (40, 32), (40, 32), (60, 32), (40, 32), (40, 32)]
    images = [Image.fromarray(scene(i, "val")[0]).resize(size) for i, size in enumerate(sizes)]
    jobs = [lambda i=i, x=x: (i, x, (x.height, x.width)) for i, x in enumerate(images)]
    results = list(engine.run(params, jobs, classes, in_order))
    order = [i for kept, _, _ in results for i in kept]
    groups = [[0], [1], [2, 3], [4], [5, 6]] if in_order else [[0, 2, 3, 5], [1, 4], [6]]
    assert [kept for kept, _, _ in results] == groups or not in_order
    assert sorted(order) == list(range(7))
    assert (order == list(range(7))) == in_order
    for kept, masks, (response,) in results:
        assert masks.shape[:2] == (1, len(kept))
        assert response.scores.shape == (len(kept), 11)


def test_an_error_while_loading_reaches_the_caller(model):
    model, params = model
    engine = Engine(model, [tiny_eval()])

    def fail():
        raise UserError("Cannot decode it.")

    with pytest.raises(UserError, match="Cannot decode"):
        list(engine.run(params, [fail], {1: np.zeros((3, 16), np.float32)}))


def test_settings_must_share_what_the_encoder_sees(model):
    settings = [tiny_eval(), tiny_eval(resolution=64)]
    with pytest.raises(ValueError, match="what follows the encoder"):
        Engine(model[0], settings)


def test_class_names_without_a_known_word_are_named(capsys):
    encoder = TextEncoder(load_tokenizer("shapes"), 12)
    assert unknown_words(encoder, ["star", "жук", "жук star", "虫", ""]) == ["жук", "虫", ""]
    tokenize_prompts(encoder, [("star", "жук"), ("moon",)], ("a {}",))
    assert "knows no word of these class names: жук. The" in capsys.readouterr().err
    tokenize_prompts(encoder, [("star",), ("moon",)], ("a {}",))
    assert not capsys.readouterr().err
