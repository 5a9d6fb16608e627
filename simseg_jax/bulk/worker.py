"""The unit of work of `segment_dataset`: one output file, from its images to its rows."""

import dataclasses
import functools
import itertools
import json
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from simseg_jax.bulk.rows import SUFFIXES, Row, write_rows
from simseg_jax.bulk.shards import Shard, read_shard
from simseg_jax.data.pairs.example import Problems
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, one_line
from simseg_jax.segmenter import Classes, Segmenter

CHUNK = 256  # Images that are embedded together.


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that the output depends on, as job.json holds it.

    content: a digest of the source's files. identity: of the checkpoint.
    """

    source: str
    content: str
    shards: int
    output: str
    what: str
    to: str
    masks: str
    image_key: str
    checkpoint: str
    identity: dict[str, Any]
    words: list[str]
    contrast: list[str]
    max_pixels: int
    settings: dict[str, Any]

    def path(self, shard: int) -> str:
        """The output file of a shard."""
        name = f"{shard:05d}-of-{self.shards:05d}{SUFFIXES[self.to]}"
        return remote.join(self.output, name)


@dataclasses.dataclass
class Done:
    """What became of one shard: its rows, those with an error by kind, why it was not written."""

    shard: int
    images: int = 0
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    failure: str = ""


class Worker:
    """Writes output files; an actor holds one.

    load() -> the segmenter, made with the first shard. gpu: whether there has to be one.
    """

    def __init__(
        self, job: Job, classes: Classes | None, load: Callable[[], Segmenter], gpu: bool = False
    ):
        self.job, self.classes, self.load, self.gpu = job, classes, load, gpu

    @functools.cached_property
    def segmenter(self) -> Segmenter:
        if self.gpu and jax.default_backend() == "cpu":
            raise UserError("An actor sees no GPU: install JAX for GPUs where the actors run.")
        segmenter = self.load()
        if segmenter.model.identity != self.job.identity:
            raise UserError(f"{self.job.checkpoint} is another model than when the job was begun.")
        return segmenter

    def __call__(self, shard: Shard) -> Done:
        """Writes the output file of a shard; no error passes through."""
        done, job = Done(shard.number), self.job
        try:
            with (
                remote.appearing(job.path(shard.number)) as path,
                write_rows(path, job.to, job.what, job.masks) as add,
            ):
                for row in self._rows(shard, done):
                    add(row)
        except Exception as error:
            expected = isinstance(error, UserError | OSError)
            failure = str(error) if expected else traceback.format_exc()
            return Done(shard.number, failure=failure)
        return done

    def _rows(self, shard: Shard, done: Done) -> Iterator[Row]:
        """The rows of a shard in the order of its images, then one on damage between them."""
        problems, keys = Problems(), {}
        failed: dict[int, str] = {}

        def images() -> Iterator[str | bytes]:
            for place, (key, image) in enumerate(read_shard(shard, self.job.image_key, problems)):
                keys[place] = key
                yield image

        def left_out(place: int, error: UserError) -> None:
            if isinstance(error.__cause__, ConnectionError):
                raise error  # It says nothing about the image: the shard is to be tried again.
            failed[place] = one_line(error.__cause__ or error)

        answers = self._embeddings if self.job.what == "embeddings" else self._masks
        following = 0
        for place, row in itertools.chain(answers(images(), left_out), [(None, {})]):
            end = following + len(keys) if place is None else place
            for missing in range(following, end):
                reason = failed.pop(missing)
                done.errors[re.sub(r"\d[\d,]*", "N", reason)] += 1
                yield {"key": keys.pop(missing), "error": reason}
            if place is not None:
                yield {"key": keys.pop(place), **row, "error": None}
                end += 1
            done.images = following = end
        if problems.count:
            done.errors["damage between images"] += 1
            yield {"key": shard.files[0][1].path, "error": str(problems)}

    def _masks(self, images: Iterator, left_out: Callable) -> Iterator[tuple[int, Row]]:
        assert self.classes is not None
        for place, answer in self.segmenter.answers(images, self.classes, left_out):
            height, width = answer.mask.shape
            if self.job.masks == "png":
                mask = {"mask": answer.mask_png()}
            else:
                mask = {"annotations": json.dumps(answer.to_coco(place))}
            yield (
                place,
                {
                    **{"height": height, "width": width, **mask, "drawn": answer.drawn},
                    **{"scores": list(answer.scores.values()), "threshold": answer.threshold},
                },
            )

    def _embeddings(self, images: Iterator, left_out: Callable) -> Iterator[tuple[int, Row]]:
        for start in itertools.count(0, CHUNK):
            chunk, bad = list(itertools.islice(images, CHUNK)), set()
            if not chunk:
                return

            def note(index: int, error: UserError, start=start, bad=bad) -> None:
                bad.add(index)
                left_out(start + index, error)

            for index, vector in enumerate(self.segmenter.embed_images(chunk, note)):
                if index not in bad:
                    yield start + index, {"embedding": vector}
