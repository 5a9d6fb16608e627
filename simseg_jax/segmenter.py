"""Images and words -> masks, in Python: the `Segmenter` class and the checks of its words."""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simseg_jax.config import first_segmentation
from simseg_jax.data.images import decode_image, open_image
from simseg_jax.data.pipeline import DataConfig
from simseg_jax.data.testsets.classes import prompt_names
from simseg_jax.masks.postprocess import label_type
from simseg_jax.reports.visualize import labels_in
from simseg_jax.runtime.command_line import add_setting
from simseg_jax.runtime.errors import UserError, one_line, some
from simseg_jax.runtime.settings import changed, typed
from simseg_jax.weights.load import TrainedModel
from simseg_jax.zeroshot.classifier import unknown_words
from simseg_jax.zeroshot.engine import Engine
from simseg_jax.zeroshot.paper import Response
from simseg_jax.zeroshot.settings import SegmentationConfig

Picture = Image.Image | np.ndarray | bytes | str | Path
PROTOCOL_OPTIONS = {
    "refine": "mask refinement",
    "resolution": "side in pixels the model sees",
    "sigma_weight": "higher: fewer words are drawn",
}
# Separators and quotes of other programs, which the command line refuses.
ODD = set(';\n\t"“”，、；')  # noqa: RUF001


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The result for one image.

    mask: [H, W] at the size of the upright image, uint8, or uint16 for more than 255 words; 0 is
    none of the words, i is words[i - 1]. scores: image-text score of every word and contrast word.
    threshold: of the scores; None with the standard protocol. drawn: the words above the threshold;
    with the standard protocol the words in the mask.
    """

    mask: np.ndarray
    words: tuple[str, ...]
    scores: dict[str, float]
    threshold: float | None
    drawn: tuple[str, ...]


class Segmenter:
    """Segments images with any words by the paper's zero-shot protocol.

    words: what to look for; a string is one word. contrast: further words that count towards the
    threshold and claim their regions but are never drawn; by default the class names of the
    checkpoint's first test set that are not among the words. max_pixels: larger images are
    refused. settings: changes to that test set's protocol settings, such as refine="crf".
    """

    def __init__(
        self,
        model: TrainedModel,
        words: Sequence[str],
        contrast: Sequence[str] | None = None,
        max_pixels: int = DataConfig.max_pixels,
        **settings,
    ):
        self.model = model
        self.max_pixels = typed(DataConfig, {"max_pixels": max_pixels}).max_pixels
        self.settings = changed(first_segmentation(model.config), settings)
        self.settings.check_patches(model.patch_size)
        self.words = check_words(words)
        unknown = unknown_words(model.encoder, self.words)
        if unknown:
            raise UserError(
                f"The vocabulary of the model knows no word of: {some(unknown)}. Name others."
            )
        tokens = _distinct(model.encoder, ("background", *self.words))
        if contrast is None:
            others = words_of(self.settings)
            self.contrast = tuple(w for w in others if _token_ids(model.encoder, w) not in tokens)
        else:
            self.contrast = check_words(contrast, "contrast")
            _distinct(model.encoder, ("background", *self.words, *self.contrast))
        names = [(name,) for name in ("background", *self.words, *self.contrast)]
        if len(names) > 1 << 16:
            raise UserError(f"At most 65,535 words and contrast words, not {len(names) - 1:,}.")
        self.engine = Engine(model, [self.settings], names)
        self.class_embeddings = self.engine.embed(model.params)

    @property
    def classes(self) -> tuple[list[str], np.ndarray]:
        """(names with "background" first, their unit-length embeddings float32 [C, D])."""
        names = ["background", *self.words, *self.contrast]
        return names, np.asarray(self.class_embeddings[self.settings.m_text])

    def segment(self, images: Iterable[Picture]) -> Iterator[Segmentation]:
        """Yields one `Segmentation` per image, in order; images are read when they are needed.

        images: paths, contents of image files, Pillow images of any mode, or arrays as
        `data.images.from_array` takes them. All are read as viewers show them: upright,
        transparency on white. A `UserError` names an image that cannot be read.
        """
        one = isinstance(images, str | bytes | bytearray | io.IOBase | Path | Image.Image)
        if one or getattr(images, "ndim", 4) < 4 or not isinstance(images, Iterable):
            raise UserError("Give segment() a list of images, for one image segment([image]).")
        return (answer for _, answer in self.answers(images))

    def answers(
        self,
        images: Iterable[Picture],
        left_out: Callable[[int, UserError], None] | None = None,
    ) -> Iterator[tuple[int, Segmentation]]:
        """`segment` with the index of every image.

        left_out: called with the index and the error of an image that cannot be read, instead of
        raising the error.
        """
        jobs = (
            functools.partial(self._read, place, image, left_out)
            for place, image in enumerate(images)
        )
        for batch, masks, (response,) in self.engine.run(
            self.model.params,
            jobs,
            self.class_embeddings,
            in_order=True,
            pixels=lambda job: _pixels(job.args[1]),
        ):
            for i, (place, shape) in enumerate(batch):
                yield place, self._answer(shape, masks[0, i], response.rows(i))

    def _read(self, place: int, picture: Picture, left_out: Callable | None) -> tuple | None:
        picture = Path(picture) if isinstance(picture, str) else picture
        name = str(picture) if isinstance(picture, Path) else f"image {place}"
        try:
            image = decode_image(picture, name, self.max_pixels)
        except UserError as error:
            if left_out is None:
                raise
            return left_out(place, error)
        shape = (image.height, image.width)
        return (place, shape), image, shape

    def _answer(self, shape: tuple[int, int], mask: np.ndarray, response) -> Segmentation:
        mask = np.where(mask > len(self.words), 0, mask).astype(label_type(1 + len(self.words)))
        mask = self.engine.protocol.restore(mask, shape)
        names = (*self.words, *self.contrast)
        threshold = None
        if isinstance(response, Response):
            drawn = {int(c) for c, d in zip(response.classes, response.drawn, strict=True) if d}
            threshold = float(response.threshold)
        else:
            drawn = set(labels_in(mask))
        return Segmentation(
            mask=mask,
            words=self.words,
            scores={n: float(s) for n, s in zip(names, response.scores[1:], strict=True)},
            threshold=threshold,
            drawn=tuple(w for i, w in enumerate(self.words, 1) if i in drawn),
        )


def _pixels(picture: Picture) -> int:
    """The number of pixels of an image, from its header; 0 if it cannot be read."""
    if isinstance(picture, Image.Image):
        return picture.width * picture.height
    if isinstance(picture, bytes | str | Path):
        picture = Path(picture) if isinstance(picture, str) else picture
        # `decode_image` will report what is wrong.
        with contextlib.suppress(Exception), open_image(picture) as opened:
            return opened.width * opened.height
    return math.prod(getattr(picture, "shape", ())[:2])


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


def split_words(text: str) -> list[str]:
    """The words of a comma-separated text, stripped of spaces; an empty text has none.

    A `UserError` refuses bytes that are not UTF-8, and characters of `ODD`, which could belong to a
    word or separate two.
    """
    with contextlib.suppress(UnicodeError):  # Without a UTF-8 locale the bytes are not decoded yet.
        text = os.fsencode(text).decode()
    try:
        text.encode()
    except UnicodeError as error:
        raise UserError("The words are no text in UTF-8: set LC_ALL=C.UTF-8.") from error
    odd = next((character for character in text if character in ODD), None)
    if odd is not None:
        raise UserError(
            f"{odd!r} in {one_line(text, 60)!r} may belong to a word or stand between two: write "
            "commas between the words, without quotes."
        )
    return [word.strip() for word in text.split(",")] if text.strip() else []


def check_words(words: Sequence[str], what: str = "words") -> tuple[str, ...]:
    """The words with single spaces; a string is one word.

    A `UserError` refuses values that are not words, repeated words and "background".
    """
    if isinstance(words, str):
        if "," in words:
            raise UserError(
                f"{what}={words!r} is one string with a comma: give a list, either "
                f"{split_words(words)!r} or, for one phrase, [{words!r}]."
            )
        words = [words]
    words = tuple(words) if isinstance(words, Iterable) else (words,)
    for word in words:
        if not isinstance(word, str) or not word.strip() or _has_surrogates(word):
            raise UserError(f"{what} are texts that are not empty, not {word!r}: leave it out.")
    words = tuple(" ".join(word.split()) for word in words)
    if not words and what == "words":
        raise UserError('Give at least one word to look for, for example --words="dog, grass".')
    repeated = [word for word, count in Counter(words).items() if count > 1]
    if repeated:
        raise UserError(f"The same word is given twice: {some(repeated)}.")
    if "background" in words:
        raise UserError('Leave out "background": it is every pixel that no word claims.')
    return words


def _has_surrogates(word: str) -> bool:
    """Whether a text has lone surrogates, which cannot be encoded as UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in word)


def _token_ids(encoder, word: str) -> bytes:
    return encoder(word)[0].tobytes()


def _distinct(encoder, words: Sequence[str]) -> dict[bytes, str]:
    """Token ids -> word; a `UserError` refuses words that the model cannot tell apart."""
    seen: dict[bytes, str] = {}
    for word in words:
        ids = _token_ids(encoder, word)
        if ids in seen:
            raise UserError(
                f"{word!r} is in words and in contrast: leave it out of one of them."
                if seen[ids] == word
                else f"{seen[ids]!r} and {word!r} are the same to this model's vocabulary: leave "
                "one of them out of words and contrast."
            )
        seen[ids] = word
    return seen
