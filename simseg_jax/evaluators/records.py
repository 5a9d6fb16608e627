"""What an evaluation keeps of every image, on disk, so that a killed job goes on where it was."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from simseg_jax.dotted import leaves
from simseg_jax.errors import UserError
from simseg_jax.sharding import gather_bytes

# Settings that do not change the record of an image.
IMMATERIAL = ("limit", "batch_size", "threads")


class Record(NamedTuple):
    """One image under every variant of the settings.

    counts: int [n, 3], rows (true label, predicted label, pixels). scores: image-text scores [C],
    NaN where a class is not scored.
    """

    index: int
    name: str
    counts: list[np.ndarray]
    scores: list[np.ndarray]

    def to_json(self) -> str:
        """One line."""
        scores = [[None if np.isnan(x) else round(float(x), 6) for x in s] for s in self.scores]
        counts = [c.tolist() for c in self.counts]
        return json.dumps([int(self.index), self.name, counts, scores])

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """Raises `ValueError` for a line that was cut off."""
        index, name, counts, scores = json.loads(line)
        arrays = [np.array(c, np.int64).reshape(-1, 3) for c in counts]
        return cls(index, name, arrays, [np.array(s, np.float64) for s in scores])


def total_confusion(records: Iterable[Record], classes: int, variant: int = 0) -> np.ndarray:
    """Pixels int64 [C, C] of all records, rows truth, columns prediction."""
    confusion = np.zeros((classes, classes), np.int64)
    for record in records:
        truth, prediction, pixels = record.counts[variant].T
        confusion[truth, prediction] += pixels
    return confusion


class RecordStore:
    """A folder of JSON lines, one file per process; the first line says what was evaluated.

    identity: settings and checkpoint. A store of another identity is refused with a `UserError`.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        # As it reads when it comes back from JSON.
        self.identity = json.loads(json.dumps(identity))

    def read(self) -> dict[int, Record]:
        """Index -> record of everything that is finished."""
        records = {}
        for path in sorted(self.folder.glob("records-*.jsonl")):
            header, *lines = path.read_text(encoding="utf-8").splitlines() or ["{}"]
            self._check(path, header)
            for line in lines:
                try:
                    record = Record.from_json(line)
                except ValueError:
                    continue  # The process was killed while it wrote this line.
                records[record.index] = record
        return records

    def extend(self, records: Iterable[Record]) -> Iterator[Record]:
        """Appends records to the file of this process as they come, and passes them on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"records-{jax.process_index():05d}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            # A new line, in case that the last one was cut off.
            file.write("\n" if file.tell() else json.dumps(self.identity) + "\n")
            for record in records:
                file.write(record.to_json() + "\n")
                file.flush()
                yield record

    def _check(self, path: Path, header: str) -> None:
        try:
            found = json.loads(header)
        except ValueError:
            found = {}
        if found == self.identity:
            return
        old, new = (dict(leaves(x)) for x in (found, self.identity))
        key = next(key for key in {**new, **old} if old.get(key) != new.get(key))
        raise UserError(
            f"{path} holds results with {key}={old.get(key)!r}, not {new.get(key)!r}: "
            "choose another --output, or delete that folder to start again."
        )


def gather(records: dict[int, Record]) -> dict[int, Record]:
    """The records of all processes, by index. All processes must call this together."""
    lines = "\n".join(record.to_json() for record in records.values())
    parts = [part.decode("utf-8").splitlines() for part in gather_bytes(lines.encode("utf-8"))]
    merged = {r.index: r for part in parts for r in map(Record.from_json, part)}
    return {index: merged[index] for index in sorted(merged)}
