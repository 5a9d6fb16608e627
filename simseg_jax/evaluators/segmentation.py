"""Zero-shot segmentation of a test set: a record per image, and mean IoU over all images."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm import tqdm

from simseg_jax.data.images import decode_image
from simseg_jax.data.testsets.classes import prompt_names
from simseg_jax.data.testsets.segmentation import segmentation_source
from simseg_jax.evaluators.localisation import masks_of_given, pointing_game
from simseg_jax.evaluators.measures import Quotients, measures
from simseg_jax.evaluators.metrics import class_iou, confusion_matrix
from simseg_jax.evaluators.records import Record, gather, total_confusion
from simseg_jax.masks.postprocess import resize_nearest
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.files import digest
from simseg_jax.runtime.sharding import local_params
from simseg_jax.runtime.threads import ahead
from simseg_jax.zeroshot.engine import Engine
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.settings import SegmentationConfig


class SegmentationEvaluator:
    """A test set under one or several settings, which may differ in what follows the encoder.

    Labels of classes count from 1. Label 0 is the background, or "no class" in test sets without a
    background. Results do not depend on batch size, devices or processes. images: (name, stamp) of
    each image. inputs: a digest of the class names and their tokenised prompts.
    """

    headline = "miou"

    def __init__(self, model: Model, *several: SegmentationConfig):
        self.several, self.settings = several, several[0]
        settings = self.settings
        self.source = segmentation_source(settings)
        names = prompt_names(settings)
        self.class_names = self.source.class_names
        self.background = self.source.background
        if not self.background:
            names, self.class_names = (("background",), *names), ("none", *self.class_names)
        # Stamps are taken before the files are read: the next job notices a change in between.
        count = settings.limit or None
        self.images = [(n, self.source.stamp(i)) for i, n in enumerate(self.source.names[:count])]
        self.count = len(self.images)
        if not self.count:
            raise UserError(f"The test set {settings.data} in {settings.root!r} has no images.")
        self._require_labels()
        self._require_candidates()
        self.engine = Engine(model, several, self.background, maps=True)
        self.prompts = self.engine.prompts(names)
        prompts = [array.tolist() for array in self.prompts]
        self.inputs = digest([self.class_names, prompts])
        self._embedded: tuple = (None, None)  # The latest parameters and their class embeddings.
        self._said = False  # Whether the message about turned masks was printed.

    def run(self, params, progress: Callable[[Iterable], Iterable] = iter):
        """Yields the `results` of all images. progress: wraps the iterator over images, for a bar.

        All processes must call this together.
        """
        records = gather(self.records(params, progress=progress))
        yield from self.results(self.measures(list(records.values())))

    def measures(self, records: Sequence[Record]) -> dict[str, Quotients]:
        """The measures of records under their first settings, see `evaluators.measures`."""
        return measures(records, len(self.class_names), self.background)

    def results(self, found: Mapping[str, Quotients]) -> Iterator[tuple[str, float]]:
        """Of the `measures`: ("miou", fraction), ("miou_given", ...), ("pointing", ...), and
        ("iou/<class>", ...) of the classes that occur.
        """
        yield from ((name, float(measure.mean(measure.once))) for name, measure in found.items())
        ious = found["miou"].of_classes(found["miou"].once)
        for name, iou in zip(self.class_names, ious, strict=True):
            if np.isfinite(iou):
                yield f"iou/{name}", float(iou)

    def confusion(self, records: Iterable[Record], number: int = 0) -> np.ndarray:
        """Pixels int64 [C, C] of all records, see `records.total_confusion`."""
        return total_confusion(records, len(self.class_names), number)

    def ious(self, confusion: np.ndarray) -> np.ndarray:
        """IoU of every class [C]; NaN for classes that do not occur and for "no class"."""
        ious = class_iou(confusion)
        if not self.background:
            ious[0] = np.nan
        return ious

    def records(
        self,
        params,
        indices: Sequence[int] | None = None,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> Iterator[Record]:
        """One record per image in this process's share of `indices` (by default all images)."""
        indices = range(self.count) if indices is None else indices
        share = indices[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor(self.engine.threads) as pool:

            def finished() -> Iterator[tuple]:
                for examples, masks, responses in self._run(params, progress(share)):
                    for i, example in enumerate(examples):
                        scores = [response.scores[i] for response in responses]
                        yield example, masks[:, i], scores, responses[0].maps[i]

            yield from ahead(pool, self._record, finished(), 2 * self.settings.batch_size)
        if self.source.turned and not self._said:
            self._said = True
            tqdm.write(
                f"Masks turned upright with their images: {len(self.source.turned)}, of "
                f"{some(sorted(self.source.turned))}. Their size does not tell whether they were "
                "upright already: if so, store these images upright, without an EXIF orientation."
            )

    def predictions(self, params, indices: Sequence[int]) -> Iterator[tuple]:
        """For pictures: (example, labels [H, W] per setting, response to the first setting)."""
        for examples, masks, responses in self._run(params, indices, in_order=True):
            for i, example in enumerate(examples):
                shape = example["mask"].shape
                labels = [self.engine.protocol.restore(mask, shape) for mask in masks[:, i]]
                yield example, labels, responses[0].rows(i)

    def _run(self, params, indices: Iterable[int], in_order: bool = False):
        local = local_params(params, self.engine.mesh)
        if self._embedded[0] is not params:
            # Embedding thousands of prompts takes time; pictures reuse the evaluation's embeddings.
            self._embedded = params, self.engine.embed(local, self.prompts)
        jobs = (lambda index=index: self._load(index) for index in indices)
        return self.engine.run(local, jobs, self._embedded[1], in_order)

    def _load(self, index: int):
        example = self.source[index]
        mask = example["mask"]
        if not self.background:
            mask = np.where(mask == 255, mask, mask + 1)
        image = decode_image(example["image"], example["name"])
        return {**example, "mask": mask, "index": index}, image, mask.shape

    def _record(self, finished: tuple) -> Record:
        example, masks, scores, maps = finished
        truth = example["mask"]
        counts = [
            self._counts(self.engine.protocol.restore(mask, truth.shape), truth) for mask in masks
        ]
        maps = self.engine.protocol.restore_maps(maps, truth.shape)
        shown = np.setdiff1d(truth, (0, 255))
        given = masks_of_given(maps, scores[0], shown, self.background)
        given = self._counts(resize_nearest(given, *truth.shape), truth)
        points = pointing_game(maps, truth, shown)
        scores = [np.where(np.isfinite(s), s, np.nan) for s in scores]
        name, stamp = self.images[example["index"]]
        return Record(name, stamp, counts, scores, given, points)

    def _counts(self, labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Rows (true label, predicted label, pixels) [n, 3] of all pairs of labels that occur."""
        confusion = confusion_matrix(labels, truth, len(self.class_names))
        pairs = np.argwhere(confusion)
        return np.concatenate([pairs, confusion[confusion > 0][:, None]], axis=1)

    def _require_candidates(self) -> None:
        """Refuses a threshold above the scores of any image, which few classes allow."""
        classes = len(self.class_names) - (not self.background)
        # The largest of n numbers exceeds their mean by at most this many standard deviations.
        most = (classes - 1) / math.sqrt(classes)
        for each in self.several:
            few = each.protocol == "paper" and classes < each.class_scores
            if few and each.sigma_weight >= most:
                raise UserError(
                    f"With the {classes} classes of {self.settings.root!r} no score reaches the "
                    f"threshold, mean + {each.sigma_weight:g} * standard deviation: set "
                    f"sigma_weight below {most:.2g}, such as {most / 2:.1g}, or protocol=standard."
                )

    def _require_labels(self) -> None:
        """Refuses a test set without a labelled pixel. It usually reads just one mask."""
        if not any((self.source[index]["mask"] != 255).any() for index in range(self.count)):
            raise UserError(
                f"The test set {self.settings.data} in {self.settings.root!r} has no labelled "
                "pixel: its masks are 255 (ignored) everywhere."
            )
