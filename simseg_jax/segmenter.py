"""Images and words -> masks, in Python: the `Segmenter` class."""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from simseg_jax.config import first_segmentation
from simseg_jax.data.images import Picture, decode_image, open_image
from simseg_jax.data.pipeline import DataConfig
from simseg_jax.data.testsets.classes import prompt_names
from simseg_jax.data.words import check_words, distinct, token_ids
from simseg_jax.evaluators.embedding import EmbeddingConfig, ImageEmbedder
from simseg_jax.masks.postprocess import label_type
from simseg_jax.reports.segmentation import Segmentation
from simseg_jax.reports.visualize import labels_in
from simseg_jax.runtime import remote
from simseg_jax.runtime.command_line import add_setting
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.settings import changed, typed
from simseg_jax.weights.load import TrainedModel, load_model
from simseg_jax.zeroshot.classifier import text_embedder, unknown_words
from simseg_jax.zeroshot.engine import Engine
from simseg_jax.zeroshot.paper import PaperProtocol, Response
from simseg_jax.zeroshot.settings import SegmentationConfig

Source = Picture | str  # A string is a path or an address.
PROTOCOL_OPTIONS = {
    "refine": "mask refinement",
    "resolution": "side in pixels the model sees",
    "sigma_weight": "higher: fewer words are drawn",
}
ROOM = 32  # Numbers of classes are rounded up to this times a power of two.
KEPT = 1 << 16  # Words whose embeddings are kept.


class Classes(NamedTuple):
    """The words of one call and their unit-length embeddings float32 [C, D].

    The first of the C classes is the background, then come words and contrast words.
    """

    words: tuple[str, ...]
    contrast: tuple[str, ...]
    embeddings: np.ndarray

    @property
    def names(self) -> list[str]:
        """The C names."""
        return ["background", *self.words, *self.contrast]


class Segmenter:
    """Segments images with any words by the paper's zero-shot protocol.

    model: what `load_model` returns; `Segmenter.from_pretrained` loads it. max_pixels: larger
    images are refused. maps: whether results hold similarity maps. settings: changes to the
    protocol settings of the checkpoint's first test set, such as refine="crf". Threads may share a
    segmenter. Words may change with every call: a program is compiled for the first 31 of them, and
    for twice as many whenever they are more.
    """

    def __init__(
        self,
        model: TrainedModel,
        max_pixels: int = DataConfig.max_pixels,
        maps: bool = True,
        **settings,
    ):
        self.model = model
        self.max_pixels = typed(DataConfig, {"max_pixels": max_pixels}).max_pixels
        self.settings = changed(first_segmentation(model.config), settings)
        self.settings.check_patches(model.patch_size)
        self.engine = Engine(model, [self.settings], maps=maps)
        self._embeddings: dict[str, np.ndarray] = {}  # Of words that were used before.
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, source: str | Path, step: int | None = None, **options) -> "Segmenter":
        """A segmenter with the model of `load_model(source, step)`: the --workdir of a run, a
        folder that `convert` wrote, its address, or "owner/name" on the hub.

        options: further arguments of `Segmenter`.
        """
        return cls(load_model(source, step), **options)

    def with_sigma_weight(self, sigma_weight: float) -> "Segmenter":
        """This segmenter with another threshold; both share embeddings and compiled programs."""
        other, engine = copy.copy(self), copy.copy(self.engine)
        other.settings = changed(self.settings, {"sigma_weight": sigma_weight})
        other.engine, engine.settings = engine, [other.settings]
        engine.protocol = copy.copy(engine.protocol)
        if isinstance(engine.protocol, PaperProtocol):
            engine.protocol.sigma_weights = np.array([sigma_weight], np.float32)
        return other

    def __call__(
        self,
        images: Source | Iterable[Source],
        words: Sequence[str],
        contrast: Sequence[str] | None = None,
    ) -> Segmentation | list[Segmentation]:
        """The result for one image, or a list of results for several; see `segment`."""
        several = _several(images)
        if several is None:
            one: list[Any] = [images]
            return next(self.segment(one, words, contrast))
        return list(self.segment(several, words, contrast))

    def segment(
        self,
        images: Iterable[Source],
        words: Sequence[str],
        contrast: Sequence[str] | None = None,
    ) -> Iterator[Segmentation]:
        """Yields one `Segmentation` per image, in order; images are read when they are needed.

        images: paths, addresses (https://, gs://, s3://), contents of image files, Pillow images of
        any mode, or arrays as `data.images.from_array` takes them. All are read as viewers show
        them: upright, transparency on white. A `UserError` names an image that cannot be read.
        words: what to look for; a string is one word. contrast: further words that count towards
        the threshold and claim their regions but are never drawn; by default the class names of the
        checkpoint's first test set that are not among the words.
        """
        several = _several(images)
        if several is None:
            raise UserError("Give segment() a list of images, for one image segment([image], ...).")
        answers = self.answers(several, self.classes(words, contrast))
        return (answer for _, answer in answers)

    def classes(self, words: Sequence[str], contrast: Sequence[str] | None = None) -> Classes:
        """Checks the words of a call and embeds those that are new."""
        encoder = self.model.encoder
        words = check_words(words)
        unknown = unknown_words(encoder, words)
        if unknown:
            raise UserError(
                f"The vocabulary of the model knows no word of: {some(unknown)}. Name others."
            )
        tokens = distinct(encoder, ("background", *words))
        if contrast is None:
            others = words_of(self.settings)
            contrast = tuple(w for w in others if token_ids(encoder, w) not in tokens)
        else:
            contrast = check_words(contrast, "contrast")
            distinct(encoder, ("background", *words, *contrast))
        names = ["background", *words, *contrast]
        if len(names) > KEPT:
            raise UserError(f"At most 65,535 words and contrast words, not {len(names) - 1:,}.")
        return Classes(words, contrast, self._embed(names))

    def _embed(self, names: list[str]) -> np.ndarray:
        with self._lock:
            if len(self._embeddings) + len(names) > 2 * KEPT:
                self._embeddings.clear()
            new = [name for name in names if name not in self._embeddings]
            if new:
                prompts = self.engine.prompts([(name,) for name in new])
                embeddings = self.engine.embed(self.model.params, prompts)[self.settings.m_text]
                self._embeddings.update(zip(new, embeddings, strict=True))
            return np.stack([self._embeddings[name] for name in names])

    def answers(
        self,
        images: Iterable[Source],
        classes: Classes,
        left_out: Callable[[int, UserError], None] | None = None,
    ) -> Iterator[tuple[int, Segmentation]]:
        """`segment` with the index of every image; classes: what `self.classes` returned.

        left_out: called with the index and the error of an image that cannot be read, instead of
        raising the error.
        """
        jobs = (
            functools.partial(self._read, place, image, left_out)
            for place, image in enumerate(images)
        )
        room = ROOM
        while room < len(classes.embeddings):
            room *= 2
        padded = np.pad(classes.embeddings, ((0, room - len(classes.embeddings)), (0, 0)))
        for batch, masks, (response,) in self.engine.run(
            self.model.params,
            jobs,
            {self.settings.m_text: padded},
            in_order=True,
            pixels=lambda job: _pixels(job.args[1]),
        ):
            for i, (place, picture, name, shape) in enumerate(batch):
                result = self._result(shape, masks[0, i], response.rows(i), classes)
                yield place, Segmentation(**result, picture=picture, name=name)

    def _read(self, place: int, source: Source, left_out: Callable | None) -> tuple | None:
        name = _name(source, place)
        try:
            picture = _opened(source)
            image = decode_image(picture, name, self.max_pixels)
        except UserError as error:
            if left_out is None:
                raise
            return left_out(place, error)
        shape = (image.height, image.width)
        return (place, picture, name, shape), image, shape

    def _result(
        self, shape: tuple[int, int], mask: np.ndarray, response, classes: Classes
    ) -> dict[str, Any]:
        protocol, count = self.engine.protocol, len(classes.words)
        mask = np.where(mask > count, 0, mask).astype(label_type(1 + count))
        mask = protocol.restore(mask, shape)
        threshold = None
        if isinstance(response, Response):
            drawn = {int(c) for c, d in zip(response.classes, response.drawn, strict=True) if d}
            threshold = float(response.threshold)
        else:
            drawn = set(labels_in(mask))
        names = classes.names[1:]
        maps = []
        if response.maps is not None:
            # A copy, so that a result does not keep those of its batch in memory.
            maps = protocol.restore_maps(response.maps, shape)[1 : 1 + len(names)].copy()
        return {
            "mask": mask,
            "labels": ("background", *classes.words),
            "drawn": tuple(word for i, word in enumerate(classes.words, 1) if i in drawn),
            "scores": {n: float(s) for n, s in zip(names, response.scores[1:], strict=False)},
            "threshold": threshold,
            "similarity": dict(zip(names, maps, strict=False)),
        }

    def embed_images(
        self,
        images: Source | Iterable[Source],
        left_out: Callable[[int, UserError], None] | None = None,
    ) -> np.ndarray:
        """Unit-length embeddings float32 [N, D]; of one image [D].

        images: as for `segment`. Their products with `embed_texts` are the image-text scores of
        retrieval, with the settings of the checkpoint's first test set for it. left_out: as for
        `answers`; the row of such an image means nothing.
        """
        several = _several(images)
        sources: list[Any] = [images] if several is None else list(several)
        if not sources:
            raise UserError("Give embed_images() at least one image.")

        def load(index: int) -> tuple[Image.Image, None]:
            source = sources[index]
            try:
                return decode_image(_opened(source), _name(source, index), self.max_pixels), None
            except UserError as error:
                if left_out is None:
                    raise
                left_out(index, error)
                return Image.new("RGB", (1, 1)), None

        vectors, _ = self._image_embedder(self.model.params, range(len(sources)), load)
        return vectors[0] if several is None else vectors

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit-length embeddings float32 [N, D] of texts; of one text [D]."""
        several = [texts] if isinstance(texts, str) else list(texts)
        if not several or not all(isinstance(text, str) for text in several):
            raise UserError("Give embed_texts() a text or a list of texts.")
        ids, mask = self.model.encoder.batch(several)
        vectors = self._text_embedder(self.model.params, ids, mask, self.embedding.m_text)
        return vectors[0] if isinstance(texts, str) else vectors

    @functools.cached_property
    def embedding(self) -> EmbeddingConfig:
        """The settings of the first retrieval test set, or the paper's for this patch size."""
        side = self.settings.resolution
        usual = EmbeddingConfig(resize=round(side * 9 / 8), crop=side)
        return next(iter(self.model.config.evals.retrieval.values()), usual)

    @functools.cached_property
    def _image_embedder(self) -> ImageEmbedder:
        return ImageEmbedder(self.model, self.embedding, self.embedding.batch_size)

    @functools.cached_property
    def _text_embedder(self) -> Callable:
        return text_embedder(self.model)


def _several(images: Any) -> Iterable[Source] | None:
    """The images, or None if it is one image or none at all."""
    one = isinstance(images, str | bytes | bytearray | io.IOBase | Path | Image.Image)
    if one or getattr(images, "ndim", 4) < 4 or not isinstance(images, Iterable):
        return None
    return images


def _name(source: Source, place: int) -> str:
    return str(source) if isinstance(source, str | Path) else f"image {place}"


def _opened(source: Source) -> Picture:
    """The picture of a source: the file of a path, the content of what lies at an address."""
    if not isinstance(source, str):
        return source
    path = remote.local_path(source)
    if not remote.is_remote(path):
        return Path(path)
    try:
        return remote.read(path)
    except OSError as error:
        raise UserError(f"Cannot read {source}: {error}.") from error


def _pixels(source: Source) -> int:
    """The number of pixels of an image, from its header; 0 if it is remote or cannot be read."""
    if isinstance(source, Image.Image):
        return source.width * source.height
    if isinstance(source, bytes | str | Path):
        file = Path(remote.local_path(source)) if isinstance(source, str) else source
        # `decode_image` will report what is wrong.
        with contextlib.suppress(Exception), open_image(file) as opened:
            return opened.width * opened.height
    return math.prod(getattr(source, "shape", ())[:2])


def add_protocol_options(parser) -> None:
    """Adds options that change the test set's protocol; parser: an argparse parser or group."""
    for name, text in PROTOCOL_OPTIONS.items():
        add_setting(parser, SegmentationConfig, name, text)


def protocol_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `SegmentationConfig` that were given on the command line."""
    names = (field.name for field in dataclasses.fields(SegmentationConfig))
    return {name: v for name in names if (v := getattr(args, name, None)) is not None}


def words_of(settings: SegmentationConfig) -> list[str]:
    """The class names of a test set (an entry of evals.seg), without the background."""
    return [name for name, *_ in prompt_names(settings) if name != "background"]
