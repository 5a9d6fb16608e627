"""Test sets of the user's own, as other tools write them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from PIL import ExifTags, Image
from support import message, run, tiny_eval, tiny_model

from simseg_jax import evaluate
from simseg_jax.data.images import decode_image
from simseg_jax.data.testsets.classes import classes_of, label_set, prompt_names
from simseg_jax.data.testsets.segmentation import segmentation_source
from simseg_jax.evaluators.measures import MEASURES
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.runtime.errors import UserError

VOC = SHARED / "data" / "VOCdevkit" / "VOC2012"
CONFIG = Path(__file__).parents[3] / "configs" / "own_images.py"
# CamVid's label_colors.txt in its order, with the class of the usual 11 after the original name.
CAMVID = """\
64 128 64\tAnimal=pedestrian
192 0 128\tArchway=building
0 128 192\tBicyclist=bicyclist
0 128 64\tBridge=building
128 0 0\tBuilding=building
64 0 128\tCar=car
64 0 192\tCartLuggagePram=pedestrian
192 128 64\tChild=pedestrian
192 192 128\tColumn_Pole=pole
64 64 128\tFence=fence
128 0 192\tLaneMkgsDriv=road
192 0 64\tLaneMkgsNonDriv=road
128 128 64\tMisc_Text=sign
192 0 192\tMotorcycleScooter=bicyclist
128 64 64\tOtherMoving=car
64 192 128\tParkingBlock=pavement
64 64 0\tPedestrian=pedestrian
128 64 128\tRoad=road
128 128 192\tRoadShoulder=pavement
0 0 192\tSidewalk=pavement
192 128 128\tSignSymbol=sign
128 128 128\tSky=sky
64 128 192\tSUVPickupTruck=car
0 0 64\tTrafficCone=pole
0 64 64\tTrafficLight=sign
192 64 128\tTrain=car
128 128 0\tTree=tree
192 128 192\tTruck_Bus=car
64 0 64\tTunnel=building
192 192 0\tVegetationMisc=tree
0 0 0\tVoid=void
64 192 0\tWall=building
"""
COLOURS = [tuple(map(int, line.split("\t")[0].split())) for line in CAMVID.splitlines()]
MERGED = [line.rpartition("=")[2] for line in CAMVID.splitlines()]


def open_set(root, **settings):
    return segmentation_source(tiny_eval(data="folder", root=str(root), **{"split": ""} | settings))


def refused(root, **settings):
    """The message for a set that is refused when it is opened or when a mask is read."""
    with pytest.raises(UserError) as error:
        masks_of(open_set(root, **settings))
    return str(error.value)


def write_pair(root, name, mask, image=".jpg", suffix=".png", **options):
    """An image and its mask: an array of values or colours, or a Pillow image."""
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask))
    for folder in ("images", "masks"):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", mask.size, "green").save(root / "images" / f"{name}{image}")
    mask.save(root / "masks" / f"{name}{suffix}", **options)


def masks_of(source):
    return {source[i]["name"]: source[i]["mask"].tolist() for i in range(len(source))}


@pytest.fixture
def camvid(tmp_path):
    """Two frames, in which all 32 colours occur."""
    pixels = np.array(COLOURS, np.uint8).reshape(4, 8, 3)
    write_pair(tmp_path, "0001TP_006690", pixels, ".png", "_L.png")
    write_pair(tmp_path, "Seq05VD_f00000", pixels[::-1], ".png", "_L.png")
    original = re.sub("=.*", "", CAMVID)
    (tmp_path / "label_colors.txt").write_text(original, newline="\r\n")
    (tmp_path / "classes.txt").write_text(re.sub(r"\t.*=", " ", CAMVID))
    return tmp_path


@pytest.fixture
def horses(tmp_path):
    """As binary masks are usually saved, here 0 and 1."""
    write_pair(tmp_path, "horse001", np.uint8([[0, 1, 1], [0, 0, 0]]))
    write_pair(tmp_path, "horse 002", np.uint8([[0, 0, 0], [0, 0, 1]]))
    (tmp_path / "classes.txt").write_text("background\nhorse: horse, pony\n")
    return tmp_path


def test_camvid_with_all_its_classes(camvid):
    source = open_set(camvid, classes="label_colors.txt", ignore="Void")
    assert (len(source.class_names), source.background) == (31, False)
    assert source.class_names[:3] == ("Animal", "Archway", "Bicyclist")
    labels = [*range(30), 255, 30]
    assert source[0]["mask"].ravel().tolist() == labels
    # Without ignore, Void is a class like the others.
    assert len(open_set(camvid, classes="label_colors.txt").class_names) == 32


def test_camvid_merged_into_eleven_classes(camvid):
    settings = tiny_eval(data="folder", root=str(camvid), ignore="void")
    classes = classes_of(settings)
    names = [name for name, _ in classes.names]
    assert (len(names), classes.background, settings.class_scores) == (11, False, 30)
    source = open_set(camvid, ignore="void")
    assert list(source.class_names) == names
    merged = [255 if name == "void" else names.index(name) for name in MERGED]
    assert source[0]["mask"].ravel().tolist() == merged
    np.testing.assert_array_equal(source[1]["mask"], np.reshape(merged, (4, 8))[::-1])
    assert source[0]["name"] == "0001TP_006690.png"


def test_colours_that_are_not_listed_are_counted_and_named(camvid):
    pixels = np.full((4, 8, 3), COLOURS[0], np.uint8)
    pixels[0, :3] = (1, 2, 3)
    pixels[1, 0] = (0, 0, 255)
    write_pair(camvid, "0001TP_006690", pixels, ".png", "_L.png")
    message = refused(camvid, ignore="void")
    assert "0001TP_006690_L.png has the values 0 0 255, 1 2 3, which do not" in message
    assert "at 4 pixels: give it a line in" in message
    # Void must be ignored by its name: no value fits a colour.
    assert "ignore has '0', but" in refused(camvid, ignore="0")
    assert "ignore has 'viod', but" in refused(camvid, ignore="viod")


def test_colours_in_masks_of_other_kinds(tmp_path):
    (tmp_path / "classes.txt").write_text("0 0 0 background\n128 0 0 horse\n255 255 255 sky\n")
    pixels = np.uint8([[[0, 0, 0], [128, 0, 0]], [[255, 255, 255], [0, 0, 0]]])
    rgb = Image.fromarray(pixels)
    palette = Image.fromarray(np.uint8([[9, 1], [4, 9]]))
    colours = np.zeros((256, 3), np.uint8)
    colours[[1, 4]] = (128, 0, 0), (255, 255, 255)
    palette.putpalette(colours.tobytes())
    for name, mask in {"a": rgb, "b": rgb.convert("RGBA"), "c": palette}.items():
        write_pair(tmp_path, name, mask)
    source = open_set(tmp_path)
    assert source.background
    assert list(masks_of(source).values()) == [[[0, 1], [2, 0]]] * 3
    # The same masks are no indices.
    (tmp_path / "classes.txt").write_text("background\nhorse\nsky\n")
    message = refused(tmp_path)
    assert "a.png is not a palette or grey mask" in message
    assert "for colours, begin every line of" in message


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits", "1 bit"])
def test_horses_with_values_0_and_1(horses, kind):
    for path in (horses / "masks").iterdir():
        values = np.asarray(Image.open(path))
        mask = Image.fromarray(values.astype(np.uint16 if kind == "16 bits" else np.uint8))
        if kind == "palette":
            mask.putpalette([0, 0, 0, 255, 255, 255])
        if kind == "1 bit":
            mask = Image.fromarray(values > 0)
        mask.save(path)
    source = open_set(horses)
    assert (source.class_names, source.background) == (("background", "horse"), True)
    assert masks_of(source) == {
        "horse 002.jpg": [[0, 0, 0], [0, 0, 1]],
        "horse001.jpg": [[0, 1, 1], [0, 0, 0]],
    }
    settings = tiny_eval(data="folder", root=str(horses), names="synonyms")
    assert prompt_names(settings) == (("background",), ("horse", "pony"))
    assert settings.class_scores == 10


def test_horses_with_values_0_and_255(horses):
    for path in (horses / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * np.uint8(255)).save(path)
    message = refused(horses)
    assert "Every pixel of the masks is background or ignored (255)" in message
    assert "(`0 background`, `255 horse`) and set ignore to nothing (ignore=)" in message
    # Half of the advice leads to the other half.
    assert "has the value 255, which does not belong" in refused(horses, ignore="")
    (horses / "classes.txt").write_text("\ufeff0 background\n255 horse\n")
    assert "The value 255 is 'horse' in" in refused(horses)
    source = open_set(horses, ignore="")
    assert masks_of(source)["horse001.jpg"] == [[0, 1, 1], [0, 0, 0]]


def test_values_of_sixteen_bits_and_ignored_ones(tmp_path):
    write_pair(tmp_path, "a", np.uint16([[0, 7, 3000], [255, 24, 7]]))
    (tmp_path / "classes.txt").write_text("7 road\n3000 sky\n24 road\n")
    source = open_set(tmp_path, ignore="0, 255")
    assert (source.class_names, source.background) == (("road", "sky"), False)
    assert masks_of(source) == {"a.jpg": [[255, 0, 1], [255, 0, 0]]}
    message = refused(tmp_path)
    assert "a.png has the value 0, which does not belong" in message
    assert "has classes for 7, 24, 3000; give it a line" in message
    # 3000 - 256 * 11 is 184: nothing is cut off.
    write_pair(tmp_path, "a", np.uint16([[7, 3000, 184]]))
    assert "the value 184" in refused(tmp_path)
    # A class may be left out by its name.
    write_pair(tmp_path, "a", np.uint16([[7, 3000, 24]]))
    (tmp_path / "classes.txt").write_text("7 road\n3000 sky\n24 car\n")
    assert masks_of(open_set(tmp_path, ignore="car")) == {"a.jpg": [[0, 1, 255]]}


def test_lossy_masks_are_refused(horses):
    for path in (horses / "masks").iterdir():
        Image.open(path).convert("L").save(path.with_suffix(".jpg"))
        path.unlink()
    assert "is a JPEG file, which does not keep labels exactly" in refused(horses)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "has 0 classes that count: a test set has 2 to 254"),
        ("horse\n", "has 1 classes that count"),
        ("\n".join(f"class {i}" for i in range(255)), "has 255 classes that count"),
        ("0 background\nhorse\n", "The lines '0 background' and 'horse' of"),
        ("0 0 0 background\n1 horse\n", "The lines '0 0 0 background' and '1 horse' of"),
        ("0 0 0 background\n256 0 0 horse\n", "'256 0 0 horse' of .* has a colour above 255"),
        ("0 background\n0 horse\n", "gives one value to 'background' and 'horse'"),
        ("sky\nhorse\nsky\n", "has two lines 'sky': for one class with several values"),
        ("horse, pony\n", "has a comma but no colon"),
        ("background:0,0,0::\nhorse:0,0,128::\n", "has synonyms of background"),
        ("background\nhorse\xe9\n", "Cannot read the classes"),
    ],
)
def test_lists_of_classes_are_right_or_refused(horses, content, problem):
    (horses / "classes.txt").write_bytes(content.encode("latin-1"))
    assert re.search(problem, refused(horses))


def test_another_list_of_classes(horses, tmp_path):
    (horses / "classes.txt").rename(tmp_path / "names")
    assert "The list of classes is missing: no file" in refused(horses)
    assert open_set(horses, classes="names").class_names == ("background", "horse")
    assert open_set(horses, classes=str(tmp_path / "names")).class_names[1] == "horse"


def test_masks_beside_masks_are_ambiguous(horses):
    for path in list((horses / "masks").iterdir()):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    (horses / "masks" / ".DS_Store.png").touch()
    (horses / "masks" / "readme.txt").touch()
    assert len(open_set(horses)) == 2
    for path in list((horses / "masks").glob("*_mask.png")):
        Image.open(path).save(path.with_name(path.name.replace("mask", "colour")))
    message = refused(horses)
    for part in ("*_colour.png of 2 images", "*_mask.png of 2", "give all masks one suffix"):
        assert part in message


def test_names_that_begin_other_names(tmp_path):
    for name in ("1", "10", "100", "1_2"):
        write_pair(tmp_path, name, np.uint8([[0, 1]]))
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    assert list(masks_of(open_set(tmp_path))) == ["1.jpg", "10.jpg", "100.jpg", "1_2.jpg"]


def test_incomplete_sets_are_refused_until_a_list_says_what_counts(horses):
    for number in range(3, 6):
        write_pair(horses, f"horse00{number}", np.uint8([[0, 1]]))
    (horses / "masks" / "horse003.png").unlink()
    (horses / "images" / "horse004.jpg").unlink()
    message = refused(horses)
    assert "has 1 images without a mask *.png in" in message
    assert "(horse003.jpg), and there are 1 masks without an image (horse004.png): add" in message
    (horses / "test.txt").write_text("horse005\nhorse 002.jpg\n")
    for split in ("test", "test.txt"):
        assert list(masks_of(open_set(horses, split=split))) == ["horse005.jpg", "horse 002.jpg"]
    (horses / "test.txt").write_text("horse003\nhorse005\n")
    assert "has 1 images without a mask" in refused(horses, split="test")
    (horses / "test.txt").write_text("horse005\nhorse006\n")
    assert "test.txt has 1 names of no image in" in refused(horses, split="test")
    (horses / "test.txt").write_text("horse005\nhorse005.jpg\n")
    assert "names horse005.jpg more than once" in refused(horses, split="test")


def test_splits_are_folders_or_lists(horses):
    write_pair(horses, "val/city/a", np.uint8([[0, 1]]))
    write_pair(horses, "val/b", np.uint8([[1, 0]]), ".png")
    assert masks_of(open_set(horses, split="val")) == {"b.png": [[1, 0]], "a.jpg": [[0, 1]]}
    assert len(open_set(horses)) == 4
    assert "Neither the list" in refused(horses, split="test")
    (horses / "val.txt").write_text("horse001\n")
    message = refused(horses, split="val")
    assert "Both the list" in message
    assert "an empty split takes all images (split=)" in message


def test_missing_folders_and_names_that_fit_nothing(horses):
    assert "There is no folder" in refused(horses / "images", classes="../classes.txt")
    Image.new("RGB", (3, 2)).save(horses / "images" / "horse001.png")
    assert "horse001.jpg and horse001.png, which would share a mask" in refused(horses)
    (horses / "images" / "horse001.png").unlink()
    for path in (horses / "masks").iterdir():
        path.rename(path.with_name(f"mask_of_{path.name}"))
    assert re.search("No mask in .*, such as mask_of_.*, begins with the name", refused(horses))
    for path in (horses / "images").iterdir():
        path.unlink()
    assert "There are no images in" in refused(horses)


def test_masks_of_another_size_are_refused_and_turned_ones_are_not(horses):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo = Image.new("RGB", (3, 2))
    photo.save(horses / "images" / "horse001.jpg", exif=exif)
    source = open_set(horses)
    assert masks_of(source)["horse001.jpg"] == [[0, 0], [0, 1], [0, 1]]
    assert decode_image(source[1]["image"]).size == (2, 3)
    Image.new("RGB", (6, 4)).save(horses / "images" / "horse001.jpg")
    assert "has 3 x 2 pixels, but the image has 6 x 4" in refused(horses)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def evaluator_of(model, root, **settings):
    settings = {"split": "", "prompts": "plain", "window": 32} | settings
    return SegmentationEvaluator(model[0], tiny_eval(data="folder", root=str(root), **settings))


@pytest.mark.parametrize("protocol", ["paper", "standard"])
def test_both_protocols_with_and_without_background(model, horses, protocol):
    evaluator = evaluator_of(model, horses, protocol=protocol, sigma_weight=0.3)
    records = list(evaluator.records(model[1]))
    assert evaluator.confusion(records).sum(axis=1).tolist() == [9, 3]
    assert dict(evaluator.results(evaluator.measures(records))).keys() - set(MEASURES) == {
        "iou/background",
        "iou/horse",
    }
    (horses / "classes.txt").write_text("grass\nhorse\n")
    evaluator = evaluator_of(model, horses, protocol=protocol, sigma_weight=0.3)
    records = list(evaluator.records(model[1]))
    assert evaluator.confusion(records).sum(axis=1).tolist() == [0, 9, 3]
    assert dict(evaluator.results(evaluator.measures(records))).keys() == {
        *MEASURES,
        "iou/grass",
        "iou/horse",
    }


def test_a_threshold_that_two_classes_never_reach_is_refused(model, horses):
    with pytest.raises(UserError, match=r"With the 2 classes .* set sigma_weight below 0\.71"):
        evaluator_of(model, horses)
    evaluator_of(model, horses, protocol="standard")
    # It is right: a little below, one score is above the threshold, a little above none is.
    for weight, drawn in ((0.7, 1), (0.71, 0)):
        scores = np.array([[0.1, 0.9]])
        threshold = scores.mean() + weight * scores.std(ddof=1)
        assert (scores > threshold).sum() == drawn


def test_changed_files_are_evaluated_again(model, horses):
    def images():
        return dict(evaluator_of(model, horses, sigma_weight=0.3).images)

    before = images()
    os.utime(horses / "masks" / "horse001.png", (1, 1))
    changed = images()
    assert before["horse001.jpg"] != changed["horse001.jpg"]
    assert before["horse 002.jpg"] == changed["horse 002.jpg"]
    # The same classes with other values are other labels.
    (horses / "classes.txt").write_text("1 background\n0 horse\n")
    assert not set(images().values()) & set(changed.values())


@pytest.mark.skipif(not VOC.is_dir(), reason=f"VOC images are missing: {VOC}")
@pytest.mark.parametrize("data", ["voc", "voc20"])
def test_voc_as_a_folder_is_voc(model, tmp_path, data):
    (tmp_path / "images").symlink_to(VOC / "JPEGImages")
    (tmp_path / "masks").symlink_to(VOC / "SegmentationClass")
    listing = VOC / "ImageSets" / "Segmentation" / "val.txt"
    (tmp_path / "val.txt").symlink_to(listing)
    names = label_set("voc")
    lines = [f"{value} {name}" for value, name in enumerate(names, start=1)]
    lines += ["0 background"] * (data == "voc")
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    ignore = "255" if data == "voc" else "0,255"
    settings = {"split": "val", "limit": 8, "top_k": 10, "prompts": "plain"}
    own = evaluator_of(model, tmp_path, ignore=ignore, **settings)
    known = SegmentationEvaluator(
        model[0], tiny_eval(data=data, root=str(VOC), window=32, **settings)
    )
    assert own.class_names == known.class_names
    records = own.records(model[1]), known.records(model[1])
    mine, theirs = (list(part) for part in records)
    np.testing.assert_array_equal(own.confusion(mine), known.confusion(theirs))
    assert own.confusion(mine).sum() > 0


def overrides(name, root, **settings):
    settings = {"root": root, "resolution": 32, "prompts": "plain", "refine": "none"} | settings
    return [f"--config.evals.seg.{name}.{key}={value}" for key, value in settings.items()]


def test_the_command_with_the_configuration_file(monkeypatch, capsys, workdir, horses, tmp_path):
    command = (f"--checkpoint={workdir}", f"--config={CONFIG}", "--pictures=1")
    command += (f"--output={tmp_path / 'out'}",)
    mine = overrides("mine", horses, sigma_weight=0.3)
    # The other test set does not exist.
    error = message(monkeypatch, capsys, evaluate, *command, *mine)
    assert "1 of 2 test sets could not be evaluated, the first is seg/mine_standard: " in error
    assert "no file data/mine/classes.txt" in error
    both = (*mine, *overrides("mine_standard", horses, window=32))
    out = run(monkeypatch, capsys, evaluate, *command, *both)
    assert "mine: 2 of 2 images are done already." in out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {"seg/mine/miou", "seg/mine_standard/miou"} <= result["results"].keys()
    assert result["config"]["evals"]["seg"]["mine"]["top_k"] == 10
    Image.fromarray(np.uint8([[0, 0, 1], [1, 1, 1]])).save(horses / "masks" / "horse001.png")
    out = run(monkeypatch, capsys, evaluate, *command, *both)
    assert "mine: 1 of 2 images are done already (1 changed since)." in out


def test_the_command_without_a_configuration_file(monkeypatch, capsys, workdir, camvid):
    """A test set of the checkpoint is replaced."""
    own = overrides("shapes", camvid, data="folder", split="", ignore="void")
    out = run(monkeypatch, capsys, evaluate, f"--checkpoint={workdir}", *own)
    assert "seg/shapes/miou" in out
    assert "pavement" in out
    result = json.loads((workdir / "evaluation-4" / "result.json").read_text())
    assert "seg/shapes/iou/bicyclist" in result["results"]
    assert result["config"]["evals"]["seg"]["shapes"]["top_k"] == 30
