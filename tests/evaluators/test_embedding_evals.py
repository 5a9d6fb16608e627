"""Retrieval and zero-shot classification on generated scenes and small files."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pairs_support import make_pairs, write_tar
from PIL import Image
from support import (
    assert_close,
    classification_eval,
    model_of,
    probe_config,
    retrieval_eval,
    tiny_model,
)

from simseg_jax.config import default_config, run_config
from simseg_jax.data.pairs import tf_example
from simseg_jax.data.testsets.labelled import class_prompts, labelled_source
from simseg_jax.evaluators.build import entries_of, headlines, make_evaluators
from simseg_jax.evaluators.embedding import ImageEmbedder, resize_and_crop
from simseg_jax.models.simseg import bind
from simseg_jax.runtime.errors import UserError
from simseg_jax.zeroshot.prompts import TEMPLATES

SMALL = {"resize": 40, "crop": 32, "threads": 2}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def evaluators(model, devices=1, **entries):
    """Of a configuration with `kind__name=settings`, and the parameters."""
    model, params = model
    config = default_config()
    for entry, settings in entries.items():
        kind, name = entry.split("__")
        config.evals[kind][name] = settings
    model = model_of(model.architecture, model.encoder, devices)
    return make_evaluators(model, entries_of(config.evals)), params


@pytest.mark.parametrize("turned", [False, True])
def test_crops_are_central_in_both_aspects(turned):
    picture = np.zeros((30, 61, 3), np.uint8)
    picture[:, 20:41] = 255
    picture = picture.swapaxes(0, 1) if turned else picture
    # 61 x 30 -> 20 x 20, or 40 x 20 (torchvision rounds down); the stripe stays in the middle.
    for aspect, wide in (("squash", 20 / 61 * 21), ("keep", 40 / 61 * 21)):
        result = resize_and_crop(Image.fromarray(picture), 20, 16, aspect)
        assert result.shape == (16, 16, 3)
        line = result[:, 8, 0] if turned else result[8, :, 0]
        bright = np.flatnonzero(line > 127)
        assert abs((bright[0] + bright[-1]) / 2 - 7.5) <= 0.5
        assert abs(len(bright) - wide) <= 1
    square = picture[:30, :30]
    for aspect in ("squash", "keep"):
        np.testing.assert_array_equal(
            resize_and_crop(Image.fromarray(square), 30, 30, aspect), square
        )


@pytest.mark.parametrize("aspect", ["squash", "keep"])
def test_photographs_through_retrieval_equal_a_second_implementation(
    golden_model, photographs, aspect
):
    """640 x 427 and 600 x 400, the paper's sizes; squashed unless told otherwise."""
    architecture, _, params = golden_model
    changed = {} if aspect == "squash" else {"aspect": aspect}
    settings = retrieval_eval(batch_size=2, threads=1, **changed)
    photos = ("rocket", "coffee")
    images = [Image.fromarray(photographs[f"{photo}/image"]) for photo in photos]
    for photo, image in zip(photos, images, strict=True):
        key = f"{photo}/retrieval/{aspect}/crop"
        crop = resize_and_crop(image, 324, 288, aspect)
        np.testing.assert_array_equal(crop[::16, ::16], photographs[key])
        assert zlib.crc32(crop.tobytes()) == photographs[f"{key}/checksum"]
    embedder = ImageEmbedder(model_of(architecture), settings, 2)
    params = jax.tree.map(jnp.asarray, params)
    vectors, _ = embedder(params, range(2), lambda index: (images[index], index))
    expected = [photographs[f"{photo}/retrieval/{aspect}/embedding"] for photo in photos]
    assert_close(vectors, np.stack(expected))


def test_paper_sizes_and_aspects():
    for settings in (retrieval_eval(), classification_eval()):
        assert (settings.resize, settings.crop, settings.aspect) == (324, 288, "squash")
    probe = probe_config()
    assert (probe.resize, probe.crop, probe.aspect, probe.feature) == (256, 224, "squash", "cls")


def test_retrieval_keeps_its_indexes_where_the_configuration_says(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write_tar(make_pairs(4), tmp_path)
    entries = {"retrieval/x": retrieval_eval(path=str(path), **SMALL)}
    cache = tmp_path / "cache"
    built = make_evaluators(model[0], entries, str(cache))
    assert built["retrieval/x"].count == 4
    assert any(cache.rglob("*"))
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("feature", ["embedding", "cls", "mean"])
def test_vectors_do_not_depend_on_batches_and_devices(model, feature):
    model, params = model
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 44, 3), np.uint8)) for _ in range(7)]
    results = []
    for batch_size, devices in ((32, 1), (2, 1), (3, 2)):
        settings = retrieval_eval(batch_size=batch_size, **SMALL)
        spread = model_of(model.architecture, devices=devices)
        embedder = ImageEmbedder(spread, settings, batch_size, feature)
        vectors, kept = embedder(params, range(7), lambda index: (images[index], index))
        assert kept == list(range(7))
        results.append(vectors)
        assert_close(results[-1], results[0], 1e-6)
    network = bind(model.graphdef, params)
    image = network.normalize(jnp.asarray(resize_and_crop(images[3], 40, 32))[None])
    tokens = network.image_encoder(image)[0]
    expected = {
        "embedding": network.encode_image(image)[0][0],
        "cls": tokens[0],
        "mean": tokens[1:].mean(axis=0),
    }
    assert_close(results[0][3], expected[feature])


@pytest.fixture
def karpathy(tmp_path):
    """Twelve images in two splits, with one to three sentences each."""
    (tmp_path / "images" / "inner").mkdir(parents=True)
    entries = []
    for number, (name, image, captions) in enumerate(make_pairs(12)):
        (tmp_path / "images" / "inner" / name).write_bytes(image)
        entries.append(
            {
                "filename": name,
                "filepath": "inner",
                "split": "test" if number % 3 else "train",
                "sentences": [{"raw": caption} for caption in captions],
            }
        )
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries}))
    return tmp_path


def test_karpathys_splits(model, karpathy):
    data = {"path": str(karpathy / "dataset.json"), "images": "images", **SMALL}
    built, params = evaluators(
        model,
        retrieval__test=retrieval_eval(split="test", **data),
        retrieval__all=retrieval_eval(split="test+train", captions=0, **data),
    )
    ranked = built["retrieval/test"].rank(params)
    assert built["retrieval/test"].count == 8
    assert ranked.owners.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6, 6, 7, 7, 7]
    assert ranked.texts[:2] == ['A "1", seen 0 é', 'A "1", seen 1 é']
    assert built["retrieval/all"].count == 12
    with pytest.raises(UserError, match="has no split 'tset', only train, test"):
        evaluators(model, retrieval__x=retrieval_eval(split="tset", **data))


def test_recall_of_the_model_is_that_of_its_similarities(model):
    settings = retrieval_eval(format="shapes", split="val", size=20, **SMALL)
    built, params = evaluators(model, retrieval__shapes=settings)
    evaluator = built["retrieval/shapes"]
    results = dict(evaluator.run(params))
    model, _ = model
    network = bind(model.graphdef, params)
    examples = [evaluator.source[i] for i in range(20)]
    pixels = [resize_and_crop(Image.fromarray(e["image"]), 40, 32) for e in examples]
    images = np.asarray(network.encode_image(network.normalize(jnp.stack(pixels)))[0])
    ids, mask = map(jnp.asarray, model.encoder.batch([e["captions"][0] for e in examples]))
    texts = np.asarray(network.encode_text(ids, mask, m=1, mask_padding=True))
    similarity = images @ texts.T
    total = 0.0
    for name, matrix in (("i2t", similarity), ("t2i", similarity.T)):
        places = np.argsort(np.argsort(-matrix, axis=1, kind="stable"), axis=1).diagonal()
        for k in (1, 5, 10):
            assert results[f"{name}/r@{k}"] == pytest.approx((places < k).mean())
            total += (places < k).mean()
    assert results["rsum"] == pytest.approx(100 * total)
    assert headlines({f"retrieval/shapes/{k}": v for k, v in results.items()}) == [
        f"retrieval/shapes/rsum {results['rsum']:.4f}"
    ]


def test_damaged_images_are_named(model, karpathy):
    (karpathy / "images" / "inner" / "00004.jpg").write_bytes(b"\xff\xd8 not")
    settings = retrieval_eval(path=str(karpathy / "dataset.json"), images="images", **SMALL)
    built, params = evaluators(model, retrieval__x=settings)
    with pytest.raises(UserError, match=r"Cannot decode .*00004\.jpg"):
        dict(built["retrieval/x"].run(params))


def test_classification_is_the_nearest_class(model):
    settings = classification_eval(data="shapes", split="val", size=24, prompts="shapes", **SMALL)
    built, params = evaluators(model, devices=2, classification__shapes=settings)
    evaluator = built["classification/shapes"]
    results = dict(evaluator.run(params))
    model, _ = model
    network = bind(model.graphdef, params)
    examples = [evaluator.source[i] for i in range(24)]
    pixels = [resize_and_crop(Image.fromarray(e["image"]), 40, 32) for e in examples]
    images = np.asarray(network.encode_image(network.normalize(jnp.stack(pixels)))[0])
    classes = []
    for name in evaluator.source.classes:
        ids, mask = map(
            jnp.asarray,
            model.encoder.batch([template.format(name) for template in TEMPLATES["shapes"]]),
        )
        mean = np.asarray(network.encode_text(ids, mask, m=1, mask_padding=True)).mean(axis=0)
        classes.append(mean / np.linalg.norm(mean))
    order = np.argsort(-images @ np.stack(classes).T, axis=1)
    labels = np.array([e["label"] for e in examples])
    assert results["top1"] == pytest.approx((order[:, 0] == labels).mean())
    assert results["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())


@pytest.fixture
def folder(tmp_path):
    """ROOT/val/CLASS/**/IMAGE as CIFAR-10 or ImageNet are unpacked."""
    for name, image, _ in make_pairs(6):
        kind = ("black_bear", "tabby_cat")[int(name[:5]) % 2]
        path = tmp_path / "val" / kind / "deeper"
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(image)
    (tmp_path / "val" / "black_bear" / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_of_class_subfolders(model, folder):
    settings = classification_eval(root=str(folder), split="val", prompts="plain", **SMALL)
    source = labelled_source(settings)
    assert source.classes == ("black_bear", "tabby_cat")
    assert [source[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert class_prompts(source.classes, "auto") == [("black bear",), ("tabby cat",)]
    names = folder / "names.txt"
    names.write_text("tabby_cat: cat, kitten\nblack_bear: bear\n")
    assert class_prompts(source.classes, str(names)) == [("bear",), ("cat", "kitten")]
    names.write_text("tabby_cat: cat\n")
    with pytest.raises(UserError, match="no line for the classes 'black_bear'"):
        class_prompts(source.classes, str(names))
    built, params = evaluators(model, classification__x=settings)
    # Of two classes one of the first five is always right.
    assert dict(built["classification/x"].run(params))["top5"] == 1.0
    for root, split, message in (
        ("", "val", "There is no folder"),
        (str(folder), "train", "There is no folder"),
        (str(folder / "val" / "tabby_cat" / "deeper"), "", "holds no subfolders with images"),
    ):
        with pytest.raises(UserError, match=message):
            labelled_source(classification_eval(root=root, split=split))


def test_imagenets_folders_get_clips_names():
    prompts = class_prompts(("n01440764", "n01484850"), "auto")
    assert prompts == [("tench",), ("great white shark",)]


def test_labelled_tfds(tmp_path):
    pairs = make_pairs(5)
    path = tmp_path / "tiny-val.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for number, (_, image, _) in enumerate(pairs):
        writer.write(tf_example.serialize({"image": image, "label": number % 2}))
    writer.close()
    info = {
        "name": "tiny",
        "fileFormat": "array_record",
        "splits": [{"name": "val", "shardLengths": ["5"]}],
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"no feature `label` with its label\.labels\.txt"):
        labelled_source(classification_eval(root=str(tmp_path), split="val"))
    (tmp_path / "label.labels.txt").write_text("cat\ndog\n")
    source = labelled_source(classification_eval(root=str(tmp_path), split="val"))
    assert source.classes == ("cat", "dog")
    assert [(source[i]["image"], source[i]["label"]) for i in range(5)] == [
        (image, number % 2) for number, (_, image, _) in enumerate(pairs)
    ]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="is not complete"):
        labelled_source(classification_eval(root=str(tmp_path), split="val"))


def test_settings_are_checked():
    config = default_config()
    config.evals.retrieval.x = retrieval_eval(crop=100)
    with pytest.raises(UserError, match=r"evals\.retrieval\.x\.crop=100 must be a multiple"):
        run_config(config)
    for kind in ("retrieval", "classification"):
        config = default_config()
        config.evals[kind].x = {"aspect": "crop"}
        with pytest.raises(
            UserError, match=rf"{kind}\.x\.aspect='crop' must be one of: squash, keep"
        ):
            run_config(config)
