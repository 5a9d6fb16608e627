"""Records of evaluated images on disk, from which a killed job continues."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.files import digest, naming
from simseg_jax.runtime.settings import first_difference, plain
from simseg_jax.runtime.sharding import gather_bytes

FORMAT = 4  # Version of the lines. Records in another format are computed again.
IMMATERIAL = ("limit", "batch_size", "threads")


def material(settings: Any) -> dict[str, Any]:
    """The settings of a test set that affect the result for an image."""
    return {key: value for key, value in plain(settings).items() if key not in IMMATERIAL}


class Record(NamedTuple):
    """The result for one image under each of the settings.

    name: of the image. stamp: identifies the version of its files. counts: per setting int [n, 3]
    with rows (true label, predicted label, pixels). scores: per setting image-text scores [C], NaN
    for a class that is not scored. given, points: under the first settings, from the true classes:
    counts of `localisation.masks_of_given`, and `localisation.pointing_game`.
    """

    name: str
    stamp: str
    counts: list[np.ndarray]
    scores: list[np.ndarray]
    given: np.ndarray
    points: np.ndarray

    @property
    def truth(self) -> np.ndarray:
        """Rows (label, pixels) [n, 2] of the labels that the mask of the image shows."""
        true, _, pixels = self.counts[0].T
        labels = np.unique(true)
        return np.array([(label, pixels[true == label].sum()) for label in labels]).reshape(-1, 2)

    def to_list(self) -> list:
        """The record as lists that JSON can hold."""
        scores = [[None if np.isnan(x) else round(float(x), 6) for x in s] for s in self.scores]
        counts = [c.tolist() for c in self.counts]
        return [self.name, self.stamp, counts, scores, self.given.tolist(), self.points.tolist()]

    @classmethod
    def from_list(cls, values: list) -> "Record":
        """The inverse of `to_list`."""
        name, stamp, counts, scores, given, points = values
        arrays = [np.array(c, np.int64).reshape(-1, 3) for c in (*counts, given)]
        scores = [np.array(s, np.float64) for s in scores]
        return cls(name, stamp, arrays[:-1], scores, arrays[-1], np.array(points).reshape(-1, 3))


def total_confusion(records: Iterable[Record], classes: int, number: int = 0) -> np.ndarray:
    """Pixels int64 [C, C] of all records under one setting: rows are the truth, columns the
    prediction. number: of the setting.
    """
    confusion = np.zeros((classes, classes), np.int64)
    for record in records:
        truth, prediction, pixels = record.counts[number].T
        confusion[truth, prediction] += pixels
    return confusion


class Kept(NamedTuple):
    """The content of a `RecordStore`: (name, stamp) -> record; reason -> unusable lines."""

    records: dict[tuple[str, str], Record]
    unusable: Counter[str]

    def of(self, images: Iterable[tuple[str, str]]) -> dict[str, Record]:
        """Name -> record, for those of the images (name, stamp) that have one."""
        return {image[0]: self.records[image] for image in images if image in self.records}

    def describe(self, done: int, remaining: Sequence[str], listed: Sequence[str]) -> str:
        """A sentence that says how many images have records, and why the `remaining` have none.

        listed: all names of the test set, including those beyond the limit.
        """
        known = {name for name, _ in self.records}
        changed = sum(name in known for name in remaining)
        reasons = Counter({"changed since": changed, "new": len(remaining) - changed})
        reasons["no longer listed"] = len(known - set(listed))
        reasons += self.unusable if remaining else Counter()
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        total = done + len(remaining)
        return f"{done} of {total} images are done already{f' ({why})' if why else ''}."


class RecordStore:
    """A folder of JSON lines, one file per process; a header line identifies the evaluation.

    identity: the checkpoint, the settings and whatever else must agree; a store with another
    identity is refused with a `UserError`. inputs: identifies what is read besides the images;
    records with other inputs are not used. Every line carries a digest of its content and header,
    which reveals damage.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], inputs: str = ""):
        self.folder = folder
        # Through JSON, which turns tuples into lists, to compare equal with what is read.
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity, "inputs": inputs}))
        self.key = digest(self.identity)

    def read(self) -> Kept:
        """All finished records."""
        kept = Kept({}, Counter())
        for path in sorted(self.folder.glob("records-*.jsonl")):
            reason = "damaged"
            for line in filter(None, path.read_bytes().split(b"\n")):
                content = _parse(line)
                if isinstance(content, dict):
                    reason = self._check(path, content)
                elif content and content[-1] == self._seal(content[:-1]):
                    record = Record.from_list(content[:-1])
                    kept.records[record.name, record.stamp] = record
                else:
                    kept.unusable[reason] += 1
        return kept

    def extend(self, records: Iterable[Record]) -> Iterator[Record]:
        """Appends records to this process's file as they arrive, and yields them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"records-{jax.process_index():05d}.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            if file.tell():
                file.write("\n")  # A kill may have cut off the last line.
            file.write(json.dumps({**self.identity, "seal": self.key}) + "\n")
            file.flush()  # A full disk is noticed before the work begins.
            for record in records:
                values = record.to_list()
                file.write(json.dumps([*values, self._seal(values)]) + "\n")
                file.flush()
                yield record

    def _seal(self, values: list) -> str:
        return digest([self.key, *values])

    def _check(self, path: Path, header: dict) -> str:
        """The reason to count if lines below this header of `path` cannot be used."""
        if header.get("format") != FORMAT:
            return "of an earlier version" if "settings" in header else "damaged"
        if header.pop("seal", None) != digest(header):
            return "damaged"
        difference = first_difference(header, self.identity)
        if difference is None:
            return "damaged"
        key, old, new = difference
        if key != "inputs":
            raise UserError(
                f"{path} holds results with {key}={old!r}, not {new!r}: choose another --output, "
                "or delete that folder to start again."
            )
        return "of other class names or prompts"


def stored(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """(identity, finished records) of whatever evaluation wrote the records in `folder`."""
    files = (path.read_bytes() for path in sorted(folder.glob("records-*.jsonl")))
    lines = (line for content in files for line in content.split(b"\n"))
    headers = [_parse(line) for line in lines if line.startswith(b"{")]
    headers = [header for header in headers if isinstance(header, dict)]
    if not headers:
        raise UserError(f"{folder} holds no records: give the folder of an evaluation.")
    identity = {key: value for key, value in headers[-1].items() if key not in ("format", "seal")}
    store = RecordStore(folder, identity, identity.pop("inputs", ""))
    kept = store.read()
    if not kept.records:
        raise UserError(f"{folder} holds no records of this version: evaluate again.")
    return identity, list(kept.records.values())


def _parse(line: bytes) -> list | dict | None:
    """The content of a line; None if it is damaged, perhaps cut off by a kill."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, list | dict) else None


def gather(records: Iterable[Record]) -> dict[str, Record]:
    """Name -> record of all processes, sorted by name. All processes must call this together."""
    own = json.dumps([record.to_list() for record in records])
    parts = [json.loads(part) for part in gather_bytes(own.encode())]
    merged = {r.name: r for part in parts for r in map(Record.from_list, part)}
    return {name: merged[name] for name in sorted(merged)}
