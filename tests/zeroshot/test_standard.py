"""The standard protocol against an independent reading that works pixel by pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import assert_close, model_of, segmentation_eval

from simseg_jax.masks.pamr import pamr
from simseg_jax.models.simseg import bind
from simseg_jax.runtime.settings import plain
from simseg_jax.zeroshot.standard import StandardProtocol, bilinear

PHOTOS = ("astronaut", "chelsea")
PATCH = 16
TIE = 1e-5
# Name -> (size of the image (width, height), size of the ground truth (height, width), settings).
LAYOUTS = {
    "1 window": ((90, 90), (90, 90), {}),
    "3 x 1 windows, smaller": ((128, 250), (47, 31), {}),
    "2 x 3 windows, larger": ((144, 96), (131, 150), {"resolution": 80}),
    "half a pixel is rounded up": ((201, 128), (64, 101), {}),
    "stride beyond the window": ((200, 64), (64, 200), {"stride": 500}),
    "whole, in patches": ((75, 121), (121, 75), {"window": 0}),
}
ENDINGS = (
    {"background_threshold": 0.2},
    {"background_threshold": 0.13, "softmax_scale": 100.0},
    {"background": "text"},
    {"background": "text", "m_text": 2},
)
PAMR = {"refine": "pamr", "pamr": {"iterations": 3, "dilations": (3,)}}


def settings_of(**settings):
    return segmentation_eval(
        **{"protocol": "standard", "refine": "none", "resolution": 64, "window": 64, "stride": 32}
        | settings
    )


@pytest.fixture(scope="module")
def photos(golden):
    return {name: Image.fromarray(golden[f"seg/{name}/input_uint8"]) for name in PHOTOS}


@pytest.fixture(scope="module")
def classes(golden):
    """Unit vectors [21, D]; one that wins somewhere stands for the background."""
    return np.roll(golden["seg_class_embedding"], -13, axis=0)


@pytest.fixture(scope="module")
def encode(golden_model):
    """uint8 [H, W, 3] -> projected tokens [1 + N, D]."""
    _, graphdef, params = golden_model
    model = bind(graphdef, params)
    tokens = jax.jit(lambda image: model.encode_image(model.normalize(image)[None])[1][0])
    return lambda image: np.asarray(tokens(image), np.float64)


def predict(golden_model, classes, images, shapes, several, background=True, devices=1):
    """Masks [V][B], cut to `shapes`, and scores [V] of images that share their windows' layout."""
    architecture, _, params = golden_model
    protocol = StandardProtocol(model_of(architecture, devices=devices), several, background)
    loaded = [protocol.load(image, shape) for image, shape in zip(images, shapes, strict=True)]
    batch = {name: np.stack([arrays[name] for arrays in loaded]) for name in loaded[0]}
    embeddings = {1: jnp.asarray(classes), 2: jnp.asarray(classes[::-1])}
    with jax.set_mesh(protocol.mesh):
        masks, scores = protocol.finish(protocol.start(params, embeddings, batch))
    assert masks.dtype == np.uint8
    cut = [[protocol.restore(m, s) for m, s in zip(v, shapes, strict=True)] for v in masks]
    return cut, [response.scores for response in scores]


def interpolate(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """[C, h, w] -> [C, height, width] as PyTorch's bilinear mode with align_corners=False."""

    def neighbours(index: int, old: int, new: int) -> tuple[int, int, float]:
        position = max((index + 0.5) * old / new - 0.5, 0)
        first = min(int(position), old - 1)
        return first, min(first + 1, old - 1), position - first if first < old - 1 else 0

    result = np.empty((len(values), height, width))
    columns = [neighbours(x, values.shape[2], width) for x in range(width)]
    for y in range(height):
        top, bottom, down = neighbours(y, values.shape[1], height)
        line = (1 - down) * values[:, top] + down * values[:, bottom]
        for x, (left, right, along) in enumerate(columns):
            result[:, y, x] = (1 - along) * line[:, left] + along * line[:, right]
    return result


def class_values(encode, classes, image, shape, settings) -> np.ndarray:
    """Float64 [C, *shape] as mmsegmentation's slide_inference and whole_inference work."""
    scale = settings.resolution / min(image.size)
    unit = 1 if settings.window else PATCH
    width, height = (int(side * scale / unit + 0.5) * unit for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    crop_h, crop_w = (settings.window, settings.window) if settings.window else (height, width)
    stride = min(settings.stride, crop_h, crop_w)
    canvas, count = np.zeros((len(classes), height, width)), np.zeros((height, width))
    for row in range(max(height - crop_h + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop_w + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop_h, height), min(column * stride + crop_w, width)
            top, left = max(bottom - crop_h, 0), max(right - crop_w, 0)
            window = pixels[top:bottom, left:right]
            patches = encode(window)[1:]
            patches /= np.linalg.norm(patches, axis=1, keepdims=True)
            cosines = (classes @ patches.T).reshape(-1, crop_h // PATCH, crop_w // PATCH)
            maps = interpolate(cosines, crop_h, crop_w)
            if settings.refine == "pamr":
                maps = np.asarray(pamr(window[None], maps[None], **plain(settings.pamr))[0])
            canvas[:, top:bottom, left:right] += maps
            count[top:bottom, left:right] += 1
    assert count.min() > 0
    return interpolate(canvas / count, *shape)


def decide(values, settings, background=True) -> tuple[np.ndarray, np.ndarray]:
    """Labels [H, W] and how much a value may change until they do."""
    if background and settings.background == "text":
        ranked = np.sort(values, axis=0)
        return values.argmax(axis=0), ranked[-1] - ranked[-2]
    values = values[1:]
    ranked = np.sort(values, axis=0)
    labels, margin = values.argmax(axis=0) + 1, ranked[-1] - ranked[-2]
    if background:
        best = values.max(axis=0)
        if settings.softmax_scale:
            best = 1 / np.exp(settings.softmax_scale * (values - best)).sum(axis=0)
        labels = np.where(best < settings.background_threshold, 0, labels)
        margin = np.minimum(margin, abs(best - settings.background_threshold))
    return labels, margin


def assert_equal_but_for_ties(mask, values, settings, background=True):
    expected, margin = decide(values, settings, background)
    assert mask.shape == expected.shape
    assert (margin < TIE).mean() < 0.01
    assert len(np.unique(expected)) >= 4
    assert (expected == 0).any() == background
    np.testing.assert_array_equal(mask[margin >= TIE], expected[margin >= TIE])


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        (1, 3, [[1], [1], [1]]),
        (2, 4, [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
        (4, 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (3, 2, [[0.75, 0.25, 0], [0, 0.25, 0.75]]),
        (5, 1, [[0, 0, 1, 0, 0]]),
        (3, 3, np.eye(3)),
    ],
)
def test_bilinear_by_hand(size, target, expected):
    np.testing.assert_allclose(bilinear(size, target), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("size", "target"), [(1, 7), (4, 64), (28, 28), (64, 37), (37, 64), (3, 50), (100, 9)]
)
def test_bilinear_in_both_directions(size, target):
    values = np.random.default_rng(size).normal(size=(2, size, 5))
    expected = interpolate(values, target, 8)
    np.testing.assert_allclose(bilinear(size, target) @ values @ bilinear(5, 8).T, expected, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(golden_model, photos, classes, encode, layout):
    size, shape, changes = LAYOUTS[layout]
    settings = settings_of(**changes, **ENDINGS[0])
    image = photos["astronaut"].resize(size)
    ((mask,),), _ = predict(golden_model, classes, [image], [shape], [settings])
    values = class_values(encode, classes, image, shape, settings)
    assert_equal_but_for_ties(mask, values, settings)


def test_number_of_windows(golden_model):
    """64 x 101 pixels: columns begin at 0, 32 and 37; masks are padded to multiples of 64."""
    protocol = StandardProtocol(model_of(golden_model[0]), [settings_of()])
    arrays = protocol.load(Image.new("RGB", (201, 128)), (64, 101))
    assert arrays["windows"].shape == (3, 64, 64, 3)
    assert arrays["rows"].shape == (1, 64, 4)
    assert arrays["columns"].shape == (3, 128, 4)
    ramp = Image.fromarray(np.arange(101, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2))
    windows = protocol.load(ramp, (64, 101))["windows"]
    assert windows[:, 0, 0, 0].tolist() == [0, 32, 37]
    assert windows[:, 0, -1, 0].tolist() == [63, 95, 100]


@pytest.mark.parametrize("window", [64, 0])
def test_endings(golden_model, photos, classes, encode, window):
    """Several settings share a pass; the second time the test set has no class "background"."""
    several = [settings_of(window=window, **ending) for ending in ENDINGS]
    image, shape = photos["chelsea"].resize((120, 80)), (80, 120)
    values = class_values(encode, classes, image, shape, several[0])
    for background in (True, False):
        masks, _ = predict(golden_model, classes, [image], [shape], several, background)
        for (mask,), settings in zip(masks, several, strict=True):
            ordered = values if settings.m_text == 1 else values[::-1]
            assert_equal_but_for_ties(mask, ordered, settings, background)


def test_pamr_refines_every_window(golden_model, photos, classes, encode):
    image, shape = photos["astronaut"].resize((120, 80)), (80, 120)
    plain, refined = settings_of(**ENDINGS[0]), settings_of(**ENDINGS[0], **PAMR)
    ((mask,),), _ = predict(golden_model, classes, [image], [shape], [refined])
    values = class_values(encode, classes, image, shape, refined)
    assert_equal_but_for_ties(mask, values, refined)
    without, _ = decide(class_values(encode, classes, image, shape, plain), plain)
    assert 0.01 < (mask != without).mean() < 0.5


def test_scores_are_the_mean_over_the_windows(golden_model, photos, classes, encode):
    image, several = photos["astronaut"].resize((96, 64)), [settings_of(), settings_of(m_image=1)]
    _, scores = predict(golden_model, classes, [image], [(64, 96)], several)
    pixels = np.asarray(image)
    for settings, score in zip(several, scores, strict=True):
        each = []
        for window in (pixels[:, :64], pixels[:, 32:]):
            pooled = np.sort(encode(window)[1:], axis=0)[-settings.m_image :].mean(axis=0)
            each.append(classes @ pooled / np.linalg.norm(pooled))
        assert_close(score[0], np.mean(each, axis=0))


def test_result_depends_neither_on_the_batch_nor_on_the_devices(golden_model, photos, classes):
    """Ground truths of different sizes share a batch: all are padded to 64 x 128."""
    several = [settings_of(**PAMR, **ENDINGS[0])]
    pixels = [np.asarray(photos[name].resize((90, 60))) for name in PHOTOS]
    images = [Image.fromarray(np.roll(pixels[i % 2], 20 * i, axis=1)) for i in range(8)]
    shapes = [(60 - i, 90 + i) for i in range(8)]
    (together,), _ = predict(golden_model, classes, images, shapes, several, devices=8)
    (some,), _ = predict(golden_model, classes, images[3:6], shapes[3:6], several)
    for mask, other in zip(some, together[3:6], strict=True):
        np.testing.assert_array_equal(mask, other)
