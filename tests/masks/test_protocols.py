"""The whole paper protocol against the authors' code."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close

from simseg_jax.config import segmentation_eval
from simseg_jax.data.augment import denormalized_uint8
from simseg_jax.errors import UserError
from simseg_jax.masks import densecrf
from simseg_jax.masks.postprocess import min_max, resize_nearest, upsample
from simseg_jax.masks.protocols import paper_protocol
from simseg_jax.zeroshot.classifier import class_embedder

PHOTOS = ("astronaut", "chelsea")
needs_crf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason="pydensecrf is not installed (extra crf)",
)


@pytest.fixture(scope="module")
def class_embeddings(golden_model, golden):
    _, graphdef, params = golden_model
    embed = class_embedder(graphdef, m_text=1)
    return embed(params, golden["seg_class_ids"].astype(np.int32), golden["seg_class_mask"])


def predict(golden_model, golden, class_embeddings, photos, **settings):
    _, graphdef, params = golden_model
    images = np.stack([golden[f"seg/{photo}/input_uint8"] for photo in photos])
    protocol = paper_protocol(graphdef, segmentation_eval(**settings))
    return protocol(params, class_embeddings, images)


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


@needs_crf
@pytest.mark.parametrize("photo", PHOTOS)
def test_crf_masks_equal_the_reference(golden, photo):
    shape = golden[f"seg/{photo}/mask_shape"]
    bits = np.unpackbits(golden[f"seg/{photo}/crf_and_closed"])[: np.prod(shape)]
    expected = bits.reshape(shape)[:, 0].astype(bool)
    maps = jnp.asarray(golden[f"seg/{photo}/similarity_18x18"])
    probabilities = np.asarray(upsample(min_max(maps), 16))
    image = golden[f"seg/{photo}/denormalised_uint8"]
    np.testing.assert_array_equal(densecrf.pydensecrf_masks(image, probabilities), expected)


@needs_crf
def test_predictions_with_crf_equal_the_reference_at_every_pixel(
    golden_model, golden, class_embeddings
):
    masks, _ = predict(golden_model, golden, class_embeddings, PHOTOS, refine="pydensecrf")
    for mask, photo in zip(masks, PHOTOS, strict=True):
        expected = golden[f"seg/{photo}/prediction"]
        np.testing.assert_array_equal(resize_nearest(np.asarray(mask), *expected.shape), expected)


def test_missing_pydensecrf_says_how_to_get_it(golden_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match="pydensecrf2"):
        paper_protocol(golden_model[1], segmentation_eval(refine="pydensecrf"))
