import json

import numpy as np
import pytest
import scipy.io
from conftest import SHARED
from PIL import ExifTags, Image
from support import tiny_eval

from simseg_jax.data.images import decode_image
from simseg_jax.data.testsets.classes import TEST_SETS, class_names, label_set, prompt_names
from simseg_jax.data.testsets.pascal_context import CATEGORY_IDS, decode_rle
from simseg_jax.data.testsets.segmentation import LAYOUTS, segmentation_source
from simseg_jax.runtime.errors import UserError

VOC = SHARED / "data" / "VOCdevkit" / "VOC2012"
COCO = SHARED / "data" / "coco_stuff164k"
SIZES = {"voc": 20, "context": 59, "coco": 80, "coco_stuff": 171, "ade20k": 150, "cityscapes": 19}


def open_source(root, data, **settings):
    return segmentation_source(tiny_eval(data=data, root=str(root), **settings))


def names_of(data, names="original"):
    return prompt_names(tiny_eval(data=data, names=names))


def write_image(path, width=3, height=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def write_mask(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(labels, np.uint8)).save(path)


def write_list(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def assert_mask(source, index, expected):
    example = source[index]
    assert example["mask"].dtype == np.uint8
    np.testing.assert_array_equal(example["mask"], expected)
    image = decode_image(example["image"])
    assert (image.height, image.width) == example["mask"].shape


# Label sets


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_label_sets_are_complete(name, count):
    names = label_set(name)
    assert len(names) == len(set(names)) == count
    assert all(text == text.strip() and text for text in names)


@pytest.mark.parametrize("data", TEST_SETS)
def test_every_benchmark_has_names_for_prompts(data):
    classes = class_names(tiny_eval(data=data))
    original, synonyms = names_of(data), names_of(data, "synonyms")
    assert original == tuple((name,) for name in classes)
    assert len(synonyms) == len(classes)
    assert all(names and all(name.strip() for name in names) for names in synonyms)
    # Without a name twice, which would count twice in the mean.
    assert all(len(set(names)) == len(names) for names in synonyms)
    assert (classes[0] == "background") == TEST_SETS[data][1]


def test_label_order():
    voc, context, coco = label_set("voc"), label_set("context"), label_set("coco")
    assert (voc[10], voc[15], voc[19]) == ("table", "plant", "monitor")
    # The original's spelling; alphabetical, as are the ids of the 459 annotated categories.
    assert {"pottedplant", "tvmonitor", "bedclothes"} <= set(context)
    assert list(context) == sorted(context)
    assert len(CATEGORY_IDS) == 59
    assert list(CATEGORY_IDS) == sorted(CATEGORY_IDS)
    assert (coco[0], coco[62], coco[79]) == ("person", "tv", "toothbrush")
    assert label_set("coco_stuff")[:80] == coco
    assert label_set("coco_stuff")[80:82] == ("banner", "blanket")
    assert (label_set("coco_stuff")[153], label_set("coco_stuff")[170]) == ("table", "wood")
    assert (label_set("ade20k")[0], label_set("ade20k")[149]) == ("wall", "flag")
    assert (label_set("cityscapes")[0], label_set("cityscapes")[18]) == ("road", "bicycle")


def test_synonyms_replace_names():
    assert names_of("voc20", "synonyms")[16] == ("sheep",)
    assert names_of("voc", "synonyms")[16] == ("potted plant", "plant in a pot")
    assert names_of("coco_stuff", "synonyms")[label_set("coco_stuff").index("wall-other")] == (
        "wall",
    )


def test_own_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("".join(f"class {i}\n" for i in range(18)) + "sea: sea , ocean\n\n")
    names = names_of("cityscapes", str(path))
    assert names[0] == ("class 0",)
    assert names[18] == ("sea", "ocean")
    path.write_text("sofa, couch\n" * 20)
    with pytest.raises(UserError, match=r"a comma but no colon: write 'sofa: sofa, couch'"):
        names_of("voc20", str(path))
    path.write_text("".join(f"class {i}\n" for i in range(19)))
    with pytest.raises(UserError, match=r"names\.txt names 19 classes, but voc20 has 20"):
        names_of("voc20", str(path))
    with pytest.raises(UserError, match="original, synonyms or a text file, but synonym is no"):
        names_of("voc", "synonym")


# Generated scenes and VOC


def test_generated_scenes():
    source = segmentation_source(tiny_eval(split="val"))
    example = source[0]
    assert example["image"].shape[:2] == example["mask"].shape
    assert len(source.class_names) == 11
    assert source.background
    assert example["mask"].max() < 11
    with pytest.raises(UserError, match="splits train, val, test, not 'trian'"):
        segmentation_source(tiny_eval(split="trian"))


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_image(root / "JPEGImages" / "one.jpg")
    mask = Image.fromarray(np.array([[0, 15, 255], [7, 20, 0]], np.uint8))
    mask.putpalette([value for index in range(256) for value in (index, 0, 0)])
    (root / "SegmentationClass").mkdir()
    mask.save(root / "SegmentationClass" / "one.png")
    write_list(root / "ImageSets" / "Segmentation" / "val.txt", "one", "lost")
    return root


def test_voc(voc):
    source = open_source(voc, "voc")
    assert len(source) == 2
    assert source[0]["name"] == "one"
    assert_mask(source, 0, [[0, 15, 255], [7, 20, 0]])
    # The folder above, as the archive unpacks it, serves as well.
    assert_mask(open_source(voc.parents[1], "voc"), 0, [[0, 15, 255], [7, 20, 0]])


def test_voc_without_background(voc):
    source = open_source(voc, "voc20")
    assert (len(source.class_names), source.background) == (20, False)
    assert_mask(source, 0, [[255, 14, 255], [6, 19, 255]])


def test_missing_files_are_named(voc):
    archive = r"VOCtrainval_11-May-2012\.tar from host\.robots"
    with pytest.raises(UserError, match=rf"image is missing.*lost\.jpg; unpack {archive}"):
        open_source(voc, "voc")[1]
    with pytest.raises(UserError, match=rf"list of images is missing.*other\.txt; .*{archive}"):
        open_source(voc, "voc", split="other")
    with pytest.raises(UserError, match=rf"No VOC folder at .*nowhere: looked.*{archive}"):
        open_source(voc / "nowhere", "voc")
    (voc / "SegmentationClass" / "one.png").unlink()
    with pytest.raises(UserError, match=rf"mask is missing.*one\.png; .*{archive}"):
        open_source(voc, "voc")[0]


def test_masks_that_do_not_fit_are_named(voc):
    source, path = open_source(voc, "voc"), voc / "SegmentationClass" / "one.png"
    Image.new("RGB", (3, 2)).save(path)
    with pytest.raises(UserError, match=r"one\.png is not a palette or grey mask"):
        source[0]
    write_mask(path, [[0, 21, 0], [0, 0, 0]])
    with pytest.raises(UserError, match=r"one\.png has the value 21, which does not belong"):
        source[0]
    # 256 + 1 is not 1.
    Image.fromarray(np.full((2, 3), 257, np.uint16)).save(path)
    with pytest.raises(UserError, match="has the value 257"):
        source[0]
    write_mask(path, [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(UserError, match=r"mask of .*one\.jpg has 2 x 3 pixels.*has 3 x 2"):
        source[0]
    write_mask(path, [[0, 21, 34], [0, 21, 0]])
    with pytest.raises(UserError, match=r"values 21, 34, which do not belong .* at 3 pixels"):
        source[0]
    Image.fromarray(np.array([[0, 1, 2], [0, 0, 0]], np.uint8)).save(path, "JPEG")
    with pytest.raises(UserError, match=r"one\.png is a JPEG file, which does not keep labels"):
        source[0]
    # One bit per pixel is enough for the labels 0 and 1.
    Image.fromarray(np.array([[True, False, True], [False] * 3])).save(path)
    assert_mask(source, 0, [[1, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize("stored", range(1, 9))
def test_a_mask_follows_its_image(voc, stored):
    photo, path = voc / "JPEGImages" / "one.jpg", voc / "SegmentationClass" / "one.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = stored
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(grey * 10).save(photo, exif=exif, quality=100)
    # As the pixels of the file are stored: turned along.
    mask = np.where(grey > 20, 255, grey)
    write_mask(path, mask)
    source = open_source(voc, "voc")
    example = source[0]
    assert source.turned == ({"one.jpg"} if 1 < stored < 5 else set())
    image = np.asarray(decode_image(example["image"]).convert("L"))
    assert example["mask"].shape == image.shape
    assert np.abs(image - np.minimum(example["mask"], 21) * 10.0)[example["mask"] < 255].max() <= 6
    if stored >= 5:  # As viewers show it: upright already.
        write_mask(path, example["mask"])
        np.testing.assert_array_equal(open_source(voc, "voc")[0]["mask"], example["mask"])
    # A square has one size either way.
    Image.fromarray(grey[:, :4] * 10).save(photo, exif=exif)
    write_mask(path, mask[:, :4])
    source = open_source(voc, "voc")
    assert source[0]["mask"].shape == (4, 4)
    assert source.turned == ({"one.jpg"} if stored > 1 else set())
    Image.fromarray(grey * 10).save(photo, exif=exif)
    write_mask(path, mask[:3])
    with pytest.raises(UserError, match=r"has 6 x 3 pixels, but the image has 6 x 4"):
        open_source(voc, "voc")[0]


@pytest.mark.parametrize("keep", [20, 60])
def test_damaged_files_are_named(voc, keep):
    source, path = open_source(voc, "voc"), voc / "SegmentationClass" / "one.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"Cannot read the mask .*one\.png"):
        source[0]
    write_mask(path, [[0, 1, 2], [0, 0, 0]])
    (voc / "JPEGImages" / "one.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"one\.jpg is damaged or not an image"):
        source[0]


# PASCAL Context


@pytest.fixture
def voc2010(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2010"
    write_image(root / "JPEGImages" / "2008_000002.jpg")
    write_image(root / "JPEGImages" / "2008_000003.jpg")
    return root


CONTEXT_MASK = [[0, 1, 2], [59, 40, 0]]  # aeroplane, bag, wood, pottedplant


def assert_context(root):
    for folder in (root, root.parents[1]):
        source = open_source(folder, "context")
        assert [source[i]["name"] for i in range(len(source))] == ["2008_000002"]
        assert (len(source.class_names), source.background) == (60, True)
        assert [source.class_names[i] for i in (1, 2, 40)] == ["aeroplane", "bag", "pottedplant"]
        assert_mask(source, 0, CONTEXT_MASK)
    source = open_source(root, "context59")
    assert (len(source.class_names), source.background) == (59, False)
    assert_mask(source, 0, [[255, 0, 1], [58, 39, 255]])
    assert source.class_names[58] == "wood"


def test_context_as_mmsegmentation_converts_it(voc2010):
    write_list(voc2010 / "ImageSets" / "SegmentationContext" / "val.txt", "2008_000002")
    path = voc2010 / "SegmentationClassContext" / "2008_000002.png"
    write_mask(path, CONTEXT_MASK)
    assert_context(voc2010)
    # Masks with background left out count from 0 and would be off by one.
    write_mask(path, [[255, 0, 1], [58, 39, 255]])
    with pytest.raises(UserError, match=r"2008_000002\.png has the value 255"):
        open_source(voc2010, "context59")[0]


def run_lengths(mask):
    """Uncompressed run lengths of COCO: column by column, background first."""
    flat = np.asarray(mask).T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(np.shape(mask)), "counts": np.diff(edges, prepend=0).tolist()}


def compressed(rle):
    """The same as a string."""
    text, counts = "", rle["counts"]
    for i, count in enumerate(counts):
        value, more = count - counts[i - 2] if i > 2 else count, True
        while more:
            low = value & 31
            value >>= 5
            more = value != (-1 if low & 16 else 0)
            text += chr(low + 32 * more + 48)
    return rle | {"counts": text}


def write_detail(root, segments):
    """trainval_merged.json with the keys of the original that matter."""
    images = [
        {"image_id": 2008000002 + i, "phase": phase, "height": 2, "width": 3}
        | {"file_name": f"2008_{i + 2:06d}.jpg", "date_captured": "", "license": 1}
        for i, phase in enumerate(("val", "train"))
    ]
    annotations = [
        {"id": i, "image_id": 2008000002, "category_id": category, "segmentation": segmentation}
        | {"iscrowd": 0, "parts": []}
        for i, (category, segmentation) in enumerate(segments)
    ]
    content = {"info": {}, "images": images, "annos_segmentation": annotations}
    content |= {"categories": [], "parts": [], "annos_occlusion": [], "annos_boundary": []}
    (root / "trainval_merged.json").write_text(json.dumps(content))


def test_context_as_json(voc2010):
    segments = [
        (2, compressed(run_lengths([[0, 1, 1], [0, 0, 0]]))),
        # Drawn later, so on top: bag over aeroplane.
        (9, compressed(run_lengths([[0, 0, 1], [0, 0, 0]]))),
        (458, compressed(run_lengths([[0, 0, 0], [1, 0, 0]]))),
        (308, run_lengths([[0, 0, 0], [0, 1, 0]])),
        # One of the 459 categories that are not evaluated.
        (1, compressed(run_lengths([[0, 0, 0], [0, 0, 1]]))),
    ]
    write_detail(voc2010, segments)
    assert_context(voc2010)
    assert open_source(voc2010, "context", split="train")[0]["name"] == "2008_000003"
    # A list overrides the file's own split.
    write_list(voc2010 / "ImageSets" / "SegmentationContext" / "train.txt", "2008_000002")
    assert open_source(voc2010, "context", split="train")[0]["name"] == "2008_000002"
    write_list(voc2010 / "ImageSets" / "SegmentationContext" / "other.txt", "2008_000009")
    write_image(voc2010 / "JPEGImages" / "2008_000009.jpg")
    with pytest.raises(UserError, match="no annotation of the image 2008_000009"):
        open_source(voc2010, "context", split="other")[0]
    with pytest.raises(UserError, match=r"No list of the images .* 'tset': no file tset\.txt"):
        open_source(voc2010, "context", split="tset")


def test_problems_of_the_json_are_named(voc2010):
    for segmentation in (
        [[0.0, 0.0, 2.0, 0.0, 2.0, 1.0]],
        {"size": [2, 3], "counts": [1, 2]},
        run_lengths([[0, 1], [1, 0]]),
    ):
        write_detail(voc2010, [(2, segmentation)])
        with pytest.raises(UserError, match="segment of 2008_000002 is not a run-length encoded"):
            open_source(voc2010, "context")[0]
    huge = (
        '{"images": [{"image_id": 1, "file_name": "a.jpg", "height": 1000000, "width": 1000000}]}'
    )
    for content in ("{}", '{"images": [', huge):
        (voc2010 / "trainval_merged.json").write_text(content)
        with pytest.raises(UserError, match=r"Cannot read .*trainval_merged\.json"):
            open_source(voc2010, "context")


def test_run_lengths_agree_with_pycocotools():
    # Strings that pycocotools.mask.encode wrote for these masks.
    mask = np.zeros((60, 70), bool)
    mask[10:50, 3:60] = True
    mask[20:25, 20:40] = False
    text = "n5X1d000000000000000000000000000000000ROA??"
    text += "AA??" * 18 + "AA???00000000000000000000000000000000000000^b0"
    np.testing.assert_array_equal(decode_rle({"size": [60, 70], "counts": text}), mask)
    rows = (
        ".###.......#.",
        "#.#..#.##...#",
        ".....##..#...",
        "#.#.##.#.#..#",
        ".###..##.##.#",
        ".#.##........",
        "..........#..",
        ".#...#....#..",
        "#...#..#.#...",
    )
    mask = np.array([list(row) for row in rows]) == "#"
    text = "111031O0NO01003OO13OK010O22N00N040L12ON082JN10M10O80H13"
    np.testing.assert_array_equal(decode_rle({"size": [9, 13], "counts": text}), mask)


def write_mat(root, name, labels):
    (root / "trainval").mkdir(exist_ok=True)
    scipy.io.savemat(root / "trainval" / f"{name}.mat", {"LabelMap": np.array(labels, np.uint16)})


def test_context_as_mat_files(voc2010):
    with pytest.raises(UserError, match=r"No annotations .* trainval; unpack VOCtrainval_03-May"):
        open_source(voc2010, "context")
    write_mat(voc2010, "2008_000002", [[431, 2, 9], [458, 308, 1]])
    # Every train and val image of VOC 2010 is annotated: its own list serves.
    write_list(voc2010 / "ImageSets" / "Main" / "val.txt", "2008_000002")
    with pytest.raises(UserError, match=r"list of classes is missing.*labels\.txt; unpack"):
        open_source(voc2010, "context")
    names = {i: f"unused {i}" for i in range(1, 460)}
    names |= {1: "accordion", 3: "air conditioner", 431: "unknown"}
    names |= dict(zip(CATEGORY_IDS, label_set("context"), strict=True))
    path = voc2010 / "labels.txt"
    write_list(path, *(f"{i}: {name}" for i, name in names.items()))
    assert_context(voc2010)
    with pytest.raises(UserError, match=r"No list of the images .* 'tset'.*trainval\.tar\.gz"):
        open_source(voc2010, "context", split="tset")
    write_list(voc2010 / "ImageSets" / "SegmentationContext" / "val.txt", "2008_000003")
    with pytest.raises(UserError, match=r"mask is missing.*2008_000003\.mat"):
        open_source(voc2010, "context")[0]
    (voc2010 / "trainval" / "2008_000003.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(UserError, match=r"Cannot read the mask .*2008_000003\.mat"):
        open_source(voc2010, "context")[0]
    path.write_text(path.read_text().replace("tvmonitor", "tv monitors"))
    with pytest.raises(UserError, match="does not name the class 'tvmonitor'"):
        open_source(voc2010, "context")


# COCO

RAW = [[0, 12, 89], [91, 181, 255]]  # person, stop sign, toothbrush; banner, wood, unlabelled
OBJECT = [[1, 12, 80], [0, 0, 0]]
STUFF = [[0, 11, 79], [80, 170, 255]]


@pytest.fixture
def coco(tmp_path):
    for name in ("000000000724", "000000000285"):
        write_image(tmp_path / "images" / "val2017" / f"{name}.jpg")
    return tmp_path


def write_coco(root, suffix, labels, folder="annotations"):
    for name in ("000000000724", "000000000285"):
        write_mask(root / folder / "val2017" / f"{name}{suffix}.png", labels)


def test_coco_raw(coco):
    write_coco(coco, "", RAW)
    source = open_source(coco, "coco_object")
    assert [source[i]["name"] for i in range(2)] == ["000000000285", "000000000724"]
    assert (len(source.class_names), source.background) == (81, True)
    assert [source.class_names[i] for i in (1, 12, 80)] == ["person", "stop sign", "toothbrush"]
    assert_mask(source, 0, OBJECT)
    assert_mask(open_source(coco, "coco_object", split="val2017"), 0, OBJECT)
    source = open_source(coco, "coco_stuff")
    assert (len(source.class_names), source.background) == (171, False)
    assert [source.class_names[i] for i in (11, 80, 170)] == ["stop sign", "banner", "wood"]
    assert_mask(source, 0, STUFF)
    # 11 is category 12, which COCO never published.
    write_coco(coco, "", [[0, 11, 0], [0, 0, 0]])
    with pytest.raises(UserError, match=r"000000000285\.png has the value 11"):
        open_source(coco, "coco_object")[0]


def test_coco_as_detectron_lays_it_out(coco):
    write_coco(coco, "", RAW, "stuffthingmaps")
    (coco / "images" / "val2017").rename(coco / "val2017")
    assert_mask(open_source(coco, "coco_object"), 1, OBJECT)


def test_coco_as_mmsegmentation_converts_it(coco):
    write_coco(coco, "_labelTrainIds", STUFF)
    assert_mask(open_source(coco, "coco_object"), 0, OBJECT)
    assert_mask(open_source(coco, "coco_stuff"), 0, STUFF)
    # The raw masks, which usually lie beside these, are unmistakable: they come first.
    write_coco(coco, "", [[1, 1, 1], [1, 1, 1]])
    assert_mask(open_source(coco, "coco_stuff"), 0, np.ones((2, 3)))


def test_coco_as_groupvit_converts_it(coco):
    write_coco(coco, "_instanceTrainIds", [[1, 12, 80], [0, 0, 255]])
    assert_mask(open_source(coco, "coco_object"), 0, [[1, 12, 80], [0, 0, 255]])
    with pytest.raises(UserError, match=r"no file 000000000285\.png or .*_labelTrainIds\.png"):
        open_source(coco, "coco_stuff")


def test_coco_as_the_authors_convert_it(coco):
    # The file name of mmsegmentation with other values: 0 is background, and there is no 255.
    write_coco(coco, "_labelTrainIds", OBJECT)
    assert_mask(open_source(coco, "coco_object"), 0, OBJECT)
    with pytest.raises(UserError, match=r"show no stuff: they were converted for coco_object"):
        open_source(coco, "coco_stuff")


def test_missing_coco_files_are_named(coco):
    archive = r"stuffthingmaps_trainval2017\.zip from github\.com/nightrome/cocostuff"
    with pytest.raises(UserError, match=rf"No COCO images at .*images/test and test; .*{archive}"):
        open_source(coco, "coco_object", split="test")
    with pytest.raises(
        UserError, match=rf"No COCO-Stuff masks at .*annotations/val2017.*{archive}"
    ):
        open_source(coco, "coco_object")
    write_mask(coco / "annotations" / "val2017" / "000000000285.png", RAW)
    with pytest.raises(UserError, match=rf"mask is missing.*000000000724\.png; .*{archive}"):
        open_source(coco, "coco_object")[1]
    for folder in ("images", "annotations"):
        (coco / folder / "empty").mkdir()
    with pytest.raises(UserError, match=rf"No images \*\.jpg in .*empty; .*{archive}"):
        open_source(coco, "coco_object", split="empty")


# ADE20K and Cityscapes


@pytest.mark.parametrize("split", ["val", "validation"])
def test_ade20k(tmp_path, split):
    root = tmp_path / "ADEChallengeData2016"
    write_image(root / "images" / "validation" / "ADE_val_00000001.jpg")
    path = root / "annotations" / "validation" / "ADE_val_00000001.png"
    write_mask(path, [[0, 1, 2], [150, 0, 3]])
    for folder in (root, tmp_path):
        source = open_source(folder, "ade20k", split=split)
        assert (len(source.class_names), source.background) == (150, False)
        assert_mask(source, 0, [[255, 0, 1], [149, 255, 2]])
    write_mask(path, [[255, 0, 1], [149, 255, 2]])
    with pytest.raises(UserError, match=r"ADE_val_00000001\.png has the value 255"):
        source[0]
    with pytest.raises(UserError, match=r"No ADE20K images at .*ADEChallengeData2016\.zip from"):
        open_source(root, "ade20k", split="test")


def test_cityscapes(tmp_path):
    names = [("lindau", "lindau_000001_000019"), ("frankfurt", "frankfurt_000000_000294")]
    for city, name in names:
        write_image(tmp_path / "leftImg8bit" / "val" / city / f"{name}_leftImg8bit.png")
    with pytest.raises(UserError, match=r"first image is missing.*labelIds.*gtFine_trainvaltest"):
        open_source(tmp_path, "cityscapes")
    for city, name in names:
        path = tmp_path / "gtFine" / "val" / city / f"{name}_gtFine_labelIds.png"
        write_mask(path, [[0, 7, 33], [29, 24, 34 if city == "lindau" else 3]])
    source = open_source(tmp_path, "cityscapes")
    assert (len(source), len(source.class_names), source.background) == (2, 19, False)
    assert source[0]["name"] == "frankfurt_000000_000294"
    # Caravans (29) and everything up to parking (9) are not evaluated.
    assert_mask(source, 0, [[255, 0, 18], [255, 11, 255]])
    assert [source.class_names[i] for i in (0, 11, 18)] == ["road", "person", "bicycle"]
    with pytest.raises(UserError, match=r"labelIds\.png has the value 34"):
        source[1]
    for city, name in names:
        path = tmp_path / "gtFine" / "val" / city / f"{name}_gtFine_labelTrainIds.png"
        write_mask(path, [[255, 0, 18], [255, 11, 255]])
    assert_mask(open_source(tmp_path, "cityscapes"), 1, [[255, 0, 18], [255, 11, 255]])
    with pytest.raises(UserError, match=r"No Cityscapes images at .*leftImg8bit/test"):
        open_source(tmp_path, "cityscapes", split="test")


def test_every_benchmark_has_a_layout():
    assert {"shapes", *LAYOUTS} == set(TEST_SETS)


# Real files


def label_values(source):
    labels = set()
    for index in range(len(source)):
        example = source[index]
        image = decode_image(example["image"])
        assert example["mask"].shape == (image.height, image.width)
        labels |= set(np.unique(example["mask"]).tolist())
    return labels


@pytest.mark.skipif(not VOC.is_dir(), reason=f"VOC images are missing: {VOC}")
def test_real_voc_sample():
    labels = label_values(open_source(VOC, "voc"))
    assert labels <= {*range(21), 255}
    assert len(labels) > 15
    expected = {label - 1 for label in labels - {0, 255}} | {255}
    assert label_values(open_source(VOC, "voc20")) == expected


@pytest.mark.skipif(not COCO.is_dir(), reason=f"COCO images are missing: {COCO}")
def test_real_coco_sample():
    labels = label_values(open_source(COCO, "coco_object"))
    assert labels <= set(range(81))
    assert len(labels) > 40
    stuff = label_values(open_source(COCO, "coco_stuff"))
    assert stuff <= {*range(171), 255}
    assert {label - 1 for label in labels if label} == {label for label in stuff if label < 80}
