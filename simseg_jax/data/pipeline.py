"""Source -> shuffled, sharded, augmented, tokenised batches, as a Grain iterator with state."""

from collections.abc import Iterator

import grain
import numpy as np

from simseg_jax.data.augment import autoaugment, decode_image, random_resized_crop, resize
from simseg_jax.data.text import TextEncoder


class PrepareExample(grain.transforms.RandomMap):
    """Source example -> {"image": uint8 [S, S, 3], "ids": int32 [T], "mask": bool [T]}."""

    def __init__(self, data, image_size: int, encoder: TextEncoder):
        self.data, self.image_size, self.encoder = data, image_size, encoder

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        data = self.data
        image = decode_image(element["image"], element.get("name", "a training image"))
        if tuple(data.crop_area) != (1.0, 1.0):
            image = random_resized_crop(
                image, self.image_size, data.crop_area, data.crop_aspect, rng
            )
        if data.autoaugment:
            image = autoaugment(image, rng)
        captions = element["captions"]
        ids, mask = self.encoder(captions[rng.integers(len(captions))], rng)
        return {"image": resize(image, self.image_size), "ids": ids, "mask": mask}


def train_iterator(
    source,
    data,
    *,
    image_size: int,
    batch_size: int,
    encoder: TextEncoder,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Endless batches of this process's share of every global batch.

    data: `config.data`. batch_size: the global one. The order and every random draw follow from
    (seed, position) alone; `get_state()` / `set_state()` resume exactly.
    """
    pairs = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # Draws belong to the position in the whole stream: the same whatever the number of processes.
    pairs = pairs.random_map(PrepareExample(data, image_size, encoder))
    pairs = pairs[process_index::process_count]
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    batches = pairs.to_iter_dataset(options).batch(batch_size // process_count)
    if data.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    return iter(batches)
