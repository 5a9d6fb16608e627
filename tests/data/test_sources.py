import pytest
from conftest import SHARED
from PIL import Image
from support import tiny_config

from simseg_jax.data.augment import decode_image
from simseg_jax.data.sources import CaptionFolder, training_source
from simseg_jax.errors import UserError

FLICKR = SHARED / "data" / "flickr8k"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (20, 10)).save(tmp_path / "Images" / name)
    (tmp_path / "captions.csv").write_text(
        'image,caption\na.jpg,"A dog, running"\na.jpg,Two dogs\nb.jpg,A cat\nc.jpg, \n'
    )
    (tmp_path / "train.txt").write_text("b.jpg\na.jpg\n")
    return tmp_path


def caption_folder(folder, split="train.txt"):
    return CaptionFolder(str(folder), "Images", "captions.csv", split)


def test_images_come_with_all_their_captions(folder):
    source = caption_folder(folder)
    assert len(source) == 2
    assert source[1]["captions"] == ("A dog, running", "Two dogs")
    assert decode_image(source[0]["image"]).size == (20, 10)
    # Without a list: every image that has a caption.
    assert [name for name, _ in caption_folder(folder, "").examples] == ["a.jpg", "b.jpg"]


def test_problems_of_a_folder_are_named(folder):
    with pytest.raises(UserError, match=r"caption table is missing.*nowhere"):
        caption_folder(folder / "nowhere")
    (folder / "train.txt").write_text("b.jpg\nc.jpg\n")
    with pytest.raises(UserError, match=r"1 images without a caption.*'c.jpg'"):
        caption_folder(folder)
    (folder / "captions.csv").write_text("file;text\n")
    with pytest.raises(UserError, match="header line `image,caption`"):
        caption_folder(folder)
    (folder / "captions.csv").write_text("image,caption\nzzz.jpg,Nothing\n")
    with pytest.raises(UserError, match=r"first training image is missing.*zzz"):
        caption_folder(folder, "")
    (folder / "captions.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="no captions"):
        caption_folder(folder, "")


def test_generated_pairs():
    assert len(training_source(tiny_config().data)) == 64


@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"Flickr8k is missing: {FLICKR}")
def test_real_flickr8k():
    source = CaptionFolder(str(FLICKR), "Images", "captions.csv", "train.txt")
    assert len(source) == 6000
    assert {len(captions) for _, captions in source.examples} == {5}
    assert decode_image(source[5999]["image"]).size == (224, 224)
