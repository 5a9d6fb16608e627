import contextlib
import io

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, features
from scipy import stats

from simseg_jax.data import crops, images
from simseg_jax.runtime.errors import UserError

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
    fast = crops.read_crop(data, 32 if box[2] < 60 else 64, fixed(box), LARGEST)
    expected = pil_crop(data, box, fast.shape[0])
    # The filters round at different places.
    assert np.abs(fast.astype(int) - expected).max() <= 1


def test_without_the_simd_filter_the_fast_path_is_pils(monkeypatch):
    monkeypatch.setattr(crops, "simd", None)
    data, box = encoded(photo()), (7, 3, 101, 90)
    fast = crops.read_crop(data, 64, fixed(box), LARGEST)
    np.testing.assert_array_equal(fast, pil_crop(data, box, 64))


@pytest.mark.parametrize("scale", [2, 4.2, 9])
def test_reduced_decoding_stays_close(scale):
    width, height = round(400 * scale), round(300 * scale)
    data, box = encoded(photo(width, height)), (width // 9, height // 7, width // 2, height // 2)
    fast = crops.read_crop(data, 64, fixed(box), LARGEST)
    expected = pil_crop(data, box, 64)
    # Averages over 8x8 blocks in place of the exact window: a shift of well under a pixel.
    assert np.abs(fast.astype(int) - expected).mean() < 1.5


def test_reduced_decoding_happens_only_when_the_crop_keeps_enough_pixels(monkeypatch):
    shapes = []
    real = crops.simplejpeg.decode_jpeg

    def decode(*args, **options):
        shapes.append(real(*args, **options).shape)
        return real(*args, **options)

    monkeypatch.setattr(crops.simplejpeg, "decode_jpeg", decode)
    data = encoded(photo(640, 480))
    for box in [(0, 0, 640, 480), (0, 0, 128, 128), (0, 0, 127, 300)]:
        crops.read_crop(data, 64, fixed(box), LARGEST)
    assert shapes == [(120, 160, 3), (240, 320, 3), (480, 640, 3)]


GREY = np.asarray(photo(48, 36).convert("L"))


def levels(image):
    return np.asarray(images.to_rgb(image)).astype(int)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = photo(48, 36) if mode not in "IF" else Image.fromarray(GREY)
    expected = image if mode not in ("1", "L", "P") else image.convert(mode)
    difference = levels(image.convert(mode)) - np.asarray(expected.convert("RGB"))
    assert np.abs(difference).max() <= (6 if mode in ("YCbCr", "HSV") else 0)


DEEP = {
    "16 bits": GREY.astype(np.uint16) * 257,
    "8 bits in the high byte": GREY.astype(np.uint16) * 256,
    "16 bits in 32": GREY.astype(np.int32) * 257,
    "8 bits in 32": GREY.astype(np.int32),
    "31 bits": (GREY.astype(np.int32) << 23) // GREY.max() * 255,
    "floats to 1": GREY / np.float32(255),
    "floats to 255": GREY.astype(np.float32),
    "floats to 65535": GREY.astype(np.float32) * 257,
    "larger floats": GREY.astype(np.float32) * 1e6 / GREY.max() * 255,
}


# Modes that Pillow writes in each container; None: not encoded.
WRITTEN = {"PNG": ("I;16",), "JPEG2000": ("I;16",), "PPM": ("I;16", "F")}
WRITTEN |= dict.fromkeys((None, "TIFF"), ("I;16", "I", "F"))


@pytest.mark.parametrize(
    ("container", "depth"),
    [
        (c, d)
        for c, modes in WRITTEN.items()
        for d in DEEP
        if Image.fromarray(DEEP[d]).mode in modes
    ],
)
def test_deep_grey_is_scaled_and_not_clipped(container, depth, monkeypatch):
    monkeypatch.setattr(images, "STRIP", 48 * 5)  # Several strips, the last one smaller.
    image = Image.fromarray(DEEP[depth])
    if container:
        options = {"irreversible": False} if container == "JPEG2000" else {}
        image = images.open_image(encoded(image, container, **options))
    stretched = depth in ("31 bits", "larger floats")
    expected = np.round(GREY * (255 / GREY.max())) if stretched else GREY
    assert np.abs(levels(image)[:, :, 1] - expected).max() <= (1 if stretched else 0)


@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_grey_without_a_meaning_is_refused(value):
    data = encoded(Image.fromarray(np.where(GREY > 99, np.float32(value), GREY)), "TIFF")
    with pytest.raises(UserError, match=r"x\.tif: grey values below 0, infinite or NaN"):
        images.decode_image(data, "x.tif")
    with pytest.raises(ValueError, match="no defined brightness"):
        crops.read_crop(data, 6, fixed((0, 0, 6, 6)), LARGEST)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_is_laid_on_white(mode):
    image = photo(48, 36).convert("L" if mode in ("LA", "La") else "RGB")
    expected = np.array(image.convert("RGB")).astype(int)
    if mode == "PA":
        image = image.convert("P")
        expected = np.array(image.convert("RGB")).astype(int)
        image = image.convert("PA")
    alpha = np.full((36, 48), 255, np.uint8)
    alpha[10:20], alpha[20:] = 128, 0
    image.putalpha(Image.fromarray(alpha))
    image = image.convert(mode)
    expected[10:20] = (expected[10:20] * 128 + 255 * 127) / 255
    expected[20:] = 255
    assert np.abs(levels(image) - expected).max() <= 2  # Premultiplying rounds.


@pytest.mark.parametrize(
    ("mode", "format"), [*((mode, "PNG") for mode in ("1", "L", "RGB", "P", "I;16")), ("P", "GIF")]
)
def test_a_transparent_value_is_laid_on_white(mode, format):
    grey = np.array([[0, 255], [0, 255]], np.uint8)
    image = Image.fromarray(grey * np.uint16(257) if mode == "I;16" else grey).convert(mode)
    key = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))
    data = encoded(image, format, transparency=key)
    np.testing.assert_array_equal(np.asarray(images.decode_image(data)), 255)


@pytest.mark.parametrize("stored", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_upright_once(format, stored):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("This Pillow has no AVIF.")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = stored
    lossless = {"lossless": True} if format == "WEBP" else {"quality": 95}
    data = encoded(photo(161, 121), format, exif=exif, **lossless)
    upright = images.decode_image(data)
    expected = photo(161, 121)
    expected = expected.transpose(images.TURNS[stored]) if stored > 1 else expected
    assert upright.size == expected.size
    tolerance = 0 if format in ("PNG", "TIFF", "WEBP") else 20
    assert np.abs(np.asarray(upright).astype(int) - expected).max() <= tolerance
    assert images.decode_image(upright) is upright
    for box, size, mean in (((11, 7, 100, 90), 50, 1), ((3, 5, 110, 112), 25, 2.5)):
        fast = crops.read_crop(data, size, fixed(box), LARGEST)
        difference = np.abs(fast.astype(int) - pil_crop(data, box, size))
        assert difference.mean() <= mean
        assert mean > 1 or difference.max() <= 1
    shapes = []
    crops.read_crop(data, 8, lambda *shape: shapes.append(shape) or (0, 0, 8, 8), LARGEST)
    assert shapes == [upright.size]
    width, height, found = images.read_header(data)
    if format != "TIFF":  # Pillow turns it by itself.
        assert (width, height, found) == (161, 121, stored)


def test_an_orientation_in_xmp_counts_too():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for format in ("JPEG", "WEBP"):
        data = encoded(photo(), format, xmp=xmp)
        assert images.decode_image(data).size == (120, 160)
        assert images.read_header(data) == (160, 120, 6)


def test_damaged_exif_never_costs_an_image():
    exif = Image.Exif()
    exif.update({ExifTags.Base.Orientation: 6, ExifTags.Base.XResolution: 72.0, 306: "2020"})
    whole = exif.tobytes()
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP"):
        for _ in range(40):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(6, len(whole), 3)] = rng.integers(0, 256, 3)
            data = encoded(photo(40, 30), format, exif=damaged.tobytes())
            upright = images.decode_image(data)
            assert upright.size in ((40, 30), (30, 40))
            box = (0, 0, *upright.size)
            fast = crops.read_crop(data, 20, fixed(box), LARGEST)
            assert np.abs(fast.astype(int) - pil_crop(data, box, 20)).max() <= 1


def test_no_file_starts_a_program(monkeypatch, tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho started >> {trace}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(eps)
    for image in (eps, tmp_path / "x.png"):
        with pytest.raises(UserError, match="no image in a known format"):
            images.decode_image(image)
    with pytest.raises(ValueError, match="no image in a known format"):
        crops.read_crop(eps, 8, fixed((0, 0, 8, 8)), LARGEST)
    with pytest.raises(ValueError, match="no image in a known format"):
        images.read_header(eps)
    assert not trace.exists()
    with contextlib.suppress(OSError, ValueError), Image.open(io.BytesIO(eps)) as opened:
        opened.load()
    assert trace.exists()  # Pillow on its own would have.


def test_animations_show_their_first_frame():
    for format in ("GIF", "PNG", "WEBP"):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert levels(images.decode_image(data))[0, 0, 0] > 200


def test_paths_are_read_as_their_content(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(photo(), "PNG"))
    np.testing.assert_array_equal(images.decode_image(tmp_path / "x.jpg"), photo())
    with pytest.raises(UserError, match=r"y\.jpg: no file is there"):
        images.decode_image(tmp_path / "y.jpg", "y.jpg")
    with pytest.raises(UserError, match="160x120 are more than"):
        images.decode_image(tmp_path / "x.jpg", max_pixels=100)
    with pytest.raises(UserError, match="0x5 has no pixels"):
        images.decode_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "BMP", "TIFF", "PNG"])
def test_other_formats(format):
    data = encoded(photo(), format)
    box = (3, 4, 100, 90)
    fast = crops.read_crop(data, 32, fixed(box), LARGEST)
    np.testing.assert_array_equal(fast, pil_crop(data, box, 32))


@pytest.mark.parametrize("keep", [0, 1, 10, 400])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_damaged_images_give_a_reason(format, keep):
    data = encoded(photo(), format)[:keep]
    with pytest.raises(UserError, match=r"Cannot decode dog\.jpg"):
        images.decode_image(data, "dog.jpg")
    with pytest.raises(ValueError, match=r"\w"):
        crops.read_crop(data, 32, fixed((0, 0, 160, 120)), LARGEST)


def test_bombs_are_refused_before_they_are_decoded():
    for format in ("JPEG", "PNG"):
        data = encoded(Image.new("RGB", (300, 200)), format)
        with pytest.raises(ValueError, match=r"300x200 are more than max_pixels=59999"):
            crops.read_crop(data, 32, fixed((0, 0, 300, 200)), 59_999)
    # A header that promises a gigapixel, as an attacker writes it.
    data = bytearray(encoded(Image.new("RGB", (300, 200))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="decompression bomb"):
        crops.read_crop(bytes(data), 32, fixed((0, 0, 300, 200)), LARGEST)


def test_crops_follow_their_definition():
    """Area uniform, aspect log-uniform, place uniform: 100,000 draws against each (chi-square)."""
    rng, side = np.random.default_rng(0), 2000
    # A square image and this area: nearly every first draw fits, so rejection changes nothing.
    boxes = np.array([crops.draw_crop(side, side, (0.2, 0.5), ASPECT, rng) for _ in range(100_000)])
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
    assert crops.draw_crop(400, 4, AREA, ASPECT, rng) == (197, 0, 5, 4)
    assert crops.draw_crop(4, 400, AREA, ASPECT, rng) == (0, 197, 4, 5)
    assert crops.draw_crop(400, 4, (1.0, 1.0), ASPECT, rng) == (0, 0, 400, 4)
