"""Runs a protocol over a stream of images; decoding, device work and host work overlap.

The evaluators and `segment` use it. Every process works on its own images with its own devices, so
that processes need not communicate before the end.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from PIL import Image

from simseg_jax.runtime.settings import leaves, plain
from simseg_jax.runtime.sharding import replicated
from simseg_jax.runtime.threads import ahead, thread_count
from simseg_jax.zeroshot.classifier import Prompts, class_embedder, tokenize_prompts
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.paper import PaperProtocol
from simseg_jax.zeroshot.prompts import TEMPLATES
from simseg_jax.zeroshot.settings import SegmentationConfig
from simseg_jax.zeroshot.standard import StandardProtocol

PROTOCOLS = {"paper": PaperProtocol, "standard": StandardProtocol}


def before_encoder(settings: SegmentationConfig) -> tuple:
    """The values of all settings that affect the encoder; they are equal within an `Engine`."""
    after = PROTOCOLS[settings.protocol].after_encoder
    return tuple(item for item in leaves(plain(settings)) if item[0].split(".")[0] not in after)


# Loads one image: (anything to return with the result, image, (height, width) of the mask), or None
# to leave it out.
Job = Callable[[], tuple[Any, Image.Image, tuple[int, int]] | None]


class Engine:
    """Masks of any images for any classes, under V settings in one pass over the images.

    settings: differ only in what follows the encoder (`before_encoder`). background: whether the
    test set has a background class; otherwise label 0 means "none". maps: see `PaperProtocol`.
    """

    def __init__(
        self,
        model: Model,
        settings: Sequence[SegmentationConfig],
        background: bool = True,
        maps: bool = False,
    ):
        first = settings[0]
        if len(set(map(before_encoder, settings))) > 1:
            raise ValueError("The settings may differ only in what follows the encoder.")
        self.settings, self.encoder, self.mesh = settings, model.encoder, model.local_mesh
        # Rounded up: every device gets the same number of images. Results do not depend on it.
        self.batch_size = -(-first.batch_size // self.mesh.size) * self.mesh.size
        self.threads = thread_count(first.threads)
        self.embed_classes = class_embedder(model)
        self.protocol = PROTOCOLS[first.protocol](model, settings, background, maps)

    def prompts(self, names: Sequence[Sequence[str]]) -> Prompts:
        """The prompts of C classes; names: the names of every class, the background first."""
        return tokenize_prompts(self.encoder, names, TEMPLATES[self.settings[0].prompts])

    def embed(self, params, prompts: Prompts) -> dict[int, np.ndarray]:
        """M^T -> class embeddings [C, D], for every M^T in the settings; params: on `self.mesh`."""
        with jax.set_mesh(self.mesh):
            sizes = sorted({settings.m_text for settings in self.settings})
            return {m: self.embed_classes(params, prompts, m) for m in sizes}

    def run(
        self,
        params,
        jobs: Iterable[Job],
        class_embeddings: Mapping[int, np.ndarray],
        in_order: bool = False,
        pixels: Callable[[Job], int] = lambda _job: 0,
    ) -> Iterator[tuple[list, np.ndarray, list]]:
        """Yields (first items of n jobs, masks [V, n, ...], V responses) until all jobs are done.

        `protocol.restore` turns a mask into labels of the image's pixels. A batch holds images of
        the same shapes, which changes their order unless `in_order`. params: on `self.mesh`.
        class_embeddings: M^T -> [C, D], the background first; rows of zeros are no classes.
        pixels(job): the size of its image, which bounds the jobs that load at a time, see
        `threads.ahead`.
        """
        classes = jax.device_put(dict(class_embeddings), replicated(self.mesh))
        with ThreadPoolExecutor(self.threads) as pool:
            loaded = ahead(pool, self._load, jobs, 2 * self.batch_size, pixels)
            started = (
                (kept, self._start(params, classes, batch))
                for kept, batch in self._batches(filter(None, loaded), in_order)
            )
            try:
                # The host finishes a batch while the device is busy with the next one.
                for batch, _next in itertools.pairwise(itertools.chain(started, [([], None)])):
                    yield self._finish(*batch)
            finally:  # A caller that stops early does not wait for images that nobody wants.
                pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, job: Job) -> tuple[Any, dict[str, np.ndarray]] | None:
        loaded = job()
        if loaded is None:
            return None
        kept, image, shape = loaded
        return kept, self.protocol.load(image, shape)

    def _start(self, params, class_embeddings: dict[int, jax.Array], batch: dict) -> Any:
        with jax.set_mesh(self.mesh):
            return self.protocol.start(params, class_embeddings, batch)

    def _finish(self, kept: list, started) -> tuple[list, np.ndarray, list]:
        with jax.set_mesh(self.mesh):
            masks, responses = self.protocol.finish(started)
        keep = slice(len(kept))
        return kept, masks[:, keep], [response.rows(keep) for response in responses]

    def _batches(self, loaded: Iterable, in_order: bool) -> Iterator[tuple[list, dict]]:
        """Groups images whose arrays have the same shapes; in_order: only neighbours."""
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
        # Padded to few sizes, so that few programs are compiled: devices times a power of two.
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
