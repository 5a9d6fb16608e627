"""Images and words -> masks: the `Segmenter` class and its command line."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from simseg_jax.command_line import (
    accepted,
    add_checkpoint_options,
    add_key_option,
    add_protocol_options,
    cache_programs,
    make_parser,
    protocol_settings,
)
from simseg_jax.config import Config, first_segmentation, segmentation_eval
from simseg_jax.config_checks import validate_segmentation
from simseg_jax.config_keys import KEYS
from simseg_jax.data.classes import prompt_names
from simseg_jax.data.images import IMAGE_SUFFIXES, decode_image, open_image
from simseg_jax.errors import UserError, one_line, report_user_errors, some
from simseg_jax.masks.postprocess import label_type
from simseg_jax.masks.protocols import Response
from simseg_jax.ranges import Key
from simseg_jax.trained import TrainedModel, load_model
from simseg_jax.visualize import index_png, labels_in, legend, overlaid
from simseg_jax.zeroshot.classifier import unknown_words
from simseg_jax.zeroshot.engine import Engine

EPILOG = """examples:
  python -m simseg_jax.segment --checkpoint=runs/shapes --words="apple, leaf" --output=out \\
      assets/scene.png
  python -m simseg_jax.segment --checkpoint=runs/f8k --words="dog, grass" --output=out photos/

For every image: NAME_mask.png (pixel value = position of the word, 0 = none of them; a palette
image, or 16-bit grey for more than 255 words) and NAME_overlay.png (colours and legend);
scores.json holds all scores of this run. A word is drawn where its similarity is high, provided its
score exceeds mean + sigma_weight * deviation of the best scores. A few words alone have no
meaningful mean, so the classes of the benchmark that the checkpoint was evaluated on are scored as
well, without being drawn; --contrast replaces them.

Images are seen as viewers show them: upright by their EXIF, the first frame of an animation,
transparency on white; grey of more than 8 bits is scaled. Masks have the size of the upright image.

Folders are searched with all that is in them, links included, each folder once. Left out, and
counted: files with other suffixes than those of images, hidden files (.NAME) and results of earlier
runs. NAME is the file without suffix; where several would have the same, all of these keep it:
x.jpg_mask.png and x.png_mask.png. Exit status: 0 done, 1 some images could not be segmented, 2 a
mistake in the command or no room to write, 130 stopped by Ctrl-C; what was done is always kept.
"""
MAX_PIXELS: Key = KEYS["data"]["max_pixels"]
MASK, OVERLAY = "_mask.png", "_overlay.png"
# Marks our own results, so that they are not taken for images when folders are searched again.
SOFTWARE = ("Software", "simseg_jax.segment")
Picture = Image.Image | np.ndarray | bytes | str | Path


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The answer for one image.

    mask: [H, W] at the size of the upright image, uint8, or uint16 for more than 255 words; 0 is
    none of the words, i is words[i - 1]. scores: image-text score of every word and contrast word.
    drawn: words above the threshold; with the standard protocol, which has none, those that show.
    """

    mask: np.ndarray
    words: tuple[str, ...]
    scores: dict[str, float]
    threshold: float | None
    drawn: tuple[str, ...]


class Segmenter:
    """Segments images with any words by the paper's zero-shot protocol.

    words: what to look for; a string is one word. contrast: further words that share in the
    threshold and claim their regions but are never drawn; by default the class names of the
    checkpoint's first benchmark that are not among the words. max_pixels: larger images are
    refused. settings: changes to that benchmark's protocol settings, such as refine="crf".
    """

    def __init__(
        self,
        model: TrainedModel,
        words: Sequence[str],
        contrast: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS.default,
        **settings,
    ):
        self.model, self.max_pixels = model, max_pixels
        base = first_segmentation(model.config).to_dict()
        self.settings = segmentation_eval(**{**base, **settings})
        validate_segmentation(self.settings, model.config.model.image.patch_size)
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
        self.engine = Engine(*model.parts, [self.settings], names)
        self.class_embeddings = self.engine.embed(model.params)

    def segment(self, images: Iterable[Picture]) -> Iterator[Segmentation]:
        """Yields one answer per image, in order; images are read as they are needed.

        images: paths, contents of image files, images of Pillow in any mode, or arrays as
        `data.images.from_array` takes them, all of them seen as viewers show them. A `UserError`
        names one that cannot be read.
        """
        if isinstance(images, str | bytes | Path | Image.Image) or getattr(images, "ndim", 4) < 4:
            raise UserError("Give segment() a list of images, for one image segment([image]).")
        return (answer for _, answer in self.answers(images))

    def answers(
        self,
        images: Iterable[Picture],
        left_out: Callable[[int, UserError], None] | None = None,
    ) -> Iterator[tuple[int, Segmentation]]:
        """`segment` with the place of every image.

        left_out: is told the place of an image that cannot be read and why, in place of the error.
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
    """How many an image has, of its header; 0 if it cannot be read."""
    if isinstance(picture, Image.Image):
        return picture.width * picture.height
    if isinstance(picture, bytes | str | Path):
        picture = Path(picture) if isinstance(picture, str) else picture
        # `decode_image` will say what is wrong.
        with contextlib.suppress(Exception), open_image(picture) as opened:
            return opened.width * opened.height
    return math.prod(getattr(picture, "shape", ())[:2])


def words_of(settings: Config) -> list[str]:
    """The classes of a benchmark, an entry of evals.seg, without the background."""
    classes = prompt_names(settings.data, settings.names)
    return [name for name, *_ in classes if name != "background"]


def split_words(text: str) -> list[str]:
    """The words of a command line: commas between them, spaces and empty ones dropped.

    A `UserError` refuses bytes that are no text.
    """
    with contextlib.suppress(UnicodeError):  # A locale without UTF-8 leaves its bytes undecoded.
        text = os.fsencode(text).decode()
    try:
        text.encode()
    except UnicodeError as error:
        raise UserError("The words are no text in UTF-8: set LC_ALL=C.UTF-8.") from error
    return [word.strip() for word in text.split(",") if word.strip()]


def check_words(words: Sequence[str], what: str = "words") -> tuple[str, ...]:
    """The words, with single spaces; a string is one word. A `UserError` refuses what is none.

    Neither are repetitions, nor "background".
    """
    if isinstance(words, str):
        if "," in words:
            raise UserError(
                f"{what}={words!r} is one string with a comma: give a list, either "
                f"{split_words(words)!r} or, for one phrase, [{words!r}]."
            )
        words = [words]
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise UserError(f"{what} are texts that are not empty, not {word!r}.")
    words = tuple(" ".join(word.split()) for word in words)
    if not words and what == "words":
        raise UserError('Give at least one word to look for, for example --words="dog, grass".')
    repeated = [word for word, count in Counter(words).items() if count > 1]
    if repeated:
        raise UserError(f"The same word is given twice: {some(repeated)}.")
    if "background" in words:
        raise UserError('Leave out "background": it is every pixel that no word claims.')
    return words


def _token_ids(encoder, word: str) -> bytes:
    return encoder(word)[0].tobytes()


def _distinct(encoder, words: Sequence[str]) -> dict[bytes, str]:
    """Token ids -> word; a `UserError` refuses words that the model cannot tell apart."""
    seen: dict[bytes, str] = {}
    for word in words:
        ids = _token_ids(encoder, word)
        if ids in seen:
            raise UserError(
                f"{seen[ids]!r} and {word!r} are the same to this model's vocabulary: leave one of "
                "them out of words and contrast."
            )
        seen[ids] = word
    return seen


def find_images(paths: Sequence[str]) -> tuple[dict[str, Path], Counter[str]]:
    """(output name -> image file, kinds of files left out) for files and folders.

    A name is the path in its folder without suffix; files whose names would be equal keep theirs.
    A `UserError` refuses those of several folders that still are equal.
    """
    found: list[tuple[Path, Path]] = []  # Path for the name, file.
    left_out: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_dir():
            images = _search(path, left_out)
            if not images:
                raise UserError(f"The folder {path} holds no images.")
            found += ((image.relative_to(path), image) for image in images)
        elif path.exists():
            found.append((Path(path.name), path))
        else:
            raise UserError(f"No image or folder at {path}.")
    same = Counter(name.with_suffix("") for name, _ in dict.fromkeys(found))
    named: dict[str, Path] = {}
    for name, file in dict.fromkeys(found):
        name = str(name.with_suffix("") if same[name.with_suffix("")] == 1 else name)
        if name in named and os.path.realpath(file) != os.path.realpath(named[name]):
            raise UserError(
                f"{named[name]} and {file} would both be written as {name}{MASK}: rename one or "
                "segment them into separate folders."
            )
        named.setdefault(name, file)
    return named, left_out


def _search(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The images in a folder and its subfolders; adds to the kinds of files that are left out."""

    def unreadable(error: OSError) -> None:
        raise error

    images, visited = [], {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        names, folders[:] = sorted(folders), []
        for name in names:
            real = os.path.realpath(os.path.join(parent, name))
            if name.startswith("."):
                left_out["hidden"] += 1
            elif real not in visited:  # Links may lead in circles.
                folders.append(name)
                visited.add(real)
        for file in sorted(Path(parent, name) for name in files):
            if file.name.startswith("."):
                left_out["hidden"] += 1
            elif file.suffix.lower() not in IMAGE_SUFFIXES:
                left_out[file.suffix or "without a suffix"] += 1
            elif _is_result(file):
                left_out["of an earlier run"] += 1
            else:
                images.append(file)
    return sorted(images)


def _is_result(file: Path) -> bool:
    if not file.name.endswith((MASK, OVERLAY)):
        return False
    with contextlib.suppress(Exception), open_image(file) as opened:
        return opened.info.get(SOFTWARE[0]) == SOFTWARE[1]
    return False


def _save(folder: Path, name: str, image: Image.Image, answer: Segmentation) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shown = [
        (label, f"{answer.words[label - 1]} {answer.scores[answer.words[label - 1]]:.2f}")
        for label in labels_in(answer.mask)
        if label
    ]
    strip = legend(shown or [(0, "none of the words")], max(image.width, 160))
    _write(index_png(answer.mask), folder / f"{name}{MASK}")
    _write(overlaid(image, answer.mask, strip), folder / f"{name}{OVERLAY}")


def _write(image: Image.Image, path: Path) -> None:
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*SOFTWARE)
    with _appearing(path) as partial:
        image.save(partial, "PNG", pnginfo=mark)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Where to write what shall appear at `path` when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def segment_files(
    segmenter: Segmenter,
    files: dict[str, Path],
    folder: Path,
    record: dict[str, dict],
    failed: dict[str, str],
) -> None:
    """Writes masks and overlays for `files` (output name -> image) into `folder`.

    record, failed: are given what scores.json says of every image done, and why others are not.
    """
    names, paths = list(files), list(files.values())
    with tqdm(total=len(files), unit="image", disable=None) as bar:

        def left_out(place: int, error: UserError) -> None:
            failed[str(paths[place])] = str(error)
            bar.update()

        for place, answer in segmenter.answers(paths, left_out):
            path, name = paths[place], names[place]
            try:
                # Read again: all images that wait for their answers would take much memory.
                image = decode_image(path, str(path), segmenter.max_pixels)
                if (image.height, image.width) != answer.mask.shape:
                    raise UserError(f"{path} was changed while it was read.")
            except UserError as error:
                left_out(place, error)
                continue
            _save(folder, name, image, answer)
            record[str(path)] = {
                "mask": f"{name}{MASK}",
                "drawn": answer.drawn,
                "threshold": answer.threshold,
                "scores": answer.scores,
            }
            bar.update()


def _write_scores(segmenter: Segmenter, folder: Path, record: dict[str, dict]) -> list[str]:
    """Writes scores.json; the masks that an earlier one lists and this one does not."""
    path, written = folder / "scores.json", {entry["mask"] for entry in record.values()}
    earlier = []
    # Whatever else may lie there under this name.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        before = json.loads(path.read_text(encoding="utf-8"))["images"].values()
        listed = [entry["mask"] for entry in before if entry["mask"] not in written]
        earlier = [name for name in listed if (folder / name).is_file()]
    content = {"words": segmenter.words, "contrast": segmenter.contrast, "images": record}
    with _appearing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return earlier


def _parse() -> argparse.Namespace:
    parser = make_parser("segment", "Segments images with words.", EPILOG)
    parser.add_argument("images", nargs="+", help="image files or folders")
    add_checkpoint_options(parser)
    parser.add_argument("--words", required=True, help="comma-separated words to look for")
    parser.add_argument("--output", required=True, help="folder for masks, overlays, scores.json")
    parser.add_argument("--contrast", help="comma-separated words scored but not drawn")
    add_protocol_options(parser)
    add_key_option(parser, "batch_size", "images per batch")
    parser.add_argument(
        "--max_pixels",
        type=accepted(MAX_PIXELS.accepts),
        default=MAX_PIXELS.default,
        help="larger images are not segmented (default: %(default)s)",
    )
    return parser.parse_args()


@report_user_errors
def main() -> None:
    """Segments the images of the command line and writes masks, overlays and scores."""
    args = _parse()
    cache_programs()
    words = check_words(split_words(args.words))
    contrast = None if args.contrast is None else split_words(args.contrast)
    files, left_out = find_images(args.images)
    folder = Path(args.output)
    _check_targets(files, folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(args.checkpoint, args.step)
    settings = protocol_settings(args)
    segmenter = Segmenter(model, words, contrast, args.max_pixels, **settings)
    if left_out:
        print(f"Left out: {some(f'{n} {kind}' for kind, n in left_out.most_common())}")
    record: dict[str, dict] = {}
    failed: dict[str, str] = {}
    trouble: BaseException | None = None
    earlier: list[str] = []
    try:
        segment_files(segmenter, files, folder, record, failed)
    except (KeyboardInterrupt, OSError, UserError) as error:
        trouble = error
    try:
        earlier = _write_scores(segmenter, folder, record)
    except OSError as error:
        trouble = trouble or error
    print(
        f"Segmented {len(record)} of {len(files)} images; masks, overlays, scores.json in {folder}"
    )
    if earlier:
        print(f"Not of this run, and not in scores.json any more: {some(earlier)}")
    if isinstance(trouble, OSError):
        raise UserError(f"Cannot write to {folder}: {trouble.strerror or one_line(trouble)}.")
    if isinstance(trouble, UserError):
        raise trouble
    if trouble is not None:
        print("Stopped; the same command starts again from the first image.", file=sys.stderr)
        sys.exit(130)
    if failed:
        first, *_ = names = [str(file) for file in files.values() if str(file) in failed]
        sys.exit(
            f"error: {len(names)} of {len(files)} images could not be segmented: {some(names)}. "
            f"The first: {one_line(failed[first])}"
        )


def _check_targets(files: dict[str, Path], folder: Path) -> None:
    """A `UserError` if an image would be overwritten."""
    images = {os.path.realpath(file) for file in files.values()}
    for name in files:
        for target in (folder / f"{name}{MASK}", folder / f"{name}{OVERLAY}"):
            if os.path.realpath(target) in images:
                raise UserError(
                    f"The image {target} would be overwritten: choose another --output."
                )


if __name__ == "__main__":
    main()
