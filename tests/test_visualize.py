import numpy as np
from PIL import Image

from simseg_jax.reports.visualize import heat_map, index_png, legend, overlay, palette, stack


def test_palette_is_that_of_pascal_voc():
    colours = palette()
    assert colours.shape == (256, 3)
    assert [tuple(colours[i]) for i in (0, 1, 15, 20, 255)] == [
        (0, 0, 0),
        (128, 0, 0),
        (192, 128, 128),
        (0, 64, 128),
        (224, 224, 192),
    ]


def test_index_png_keeps_the_labels(tmp_path):
    mask = np.array([[0, 3], [255, 7]])
    index_png(mask).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), mask)


def test_overlay_leaves_unlabelled_pixels_alone():
    image = np.full((2, 2, 3), 100, np.uint8)
    mask = np.array([[0, 1], [0, 0]])
    result = overlay(image, mask, strength=1.0)
    np.testing.assert_array_equal(result[0, 1], palette()[1])
    np.testing.assert_array_equal(result[1], image[1])


def test_heat_maps_are_ordered_and_constant_maps_dark():
    lightness = heat_map(np.linspace(0, 5, 20).reshape(1, 20)).sum(axis=-1)[0]
    assert (np.diff(lightness.astype(int)) > 0).all()
    assert len(np.unique(heat_map(np.ones((3, 3))).reshape(-1, 3), axis=0)) == 1


def test_a_long_legend_wraps_within_its_width():
    labels = [(i, f"word number {i}") for i in range(1, 12)]
    strip = legend(labels, 200)
    assert strip.width == 200
    assert strip.height > legend(labels[:1], 200).height
    assert stack([strip, Image.new("RGB", (300, 10))]).size == (300, strip.height + 10)
