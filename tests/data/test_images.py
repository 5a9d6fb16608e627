import io

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from simseg_jax.data import images
from simseg_jax.errors import UserError

AREA, ASPECT = (0.6, 1.0), (3 / 4, 4 / 3)
LARGEST = 10**7


def photo(width=160, height=120, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def fixed(box):
    return lambda _width, _height: box


def pil_crop(data, box, size):
    return images.crop_and_resize(images.decode_image(data), box, size)


@pytest.mark.parametrize("box", [(0, 0, 160, 120), (7, 3, 101, 90), (5, 6, 32, 32), (0, 0, 20, 50)])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 60}, {"subsampling": 0}])
def test_the_fast_path_equals_pil_to_one_level(box, options):
    data = encoded(photo(), **options)
    fast = images.read_crop(data, 32 if box[2] < 60 else 64, fixed(box), LARGEST)
    expected = pil_crop(data, box, fast.shape[0])
    # The filters round at different places.
    assert np.abs(fast.astype(int) - expected).max() <= 1


def test_without_the_simd_filter_the_fast_path_is_pils(monkeypatch):
    monkeypatch.setattr(images, "simd", None)
    data, box = encoded(photo()), (7, 3, 101, 90)
    fast = images.read_crop(data, 64, fixed(box), LARGEST)
    np.testing.assert_array_equal(fast, pil_crop(data, box, 64))


@pytest.mark.parametrize("scale", [2, 4.2, 9])
def test_reduced_decoding_stays_close(scale):
    width, height = round(400 * scale), round(300 * scale)
    data, box = encoded(photo(width, height)), (width // 9, height // 7, width // 2, height // 2)
    fast = images.read_crop(data, 64, fixed(box), LARGEST)
    expected = pil_crop(data, box, 64)
    # Averages over 8x8 blocks in place of the exact window: a shift of well under a pixel.
    assert np.abs(fast.astype(int) - expected).mean() < 1.5


def test_reduced_decoding_happens_only_when_the_crop_keeps_enough_pixels(monkeypatch):
    shapes = []
    real = images.simplejpeg.decode_jpeg

    def decode(*args, **options):
        shapes.append(real(*args, **options).shape)
        return real(*args, **options)

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", decode)
    data = encoded(photo(640, 480))
    for box in [(0, 0, 640, 480), (0, 0, 128, 128), (0, 0, 127, 300)]:
        images.read_crop(data, 64, fixed(box), LARGEST)
    assert shapes == [(120, 160, 3), (240, 320, 3), (480, 640, 3)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    flat = Image.new("RGB", (6, 6), (255, 255, 255))
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), 255 << 8, np.uint16))
    else:
        image = flat.convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert images.decode_image(data).mode == "RGB"
    assert images.decode_image(data).getpixel((0, 0)) == (255, 255, 255)
    np.testing.assert_array_equal(images.read_crop(data, 6, fixed((0, 0, 6, 6)), LARGEST), 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "BMP", "TIFF", "PNG"])
def test_other_formats(format):
    data = encoded(photo(), format)
    box = (3, 4, 100, 90)
    fast = images.read_crop(data, 32, fixed(box), LARGEST)
    np.testing.assert_array_equal(fast, pil_crop(data, box, 32))


@pytest.mark.parametrize("keep", [0, 1, 10, 400])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_damaged_images_give_a_reason(format, keep):
    data = encoded(photo(), format)[:keep]
    with pytest.raises(UserError, match=r"Cannot decode dog\.jpg"):
        images.decode_image(data, "dog.jpg")
    with pytest.raises(ValueError, match=r"\w"):
        images.read_crop(data, 32, fixed((0, 0, 160, 120)), LARGEST)


def test_bombs_are_refused_before_they_are_decoded():
    for format in ("JPEG", "PNG"):
        data = encoded(Image.new("RGB", (300, 200)), format)
        with pytest.raises(ValueError, match=r"300x200 are more than data.max_pixels=59999"):
            images.read_crop(data, 32, fixed((0, 0, 300, 200)), 59_999)
    # A header that promises a gigapixel, as an attacker writes it.
    data = bytearray(encoded(Image.new("RGB", (300, 200))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="decompression bomb"):
        images.read_crop(bytes(data), 32, fixed((0, 0, 300, 200)), LARGEST)


def test_crops_follow_their_definition():
    """Area uniform, aspect log-uniform, place uniform: 100,000 draws against each (chi-square)."""
    rng, side = np.random.default_rng(0), 2000
    # A square image and this area: nearly every first draw fits, so rejection changes nothing.
    boxes = np.array(
        [images.draw_crop(side, side, (0.2, 0.5), ASPECT, rng) for _ in range(100_000)]
    )
    left, top, width, height = boxes.T
    assert (boxes >= 0).all()
    assert (left + width <= side).all()
    assert (top + height <= side).all()

    def uniform(values, low, high):
        counts, _ = np.histogram(values, 20, (low, high))
        assert counts.sum() > 99_000  # Rounding to whole pixels loses a few at the ends.
        return stats.chisquare(counts).pvalue

    assert uniform(width * height / side**2, 0.2, 0.5) > 1e-4
    assert uniform(np.log(width / height), *np.log(ASPECT)) > 1e-4
    # Whole pixels are spread over [0, 1) by the middle of each.
    assert uniform((left + 0.5) / (side - width + 1), 0, 1) > 1e-4
    assert uniform((top + 0.5) / (side - height + 1), 0, 1) > 1e-4


def test_extreme_images_fall_back_to_a_central_crop():
    rng = np.random.default_rng(0)
    assert images.draw_crop(400, 4, AREA, ASPECT, rng) == (197, 0, 5, 4)
    assert images.draw_crop(4, 400, AREA, ASPECT, rng) == (0, 197, 4, 5)
    assert images.draw_crop(400, 4, (1.0, 1.0), ASPECT, rng) == (0, 0, 400, 4)
