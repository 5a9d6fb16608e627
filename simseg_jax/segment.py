"""Images and words -> masks: the `Segmenter` class and its command line."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from simseg_jax.command_line import (
    add_checkpoint_options,
    add_protocol_options,
    cache_programs,
    make_parser,
    protocol_settings,
)
from simseg_jax.config import Config, first_segmentation, segmentation_eval
from simseg_jax.config_checks import validate_segmentation
from simseg_jax.data.classes import prompt_names
from simseg_jax.data.images import IMAGE_SUFFIXES, decode_image
from simseg_jax.errors import UserError, report_user_errors, some
from simseg_jax.masks.protocols import Response
from simseg_jax.trained import TrainedModel, load_model
from simseg_jax.visualize import index_png, legend, overlay, stack
from simseg_jax.zeroshot.classifier import unknown_words
from simseg_jax.zeroshot.engine import Engine

EPILOG = """examples:
  python -m simseg_jax.segment --checkpoint=runs/shapes --words="apple, leaf" --output=out \\
      assets/scene.png
  python -m simseg_jax.segment --checkpoint=runs/f8k --words="dog, grass" --output=out photos/

For every image: NAME_mask.png (palette image, pixel value = position of the word, 0 = none of
them) and NAME_overlay.png (colours and legend); scores.json holds all scores. A word is drawn
where its similarity is high, provided its score exceeds mean + sigma_weight * deviation of the best
scores. A few words alone have no meaningful mean, so the classes of the benchmark that the
checkpoint was evaluated on are scored as well, without being drawn; --contrast replaces them.
"""


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The answer for one image.

    mask: uint8 [H, W] at the size of the image; 0 is none of the words, i is words[i - 1].
    scores: image-text score of every word and contrast word. drawn: words above the threshold; with
    the standard protocol, which has none, those that show.
    """

    mask: np.ndarray
    words: tuple[str, ...]
    scores: dict[str, float]
    threshold: float | None
    drawn: tuple[str, ...]


class Segmenter:
    """Segments images with any words by the paper's zero-shot protocol.

    words: what to look for. contrast: further words that share in the threshold and claim their
    regions but are never drawn; by default the class names of the checkpoint's first benchmark.
    settings: changes to that benchmark's protocol settings, such as refine="crf".
    """

    def __init__(
        self,
        model: TrainedModel,
        words: Sequence[str],
        contrast: Sequence[str] | None = None,
        **settings,
    ):
        self.model = model
        base = first_segmentation(model.config).to_dict()
        self.settings = segmentation_eval(**{**base, **settings})
        validate_segmentation(self.settings, model.config.model.image.patch_size)
        self.words = check_words(words)
        unknown = unknown_words(model.encoder, self.words)
        if unknown:
            raise UserError(
                f"The vocabulary of the model knows no word of: {some(unknown)}. Name others."
            )
        if contrast is None:
            contrast = words_of(self.settings)
        self.contrast = tuple(w for w in dict.fromkeys(contrast) if w not in self.words)
        names = [(name,) for name in ("background", *self.words, *self.contrast)]
        self.engine = Engine(*model.parts, [self.settings], names)
        self.class_embeddings = self.engine.embed(model.params)

    def segment(self, images: Iterable[Image.Image]) -> Iterator[Segmentation]:
        """Yields one answer per RGB image, in order; images are read as they are needed."""
        jobs = (lambda image=image: (image, image, (image.height, image.width)) for image in images)
        for batch, masks, (response,) in self.engine.run(
            self.model.params, jobs, self.class_embeddings, in_order=True
        ):
            for i, image in enumerate(batch):
                yield self._answer(image, masks[0, i], response.rows(i))

    def _answer(self, image: Image.Image, mask: np.ndarray, response) -> Segmentation:
        labels = self.engine.protocol.restore(mask, (image.height, image.width))
        labels = np.where(labels > len(self.words), 0, labels).astype(np.uint8)
        names = (*self.words, *self.contrast)
        drawn, threshold = set(np.unique(labels)), None
        if isinstance(response, Response):
            drawn = {int(c) for c, d in zip(response.classes, response.drawn, strict=True) if d}
            threshold = float(response.threshold)
        return Segmentation(
            mask=labels,
            words=self.words,
            scores={n: float(s) for n, s in zip(names, response.scores[1:], strict=True)},
            threshold=threshold,
            drawn=tuple(w for i, w in enumerate(self.words, 1) if i in drawn),
        )


def words_of(settings: Config) -> list[str]:
    """The classes of a benchmark, an entry of evals.seg, without the background."""
    classes = prompt_names(settings.data, settings.names)
    return [name for name, *_ in classes if name != "background"]


def check_words(words: Sequence[str]) -> tuple[str, ...]:
    """The words without surrounding space; refuses an empty list, repetitions and "background"."""
    words = tuple(word.strip() for word in words if word.strip())
    if not words:
        raise UserError('Give at least one word to look for, for example --words="dog, grass".')
    if len(set(words)) < len(words):
        raise UserError("The same word is given twice.")
    if "background" in words:
        raise UserError('Leave out "background": it is every pixel that no word claims.')
    if len(words) > 255:
        raise UserError(f"A mask image holds at most 255 words, not {len(words)}.")
    return words


def find_images(paths: Sequence[str]) -> dict[str, Path]:
    """Output name -> image file, for files and (recursively) folders; names without suffix."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            named = {str(f.relative_to(path).with_suffix("")): f for f in files}
            if not named:
                raise UserError(f"The folder {path} holds no images.")
        elif path.is_file():
            named = {path.stem: path}
        else:
            raise UserError(f"No image or folder at {path}.")
        for name, file in named.items():
            if name in found:
                raise UserError(
                    f"{found[name]} and {file} would both be written as {name}_mask.png: "
                    "rename one or segment them into separate folders."
                )
            found[name] = file
    return found


def _save(folder: Path, name: str, image: Image.Image, answer: Segmentation) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    index_png(answer.mask).save(folder / f"{name}_mask.png")
    coloured = Image.fromarray(overlay(np.asarray(image), answer.mask))
    labels = [
        (index, f"{word} {answer.scores[word]:.2f}")
        for index, word in enumerate(answer.words, 1)
        if (answer.mask == index).any()
    ]
    strip = legend(labels or [(0, "none of the words")], max(coloured.width, 160))
    stack([coloured, strip]).save(folder / f"{name}_overlay.png")


@report_user_errors
def main() -> None:
    """Segments the images of the command line and writes masks, overlays and scores."""
    parser = make_parser("segment", "Segments images with words.", EPILOG)
    parser.add_argument("images", nargs="+", help="image files or folders")
    add_checkpoint_options(parser)
    parser.add_argument("--words", required=True, help="comma-separated words to look for")
    parser.add_argument("--output", required=True, help="folder for masks, overlays, scores.json")
    parser.add_argument("--contrast", help="comma-separated words scored but not drawn")
    add_protocol_options(parser)
    parser.add_argument("--batch_size", type=int, help="images per batch")
    args = parser.parse_args()
    cache_programs()
    words = check_words(args.words.split(","))
    files = find_images(args.images)
    contrast = None if args.contrast is None else [w.strip() for w in args.contrast.split(",")]
    model = load_model(args.checkpoint, args.step)
    segmenter = Segmenter(model, words, contrast, **protocol_settings(args))

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    opened: list[tuple[str, Image.Image]] = []

    def readable() -> Iterator[Image.Image]:
        for name, file in files.items():
            try:
                image = decode_image(file.read_bytes(), str(file))
            except UserError as error:
                failed.append(str(error))
                continue
            opened.append((name, image))
            yield image

    record = {}
    with tqdm(total=len(files), unit="image", disable=None) as bar:
        for answer in segmenter.segment(readable()):
            name, image = opened.pop(0)
            _save(folder, name, image, answer)
            record[str(files[name])] = {
                "drawn": answer.drawn,
                "threshold": answer.threshold,
                "scores": answer.scores,
            }
            bar.update()
    content = {"words": segmenter.words, "contrast": segmenter.contrast, "images": record}
    (folder / "scores.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(
        f"Segmented {len(record)} of {len(files)} images; masks, overlays, scores.json in {folder}"
    )
    if failed:
        sys.exit("\n".join(f"error: {message}" for message in failed))


if __name__ == "__main__":
    main()
