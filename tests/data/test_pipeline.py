import numpy as np
import pytest
from support import tiny_config

from simseg_jax.data.pipeline import train_iterator
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.errors import UserError


class NumberedSource:
    """Image i is filled with the value i; one corrupt entry on request."""

    def __init__(self, size, corrupt=None):
        self.size, self.corrupt = size, corrupt

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = np.full((16, 16, 3), index, np.uint8)
        if index == self.corrupt:
            image = b"no image"
        return {"image": image, "captions": ("a star", "a moon"), "name": f"number {index}"}


def iterator(source, batch_size=8, process_index=0, process_count=1, seed=0, **settings):
    data = tiny_config().data
    data.update({"crop_area": (1.0, 1.0), "autoaugment": False, "max_length": 6, **settings})
    encoder = TextEncoder(load_tokenizer("shapes"), data.max_length, data.edit_rate)
    return train_iterator(
        source,
        data,
        image_size=16,
        batch_size=batch_size,
        encoder=encoder,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def indices(batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])


def test_an_epoch_shows_every_image_once_in_a_new_order():
    batches = take(iterator(NumberedSource(32)), 8)
    first, second = indices(batches[:4]), indices(batches[4:])
    np.testing.assert_array_equal(np.sort(first), np.arange(32))
    np.testing.assert_array_equal(np.sort(second), np.arange(32))
    assert not np.array_equal(first, second)
    assert batches[0]["image"].dtype == np.uint8
    assert batches[0]["ids"].shape == batches[0]["mask"].shape == (8, 6)


def test_processes_split_every_epoch():
    source = NumberedSource(32)
    whole = take(iterator(source, edit_rate=0.5), 4)
    parts = [
        take(iterator(source, process_index=i, process_count=2, edit_rate=0.5), 4) for i in (0, 1)
    ]
    for i in (0, 1):
        np.testing.assert_array_equal(indices(parts[i]), indices(whole)[i::2])
        # The random edits too belong to the example, not to the process that makes it.
        ids = np.concatenate([batch["ids"] for batch in parts[i]])
        np.testing.assert_array_equal(ids, np.concatenate([b["ids"] for b in whole])[i::2])


def test_order_follows_from_the_seed_whatever_the_threads():
    first = take(iterator(NumberedSource(32), threads=1, edit_rate=0.5), 3)
    again = take(iterator(NumberedSource(32), threads=4, prefetch=2, edit_rate=0.5), 3)
    other = take(iterator(NumberedSource(32), seed=1), 3)
    for a, b in zip(first, again, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert not np.array_equal(indices(first), indices(other))


def test_state_resumes_exactly():
    original = iterator(NumberedSource(20), edit_rate=0.5)
    take(original, 4)
    state = original.get_state()
    expected = take(original, 3)
    resumed = iterator(NumberedSource(20), edit_rate=0.5)
    resumed.set_state(state)
    for a, b in zip(expected, take(resumed, 3), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_captions_are_drawn_at_random():
    batches = iterator(NumberedSource(64), edit_rate=0.0)
    ids = np.concatenate([batch["ids"] for batch in take(batches, 8)])
    assert len(np.unique(ids, axis=0)) == 2


def test_full_augmentation_gives_the_right_shape():
    batch = next(iterator(NumberedSource(8), autoaugment=True, crop_area=(0.5, 1.0)))
    assert batch["image"].shape == (8, 16, 16, 3)


def test_a_corrupt_image_is_named():
    with pytest.raises(UserError, match="Cannot decode number 5"):
        take(iterator(NumberedSource(16, corrupt=5)), 2)
