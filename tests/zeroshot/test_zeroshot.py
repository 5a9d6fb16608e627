import jax
import numpy as np
from support import assert_close, tiny_config

from simseg_jax.config import model_config
from simseg_jax.data.classes import class_names
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.models.simseg import init_params, make_model
from simseg_jax.zeroshot.classifier import class_embedder, tokenize_prompts
from simseg_jax.zeroshot.prompts import TEMPLATES


def test_templates_and_classes():
    assert len(TEMPLATES["imagenet"]) == len(set(TEMPLATES["imagenet"])) == 80
    assert all(t.count("{}") == 1 for templates in TEMPLATES.values() for t in templates)
    assert len(class_names("voc")) == 21
    assert class_names("voc")[0] == class_names("shapes")[0] == "background"
    # The original's spelling, which the reported numbers depend on.
    assert {"plant", "monitor", "table"} <= set(class_names("voc"))


def test_chunks_do_not_change_class_embeddings(monkeypatch):
    tokenizer = load_tokenizer("shapes")
    architecture = model_config(tiny_config(), len(tokenizer))
    params = init_params(architecture, jax.random.key(0))
    graphdef = make_model(architecture)
    prompts = tokenize_prompts(
        TextEncoder(tokenizer, 12), class_names("shapes"), TEMPLATES["shapes"]
    )
    assert prompts[0].shape == (11, 4, 12)
    whole = class_embedder(graphdef, m_text=1)(params, *prompts)
    assert whole.shape == (11, 16)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-6)
    monkeypatch.setattr("simseg_jax.zeroshot.classifier.CHUNK", 7)
    assert_close(class_embedder(graphdef, m_text=1, devices=2)(params, *prompts), whole, 1e-6)
