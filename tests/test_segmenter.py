"""The Python interface: words that change, similarity maps, embeddings, what a result can do."""

import json
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import simseg_jax
from simseg_jax import Segmenter
from simseg_jax.data.shapes import CATEGORIES, scene
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError

SCENES = [Image.fromarray(scene(i, "val")[0]) for i in range(3)]
STANDARD = {"protocol": "standard", "resolution": 32, "window": 32, "stride": 16, "refine": "none"}


@pytest.fixture(scope="module")
def segmenter(trained):
    return Segmenter.from_pretrained(trained, sigma_weight=-1, refine="none")


def test_importing_the_package_imports_no_jax():
    code = "import sys, simseg_jax; print([m for m in ('jax', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(simseg_jax.__all__) == {"Segmentation", "Segmenter", "__version__"}
    assert all(getattr(simseg_jax, name) for name in simseg_jax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Segmentor'"):
        _ = simseg_jax.Segmentor  # pyright: ignore


def test_one_image_gives_one_result_and_several_a_list(segmenter):
    one = segmenter(SCENES[0], "star")
    assert one.labels == ("background", "star")
    several = segmenter([np.asarray(image) for image in SCENES], ["star"])
    assert len(several) == 3
    np.testing.assert_array_equal(several[0].mask, one.mask)
    assert segmenter(np.stack([np.asarray(image) for image in SCENES[:2]]), "star")[1].mask.shape


@pytest.mark.parametrize("options", [{"sigma_weight": 0.5}, STANDARD], ids=["paper", "standard"])
def test_padding_of_classes_changes_nothing(trained, monkeypatch, options):
    """31 or fewer words share a program; the same words without padding give the same."""
    segmenter = Segmenter.from_pretrained(trained, background_threshold=-1, **options)
    padded = segmenter(SCENES, CATEGORIES[:4], CATEGORIES[4:7])
    monkeypatch.setattr("simseg_jax.segmenter.ROOM", 1)
    monkeypatch.setattr("simseg_jax.segmenter.Segmenter._embed", shortened(segmenter._embed))
    exact = segmenter(SCENES, CATEGORIES[:4], CATEGORIES[4:7])
    for one, other in zip(padded, exact, strict=True):
        np.testing.assert_array_equal(one.mask, other.mask)
        assert one.drawn == other.drawn
        assert list(one.scores) == list(CATEGORIES[:7])
        # Another shape of the products may sum in another order.
        np.testing.assert_allclose(list(one.scores.values()), list(other.scores.values()), 1e-5)
        if one.threshold is not None:
            np.testing.assert_allclose(one.threshold, other.threshold, rtol=1e-5)
        for word, map_ in one.similarity.items():
            np.testing.assert_allclose(map_, other.similarity[word], rtol=1e-4, atol=1e-6)
    assert len({answer.mask.tobytes() for answer in padded}) > 1


def shortened(embed):
    """`_embed` for eight classes with room for exactly eight."""

    def eight(_segmenter, names):
        assert len(names) == 8
        return embed(names)

    return eight


def test_ten_sets_of_words_compile_once(segmenter, caplog):
    segmenter(SCENES[0], ["star"], [])
    with jax.log_compiles():
        for count in range(1, 11):
            answer = segmenter(SCENES[0], CATEGORIES[:count], CATEGORIES[count:][:1])
            assert answer.labels == ("background", *CATEGORIES[:count])
        assert "XLA compilation" not in caplog.text
        segmenter(SCENES[0], [f"{a} {b}" for a in CATEGORIES for b in CATEGORIES[:4]], [])
    assert caplog.text.count("Finished XLA compilation of jit(_respond)") == 1


def test_another_threshold_compiles_nothing(segmenter, caplog):
    one = segmenter(SCENES[0], CATEGORIES, [])
    with jax.log_compiles():
        higher = segmenter.with_sigma_weight(0.75)
        other = higher(SCENES[0], CATEGORIES, [])
        assert "XLA compilation" not in caplog.text
    own = Segmenter(segmenter.model, sigma_weight=0.75, refine="none")
    expected = own(SCENES[0], CATEGORIES, [])
    assert other.record() == expected.record()
    np.testing.assert_array_equal(other.mask, expected.mask)
    assert set(other.drawn) < set(one.drawn)
    assert (higher.settings.sigma_weight, segmenter.settings.sigma_weight) == (0.75, -1)
    assert segmenter(SCENES[0], CATEGORIES, []).record() == one.record()


def test_threads_share_a_segmenter(segmenter):
    expected = {word: segmenter(SCENES[0], word, []) for word in CATEGORIES}
    segmenter._embeddings.clear()
    answers = {}

    def ask(word):
        answers[word] = segmenter(SCENES[0], word, [])

    threads = [threading.Thread(target=ask, args=[word]) for word in CATEGORIES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for word, answer in answers.items():
        assert answer.scores == expected[word].scores
        np.testing.assert_array_equal(answer.mask, expected[word].mask)
    assert len(answers) == len(CATEGORIES)


def test_similarity_maps(segmenter, trained):
    answer = segmenter(SCENES[0], ["star", "moon"], ["apple"])
    assert list(answer.similarity) == ["star", "moon", "apple"]
    grid = segmenter.settings.resolution // segmenter.model.patch_size
    assert {m.shape for m in answer.similarity.values()} == {(grid, grid)}
    # Without refinement, a drawn word claims the patches above the middle of its map's range.
    for word in answer.drawn:
        map_ = answer.similarity[word]
        middle = (map_.max() + map_.min()) / 2
        label = answer.labels.index(word)
        assert (map_ > middle).any()
        claimed = np.asarray(Image.fromarray(answer.mask).resize((grid, grid), 0)) == label
        assert not (claimed & (map_ < middle - 1e-5)).all()
    without = Segmenter(segmenter.model, maps=False, refine="none")
    assert without(SCENES[0], "star").similarity == {}
    standard = Segmenter(segmenter.model, **STANDARD)
    image = SCENES[0].resize((100, 70))
    maps = standard(image, ["star"], ["moon"]).similarity
    assert {m.shape for m in maps.values()} == {(5, 7)}


def test_embeddings_find_each_other(segmenter):
    images = segmenter.embed_images(SCENES)
    texts = segmenter.embed_texts(["a star", "a moon"])
    assert images.shape == (3, texts.shape[1])
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(segmenter.embed_images(SCENES[1]), images[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(segmenter.embed_texts("a moon"), texts[1], rtol=1e-5, atol=1e-6)
    for call in (lambda: segmenter.embed_texts([]), lambda: segmenter.embed_images([])):
        with pytest.raises(UserError, match="Give embed_"):
            call()


# pycocotools decodes with NumPy's old protocol.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_a_result_can_do(segmenter, tmp_path):
    SCENES[0].save(tmp_path / "x.png")
    answer = segmenter(tmp_path / "x.png", CATEGORIES, [])
    assert answer.image.size == SCENES[0].size
    mask, overlay = answer.save(tmp_path / "out" / "x")
    with Image.open(mask) as image:
        np.testing.assert_array_equal(np.asarray(image), answer.mask)
    assert mask.read_bytes() == answer.mask_png()
    with Image.open(overlay) as image:
        assert image.tobytes() == answer.overlay().tobytes()
    annotations = json.loads(json.dumps(answer.to_coco("x.png")))
    found = set(np.unique(answer.mask)) - {0}
    assert {a["category_id"] for a in annotations} == found
    assert found
    for entry in annotations:
        expected = answer.mask == entry["category_id"]
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]), expected)
        assert entry["area"] == expected.sum()
        rows, columns = np.nonzero(expected)
        left, top, width, height = entry["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert entry["score"] == answer.scores[entry["category"]]
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png was changed after it was segmented"):
        answer.overlay()


def test_addresses_are_read(segmenter, monkeypatch):
    content = []
    monkeypatch.setattr(remote, "read", lambda path: content.append(path) or b"text")
    with pytest.raises(UserError, match=r"Cannot decode https://host/x\.png: no image"):
        segmenter("https://host/x.png", "star")
    assert content == ["https://host/x.png"]

    def fails(_path):
        raise OSError("no route")

    monkeypatch.setattr(remote, "read", fails)
    with pytest.raises(UserError, match=r"Cannot read https://host/x\.png: no route"):
        segmenter("https://host/x.png", "star")
