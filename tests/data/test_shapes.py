import numpy as np
import pytest

from simseg_jax.data import shapes
from simseg_jax.data.pairs.opening import ShapesSource
from simseg_jax.data.shapes import CATEGORIES, OUTLINES, scene, vocabulary
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.zeroshot.prompts import TEMPLATES


def test_scenes_follow_from_their_index():
    first = scene(3, "train")
    scene.cache_clear()
    again = scene(3, "train")
    np.testing.assert_array_equal(first[0], again[0])
    assert first[2] == again[2]
    assert not np.array_equal(first[0], scene(4, "train")[0])
    assert not np.array_equal(first[0], scene(3, "val")[0])


def test_captions_name_exactly_the_objects_that_were_drawn():
    for index in range(50):
        image, mask, caption = scene(index, "val")
        assert image.shape == (shapes.SIZE, shapes.SIZE, 3)
        assert image.dtype == np.uint8
        visible = {CATEGORIES[label - 1] for label in np.unique(mask) if label}
        named = set(caption.split()) & set(CATEGORIES)
        # An object may be hidden behind another one, but nothing unnamed is ever visible.
        assert visible <= named
        assert 1 <= len(named) <= 3


def test_every_category_occurs_and_has_a_plausible_area():
    masks = np.stack([scene(i, "val")[1] for i in range(200)])
    for label, name in enumerate(CATEGORIES, 1):
        present = (masks == label).any(axis=(1, 2))
        assert present.sum() > 20, name
        area = (masks == label).sum(axis=(1, 2))[present].mean()
        assert 0.01 < area / shapes.SIZE**2 < 0.25, name


@pytest.mark.parametrize("name", CATEGORIES)
def test_outlines_lie_inside_the_unit_circle_roughly(name):
    axis = np.linspace(-1.6, 1.6, 161)
    u, v = np.meshgrid(axis, axis)
    distance, pattern = OUTLINES[name](u, v)
    assert np.isfinite(distance).all()
    assert np.isfinite(pattern).all()
    inside = distance < 0
    assert inside.any()
    assert np.hypot(u, v)[inside].max() < 1.45


def test_training_examples_carry_no_mask():
    source = ShapesSource(10, "train")
    assert len(source) == 10
    assert set(source[0]) == {"image", "captions", "name"}


def test_the_vocabulary_spells_every_caption_and_prompt():
    tokenizer = load_tokenizer("shapes")
    encoder = TextEncoder(tokenizer, max_length=32)
    texts = [scene(i, "train")[2] for i in range(100)]
    texts += [t.format(name) for t in TEMPLATES["shapes"] for name in ("background", *CATEGORIES)]
    ids, mask = encoder.batch(texts)
    unknown = tokenizer.unk_token_id
    assert not (ids == unknown).any()
    for text, row in zip(texts, mask, strict=True):
        assert row.sum() == len(text.split()) + 2
    # Other words fall back to letters rather than to [UNK].
    assert unknown not in encoder("zebra")[0]
    assert len(vocabulary()) == len(tokenizer)
