"""Damaged data on the way from shards to training."""

import json

import pytest
from pairs_support import IMAGES, make_pairs, write_array_record, write_coco, write_csv, write_tar
from support import assert_trees_equal, data_set, tiny_config

from simseg_jax.data.pipeline import Examples, TrainBatches
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.runtime.errors import UserError
from simseg_jax.train import train


def damaged_shards(folder, share, count=100):
    """Tar shards in which the images of `share` of the pairs are cut short or no images at all."""
    pairs = make_pairs(count)
    for number, index in enumerate(range(0, count, round(1 / share))):
        name, image, captions = pairs[index]
        pairs[index] = (name, image[: len(image) // 2] if number % 2 else b"text", captions)
    return write_tar(pairs, folder), len(range(0, count, round(1 / share)))


def shard_config(folder, share):
    path, damaged = damaged_shards(folder, share)
    config = tiny_config()
    config.data.train = {"shards": data_set(path=str(path))}
    config.data.cache = str(folder / "cache")
    config.batch_size, config.epochs = 16, 2.0
    return config, damaged


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_over_five_percent_damaged_members(tmp_path, capsys, workers):
    config, damaged = shard_config(tmp_path, 0.05)
    config.data.workers = workers
    train(config, tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in metrics]
    # Two epochs of 100 pairs, 12 batches of 16: all of the first, most of the second.
    assert damaged < records[-1]["data_replaced"] <= 2 * damaged
    out = capsys.readouterr().out
    assert out.count("Replaced by another example: ") == 5
    assert "data.train.shards: 100 examples" in out


@pytest.mark.slow
def test_training_stops_when_too_much_is_damaged(tmp_path):
    config, _ = shard_config(tmp_path, 0.25)
    with pytest.raises(UserError, match=r"cannot be used, more than data.max_bad=0.1; the last"):
        train(config, tmp_path / "run")
    config.data.max_bad = 0.4
    train(config, tmp_path / "run")


@pytest.mark.parametrize("write", [write_csv, write_coco, write_array_record])
def test_every_format_gives_the_same_training_examples(tmp_path, write):
    pairs = make_pairs(24)
    data = tiny_config().data
    data.update({"edit_rate": 0.5, "cache": str(tmp_path / "cache")})
    encoder = TextEncoder(load_tokenizer("shapes"), 25, 0.5)
    batches = []
    for writer in (write_tar, write):
        folder = tmp_path / writer.__name__
        folder.mkdir()
        data.train = {"pairs": data_set(path=writer(pairs, folder), images=IMAGES)}
        examples = Examples(data, image_size=32, batch_size=8, encoder=encoder, seed=0)
        stream = TrainBatches(examples, batch_size=8)
        batches.append([next(stream) for _ in range(6)])
    assert_trees_equal(*batches)
