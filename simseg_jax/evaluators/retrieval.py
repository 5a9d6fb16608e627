"""Image-text retrieval: R@1, R@5, R@10 in both directions and RSUM (paper, tables 6 and 7)."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from simseg_jax.data.images import decode_image
from simseg_jax.data.pairs import BadExample, PairsConfig, open_source
from simseg_jax.evaluators.embedding import EmbeddingConfig, ImageEmbedder
from simseg_jax.evaluators.metrics import recall_at
from simseg_jax.evaluators.ranking import nearest
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.settings import setting
from simseg_jax.runtime.sharding import local_params
from simseg_jax.zeroshot.classifier import text_embedder
from simseg_jax.zeroshot.model import Model

KS = (1, 5, 10)


class Ranked(NamedTuple):
    """nearest: from `ranking.nearest`; owners: the image of every text; texts: the captions."""

    nearest: tuple[np.ndarray, np.ndarray]
    owners: np.ndarray
    texts: list[str]


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(PairsConfig, EmbeddingConfig):
    """One entry of `evals.retrieval`: images and their captions."""

    captions: int = setting(5, "number of captions per image, the first ones; 0: all", whole(0))


class RetrievalEvaluator:
    """Every caption is searched among all images and every image among all captions.

    The search is exact; the first of ties wins. cache: folder for indexes and copies of the data,
    see `config.data.cache`.
    """

    headline = "rsum"

    def __init__(self, model: Model, settings: RetrievalConfig, cache: str = ""):
        self.settings, self.encoder, self.mesh = settings, model.encoder, model.local_mesh
        self.source = open_source(settings, cache)
        if self.source.problems:
            tqdm.write(f"{settings.path}: {len(self.source):,} images; {self.source.problems}")
        self.count = min(len(self.source), settings.limit or len(self.source))
        self.embed_images = ImageEmbedder(model, settings, settings.batch_size)
        self.embed_texts = text_embedder(model)

    def run(self, params, progress: Callable[[Iterable], Iterable] = iter) -> Iterator[tuple]:
        """Yields ("i2t/r@1", fraction), ..., ("rsum", sum of the six recalls in percent)."""
        yield from scores(self.rank(params, progress))

    def rank(self, params, progress: Callable[[Iterable], Iterable] = iter) -> Ranked:
        """The nearest captions and images; `scores` computes the results from them."""

        def load(index: int):
            try:
                example = self.source[index]
            except BadExample as error:
                raise UserError(
                    f"{error} Remove it from the test set or replace the file."
                ) from error
            image = decode_image(example["image"], str(example["name"]))
            return image, example["captions"][: self.settings.captions or None]

        images, used = self.embed_images(params, range(self.count), load, progress)
        owners = np.repeat(np.arange(self.count), [len(captions) for captions in used])
        texts = [caption for captions in used for caption in captions]
        ids, mask = self.encoder.batch(texts)
        local = local_params(params, self.mesh)
        with jax.set_mesh(self.mesh):
            embedded = self.embed_texts(local, ids, mask, self.settings.m_text)
        return Ranked(nearest(images, embedded, max(KS)), owners, texts)


def scores(ranked: Ranked) -> Iterator[tuple[str, float]]:
    """The results of `RetrievalEvaluator.run`."""
    recalls = {k: recall_at(ranked.nearest, ranked.owners, k) for k in KS}
    for direction, name in enumerate(("i2t", "t2i")):
        for k in KS:
            yield f"{name}/r@{k}", recalls[k][direction]
    yield "rsum", 100 * sum(sum(both) for both in recalls.values())
