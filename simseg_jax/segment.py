"""The command that segments images and folders with words: `python -m simseg_jax.segment`."""

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from simseg_jax.data.images import IMAGE_SUFFIXES, open_image
from simseg_jax.data.pipeline import DataConfig
from simseg_jax.data.words import check_words, split_words
from simseg_jax.reports.segmentation import MASK, OVERLAY, SOFTWARE
from simseg_jax.runtime.command_line import (
    add_checkpoint_options,
    add_setting,
    cache_programs,
    make_parser,
)
from simseg_jax.runtime.errors import UserError, one_line, report_user_errors, some
from simseg_jax.runtime.files import make_writable, write_json
from simseg_jax.runtime.processes import keeping
from simseg_jax.segmenter import Classes, Segmenter, add_protocol_options, protocol_settings
from simseg_jax.weights.load import load_model
from simseg_jax.zeroshot.settings import SegmentationConfig

EPILOG = """examples:
  python -m simseg_jax.segment --checkpoint=runs/shapes --words="apple, leaf" --output=out \\
      assets/scene.png
  python -m simseg_jax.segment --checkpoint=runs/f8k --words="dog, grass" --output=out photos/

For every image: NAME_mask.png (pixel value = position of the word, 0 = none of them; a palette
image, or 16-bit grey for more than 255 words) and NAME_overlay.png (colours and legend);
scores.json holds all scores of this run. A word is drawn where its similarity is high, provided its
score exceeds mean + sigma_weight * standard deviation of the best scores. The mean of a few words
is meaningless, so the classes of the checkpoint's test set are scored as well, without being drawn;
--contrast replaces them.

Images are read as viewers show them: rotated as EXIF says, the first frame of an animation,
transparency on white; grey of more than 8 bits is scaled. Masks have the size of the upright image.

Folders are searched recursively; links are followed, each folder is visited once. Files without an
image suffix, hidden files (.NAME) and results of earlier runs are left out and counted. NAME is the
file name without its suffix; files that would have the same NAME keep the suffix: x.jpg_mask.png
and x.png_mask.png. Exit status: 0 done, 1 some images could not be segmented, 2 an error that you
can correct (or a full disk), 130 stopped (Ctrl-C, SIGTERM); finished images are kept.
"""


def find_images(paths: Sequence[str]) -> tuple[dict[str, Path], Counter[str]]:
    """(output name -> image file, kinds of files left out) for files and folders.

    A name is the path in its folder without suffix; files whose names would be equal keep the
    suffix. A `UserError` refuses files of several folders whose names are equal even then.
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
    """The images in a folder and its subfolders; counts the files left out by kind."""

    def unreadable(error: OSError) -> None:
        raise error

    images, visited = [], {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        names, folders[:] = sorted(folders), []
        for name in names:
            real = os.path.realpath(os.path.join(parent, name))
            if name.startswith("."):
                left_out["hidden"] += 1
            elif real not in visited:  # Links may form cycles.
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


def segment_files(
    segmenter: Segmenter,
    classes: Classes,
    files: dict[str, Path],
    folder: Path,
    record: dict[str, dict],
    failed: dict[str, str],
) -> None:
    """Writes masks and overlays for `files` (output name -> image) into `folder`.

    Adds to `record` what scores.json says about every finished image, and to `failed` the reasons
    why others failed.
    """
    names, paths = list(files), list(files.values())
    with tqdm(total=len(files), unit="image", disable=None) as bar:

        def left_out(place: int, error: UserError) -> None:
            failed[str(paths[place])] = str(error)
            bar.update()

        for place, answer in segmenter.answers(paths, classes, left_out):
            path, name = paths[place], names[place]
            try:
                answer.save(folder / name)
                record[str(path)] = {"mask": f"{name}{MASK}", **answer.record()}
            except UserError as error:
                left_out(place, error)
                continue
            finally:  # Ctrl-C may come at any point; no mask stays without its scores.
                if str(path) not in record:
                    for suffix in (MASK, OVERLAY):
                        (folder / f"{name}{suffix}").unlink(missing_ok=True)
            bar.update()


def _write_scores(classes: Classes, folder: Path, record: dict[str, dict]) -> list[str]:
    """Writes scores.json; returns masks of earlier runs, which only the old scores.json lists."""
    path, written = folder / "scores.json", {entry["mask"] for entry in record.values()}
    earlier = []
    # Any other file may have this name.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        before = json.loads(path.read_text(encoding="utf-8"))["images"].values()
        listed = [entry["mask"] for entry in before if entry["mask"] not in written]
        earlier = [name for name in listed if (folder / name).is_file()]
    content = {"words": classes.words, "contrast": classes.contrast, "images": record}
    write_json(path, content)
    return earlier


def _parse() -> argparse.Namespace:
    parser = make_parser("segment", "Segments images with words.", EPILOG)
    parser.add_argument("images", nargs="+", help="image files or folders")
    add_checkpoint_options(parser)
    parser.add_argument("--words", required=True, help="comma-separated words to look for")
    parser.add_argument("--output", required=True, help="folder for masks, overlays, scores.json")
    parser.add_argument("--contrast", help="comma-separated words scored but not drawn")
    add_protocol_options(parser)
    add_setting(parser, SegmentationConfig, "batch_size", "images per batch")
    text = "larger images are not segmented (default: %(default)s)"
    add_setting(parser, DataConfig, "max_pixels", text, DataConfig.max_pixels)
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
    make_writable(folder)
    model = load_model(args.checkpoint, args.step)
    segmenter = Segmenter(model, args.max_pixels, maps=False, **protocol_settings(args))
    classes = segmenter.classes(words, contrast)
    if left_out:
        print(f"Left out: {some(f'{n} {kind}' for kind, n in left_out.most_common())}")
    record: dict[str, dict] = {}
    failed: dict[str, str] = {}
    try:
        with keeping(lambda: "The same command starts again from the first image."):
            segment_files(segmenter, classes, files, folder, record, failed)
    finally:
        done = f"{len(record)} of {len(files)} images"
        print(f"Segmented {done}; masks, overlays, scores.json in {folder}")
        earlier = _write_scores(classes, folder, record)
        if earlier:
            print(f"Not of this run, and not in scores.json any more: {some(earlier)}")
    if failed:
        names = [str(file) for file in files.values() if str(file) in failed]
        sys.exit(
            f"error: {len(names)} of {len(files)} images could not be segmented: {some(names)}. "
            f"The first: {one_line(failed[names[0]])}"
        )


def _check_targets(files: dict[str, Path], folder: Path) -> None:
    """Raises a `UserError` if an input image would be overwritten."""
    images = {os.path.realpath(file) for file in files.values()}
    for name in files:
        for target in (folder / f"{name}{MASK}", folder / f"{name}{OVERLAY}"):
            if os.path.realpath(target) in images:
                raise UserError(
                    f"The image {target} would be overwritten: choose another --output."
                )


if __name__ == "__main__":
    main()
