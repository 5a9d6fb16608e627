"""The whole paper protocol against the authors' code."""

import importlib.util
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import assert_close, model_of, segmentation_eval

from simseg_jax.masks.postprocess import resize_nearest
from simseg_jax.masks.refine import denormalized_uint8, image_for_crf
from simseg_jax.runtime.errors import UserError
from simseg_jax.zeroshot.classifier import Prompts, class_embedder
from simseg_jax.zeroshot.paper import (
    PaperProtocol,
    Response,
    adaptive_threshold,
    candidate_classes,
    compose,
    min_max,
)

PHOTOS = ("astronaut", "chelsea")
needs_crf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason="pydensecrf is not installed (extra crf)",
)


@pytest.fixture(scope="module")
def class_embeddings(golden_model, golden):
    architecture, _, params = golden_model
    ids, mask = (golden[f"seg_class_{name}"] for name in ("ids", "mask"))
    classes = np.repeat(np.arange(len(ids)), ids.shape[1])
    prompts = Prompts(ids.reshape(-1, 25).astype(np.int32), mask.reshape(-1, 25), classes)
    return class_embedder(model_of(architecture))(params, prompts, 1)


def predict(golden_model, golden, class_embeddings, photos, devices=1, refine="none", **settings):
    """Masks [B, S, S] and response of the photos in one batch."""
    several = [segmentation_eval(refine=refine, **settings)]
    masks, responses = predict_all(golden_model, golden, class_embeddings, photos, several, devices)
    return masks[0], responses[0]


def predict_all(golden_model, golden, class_embeddings, photos, several, devices=1):
    """Masks [V, B, S, S] and responses under V settings in one pass."""
    architecture, _, params = golden_model
    images = np.stack([golden[f"seg/{photo}/input_uint8"] for photo in photos])
    protocol = PaperProtocol(model_of(architecture, devices=devices), several)
    embeddings = {1: class_embeddings, 2: class_embeddings}
    with jax.set_mesh(protocol.mesh):
        return protocol.finish(protocol.start(params, embeddings, {"image": images}))


def test_threshold_is_mean_plus_unbiased_deviation_of_the_top():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(3, 20)), jnp.float32)
    top = np.sort(scores, axis=1)[:, -10:]
    expected = top.mean(axis=1) + 0.5 * top.std(axis=1, ddof=1)
    np.testing.assert_allclose(adaptive_threshold(scores, 10, 0.5), expected, rtol=1e-5)
    # Fewer classes than K: all of them.
    np.testing.assert_allclose(
        adaptive_threshold(scores, 30, 0.0), scores.mean(axis=1), rtol=1e-4, atol=1e-6
    )


def test_candidates_skip_background_and_stop_at_the_threshold():
    scores = jnp.array([[0.9, 0.1, 0.8, 0.5, 0.5]])
    classes, drawn = candidate_classes(scores, jnp.array([0.5]), 4)
    np.testing.assert_array_equal(classes, [[0, 2, 3, 4]])
    np.testing.assert_array_equal(drawn, [[False, True, True, True]])
    _, drawn = candidate_classes(scores, jnp.array([0.85]), 4)
    assert not np.asarray(drawn).any()


def test_min_max_guards_constant_maps():
    maps = jnp.array([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    np.testing.assert_array_equal(min_max(maps), [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]])


def test_composition_is_the_argmax_of_score_times_mask():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 8)).astype(np.float32)
    classes = np.argsort(-scores, axis=1)[:, :5]
    masks = rng.random((6, 5, 9, 7)) < 0.4
    drawn = (classes != 0) & (np.arange(5) < 4)
    weighted = np.zeros((6, 8, 9, 7))
    for image in range(6):
        for rank, label in enumerate(classes[image]):
            if drawn[image, rank]:
                weighted[image, label] = masks[image, rank] * scores[image, label]
    expected = np.where(weighted.max(axis=1) > 0, weighted.argmax(axis=1), 0)
    response = Response(*map(jnp.asarray, (scores, scores, classes, drawn, masks, masks)))
    composed = compose(jnp.asarray(masks), response)
    np.testing.assert_array_equal(composed, expected)


def test_class_embeddings(class_embeddings, golden):
    assert_close(class_embeddings, golden["seg_class_embedding"])


def test_scores_thresholds_candidates_and_maps(golden_model, golden, class_embeddings):
    _, response = predict(golden_model, golden, class_embeddings, PHOTOS)
    for i, photo in enumerate(PHOTOS):
        reference = {k: golden[f"seg/{photo}/{k}"] for k in ("scores", "threshold", "candidates")}
        assert_close(response.scores[i], reference["scores"])
        assert_close(response.threshold[i], reference["threshold"])
        np.testing.assert_array_equal(response.classes[i], reference["candidates"])
        drawn = reference["scores"][reference["candidates"]] >= reference["threshold"]
        np.testing.assert_array_equal(response.drawn[i], drawn & (reference["candidates"] > 0))
        assert_close(response.self_similarity[i], golden[f"seg/{photo}/i2i"])
        assert_close(response.similarity[i], golden[f"seg/{photo}/similarity_18x18"])


def test_the_threshold_of_context_takes_more_scores(golden_model, golden, class_embeddings):
    """30 of them by default, which are all of these 21 classes, where VOC takes 10."""
    _, response = predict(golden_model, golden, class_embeddings, PHOTOS[:1], data="context")
    scores = golden["seg/astronaut/scores"]
    assert_close(response.threshold[0], scores.mean() + scores.std(ddof=1))


def test_masks_without_crf(golden_model, golden, class_embeddings):
    """Independent NumPy/SciPy-free reading of the protocol from the reference similarity maps."""
    masks, _ = predict(golden_model, golden, class_embeddings, PHOTOS)
    for i, photo in enumerate(PHOTOS):
        scores = golden[f"seg/{photo}/scores"]
        weighted = np.zeros((len(scores), 288, 288))
        maps = golden[f"seg/{photo}/similarity_18x18"]
        for label, similarity in zip(golden[f"seg/{photo}/candidates"], maps, strict=True):
            if scores[label] < golden[f"seg/{photo}/threshold"]:
                break
            p = (similarity - similarity.min()) / np.ptp(similarity)
            mask = np.kron(p > 0.5, np.ones((16, 16), bool))
            # Closing with a 7x7 square leaves 16x16 blocks as they are unless a gap is narrower
            # than 7 pixels, which a grid of 16 cannot have.
            weighted[label] = mask * scores[label]
        np.testing.assert_array_equal(masks[i], weighted.argmax(axis=0))


@pytest.mark.parametrize("batch", [1, 2])
def test_result_does_not_depend_on_the_batch(golden_model, golden, class_embeddings, batch):
    together, _ = predict(golden_model, golden, class_embeddings, PHOTOS)
    alone, _ = predict(golden_model, golden, class_embeddings, PHOTOS[:batch])
    np.testing.assert_array_equal(alone, together[:batch])


@pytest.mark.parametrize("photo", PHOTOS)
def test_image_for_the_crf_is_truncated_like_the_original(golden, photo):
    image = denormalized_uint8(golden[f"seg/{photo}/input_uint8"])
    np.testing.assert_array_equal(image, golden[f"seg/{photo}/denormalised_uint8"])


def test_device_image_for_the_crf_is_the_same():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(image_for_crf(jnp.asarray(levels)), denormalized_uint8(levels))


@pytest.mark.parametrize(
    "settings",
    [
        {"refine": "crf", "crf": {"backend": "numpy"}},
        {"refine": "crf", "crf": {"backend": "jax"}},
        pytest.param({"refine": "pydensecrf"}, marks=needs_crf),
    ],
    ids=["numpy", "jax", "pydensecrf"],
)
def test_predictions_with_crf_equal_the_reference_at_every_pixel(
    golden_model, golden, class_embeddings, settings
):
    masks, _ = predict(golden_model, golden, class_embeddings, PHOTOS, **settings)
    for mask, photo in zip(masks, PHOTOS, strict=True):
        expected = golden[f"seg/{photo}/prediction"]
        np.testing.assert_array_equal(resize_nearest(mask, *expected.shape), expected)


@pytest.mark.parametrize("photo", ["rocket", "coffee"])
def test_photographs_of_other_sizes_equal_a_second_implementation(
    golden_model, class_embeddings, photographs, photo
):
    """640 x 427 and 600 x 400, from the whole image to the label of every pixel."""
    stored = {
        key.removeprefix(f"{photo}/"): value
        for key, value in photographs.items()
        if key.startswith(photo)
    }
    architecture, _, params = golden_model
    image = stored["image"]
    protocol = PaperProtocol(model_of(architecture), [segmentation_eval()])
    batch = {"image": protocol.load(Image.fromarray(image), image.shape[:2])["image"][None]}
    for key, pixels in (
        ("input", batch["image"][0]),
        ("levels", denormalized_uint8(batch["image"])[0]),
    ):
        np.testing.assert_array_equal(pixels[::16, ::16], stored[key])
        assert zlib.crc32(pixels.tobytes()) == stored[f"{key}/checksum"]
    with jax.set_mesh(protocol.mesh):
        started = protocol.start(params, {1: class_embeddings}, batch)
        masks, (response,) = protocol.finish(started)
    assert_close(response.scores[0], stored["scores"])
    assert_close(response.threshold[0], stored["threshold"])
    np.testing.assert_array_equal(response.classes[0], stored["candidates"])
    drawn = np.unpackbits(stored["masks"]).reshape(5, 288, 288)
    labels = stored["candidates"][drawn.argmax(axis=0)] * drawn.any(axis=0)
    np.testing.assert_array_equal(masks[0, 0], labels)
    np.testing.assert_array_equal(
        protocol.restore(masks[0, 0], image.shape[:2]), stored["prediction"]
    )


@pytest.mark.parametrize("backend", ["numpy", pytest.param("jax", marks=pytest.mark.slow)])
def test_crf_on_several_devices(golden_model, golden, class_embeddings, backend):
    settings = {"refine": "crf", "crf": {"backend": backend}}
    one, _ = predict(golden_model, golden, class_embeddings, PHOTOS, **settings)
    two, _ = predict(golden_model, golden, class_embeddings, PHOTOS, devices=2, **settings)
    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_too_little_room_for_the_lattice_runs_again(
    golden_model, golden, class_embeddings, monkeypatch
):
    settings = {"refine": "crf", "crf": {"backend": "jax"}}
    expected, _ = predict(golden_model, golden, class_embeddings, PHOTOS, **settings)
    monkeypatch.setattr("simseg_jax.masks.refine.lattice_size", lambda height, width: 9000)
    masks, _ = predict(golden_model, golden, class_embeddings, PHOTOS, **settings)
    np.testing.assert_array_equal(masks, expected)


@pytest.mark.parametrize(
    ("backend", "count"), [pytest.param("numpy", 6, marks=pytest.mark.slow), ("jax", 3)]
)
def test_settings_in_one_pass_equal_single_runs(
    golden_model, golden, class_embeddings, backend, count
):
    crf = {"crf": {"backend": backend}}
    changes = [
        {"refine": "crf", "sigma_weight": 0.25},
        {"refine": "none"},
        {"refine": "crf", "m_image": 1, "sigma_weight": 0.5},
        {"refine": "crf", "sigma_weight": 1.5, "candidates": 3},
        {"refine": "crf", "closing": 1},
        {"refine": "pamr", "m_text": 2, "top_k": 5},
    ]
    several = [segmentation_eval(**crf, **change) for change in changes[:count]]
    masks, responses = predict_all(golden_model, golden, class_embeddings, PHOTOS, several)
    for settings, mask, response in zip(several, masks, responses, strict=True):
        alone, expected = predict_all(golden_model, golden, class_embeddings, PHOTOS, [settings])
        np.testing.assert_array_equal(mask, alone[0])
        # Cosines near 0 are sums of products that cancel: rounding leaves 1e-7 there.
        assert response.maps is None
        for name in expected[0]._fields[:-1]:
            np.testing.assert_allclose(
                getattr(response, name),
                getattr(expected[0], name),
                rtol=1e-5,
                atol=1e-6,
                err_msg=name,
            )
    assert len({mask.tobytes() for mask in masks}) >= count - 2


def test_without_background_class_zero_is_not_scored(golden_model, golden, class_embeddings):
    architecture, _, params = golden_model
    images = np.stack([golden[f"seg/{photo}/input_uint8"] for photo in PHOTOS])
    protocol = PaperProtocol(model_of(architecture), [segmentation_eval(top_k=30)], False)
    _, (response,) = protocol.finish(
        protocol.start(params, {1: class_embeddings}, {"image": images})
    )
    assert not (response.classes == 0).any()
    scores = response.scores[:, 1:]
    expected = scores.mean(axis=1) + scores.std(axis=1, ddof=1)
    np.testing.assert_allclose(response.threshold, expected, rtol=1e-5)


def test_missing_pydensecrf_says_how_to_get_it(golden_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match="pydensecrf2"):
        PaperProtocol(model_of(golden_model[0]), [segmentation_eval(refine="pydensecrf")])
