import jax
import numpy as np
import pytest

from simseg_jax.evaluators import ranking
from simseg_jax.evaluators.metrics import recall_at
from simseg_jax.evaluators.ranking import nearest
from simseg_jax.runtime.sharding import make_mesh


def reference(images, texts, k):
    """Full matrix, full stable sort."""
    similarity = images @ texts.T
    return (
        np.argsort(-similarity, axis=1, kind="stable")[:, :k],
        np.argsort(-similarity.T, axis=1, kind="stable")[:, :k],
    )


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(("count", "others"), [(50, 130), (8, 16), (3, 1)])
def test_chunks_and_devices_do_not_matter(monkeypatch, devices, count, others):
    monkeypatch.setattr(ranking, "IMAGE_CHUNK", 8)
    monkeypatch.setattr(ranking, "TEXT_CHUNK", 16)
    rng = np.random.default_rng(0)
    # Small whole numbers: exact sums, and many equal similarities.
    images, texts = (rng.integers(-2, 3, (n, 6)).astype(np.float32) for n in (count, others))
    found = nearest(images, texts, 10, jax.devices()[:devices])
    for result, expected in zip(found, reference(images, texts, 10), strict=True):
        width = expected.shape[1]
        np.testing.assert_array_equal(result[:, :width], expected)
        assert (result[:, width:] == -1).all()


def test_a_mesh_of_other_devices_in_the_context_is_left_alone():
    x = np.eye(4, dtype=np.float32)
    with jax.set_mesh(make_mesh()):
        found = nearest(x, x, 1, jax.devices()[:2])
    np.testing.assert_array_equal(found[0][:, 0], np.arange(4))


def test_recall_equals_the_reference(golden):
    pairs = nearest(golden["retr/image"], golden["retr/text"], 10)
    owners = golden["retr/text_image_id"]
    for k in (1, 5, 10):
        image_to_text, text_to_image = recall_at(pairs, owners, k)
        # The reference divides in float32.
        assert image_to_text == pytest.approx(golden[f"retr/image2text_R@{k}"], abs=1e-7)
        assert text_to_image == pytest.approx(golden[f"retr/text2image_R@{k}"], abs=1e-7)


def test_recall_by_hand():
    owners = np.array([0, 0, 1, 2])
    of_images = np.array([[2, 1, 0, 3], [2, 0, 1, 3], [0, 1, 2, -1]])
    of_texts = np.array([[1, 0, 2], [0, 1, 2], [1, 0, 2], [0, 1, 2]])
    pairs = of_images, of_texts
    # Image 0 finds its text second, image 1 first, image 2 not among three; texts 1 and 2 at once.
    assert recall_at(pairs, owners, 1) == (1 / 3, 2 / 4)
    assert recall_at(pairs, owners, 2) == (2 / 3, 3 / 4)
    assert recall_at(pairs, owners, 3) == (2 / 3, 1.0)
    # -1 stands for nothing, not for the last text.
    assert recall_at(pairs, owners, 4) == (2 / 3, 1.0)
