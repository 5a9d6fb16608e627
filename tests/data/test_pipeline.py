import io

import numpy as np
import pytest
from PIL import Image
from support import assert_trees_equal, data_set, tiny_config

from simseg_jax.data import pipeline
from simseg_jax.data.pairs import BadExample, Problems
from simseg_jax.data.pipeline import Examples, TrainBatches
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.runtime.errors import UserError


class NumberedSource:
    """Image i is filled with the value i; the indices in `damaged` hold no image."""

    def __init__(self, size, damaged=(), offset=0):
        self.size, self.damaged, self.offset, self.problems = size, damaged, offset, Problems()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = np.full((16, 16, 3), index + self.offset, np.uint8)
        if index in self.damaged:
            if index % 2:
                raise BadExample(f"number {index}", "its file has vanished")
            image = b"no image"
        return {"image": image, "captions": ("a star", "a moon"), "name": f"number {index}"}


@pytest.fixture
def examples(monkeypatch):
    """Makes `Examples` of given sources (data sets "a", "b", ...) and settings."""

    def make(*sources, batch_size=8, seed=0, groups=False, **settings):
        data = tiny_config().data
        weights = settings.pop("weights", [1.0] * len(sources))
        collages = settings.pop("collages", [0.0] * len(sources))
        data.train = {
            name: data_set(path=name, weight=weight, collage=collage)
            for name, weight, collage in zip("abc", weights, collages, strict=False)
        }
        by_name = dict(zip("abc", sources, strict=False))
        monkeypatch.setattr(pipeline, "open_source", lambda s, _cache: by_name[s.path])
        data.update({"crop_area": (1.0, 1.0), "autoaugment": False, "max_length": 6, **settings})
        encoder = TextEncoder(load_tokenizer("shapes"), data.max_length, data.edit_rate)
        fixed = {"image_size": 16, "encoder": encoder, "groups": groups}
        return Examples(data, batch_size=batch_size, seed=seed, **fixed)

    return make


def batches(examples, count, batch_size=8, position=0, process=(0, 1)):
    stream = TrainBatches(
        examples, batch_size=batch_size, process_index=process[0], process_count=process[1]
    )
    stream.position = position
    return [next(stream) for _ in range(count)]


def indices(batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])


def test_an_epoch_shows_every_image_once_in_a_new_order(examples):
    taken = batches(examples(NumberedSource(32)), 8)
    first, second = indices(taken[:4]), indices(taken[4:])
    np.testing.assert_array_equal(np.sort(first), np.arange(32))
    np.testing.assert_array_equal(np.sort(second), np.arange(32))
    assert not np.array_equal(first, second)
    assert taken[0]["image"].dtype == np.uint8
    assert taken[0]["ids"].shape == taken[0]["mask"].shape == (8, 6)
    assert set(taken[0]) == {"image", "ids", "mask"}


@pytest.mark.parametrize("batch_size", [8, 72])  # 72: several chunks of unequal size.
def test_the_global_batch_does_not_depend_on_the_processes(examples, batch_size):
    source = NumberedSource(200)
    made = examples(source, batch_size=batch_size, edit_rate=0.5)
    whole = batches(made, 3, batch_size)
    for count in (2, 4):
        parts = [batches(made, 3, batch_size, process=(i, count)) for i in range(count)]
        joined = [
            {key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]}
            for step in range(3)
        ]
        assert_trees_equal(joined, whole)


def test_order_follows_from_the_seed_whatever_the_threads(examples):
    first = batches(examples(NumberedSource(32), threads=1, edit_rate=0.5), 3)
    again = batches(examples(NumberedSource(32), threads=4, prefetch=2, edit_rate=0.5), 3)
    other = batches(examples(NumberedSource(32), seed=1), 3)
    assert_trees_equal(first, again)
    assert not np.array_equal(indices(first), indices(other))


def test_captions_are_drawn_at_random(examples):
    ids = np.concatenate(
        [b["ids"] for b in batches(examples(NumberedSource(64), edit_rate=0.0), 8)]
    )
    assert len(np.unique(ids, axis=0)) == 2


def test_debiased_batches(examples):
    sources = NumberedSource(40), NumberedSource(80, offset=100)
    made = examples(*sources, mixture="debiased")
    owners = [set(batch["image"][:, 0, 0, 0] >= 100) for batch in batches(made, 15)]
    assert sorted(map(tuple, owners)) == [(False,)] * 5 + [(True,)] * 10
    assert len(made) == 120
    sources[1].problems.note("caption: title taken, raw left out")
    assert made.describe() == [
        "data.train.a: 40 examples",
        "data.train.b: 80 examples; Nothing was left out; caption: title taken, raw left out (1)",
    ]


def test_the_hosts_augmentation(examples):
    """transform=pil applies AutoAugment here, fast leaves it to the device."""
    flat = NumberedSource(32, offset=100)
    settings = {"autoaugment": True, "crop_area": (0.5, 1.0)}
    fast = batches(examples(flat, **settings), 4)
    assert all(len(np.unique(image)) == 1 for batch in fast for image in batch["image"])
    pil = batches(examples(flat, transform="pil", **settings), 4)
    assert pil[0]["image"].shape == (8, 16, 16, 3)
    assert any(len(np.unique(image)) > 1 for batch in pil for image in batch["image"])


def test_both_transforms_make_the_same_crops(examples):
    class Photos(NumberedSource):
        def __getitem__(self, index):
            file = io.BytesIO()
            image = np.random.default_rng(index).integers(0, 256, (5, 6, 3), np.uint8)
            # Too small for reduced decoding.
            Image.fromarray(image).resize((30, 28)).save(file, "JPEG")
            return {**super().__getitem__(index), "image": file.getvalue()}

    settings = {"crop_area": (0.3, 1.0), "edit_rate": 0.5}
    fast = batches(examples(Photos(16), **settings), 2)
    pil = batches(examples(Photos(16), transform="pil", **settings), 2)
    for a, b in zip(fast, pil, strict=True):
        np.testing.assert_array_equal(a["ids"], b["ids"])
        # The two filters round at different places.
        assert np.abs(a["image"].astype(int) - b["image"]).max() <= 2


def test_damaged_examples_are_replaced_counted_and_named(examples, capsys):
    made = examples(NumberedSource(64, damaged=(3, 10, 20)))
    stream = TrainBatches(made, batch_size=8)
    taken = [next(stream) for _ in range(8)]
    assert stream.bad == 3
    assert not set(indices(taken)) & {3, 10, 20}
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(": ", 1)[1] for line in lines)[1].startswith("number 20: ")
    assert "Replaced by another example: number 3: its file has vanished." in lines
    # The replacement belongs to the position as well.
    assert_trees_equal(batches(examples(NumberedSource(64, damaged=(3, 10, 20))), 8), taken)


def test_too_many_damaged_examples_stop_the_run(examples):
    made = examples(NumberedSource(200, damaged=range(0, 200, 4)))
    with pytest.raises(UserError, match=r"examples cannot be used, more than data.max_bad=0.1"):
        batches(made, 25)
    tolerant = examples(NumberedSource(200, damaged=range(0, 200, 4)), max_bad=0.5)
    assert len(batches(tolerant, 25)) == 25
    with pytest.raises(UserError, match=r"20 examples in a row of data.train.a cannot be used"):
        batches(examples(NumberedSource(64, damaged=range(64))), 1)


def test_bombs_count_as_damaged(examples):
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "JPEG")

    class Large(NumberedSource):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "image": file.getvalue()}

    with pytest.raises(UserError, match=r"20x20 are more than max_pixels=100"):
        batches(examples(Large(8), max_pixels=100), 1)


def test_captions_without_a_known_word_are_counted(examples, capsys):
    class Foreign(NumberedSource):
        def __getitem__(self, index):
            caption = "жук" if index % 4 == 0 else "жук star"
            return {**super().__getitem__(index), "captions": (caption,)}

    stream = TrainBatches(examples(Foreign(32), edit_rate=0.5), batch_size=8)
    taken = [next(stream) for _ in range(4)]
    assert stream.unknown == 8
    assert set(taken[0]) == {"image", "ids", "mask"}
    assert capsys.readouterr().out.count("knows no word of some captions") == 1


def test_identity_is_that_of_the_content(examples):
    """Of images and captions, wherever they lie; what cannot be read has none."""

    class Renamed(NumberedSource):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "name": "elsewhere"}

    def identity(*sources, **settings):
        return examples(*sources, **settings).identity()

    first = identity(NumberedSource(200), NumberedSource(20, offset=9))
    assert {name: value["examples"] for name, value in first.items()} == {"a": 200, "b": 20}
    assert [len(set(value["sample"])) for value in first.values()] == [64, 20]
    assert identity(Renamed(200), Renamed(20, offset=9), threads=1) == first
    assert identity(NumberedSource(200, offset=1))["a"]["sample"] != first["a"]["sample"]
    damaged = identity(NumberedSource(200, damaged=(199,)))["a"]["sample"]
    assert damaged == [*first["a"]["sample"][:-1], ""]


def test_a_configuration_without_data_is_explained(examples):
    with pytest.raises(UserError, match="names no data set: add one"):
        examples()


def test_waiting_is_measured(examples):
    stream = TrainBatches(examples(NumberedSource(32)), batch_size=8)
    next(stream)
    assert 0 < stream.waited < 60
    assert stream.position == 8


def test_a_position_of_another_batch_size_starts_at_a_whole_batch(examples):
    stream = TrainBatches(examples(NumberedSource(32)), batch_size=8)
    stream.position = 21
    assert stream.position == 16


@pytest.fixture(scope="module")
def scenes():
    """Examples that worker processes can open themselves."""

    def make(**settings):
        config = tiny_config()
        config.data.update({"edit_rate": 0.5, "prefetch": 64, **settings})
        encoder = TextEncoder(load_tokenizer("shapes"), config.data.max_length, 0.5)
        return Examples(config.data, image_size=32, batch_size=80, encoder=encoder, seed=0)

    return make


@pytest.mark.slow
def test_resuming_with_any_number_of_workers_gives_the_same_batches(scenes):
    """In the middle of an epoch (64 examples), from a run with 0 workers on with 0, 2 and 4."""
    whole = batches(scenes(), 5, 80)
    for workers in (0, 2, 4):
        rest = batches(scenes(workers=workers), 3, 80, position=160)
        assert_trees_equal(rest, whole[2:])


def test_equal_captions_are_a_group(examples):
    """Before words are edited, and for equal word pieces."""
    made = examples(NumberedSource(32), groups=True, edit_rate=0.9)
    (batch,) = batches(made, 1)
    captions = [made[i]["caption"] for i in range(8)]
    assert set(captions) == {"a star", "a moon"}
    groups = [tuple(row) for row in batch["groups"].tolist()]
    assert batch["groups"].dtype == np.uint32
    for caption, group in zip(captions, groups, strict=True):
        assert [g == group for g in groups] == [c == caption for c in captions]


def test_mirrored_images(scenes):
    plain, all_, some = (scenes(flip=share) for share in (0.0, 1.0, 0.3))
    mirrored = 0
    for i in range(60):
        image = plain[i]["image"]
        np.testing.assert_array_equal(all_[i]["image"], image[:, ::-1])
        equal = [np.array_equal(some[i]["image"], each) for each in (image, image[:, ::-1])]
        assert sum(equal) == 1
        mirrored += equal[1]
    assert 8 <= mirrored <= 28


def test_collages(examples):
    source = NumberedSource(200)
    made = examples(source, collages=[0.5], max_length=20)
    collages = 0
    for example in map(made.__getitem__, range(200)):
        tiles = [example["image"][y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
        values = [int(tile[0, 0, 0]) for tile in tiles]
        assert all((tile == value).all() for tile, value in zip(tiles, values, strict=True))
        names = [f"number {value}" for value in values]
        if " + " in example["name"]:
            collages += 1
            assert example["name"] == " + ".join(names)
            assert len(example["caption"].split(", ")) == 4
            assert example["mask"].sum() >= 2 + 4 * 2  # [CLS], [SEP] and the words.
        else:
            assert {example["name"]} == set(names)
    assert 70 <= collages <= 130
    # A damaged tile makes its collage another example.
    damaged = examples(NumberedSource(200, damaged=range(0, 200, 7)), collages=[1.0])
    assert any(damaged[i]["bad"] for i in range(20))
    # Of two data sets only one may have them.
    made = examples(source, NumberedSource(200), collages=[1.0, 0.0])
    for i in range(40):
        assert (" + " in made[i]["name"]) == (made.mixture[i][0] == 0)
