"""From a job to a finished data set: running its shards anywhere, metadata of TFDS, data card."""

import datetime
import functools
import json
import multiprocessing
import shlex
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simseg_jax.data.images import decode_image
from simseg_jax.data.pairs import PairsConfig, Problems, open_source
from simseg_jax.data.prepare import card
from simseg_jax.data.prepare.shards import (
    DROPPED,
    Job,
    Statistics,
    hash_part,
    is_hashed,
    is_written,
    repeated,
    statistics_path,
    write_shard,
)
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.files import make_writable, write_json

VERSION = "1.0.0"
JOB = "job.json"
FEW = 10  # So many bad examples never stop a job: too few for a share.


def make_data_set(
    job: Job, problems: Problems, output: Path, processes: int, beam: str, max_bad: float
) -> None:
    """Writes the shards that are missing, then what describes them, and prints a summary.

    problems: what the index of the source left out. beam: pipeline options, '' to run here on
    `processes`. max_bad: the share of unusable examples above which a `UserError` stops it.
    """
    work = output / f"{VERSION}.incomplete"
    if work.exists() and any(work.iterdir()):
        check_same(work, job)
        for partial in work.glob(".*"):
            partial.unlink()  # Of a process that was killed.
    else:
        make_writable(work)
        write_json(work / JOB, asdict(job))
    _check_bad(problems.count, problems.count + job.examples, problems.first, max_bad)

    def run(function: Callable, missing: list[int], what: str) -> Iterator[int]:
        call = functools.partial(function, job, work)
        indices = _on_beam(call, missing, beam) if beam else _here(call, missing, processes)
        done = job.shards - len(missing)
        return iter(tqdm(indices, desc=what, unit="shard", total=job.shards, initial=done))

    if job.duplicates == "drop":
        missing = [i for i in range(job.shards) if not is_hashed(work, i)]
        for _ in run(hash_part, missing, "searching duplicates"):
            pass
        np.save(work / DROPPED, repeated(job, work))
    missing = [i for i in range(job.shards) if not is_written(job, work, i)]
    if len(missing) < job.shards:
        print(f"Continuing: {job.shards - len(missing)} of {job.shards} shards are there.")
    total = Statistics()
    for index in run(write_shard, missing, "writing"):
        total += Statistics.load(statistics_path(work, index))
        first = [name for names in total.first.values() for name in names]
        bad = total.counts["unusable"] + total.counts["corrupt"]
        _check_bad(bad, total.counts["examples"], first, max_bad)
    _finish(job, problems, output, work)


def check_same(folder: Path, job: Job) -> None:
    """Raises a `UserError` unless `folder` belongs to the same job."""
    wanted = asdict(job)
    try:
        saved = dict(json.loads((folder / JOB).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError(f"{folder} was made by other means: use another --output.") from error
    differing = [key for key in wanted if saved.get(key) != wanted[key]]
    if differing == ["content"]:
        raise UserError(
            f"The files of the source have changed since {folder} was begun: use another --output, "
            "or delete that folder to start again."
        )
    if differing:
        changes = ", ".join(f"{k}={saved.get(k)!r} instead of {wanted[k]!r}" for k in differing)
        raise UserError(
            f"{folder} holds another job, with {changes}: use another --output, or delete that "
            "folder to start again."
        )


def read_back(folder: Path, job: Job):
    """The written examples, as a source of training pairs."""
    settings = PairsConfig(path=str(folder), format="tfds", split=job.split_name)
    return open_source(settings)


def _check_bad(bad: int, seen: int, first: list[str], max_bad: float) -> None:
    if bad > max(FEW, max_bad * seen):
        raise UserError(
            f"{bad} of {seen} examples cannot be used, more than --max_bad={max_bad}: "
            f"{some(first)}. Repair the data or raise --max_bad; finished shards are kept."
        )


def _here(call: Callable, indices: list[int], processes: int) -> Iterator[int]:
    """Calls call(index) for all indices; yields each when it is done."""
    if processes == 1 or len(indices) < 2:
        for index in indices:
            call(index)
            yield index
        return
    # A fork of a process with threads (JAX has some) may hang.
    context = multiprocessing.get_context("spawn")
    # Ctrl-C goes to all processes of a terminal: these have nothing to say about it.
    silent = (signal.SIGINT, signal.SIG_DFL)
    size = min(processes, len(indices))
    with ProcessPoolExecutor(size, context, signal.signal, silent) as pool:
        futures = {pool.submit(call, index): index for index in indices}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()  # A shard may take minutes.
            raise
        except BrokenProcessPool as error:
            raise UserError(
                "A process died, perhaps for lack of memory: run the same command again, with "
                "fewer --processes; finished shards are kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _on_beam(call: Callable, indices: list[int], options: str) -> Iterator[int]:
    """As `_here`, on Apache Beam; nothing is yielded before all is done."""
    import apache_beam  # pyright: ignore[reportMissingImports]
    from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]

    given = pipeline_options.PipelineOptions(shlex.split(options))
    with apache_beam.Pipeline(options=given) as pipeline:
        numbers = pipeline | apache_beam.Create(indices) | apache_beam.Reshuffle()
        _ = numbers | apache_beam.Map(call)
    yield from indices


def _finish(job: Job, problems: Problems, output: Path, work: Path) -> None:
    """Metadata, card and the final name, once all shards are there."""
    parts = [Statistics.load(statistics_path(work, i)) for i in range(job.shards)]
    total = sum(parts, Statistics())
    if not total.counts["written"]:
        raise UserError(f"None of the {job.examples} examples can be used: {total.first}.")
    dropped = job.duplicates == "drop"
    duplicates = len(np.load(work / DROPPED) if dropped else repeated(job, work))
    _write_metadata(job, work, parts)
    facts = _card(job, problems, total, duplicates)
    card.write_card(output, facts)
    written = read_back(work, job)
    chosen = np.linspace(0, len(written) - 1, min(len(written), card.SAMPLES)).astype(int)
    samples = [written[int(i)] for i in chosen]
    left_out = problems.count + total.counts["unusable"] + total.counts["corrupt"]
    lines = [
        f"{facts['images']:,} images with {facts['captions']:,} captions, {job.shards} shard(s), "
        f"{facts['bytes_out'] / 1e6:,.1f} MB ({facts['bytes_in'] / 1e6:,.1f} MB before)",
        f"left out: {left_out:,} damaged or without caption"
        + (f", {duplicates:,} duplicates" if dropped else "")
        + ("" if dropped else f"; {duplicates:,} duplicates are in it"),
    ]
    card.write_picture(
        output / "card.png",
        job.name,
        [*lines, f"from {job.source['path'] or job.source['format']}"],
        [(decode_image(pair["image"], pair["name"]), pair["captions"][0]) for pair in samples],
        total.words,
        total.short_side,
        job.short_side,
    )
    final = work.rename(output / VERSION)
    for pattern in ("statistics-*.json", "hashes-*.npy", DROPPED):
        for scratch in final.glob(pattern):
            scratch.unlink()
    print(f"{'; '.join(lines)}. Data: {final}, card: {output / 'card.json'}, card.png")


def _write_metadata(job: Job, work: Path, parts: list[Statistics]) -> None:
    """dataset_info.json and features.json, so that TFDS reads the shards."""
    import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]

    template = tfds.core.ShardedFileTemplate(
        data_dir=str(work),  # pyright: ignore[reportArgumentType]
        dataset_name=job.name,
        split=job.split_name,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name=job.split_name,
        shard_lengths=[part.counts["written"] for part in parts],
        num_bytes=sum(part.counts["bytes_out"] for part in parts),
        filename_template=template,
    )
    text = tfds.features.Text()
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features={
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence(text),
            "name": text,
        },
        split_infos=[split],
        version=VERSION,
        filename_template=template,
        check_data=False,
        description="Images with captions; see card.json.",
    )


def _card(job: Job, problems: Problems, total: Statistics, duplicates: int) -> dict[str, Any]:
    """What card.json holds: counts, the first of every kind of problem, sizes, the job."""
    counts = total.counts

    def rejected(kind: str) -> dict[str, Any]:
        return {"count": counts[kind], "first": total.first.get(kind, [])}

    return {
        "name": job.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "images": counts["written"],
        "captions": counts["captions"],
        "examples_in": job.examples,
        "left_out_by_the_index": asdict(problems),
        "corrupt_images": rejected("corrupt"),
        "unusable_examples": rejected("unusable"),
        "duplicates": {"count": duplicates, "kept": job.duplicates == "keep"},
        "reencoded_images": counts["reencoded"],
        "bytes_in": counts["bytes_in"],
        "bytes_out": counts["bytes_out"],
        "words_per_caption": card.summary(total.words),
        "short_side_before": card.summary(total.short_side),
        "long_side_before": card.summary(total.long_side),
        "job": asdict(job),
    }
