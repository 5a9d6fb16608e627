import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from support import message, probe_config, run

from simseg_jax import linear_probe
from simseg_jax.data.shapes import scene
from simseg_jax.evaluators.probe import ProbeConfig, probe, probe_step
from simseg_jax.linear_probe import features_of
from simseg_jax.runtime.errors import UserError
from simseg_jax.training.optim import cosine_schedule, lars

CONFIG = """
from simseg_jax.config import probe_config

def get_config():
    small = {"resize": 32, "crop": 32, "size": 40, "val_size": 20, "epochs": 12}
    return probe_config(data="shapes", threads=2, **small)
"""


def trajectory(golden, schedule, steps):
    """(losses, kernel [C, D], bias [C]) of `steps` steps on the problem of the reference."""
    optimizer = lars(schedule)
    params = {"kernel": jnp.asarray(golden["lars/w0"].T), "bias": jnp.zeros(5)}
    batch = {"x": golden["lars/x"], "y": golden["lars/y"]}
    step = jax.jit(lambda *arguments: probe_step(optimizer, *arguments))
    state, losses = optimizer.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    return losses, params["kernel"].T, params["bias"]


def test_lars_follows_the_references_trajectory(golden):
    losses, kernel, bias = trajectory(golden, optax.constant_schedule(0.1), 6)
    np.testing.assert_allclose(losses, golden["lars/losses"], rtol=1e-6)
    np.testing.assert_allclose(kernel, golden["lars/w6"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bias, golden["lars/b6"], rtol=1e-6, atol=1e-7)


def test_lars_under_warm_up_and_cosine(golden, photographs):
    """The momentum holds steps of the rates at which they were made."""
    schedule = cosine_schedule(20.0, steps=40, warmup_steps=8, final_fraction=0.0)
    losses, kernel, bias = trajectory(golden, schedule, 40)
    np.testing.assert_allclose(losses, photographs["lars/losses"], rtol=1e-4)
    np.testing.assert_allclose(kernel, photographs["lars/kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bias, photographs["lars/bias"], rtol=1e-4)


def test_the_classifier_starts_as_pytorchs():
    """Uniform within 1 / sqrt(width), the bias too; a learning rate of 0 keeps it so."""
    width, classes = 64, 200
    settings = ProbeConfig(base_lr=0.0, epochs=1, warmup_epochs=0)
    train = {"features": np.eye(width, dtype=np.float32), "labels": np.arange(width)}
    bias, *rows = probe(settings, train, np.eye(width + 1, width, -1, np.float32), classes)
    for weights in (bias, np.stack(rows) - bias):
        np.testing.assert_allclose(np.abs(weights).max(), width**-0.5, rtol=0.05)
        np.testing.assert_allclose(weights.std(), (3 * width) ** -0.5, rtol=0.1)


def clusters(count, seed):
    """Features of three classes around three points, far from the origin in one channel."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.array([[2, 0, 0, 50], [0, 2, 0, 50], [0, 0, 2, 50]], np.float32)
    features = centres[labels] + 0.5 * rng.normal(size=(count, 4))
    return {"features": features.astype(np.float32), "labels": labels}


@pytest.mark.parametrize(("standardize", "base_lr"), [(False, 100.0), (True, 20.0)])
def test_clusters_are_told_apart(standardize, base_lr):
    # The channel that all share hinders LARS until it is taken away.
    settings = probe_config(
        batch_size=64, epochs=60, warmup_epochs=5, base_lr=base_lr, standardize=standardize
    )
    val = clusters(99, 1)
    scores = probe(settings, clusters(203, 0), val["features"], 3)
    assert (scores.argmax(axis=1) == val["labels"]).mean() > 0.95


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "probe.py"
    path.write_text(CONFIG)
    return path


def test_command_keeps_its_features(monkeypatch, capsys, workdir, config):
    arguments = (f"--checkpoint={workdir}", f"--config={config}")
    out = run(monkeypatch, capsys, linear_probe, *arguments)
    folder = workdir / "linear_probe-4" / "cls"
    assert str(folder) in out.splitlines()[-1]
    first = json.loads((folder / "result.json").read_text())
    assert first["results"]["top1"] <= first["results"]["top5"]
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "ImageEmbedder", None)
        run(monkeypatch, capsys, linear_probe, *arguments)
        assert json.loads((folder / "result.json").read_text())["results"] == first["results"]
        # Another classifier, the same features; another size is refused by the patch.
        run(monkeypatch, capsys, linear_probe, *arguments, "--config.base_lr=0.5")
        with pytest.raises(TypeError):
            run(monkeypatch, capsys, linear_probe, *arguments, "--config.size=41")


def test_features_belong_to_their_images(monkeypatch, capsys, tmp_path):
    root, out = tmp_path / "images", tmp_path / "out"
    for number in range(12):
        path = root / ("train", "val")[number % 2] / f"kind {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number, "val")[0]).save(path)

    def embedder(*_):
        def embed(_params, indices, load, _bar):
            images, labels = zip(*map(load, indices), strict=True)
            return np.array([np.asarray(image).mean((0, 1)) for image in images]), list(labels)

        return embed

    monkeypatch.setattr(linear_probe, "ImageEmbedder", embedder)
    model: Any = SimpleNamespace(identity={"step": 1}, patch_size=8, params=None)
    settings = probe_config(data="folder", root=str(root), crop=32, resize=32)

    def features(folder):
        folder.mkdir(exist_ok=True)
        found = [features_of(model, settings, split, folder) for split in ("train", "val")]
        return [part[name].tolist() for part in found for name in ("features", "labels")]

    def replace():
        Image.fromarray(scene(40, "val")[0]).save(root / "train" / "kind 0" / "0.png")

    def insert():
        (root / "train" / "a kind").mkdir()
        Image.fromarray(scene(41, "val")[0]).save(root / "train" / "a kind" / "0.png")

    def damage():
        content = bytearray((out / "train.npz").read_bytes())
        content[len(content) // 3] ^= 1
        (out / "train.npz").write_bytes(content)

    def cut():
        (out / "train.npz").write_bytes((out / "train.npz").read_bytes()[:100])

    features(out)
    for change, why in (
        (replace, "images and classes changed since"),
        (insert, "images and classes changed since"),
        (damage, "it is damaged"),
        (cut, "it is damaged"),
    ):
        change()
        found = features(out)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"The features in {out / 'train.npz'} are computed again ({why}")
        assert found == features(tmp_path / change.__name__)
        assert found == features(out)
        assert not capsys.readouterr().out


def test_mistakes(monkeypatch, capsys, workdir, config):
    arguments = (f"--checkpoint={workdir}", f"--config={config}")
    error = message(monkeypatch, capsys, linear_probe, *arguments, "--config.crop=30")
    assert "crop=30 must be a multiple of the patch size, which is 8" in error
    error = message(monkeypatch, capsys, linear_probe, *arguments, "--config.data=folder")
    assert "There is no folder" in error
    error = message(monkeypatch, capsys, linear_probe, *arguments, "--config.epoch=1")
    assert "the nearest is 'epochs'" in error
    with pytest.raises(UserError, match="warmup_epochs=90 must be less than epochs=90"):
        probe_config(warmup_epochs=90)
