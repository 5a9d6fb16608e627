"""ArrayRecord shards of tf.train.Example, alone or in a TFDS data set, without TensorFlow."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError
from grain.sources import ArrayRecordDataSource

from simseg_jax.data.pairs import tf_example
from simseg_jax.data.pairs.cache import local_copy
from simseg_jax.data.pairs.example import (
    BadExample,
    Problems,
    choose_keys,
    no_pairs,
    optional_key,
    usable_captions,
)
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, one_line, some
from simseg_jax.runtime.remote import File

INFO = "dataset_info.json"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
LOOKED = 4  # Records of a shard whose features are read to choose keys.
READ_ERRORS = (OSError, ValueError, RuntimeError, DecodeError)


class RecordSource:
    """Records of ArrayRecord shards: tf.train.Example with an image and captions.

    path: as in the settings, for messages. promised: the numbers of records per shard that TFDS
    stored, for messages about unreadable shards. The reader needs local files, so remote shards are
    copied into the cache folder.
    """

    def __init__(
        self,
        path: str,
        files: list[File],
        image_key: str,
        caption_key: str,
        cache: Path,
        promised: list[int] | None = None,
    ):
        self.path = path
        shards, self.problems = open_shards(files, cache, promised)
        if not shards:
            raise no_pairs(path, self.problems)
        self.records: Any = ArrayRecordDataSource(shards)
        features = self._first_features([shard.take for shard in shards])
        among = features, self.problems
        [self.image] = choose_keys(path, "feature image", image_key, *among)
        self.captions = choose_keys(path, "feature caption", caption_key, *among)
        self.name = optional_key(features)
        if not any(isinstance(value, bytes) for value in features[self.image]):
            raise UserError(f"{path}: feature {self.image} holds numbers, not an encoded image.")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{self.path}, record {index}"
        try:
            values = tf_example.parse(self.records[index])
        except READ_ERRORS as error:
            raise BadExample(name, error) from error
        for value in values.get(self.name, ())[:1]:
            name += f", {value.decode(errors='replace') if isinstance(value, bytes) else value}"
        image = next(iter(values.get(self.image, ())), b"")
        if not image or not isinstance(image, bytes):
            raise BadExample(name, "no image")
        captions = usable_captions(name, *(values.get(key, ()) for key in self.captions))
        return {"image": image, "captions": captions, "name": name}

    def _first_features(self, counts: list[int]) -> dict[str, list]:
        """Features and their values in a few records of the first shard where any can be parsed.

        A single record could be an odd one. counts: records per shard.
        """
        start, reason = 0, "they are empty"
        features: dict[str, list] = {}
        for count in counts:
            for index in range(start, start + min(LOOKED, count)):
                try:
                    for key, values in tf_example.parse(self.records[index]).items():
                        features.setdefault(key, []).extend(values)
                except READ_ERRORS as error:
                    reason = one_line(error)
            if features:
                return features
            start += count
        raise UserError(f"The records of {self.path} are no tf.train.Example: {reason}.")


def open_shards(
    files: list[File], cache: Path, promised: list[int] | None = None
) -> tuple[list, Problems]:
    """(shards as `ArrayRecordDataSource` takes them, problems that name those left out)."""
    problems = Problems()

    def measure(file: File):
        try:
            path = local_copy(file, cache)
            reader = ArrayRecordReader(path)
            count = reader.num_records()
            reader.close()  # Raises if the file is damaged; before, it seems to have 0 records.
            return path, count
        except (OSError, RuntimeError) as error:
            if not remote.is_damage(error):
                raise
            return file.path, error

    with ThreadPoolExecutor(16) as pool:
        measured = list(pool.map(measure, files))
    shards = []
    for number, (shard, count) in enumerate(measured):
        if isinstance(count, Exception):
            lost = f" with {promised[number]} records" if promised else ""
            reason = one_line(str(count).partition(";")[0] or "truncated", 60)
            problems.add(f"{shard}: unreadable shard{lost} ({reason})")
        elif count:
            # Grain's read instruction, which saves it from counting the records again.
            shards.append(
                SimpleNamespace(filename=shard, skip=0, take=count, examples_in_shard=count)
            )
    return shards, problems


def tfds_files(folder: str, split: str) -> tuple[list[File], list[int]]:
    """(shards, number of records of each) of a split ('' for train) of a TFDS data set.

    folder: the folder of one version, which has dataset_info.json.
    """
    path, split = remote.join(folder, INFO), split or "train"
    try:
        info = json.loads(remote.read(path))
        splits = {str(entry["name"]): entry for entry in info["splits"]}
        stored = info.get("fileFormat", "tfrecord")
        lengths = [int(count) for count in splits.get(split, {}).get("shardLengths", [])]
        template = str(splits.get(split, {}).get("filepathTemplate") or TEMPLATE)
    except (*READ_ERRORS, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"Cannot read {path}: {type(error).__name__}: {one_line(error)}."
        ) from error
    if stored != "array_record":
        raise UserError(
            f"{folder} is stored as {stored}, which has no random access; convert it with `tfds "
            f"convert_format --dataset_version_dir={folder} --out_file_format=array_record`."
        )
    if split not in splits:
        raise UserError(f"{folder} has no split {split!r}; its splits are {some(splits)}.")
    present = {file.path.rpartition("/")[2]: file for file in remote.listing(folder)[0]}
    files, count = [], len(lengths)
    for number in range(count):
        values = {
            "DATASET": info.get("name"),
            "SPLIT": split,
            "FILEFORMAT": stored,
            "SHARD_INDEX": f"{number:05d}",
            "NUM_SHARDS": f"{count:05d}",
            "SHARD_X_OF_Y": f"{number:05d}-of-{count:05d}",
        }
        # str.format would let an untrusted template pad the name to any width.
        name = template.rpartition("/")[2]
        for key, value in values.items():
            name = name.replace(f"{{{key}}}", str(value))
        files.append(present.get(name, File(remote.join(folder, name), 0, "")))
    return files, lengths
