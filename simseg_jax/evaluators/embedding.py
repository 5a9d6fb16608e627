"""One vector per image: the shared part of retrieval, classification and linear probing."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from simseg_jax.models.simseg import bind
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import BATCH, RESPONSES, SIDE, THREADS, one_of, whole
from simseg_jax.runtime.settings import setting
from simseg_jax.runtime.sharding import gather_bytes, local_params, to_global_batch
from simseg_jax.runtime.threads import ahead, thread_count
from simseg_jax.zeroshot.model import Model


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How images are resized, cropped and pooled."""

    resize: int = setting(324, "side in pixels to which images are resized", SIDE)
    crop: int = setting(288, "side in pixels of the central square that the model sees", SIDE)
    aspect: str = setting(
        "squash",
        "squash: resize to a square, as the authors do; keep: resize the shorter side",
        one_of("squash", "keep"),
    )
    m_image: int = setting(5, "M^I: responses per channel over patches", RESPONSES)
    threads: int = setting(0, "threads that decode; 0: one per core, at most 32", THREADS)

    def check_patches(self, patch_size: int, prefix: str = "") -> None:
        """Raises a `UserError` unless the crop is a multiple of the patch size and fits."""
        if self.crop % patch_size or self.crop > self.resize:
            raise UserError(
                f"{prefix}crop={self.crop} must be a multiple of the patch size, which is "
                f"{patch_size}, and at most {prefix}resize={self.resize}."
            )


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig(ImageConfig):
    """How images and their texts are embedded, and how many."""

    m_text: int = setting(1, "M^T: responses per channel over words, without padding", RESPONSES)
    limit: int = setting(0, "number of images; 0: all", whole(0))
    batch_size: int = setting(32, "images per batch over all devices of a process", BATCH)


def resize_and_crop(image: Image.Image, size: int, side: int, aspect: str = "squash") -> np.ndarray:
    """The central square of a resized image: uint8 [side, side, 3].

    aspect: "squash" resizes to size x size pixels, as the authors do; "keep" resizes the shorter
    side to `size`. Bilinear and antialiased; sizes are rounded as by torchvision's Resize and
    CenterCrop.
    """
    width, height = image.size
    if aspect == "squash":
        width, height = size, size
    else:
        short = min(width, height)
        width, height = (int(size * pixels / short) for pixels in (width, height))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


class ImageEmbedder:
    """Runs many images through the image encoder; results are the same for any batch or devices.

    batch_size: images at a time. feature: the vector of an image: "embedding" (pooled, projected,
    of unit length), or from the encoder's tokens after the final norm "cls" (the CLS token) or
    "mean" (the mean of the patches).
    """

    def __init__(
        self, model: Model, settings: ImageConfig, batch_size: int, feature: str = "embedding"
    ):
        self.mesh, self.settings, graphdef = model.local_mesh, settings, model.graphdef
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        self.threads = thread_count(settings.threads)

        def embed(params, images: jax.Array) -> jax.Array:
            network = bind(graphdef, params)
            images = network.normalize(images)
            if feature == "embedding":
                _, tokens = network.encode_image(images)
                return network.pool_image(tokens, settings.m_image)
            tokens = network.image_encoder(images).astype(jnp.float32)
            return tokens[:, 0] if feature == "cls" else tokens[:, 1:].mean(axis=1)

        self.embed = jax.jit(embed)

    def compile(self, params, images: jax.ShapeDtypeStruct) -> Iterator[tuple[str, Any]]:
        """The one compiled program, as `PaperProtocol.compile` yields several."""
        yield "encoder", self.embed.lower(params, images).compile()

    def __call__(
        self,
        params,
        indices: Sequence[int],
        load: Callable[[int], tuple[Image.Image, Any]],
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> tuple[np.ndarray, list]:
        """(vectors float32 [len(indices), D], one label per image), the same on every process.

        load(index) -> (image, its label: anything that JSON can hold).
        """
        share = indices[jax.process_index() :: jax.process_count()]
        params = local_params(params, self.mesh)
        labels: dict[int, Any] = {}

        def prepare(index: int) -> np.ndarray:
            image, labels[index] = load(index)
            seen = self.settings
            return resize_and_crop(image, seen.resize, seen.crop, seen.aspect)

        with ThreadPoolExecutor(self.threads) as pool, jax.set_mesh(self.mesh):
            loaded = ahead(pool, prepare, progress(share), 2 * self.batch_size)
            batches = iter(lambda: list(itertools.islice(loaded, self.batch_size)), [])
            started = (self._start(params, batch) for batch in batches)
            # A result is fetched while the device is busy with the next batch.
            pairs = itertools.pairwise(itertools.chain(started, [None]))
            parts = [np.asarray(vectors) for vectors, _next in pairs]
        # Without the rows that fill up the last batch. A process may have no images at all.
        own = np.concatenate(parts)[: len(share)] if parts else None
        everything = dict(
            item
            for part in gather_bytes(json.dumps(list(labels.items())).encode())
            for item in json.loads(part)
        )
        return _gathered(own, len(indices)), [everything[index] for index in indices]

    def _start(self, params, batch: list[np.ndarray]) -> jax.Array:
        images = np.zeros((self.batch_size, *batch[0].shape), np.uint8)
        images[: len(batch)] = batch
        return self.embed(params, to_global_batch(images, self.mesh))


def _gathered(own: np.ndarray | None, count: int) -> np.ndarray:
    """The vectors of all `count` images in order; of n processes each has every n-th one."""
    if jax.process_count() == 1:
        assert own is not None
        return own
    own = np.zeros((0, 0), np.float32) if own is None else own
    # A process without images learns the width from the others.
    width = int(multihost_utils.process_allgather(np.array(own.shape[1])).max())
    padded = np.zeros((-(-count // jax.process_count()), width), np.float32)
    padded[: len(own), : own.shape[1]] = own
    return multihost_utils.process_allgather(padded).swapaxes(0, 1).reshape(-1, width)[:count]
