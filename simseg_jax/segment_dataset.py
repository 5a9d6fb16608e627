"""The command that segments or embeds a data set: `python -m simseg_jax.segment_dataset`.

The input is cut into shards, and every shard becomes one output file, which appears when it is
complete. So each image is in exactly one row, whatever is killed and started again. An actor takes
a shard, streams its images through a `Segmenter` and writes the file. Ray places the actors, hands
out shards and replaces actors that die; images and masks never pass through it. Ray Data would move
them as blocks, and its pool waits forever once its actors cannot be restarted.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from simseg_jax.bulk.rows import SUFFIXES
from simseg_jax.bulk.shards import Shard, cut, find_archives, remote_images
from simseg_jax.bulk.worker import Done, Job, Worker
from simseg_jax.data.pipeline import DataConfig
from simseg_jax.data.words import split_words
from simseg_jax.evaluators.records import material
from simseg_jax.runtime import actors, files, remote
from simseg_jax.runtime.command_line import (
    accepted,
    add_checkpoint_options,
    add_setting,
    cache_programs,
    make_parser,
)
from simseg_jax.runtime.errors import UserError, one_line, report_user_errors, some
from simseg_jax.runtime.processes import keeping, only_run
from simseg_jax.runtime.ranges import number, whole
from simseg_jax.runtime.remote import File
from simseg_jax.segment import find_images
from simseg_jax.segmenter import Segmenter, add_protocol_options, protocol_settings
from simseg_jax.zeroshot.settings import SegmentationConfig

JOB = "job.json"
SAME = ("what", "to", "masks", "image_key", "checkpoint", "max_pixels")  # Options in the job.
FEW = 10  # After so many failed shards the job stops.
EPILOG = """examples:
  python -m simseg_jax.segment_dataset photos/ out --checkpoint=runs/f8k --words="dog, grass"
  python -m simseg_jax.segment_dataset "s3://bucket/{00000..00331}.tar" s3://bucket/masks \\
      --checkpoint=OWNER/NAME --words="dog, grass" --address=auto --actors=16 --gpus_per_actor=1

SOURCE is a folder of images (with its subfolders), or the tar or Parquet files of a folder, a
pattern or an address. OUTPUT/00000-of-00332.parquet, ... have one row per image, damaged ones with
the reason in `error`; OUTPUT/job.json has the words, the order of `scores`, and the settings. A tar
or Parquet file becomes one output file, and so do --shard_size image files.

The same command continues after an interruption of any kind and leaves finished files alone. With
actors it needs the extra ray (pip install -e ".[ray]"), for Parquet files also parquet. Exit
status: 0 every file is written, 1 some are not, 2 an error that you can correct, 130 stopped.
"""


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = make_parser("segment_dataset", "Segments or embeds all images of a data set.", EPILOG)
    parser.add_argument("source", help="folder, tar or Parquet files, pattern or address")
    parser.add_argument("output", help="folder or address of the results")
    add_checkpoint_options(parser)
    parser.add_argument("--words", help="comma-separated words to look for")
    parser.add_argument("--contrast", help="comma-separated words scored but not drawn")
    parser.add_argument(
        "--what", choices=("masks", "embeddings"), default="masks", help="default: %(default)s"
    )
    parser.add_argument(
        "--to", choices=tuple(SUFFIXES), default="parquet", help="default: %(default)s"
    )
    parser.add_argument(
        "--masks",
        choices=("png", "rle"),
        default="png",
        help="PNG files, or the JSON of annotations with COCO's run lengths (default: %(default)s)",
    )
    parser.add_argument("--image_key", default="", help="column or suffix of the image in archives")
    for option, accepts, default, text in (
        ("--shard_size", whole(1), 1000, "image files per output file (%(default)s)"),
        ("--actors", whole(0), 0, "processes of Ray; 0: this process, without Ray (%(default)s)"),
    ):
        parser.add_argument(option, type=accepted(accepts), default=default, help=text)
    parser.add_argument(
        "--gpus_per_actor",
        type=accepted(number(0, 8), float),
        default=0.0,
        help="1, or 0.5 for two actors on each (default: 0, the CPU)",
    )
    parser.add_argument("--address", help="join this Ray cluster (auto, ray://...)")
    add_protocol_options(parser)
    add_setting(parser, SegmentationConfig, "batch_size", "images per batch")
    text = "larger images are rows with an error (default: %(default)s)"
    add_setting(parser, DataConfig, "max_pixels", text, DataConfig.max_pixels)
    args = parser.parse_args()
    if (args.words is None) == (args.what == "masks"):
        raise UserError("--words is needed for masks, and only for them.")
    if args.address and not args.actors:
        raise UserError("--address needs --actors=N.")
    return args


def _find(source: str) -> tuple[str, list[tuple[str, File]], Counter[str]]:
    """(form, (key, file) of all files, kinds of files left out) of a data set."""
    form, archives = find_archives(source)
    if form != "images":
        return form, [(file.path, file) for file in archives], Counter()
    if remote.is_remote(source):
        return form, sorted(remote_images(source).items()), Counter()
    found, left_out = find_images([source])
    local = ((key, str(path)) for key, path in found.items())
    return form, [(key, File(path, 0, _stamp(path))) for key, path in local], left_out


def _stamp(path: str) -> str:
    return files.stamp(path) if os.path.exists(path) else "missing"  # A broken link.


@report_user_errors
def main() -> None:
    """Writes the missing output files of the data set of the command line."""
    args = parse()
    source = remote.local_path(args.source)
    form, listed, left_out = _find(source)
    if left_out:
        print(f"Left out: {some(f'{n} {kind}' for kind, n in left_out.most_common())}")
    with contextlib.ExitStack() as stack:
        ray = None
        if args.actors:
            # Before JAX starts threads, as Ray forks.
            ray = stack.enter_context(actors.connected(args.address))
            jax.config.update("jax_platforms", "cpu")  # Devices belong to the actors.
        cache_programs()

        def load(step: int | None, **settings) -> Segmenter:
            settings = {**protocol_settings(args), **settings}
            return Segmenter.from_pretrained(
                args.checkpoint, step, max_pixels=args.max_pixels, maps=False, **settings
            )

        segmenter = load(args.step)  # Before the actors do, so that mistakes are found here.
        classes = None
        if args.what == "masks":
            contrast = None if args.contrast is None else split_words(args.contrast)
            classes = segmenter.classes(split_words(args.words), contrast)
        settings = segmenter.settings if classes else segmenter.embedding
        identity = segmenter.model.identity
        shards = cut(form, listed, args.shard_size)
        job = Job(
            source=source,
            content=files.digest(listed),
            shards=len(shards),
            output=remote.local_path(args.output),
            identity=identity,
            words=list(classes.words if classes else ()),
            contrast=list(classes.contrast if classes else ()),
            settings=material(settings),
            **{key: getattr(args, key) for key in SAME},
        )
        if not remote.is_remote(job.output):
            stack.enter_context(only_run(Path(job.output)))
        missing = _begin(job, shards)
        if ray is None:
            written = map(Worker(job, classes, lambda: segmenter), missing)
        else:

            def make(cores: int) -> Worker:
                again = functools.partial(load, identity.get("step"), threads=cores)
                return Worker(job, classes, again, args.gpus_per_actor > 0)

            found = actors.results(ray, make, missing, args.actors, args.gpus_per_actor)
            written = (done or Done(shard.number, failure=why) for shard, done, why in found)
        # Later than Ray's own handling of SIGTERM.
        with keeping(
            lambda: f"Finished files in {job.output} are kept; the same command continues."
        ):
            _follow(job, written, len(missing))


def _begin(job: Job, shards: list[Shard]) -> list[Shard]:
    """The shards without an output file; a `UserError` refuses the folder of another job."""
    path = remote.join(job.output, JOB)
    wanted = json.loads(json.dumps(dataclasses.asdict(job)))
    present = {file.path.rpartition("/")[2] for file in remote.listing(job.output)[0]}
    if JOB in present:
        try:
            saved = dict(json.loads(remote.read(path)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: use another OUTPUT.") from error
        files.check_same(job.output, saved, wanted)
    elif any(not name.startswith(".") for name in present):
        raise UserError(f"{job.output} holds other files: use another OUTPUT.")
    else:
        with remote.appearing(path) as partial:
            partial.write_text(json.dumps(wanted, indent=2) + "\n")
    if not remote.is_remote(job.output):
        for partial in Path(job.output).glob(".*.partial"):
            partial.unlink()  # From a process that was killed.
    return [s for s in shards if job.path(s.number).rpartition("/")[2] not in present]


def _follow(job: Job, written: Iterator[Done], count: int) -> None:
    """Shows progress, and at the end a summary; exits with 1 if a file is missing."""
    images, errors, failed, began = 0, Counter(), {}, time.perf_counter()
    try:
        with tqdm(total=job.shards, initial=job.shards - count, unit="file", disable=None) as bar:
            for done in written:
                images += done.images
                errors += done.errors
                if done.failure:
                    failed[done.shard] = done.failure
                    tqdm.write(f"{job.path(done.shard)}: {done.failure}", sys.stderr)
                if len(failed) == FEW:
                    break
                bar.update(not done.failure)
                bar.set_postfix_str(f"{images / (time.perf_counter() - began):.1f} images/s")
    finally:
        seconds = time.perf_counter() - began
        kinds = some(f"{n} {kind}" for kind, n in errors.most_common())
        wrong = f"{errors.total():,} with an error ({kinds})" if errors else "none with an error"
        print(
            f"{images:,} images, {wrong}, {images / max(seconds, 1e-9):.1f} images/s. "
            f"{job.shards - count} of {job.shards} files were there before. Results: {job.output}"
        )
    if failed:
        sys.exit(
            f"error: {len(failed)} files could not be written: {some(failed)}. The first: "
            f"{one_line(next(iter(failed.values())))}. The same command tries again."
        )


if __name__ == "__main__":
    main()
