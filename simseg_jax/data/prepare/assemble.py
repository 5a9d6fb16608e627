"""From a job to a finished data set: writes the shards, here or on Beam, then describes them."""

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

import numpy as np
from tqdm import tqdm

from simseg_jax.data.images import decode_image
from simseg_jax.data.pairs import PairsConfig, Problems, open_source
from simseg_jax.data.pairs.example import spread
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
from simseg_jax.runtime import files
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.files import make_writable, write_json

VERSION = "1.0.0"
JOB = "job.json"
FEW = 10  # So few bad examples never stop a job: their share means nothing.


def make_data_set(
    job: Job, problems: Problems, output: Path, processes: int, beam: str, max_bad: float
) -> None:
    """Writes the missing shards, their metadata and the data card, and prints a summary.

    problems: what the index of the source left out. beam: pipeline options of Apache Beam, '' to
    run in `processes` of this machine. max_bad: a larger share of unusable examples stops the job
    with a `UserError`.
    """
    work = output / f"{VERSION}.incomplete"
    if work.exists() and any(work.iterdir()):
        check_same(work, job)
        for partial in work.glob(".*"):
            partial.unlink()  # From a process that was killed.
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
        total.add(Statistics.load(statistics_path(work, index)))
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
        raise UserError(f"{folder} was not made by prepare: use another --output.") from error
    files.check_same(folder, saved, wanted)


def read_back(folder: Path, job: Job):
    """The written examples, as a source of training pairs."""
    return open_source(PairsConfig(path=str(folder), format="tfds", split=job.split_name))


def _check_bad(bad: int, seen: int, first: list[str], max_bad: float) -> None:
    if bad > max(FEW, max_bad * seen):
        raise UserError(
            f"{bad} of {seen} examples cannot be used, more than --max_bad={max_bad}: "
            f"{some(first)}. Repair the data or raise --max_bad; finished shards are kept."
        )


def _here(call: Callable, indices: list[int], processes: int) -> Iterator[int]:
    """Calls call(index) for all indices in processes; yields every index when its call is done."""
    if processes == 1 or len(indices) < 2:
        for index in indices:
            call(index)
            yield index
        return
    # A fork of a process with threads, such as JAX's, may hang.
    context = multiprocessing.get_context("spawn")
    # A terminal sends Ctrl-C to all processes: the workers shall end without a traceback.
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
                "A process died, perhaps for lack of memory: run the same command again with "
                "fewer --processes; finished shards are kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _on_beam(call: Callable, indices: list[int], options: str) -> Iterator[int]:
    """As `_here`, but on Apache Beam, which reports nothing before all calls are done."""
    import apache_beam  # pyright: ignore[reportMissingImports]
    from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]

    given = pipeline_options.PipelineOptions(shlex.split(options))
    with apache_beam.Pipeline(options=given) as pipeline:
        numbers = pipeline | apache_beam.Create(indices) | apache_beam.Reshuffle()
        _ = numbers | apache_beam.Map(call)
    yield from indices


def _finish(job: Job, problems: Problems, output: Path, work: Path) -> None:
    """Writes metadata and card and gives the folder its final name, after the last shard."""
    parts = [Statistics.load(statistics_path(work, i)) for i in range(job.shards)]
    total = Statistics()
    for part in parts:
        total.add(part)
    if not total.counts["written"]:
        raise UserError(f"None of the {job.examples} examples can be used: {total.first}.")
    dropped = job.duplicates == "drop"
    duplicates = len(np.load(work / DROPPED) if dropped else repeated(job, work))
    _write_metadata(job, work, parts)
    facts = card.facts(job, problems, total, duplicates)
    card.write_card(output, facts)
    left_out = problems.count + total.counts["unusable"] + total.counts["corrupt"]
    what = f", {duplicates:,} duplicates" if dropped else f"; {duplicates:,} duplicates are in it"
    lines = [
        f"{facts['images']:,} images with {facts['captions']:,} captions, {job.shards} shard(s), "
        f"{facts['bytes_out'] / 1e6:,.1f} MB ({facts['bytes_in'] / 1e6:,.1f} MB before)",
        f"left out: {left_out:,} damaged or without caption{what}",
    ]
    written = read_back(work, job)
    pairs = [written[index] for index in spread(len(written), card.SAMPLES)]
    samples = [(decode_image(pair["image"], pair["name"]), pair["captions"][0]) for pair in pairs]
    origin = f"from {job.source['path'] or job.source['format']}"
    card.write_picture(output / "card.png", job, [*lines, origin], samples, total)
    final = work.rename(output / VERSION)
    for pattern in ("statistics-*.json", "digests-*.npy", DROPPED):
        for scratch in final.glob(pattern):
            scratch.unlink()
    print(f"{'; '.join(lines)}. Data: {final}, card: {output / 'card.json'}, card.png")


def _write_metadata(job: Job, work: Path, parts: list[Statistics]) -> None:
    """Writes dataset_info.json and features.json, which TFDS needs to read the shards."""
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
