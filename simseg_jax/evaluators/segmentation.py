"""Zero-shot segmentation of a benchmark: mean IoU and the IoU of every class."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from simseg_jax.data.augment import decode_image, resize
from simseg_jax.data.benchmarks import segmentation_source
from simseg_jax.data.text import TextEncoder
from simseg_jax.errors import UserError
from simseg_jax.masks.postprocess import resize_nearest
from simseg_jax.masks.protocols import paper_protocol
from simseg_jax.metrics import class_iou, confusion_matrix, mean_iou
from simseg_jax.sharding import local_rows, to_global_batch
from simseg_jax.zeroshot.classifier import class_embedder, tokenize_prompts
from simseg_jax.zeroshot.prompts import TEMPLATES


class SegmentationEvaluator:
    """One entry of `config.evals.seg`; results do not depend on batch size or device count."""

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh, encoder: TextEncoder, settings):
        self.mesh, self.settings = mesh, settings
        self.source = segmentation_source(settings)
        self.class_names = self.source.class_names
        count = len(self.source)
        self.count = min(settings.limit, count) if settings.limit else count
        if not self.count:
            raise UserError(f"The benchmark {settings.data} in {settings.root!r} has no images.")
        if settings.batch_size % mesh.size:
            raise UserError(
                f"An evaluation's batch_size={settings.batch_size} must be a multiple of the "
                f"number of devices, which is {mesh.size}."
            )
        templates = TEMPLATES[settings.prompts]
        self.prompts = tokenize_prompts(encoder, self.class_names, templates)
        self.embed = class_embedder(graphdef, settings.m_text, mesh.size)
        self.predict = paper_protocol(graphdef, settings)

    def run(self, params, progress=iter) -> Iterator[tuple[str, float]]:
        """Yields ("miou", fraction) and ("iou/<class>", fraction) for classes that occur.

        progress: wraps the iterator over batches, to show a bar.
        """
        classes = len(self.class_names)
        confusion = np.zeros((classes, classes), np.int64)
        for examples, masks, _ in self.predictions(params, progress):
            for example, mask in zip(examples, masks, strict=True):
                truth = example["mask"]
                confusion += confusion_matrix(resize_nearest(mask, *truth.shape), truth, classes)
        if jax.process_count() > 1:
            confusion = multihost_utils.process_allgather(confusion).sum(axis=0)
        yield "miou", mean_iou(confusion)
        for name, iou in zip(self.class_names, class_iou(confusion), strict=True):
            if np.isfinite(iou):
                yield f"iou/{name}", float(iou)

    def predictions(self, params, progress=iter, count: int | None = None):
        """Yields (examples, index masks [n, S, S], response of n rows) per batch of this process.

        While the device computes one batch, threads decode the next.
        """
        class_embeddings = self.embed(params, *self.prompts)
        processes = jax.process_count()
        local_batch = self.settings.batch_size // processes
        count = self.count if count is None else min(count, self.count)
        indices = range(jax.process_index(), count, processes)
        # Every process runs as many batches as the one with the most images.
        batches = range(math.ceil(math.ceil(count / processes) / local_batch))
        size = self.settings.resolution
        with ThreadPoolExecutor(4) as pool:

            def fetch(i: int) -> Iterator[tuple[dict, np.ndarray]]:
                return pool.map(self._load, indices[i * local_batch : (i + 1) * local_batch])

            upcoming = fetch(0)
            for i in progress(batches):
                loaded, upcoming = list(upcoming), fetch(i + 1)
                images = np.zeros((local_batch, size, size, 3), np.uint8)
                for row, (_, image) in enumerate(loaded):
                    images[row] = image
                batch = to_global_batch(images, self.mesh)
                masks, response = self.predict(params, class_embeddings, batch)
                examples = [example for example, _ in loaded]
                masks, response = jax.tree.map(local_rows, (masks, response))
                keep = slice(len(examples))
                yield examples, masks[keep], response.rows(keep)

    def _load(self, index: int) -> tuple[dict, np.ndarray]:
        example = self.source[index]
        image = decode_image(example["image"], example["name"])
        return example, resize(image, self.settings.resolution)
