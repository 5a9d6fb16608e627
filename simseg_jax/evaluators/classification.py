"""Zero-shot classification: the class whose embedding is nearest to the image (paper, table 8)."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from simseg_jax.data.testsets.labelled import class_prompts, labelled_source, loader
from simseg_jax.evaluators.embedding import EmbeddingConfig, ImageEmbedder
from simseg_jax.evaluators.metrics import top_accuracy
from simseg_jax.runtime.ranges import SCENES, TEXT, one_of
from simseg_jax.runtime.settings import setting
from simseg_jax.runtime.sharding import local_params
from simseg_jax.zeroshot.classifier import class_embedder, tokenize_prompts
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.prompts import TEMPLATES


@dataclasses.dataclass(frozen=True)
class ClassificationConfig(EmbeddingConfig):
    """One entry of `evals.classification`: images with one class each."""

    data: str = setting(
        "folder",
        "folder: ROOT/SPLIT/CLASS/IMAGE or a TFDS folder; shapes: generated",
        one_of("folder", "shapes"),
    )
    root: str = setting("", "folder of the data", TEXT)
    split: str = setting("", "subfolder, or split of the TFDS or generated data", TEXT)
    names: str = setting(
        "auto",
        "auto: CLIP's names for ImageNet, else the folders'; or a file of `class: name, name`",
        TEXT,
    )
    prompts: str = setting(
        "imagenet", "templates: imagenet (the 80 of CLIP), plain, shapes", one_of(*TEMPLATES)
    )
    size: int = setting(256, "shapes: number of scenes", SCENES)


class ClassificationEvaluator:
    """Top-1 and top-5 accuracy on images with one class each."""

    headline = "top1"

    def __init__(self, model: Model, settings: ClassificationConfig):
        self.settings, self.mesh = settings, model.local_mesh
        self.source = labelled_source(settings)
        self.count = min(len(self.source), settings.limit or len(self.source))
        names = class_prompts(self.source.classes, settings.names)
        self.prompts = tokenize_prompts(model.encoder, names, TEMPLATES[settings.prompts])
        self.embed_classes = class_embedder(model)
        self.embed_images = ImageEmbedder(model, settings, settings.batch_size)

    def run(self, params, progress: Callable[[Iterable], Iterable] = iter) -> Iterator[tuple]:
        """Yields ("top1", fraction) and ("top5", fraction)."""
        # A limited number is spread evenly, because the images may be sorted by class.
        indices = np.linspace(0, len(self.source) - 1, self.count).round().astype(int)
        load = loader(self.source)
        images, labels = self.embed_images(params, indices.tolist(), load, progress)
        local = local_params(params, self.mesh)
        with jax.set_mesh(self.mesh):
            classes = self.embed_classes(local, self.prompts, self.settings.m_text)
        scores = images @ classes.T
        for k in (1, 5):
            yield f"top{k}", top_accuracy(scores, np.array(labels), k)
