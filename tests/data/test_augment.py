import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from simseg_jax.data import augment
from simseg_jax.errors import UserError

REFERENCE = SHARED / "goldens" / "autoaugment.npz"


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"reference images are missing: {REFERENCE}")
def test_operations_equal_the_reference():
    reference = np.load(REFERENCE)
    image = Image.fromarray(reference["image"])
    compared = set()
    for key in reference:
        operation, *level = key.split("/")
        if operation in augment.OPERATIONS and level[-1] in ("+", "-"):
            sign = 1 if level[1] == "+" else -1
            result = augment.OPERATIONS[operation](image, int(level[0]), sign)
            np.testing.assert_array_equal(np.asarray(result), reference[key], err_msg=key)
            compared.add(operation)
    assert compared == set(augment.OPERATIONS)


def test_policy_uses_known_operations_and_all_of_them():
    assert len(augment.IMAGENET_POLICY) == 25
    used = {operation for policy in augment.IMAGENET_POLICY for _, operation, _ in policy}
    assert used == set(augment.OPERATIONS)


def test_autoaugment_follows_its_generator(photo):
    results = [
        np.asarray(augment.autoaugment(photo, np.random.default_rng(seed))) for seed in (1, 1, 7)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_crop_area_and_aspect_stay_in_range(photo, monkeypatch):
    sizes = []
    real = Image.Image.crop

    def crop(image, box):
        sizes.append((box[2] - box[0], box[3] - box[1]))
        assert 0 <= box[0] <= box[2] <= 160
        assert 0 <= box[1] <= box[3] <= 120
        return real(image, box)

    monkeypatch.setattr(Image.Image, "crop", crop)
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert augment.random_resized_crop(photo, 32, (0.6, 1.0), (3 / 4, 4 / 3), rng).size == (
            32,
            32,
        )
    width, height = np.array(sizes).T
    area, aspect = width * height / (160 * 120), width / height
    # Rounding to whole pixels moves area and aspect by about a percent.
    assert 0.59 < area.min() < 0.65
    assert 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.85
    assert 1.25 < aspect.max() < 1.36


def test_extreme_images_fall_back_to_a_central_crop():
    line = Image.new("RGB", (400, 4))
    rng = np.random.default_rng(0)
    assert augment.random_resized_crop(line, 16, (0.6, 1.0), (3 / 4, 4 / 3), rng).size == (16, 16)


def test_normalisation():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    expected = (images / 255 - np.array(augment.MEAN)) / np.array(augment.STD)
    normalised = jax.jit(augment.normalize)(images)
    assert normalised.dtype == jnp.float32
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (10, 20, 30)).convert(mode).save(
        file, "JPEG" if mode == "CMYK" else "PNG"
    )
    image = augment.decode_image(file.getvalue())
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_damaged_images_are_named(photo, keep):
    file = io.BytesIO()
    photo.save(file, "JPEG")
    with pytest.raises(UserError, match=r"Cannot decode dog\.jpg"):
        augment.decode_image(file.getvalue()[:keep], "dog.jpg")
