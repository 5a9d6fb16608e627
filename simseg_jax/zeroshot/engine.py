"""Runs a protocol over a stream of images: decoding, device and host work overlap.

Used by the evaluators and by `segment`. Every process works on its own images with its own devices,
so that processes need not agree on anything before the end.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from PIL import Image

from simseg_jax.runtime.settings import leaves, plain
from simseg_jax.runtime.threads import ahead, thread_count
from simseg_jax.zeroshot.classifier import class_embedder, tokenize_prompts
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.paper import PaperProtocol
from simseg_jax.zeroshot.prompts import TEMPLATES
from simseg_jax.zeroshot.settings import SegmentationConfig
from simseg_jax.zeroshot.standard import StandardProtocol

PROTOCOLS = {"paper": PaperProtocol, "standard": StandardProtocol}


def before_encoder(settings: SegmentationConfig) -> tuple:
    """The settings that decide what the encoder sees: all those of an `Engine` share them."""
    after = PROTOCOLS[settings.protocol].after_encoder
    return tuple(item for item in leaves(plain(settings)) if item[0].split(".")[0] not in after)


# What a stream holds: something to keep, its image, and (height, width) of the mask wanted; or
# nothing, if there is no image to be had.
Job = Callable[[], tuple[Any, Image.Image, tuple[int, int]] | None]


class Engine:
    """Masks of any images for fixed classes, under V settings at once.

    settings: they share what reads and encodes an image (`before_encoder`). names: the prompt names
    of every class, those of the background first. background: whether the test set has that class;
    label 0 means "none" otherwise.
    """

    def __init__(
        self,
        model: Model,
        settings: Sequence[SegmentationConfig],
        names: Sequence[Sequence[str]],
        background: bool = True,
    ):
        first = settings[0]
        if len(set(map(before_encoder, settings))) > 1:
            raise ValueError("The settings may differ only in what follows the encoder.")
        self.settings, self.mesh = settings, model.local_mesh
        # Every device gets as many images; results do not depend on it.
        self.batch_size = -(-first.batch_size // self.mesh.size) * self.mesh.size
        self.threads = thread_count(first.threads)
        self.prompts = tokenize_prompts(model.encoder, names, TEMPLATES[first.prompts])
        self.embed_classes = class_embedder(model)
        self.protocol = PROTOCOLS[first.protocol](model, settings, background)

    def embed(self, params) -> dict[int, jax.Array]:
        """Class embeddings [C, D] for every M^T of the settings; params: on `self.mesh`."""
        with jax.set_mesh(self.mesh):
            sizes = sorted({settings.m_text for settings in self.settings})
            return {m: self.embed_classes(params, self.prompts, m) for m in sizes}

    def run(
        self,
        params,
        jobs: Iterable[Job],
        class_embeddings: dict[int, jax.Array],
        in_order: bool = False,
        pixels: Callable[[Job], int] = lambda _job: 0,
    ) -> Iterator[tuple[list, np.ndarray, list]]:
        """Yields (n things kept, masks [V, n, ...], V responses) until all jobs are done.

        Masks become labels of the image's pixels by `protocol.restore`. Images that need the same
        program meet in a batch, which changes their order unless it must be kept. params and
        class_embeddings: on `self.mesh`. pixels: those of a job's image; the jobs that run at a
        time have PIXELS_AHEAD together at most, or are one.
        """
        running: deque[tuple[list, Any]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            loaded = ahead(pool, self._load, jobs, 2 * self.batch_size, pixels)
            try:
                for kept, batch in self._batches(filter(None, loaded), in_order):
                    with jax.set_mesh(self.mesh):
                        running.append((kept, self.protocol.start(params, class_embeddings, batch)))
                    if len(running) > 1:
                        # While the device is busy with the next batch.
                        yield self._finish(*running.popleft())
                while running:
                    yield self._finish(*running.popleft())
            finally:  # Whoever stops early does not wait for images that nobody wants.
                pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, job: Job) -> tuple[Any, dict[str, np.ndarray]] | None:
        loaded = job()
        if loaded is None:
            return None
        kept, image, shape = loaded
        return kept, self.protocol.load(image, shape)

    def _finish(self, kept: list, started) -> tuple[list, np.ndarray, list]:
        with jax.set_mesh(self.mesh):
            masks, responses = self.protocol.finish(started)
        keep = slice(len(kept))
        return kept, masks[:, keep], [response.rows(keep) for response in responses]

    def _batches(self, loaded: Iterable, in_order: bool) -> Iterator[tuple[list, dict]]:
        waiting: dict[tuple, list] = {}
        for kept, arrays in loaded:
            shapes = tuple(array.shape for array in arrays.values())
            if in_order and waiting and shapes not in waiting:
                yield self._stack(waiting.popitem()[1])
            group = waiting.setdefault(shapes, [])
            group.append((kept, arrays))
            if len(group) == self.batch_size:
                yield self._stack(waiting.pop(shapes))
        for group in waiting.values():
            yield self._stack(group)

    def _stack(self, group: list) -> tuple[list, dict[str, np.ndarray]]:
        # Few sizes, hence few programs: a power of two times the devices.
        rows = self.mesh.size
        while rows < len(group):
            rows *= 2
        rows = min(rows, self.batch_size)
        batch = {}
        for name, first in group[0][1].items():
            batch[name] = np.zeros((rows, *first.shape), first.dtype)
            for row, (_, arrays) in zip(batch[name], group, strict=False):
                row[:] = arrays[name]
        return [kept for kept, _ in group], batch
