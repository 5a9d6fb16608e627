"""What a resumed run may change: every key is either listed and said, or refused."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from support import data_set, tiny_config, tiny_eval

from simseg_jax.config import run_config
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.settings import assign, get, plain
from simseg_jax.training.checkpoint import Record
from simseg_jax.training.resume import changes

IDENTITY = {
    "vocabulary": {"tokens": 100, "digest": "aa"},
    "data": {"shapes": {"examples": 64, "sample": ["a", "b", "", "d"]}},
}
ALLOWED = {
    "steps": 9,
    "epochs": 2.0,
    "log_every": 7,
    "pictures": 2,
    "micro_batch": 2,
    "gradient_dtype": "float32",
    "remat": "full",
    "optim.lr": 2e-3,
    "optim.clip_norm": 1.0,
    "mesh.fsdp": 2,
    "checkpoint.keep": 9,
    "data.threads": 5,
    "data.workers": 2,
    "data.cache": "/elsewhere",
    "data.max_bad": 0.5,
    "data.train.shapes.path": "moved",
    "init.image": "timm.pth",
}
REFUSED = {
    "seed": 3,
    "batch_size": 32,
    "optim.b2": 0.95,
    "optim.warmup": 0.5,
    "optim.lr_rules": ((".*", 0.5),),
    "data.mixture": "debiased",
    "data.max_length": 20,
    "data.edit_rate": 0.5,
    "data.crop_area": (0.5, 1.0),
    "data.train.shapes.weight": 2.0,
    "data.train.shapes.collage": 0.5,
}
MODEL = {"model.embed_dim": 8, "model.pool": "mean", "model.text.dropout": 0.0}


def compare(config, identity=None, own=True, saved_identity=IDENTITY):
    saved = Record(tiny_config().to_dict(), 0, saved_identity)
    return changes(saved, config.to_dict(), identity or IDENTITY, "The checkpoint X", own)


def changed(key, value):
    values = tiny_config().to_dict()
    assign(values, key, value)
    return ConfigDict(values)


def test_nothing_changed():
    assert compare(tiny_config()) == compare(tiny_config(), own=False) == []


@pytest.mark.parametrize("key", ALLOWED)
def test_what_may_change_is_said(key):
    old = get(tiny_config().to_dict(), key)
    note = ["the learning rate follows the new length"] if key in ("steps", "epochs") else []
    assert compare(changed(key, ALLOWED[key])) == [f"{key} {old!r} -> {ALLOWED[key]!r}", *note]


@pytest.mark.parametrize("key", REFUSED)
def test_what_must_not_change_is_refused(key):
    """Another run that starts from the checkpoint may change it."""
    config = changed(key, REFUSED[key])
    old = get(tiny_config().to_dict(), key)
    with pytest.raises(UserError) as refused:
        compare(config)
    message = str(refused.value)
    assert message.startswith(
        f"The checkpoint X has {key}={old!r}, the configuration {REFUSED[key]!r}. "
    )
    assert "Set it back" in message
    assert "checkpoint.resume" in message
    assert compare(config, own=False) == [f"{key} {old!r} -> {REFUSED[key]!r}"]


@pytest.mark.parametrize("key", MODEL)
@pytest.mark.parametrize("own", [True, False])
def test_the_model_stays_in_any_case(key, own):
    with pytest.raises(UserError, match=f"{key}=.*Set it back"):
        compare(changed(key, MODEL[key]), own=own)


def test_evaluations_may_come_and_go():
    config = tiny_config()
    config.evals.seg.new = tiny_eval()
    assert compare(config) == ["evals.seg.new absent -> present"]


def test_data_sets_may_not():
    config = tiny_config()
    config.data.train.more = data_set(path="more.csv")
    with pytest.raises(UserError, match=r"data.train.more=absent, the configuration present"):
        compare(config)
    assert compare(config, own=False) == ["data.train.more absent -> present"]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"examples": 65, "sample": ["a"]}, "shapes had 64 examples, now 65"),
        ({"examples": 64, "sample": ["a", "x", "c", "d"]}, "1 of 3 compared examples of .* differ"),
    ],
)
def test_other_data_of_the_same_name(now, message):
    identity = {**IDENTITY, "data": {"shapes": now}}
    with pytest.raises(UserError, match=f"X was trained on other data: .*{message}"):
        compare(tiny_config(), identity)
    assert len(compare(tiny_config(), identity, own=False)) == 1


def test_an_example_that_cannot_be_read_now_is_not_compared():
    now = {"examples": 64, "sample": ["", "b", "c", "d"]}
    assert compare(tiny_config(), {**IDENTITY, "data": {"shapes": now}}) == []


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("other", [{"tokens": 100, "digest": "bb"}, {"tokens": 90, "digest": "cc"}])
def test_another_vocabulary_is_named(own, other):
    config = changed("data.vocab", "vrev.txt")
    with pytest.raises(UserError) as refused:
        compare(config, {**IDENTITY, "vocabulary": other}, own)
    assert "data.vocab='shapes' (100 tokens, digest aa)" in str(refused.value)
    assert f"data.vocab='vrev.txt' ({other['tokens']} tokens" in str(refused.value)
    assert len(str(refused.value)) < 400
    # The same tokens from another place are the same vocabulary.
    assert compare(config) == ["data.vocab 'shapes' -> 'vrev.txt'"]


def test_checkpoints_without_an_identity():
    assert compare(tiny_config(), saved_identity=None) == []


def test_keys_added_since_have_their_defaults():
    saved = tiny_config().to_dict()
    del saved["loss_chunk"], saved["data"]["max_pixels"], saved["data"]["train"]["shapes"]["weight"]
    record = Record(plain(run_config(saved)), 0, IDENTITY)
    assert changes(record, tiny_config().to_dict(), IDENTITY, "X", True) == []
    changed_values = changed("loss_chunk", 2).to_dict()
    assert np.size(changes(record, changed_values, IDENTITY, "X", True)) == 1
