"""Writers of small data sets in every format of training pairs.

Each takes a list of (name, JPEG bytes, captions) and a folder, and returns the path for
`settings.path`; the formats then give the same examples in the same order.
"""

import csv
import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from simseg_jax.data.pairs import open_source, tf_example

IMAGES = "Images"  # Folder that write_csv and write_coco put the images in.


def make_pairs(count: int, seed: int = 0) -> list[tuple[str, bytes, tuple[str, ...]]]:
    """`count` pairs of noise images (24 x 16) with one to three captions."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8)).save(file, "JPEG")
        captions = tuple(f'A "{number}", seen {k} é' for k in range(1 + number % 3))
        pairs.append((f"{number:05d}.jpg", file.getvalue(), captions))
    return pairs


def settings(path, format="auto", **others) -> SimpleNamespace:
    """Settings of one data set, as `open_source` takes them."""
    defaults = {"split": "", "images": IMAGES, "image_key": "", "caption_key": "", "size": 8}
    return SimpleNamespace(**(defaults | {"path": str(path), "format": format} | others))


def read_all(path, cache, **others) -> list[tuple[bytes, tuple[str, ...]]]:
    """(image, captions) of every example."""
    source = open_source(settings(path, **others), str(cache))
    assert source.problems.count == 0, source.problems
    return [(source[i]["image"], source[i]["captions"]) for i in range(len(source))]


def write_csv(pairs, folder) -> str:
    """captions.csv with one row per caption, and Images/."""
    _write_images(pairs, folder)
    path = Path(folder) / "captions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption"))
        rows.writerows((name, caption) for name, _, captions in pairs for caption in captions)
    return str(path)


def write_coco(pairs, folder) -> str:
    """captions.json as for COCO, and Images/."""
    _write_images(pairs, folder)
    images = [{"id": 7 * i, "file_name": name} for i, (name, _, _) in enumerate(pairs)]
    annotations = [
        {"id": 10 * i + k, "image_id": 7 * i, "caption": caption}
        for i, (_, _, captions) in enumerate(pairs)
        for k, caption in enumerate(captions)
    ]
    path = Path(folder) / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def write_tar(pairs, folder, shards: int = 2, format: int = tarfile.GNU_FORMAT) -> str:
    """{00000..N}.tar as from img2dataset; several captions are a list in KEY.json."""
    for shard, part in enumerate(_split(pairs, shards)):
        with tarfile.open(Path(folder) / f"{shard:05d}.tar", "w", format=format) as tar:
            for name, image, captions in part:
                key = name.rpartition(".")[0]
                add_member(tar, name, image)
                if len(captions) == 1:
                    add_member(tar, f"{key}.txt", captions[0].encode())
                add_member(tar, f"{key}.json", json.dumps({"caption": captions}).encode())
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a regular file to an open archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_parquet(pairs, folder, shards: int = 2) -> str:
    """The folder with train-0000I-of-0000N.parquet in the layout of Hugging Face."""
    import pyarrow as pa
    import pyarrow.parquet

    for shard, part in enumerate(_split(pairs, shards)):
        table = pa.table(
            {
                "image": [{"bytes": image, "path": name} for name, image, _ in part],
                "caption": [list(captions) for _, _, captions in part],
            }
        )
        path = Path(folder) / f"train-{shard:05d}-of-{shards:05d}.parquet"
        pa.parquet.write_table(table, path, row_group_size=8)
    return str(folder)


def write_array_record(pairs, folder, shards: int = 2, stem: str = "pairs") -> str:
    """The folder with STEM.array_record-0000I-of-0000N."""
    for shard, part in enumerate(_split(pairs, shards)):
        path = Path(folder) / f"{stem}.array_record-{shard:05d}-of-{shards:05d}"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for name, image, captions in part:
            values = {"image": image, "captions": list(captions), "name": name}
            writer.write(tf_example.serialize(values))
        writer.close()
    return str(folder)


def write_tfds(pairs, folder, shards: int = 2) -> str:
    """The folder `pairs` with version 1.0.0; TFDS can read it too if it is installed."""
    home = Path(folder) / "pairs" / "1.0.0"
    home.mkdir(parents=True)
    write_array_record(pairs, home, shards, stem="pairs-train")
    split = {
        "name": "train",
        "shardLengths": [str(len(part)) for part in _split(pairs, shards)],
        "numBytes": "1",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "pairs", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (home / "dataset_info.json").write_text(json.dumps(info))
    if importlib.util.find_spec("tensorflow_datasets"):
        from tensorflow_datasets import features

        layout = {
            "image": features.Image(shape=(None, None, 3)),
            "captions": features.Sequence(features.Text()),
            "name": features.Text(),
        }
        features.FeaturesDict(layout).save_config(str(home))
    return str(home.parent)


def _write_images(pairs, folder) -> None:
    (Path(folder) / IMAGES).mkdir(exist_ok=True)
    for name, image, _ in pairs:
        (Path(folder) / IMAGES / name).write_bytes(image)


def _split(pairs, shards: int) -> list:
    size = -(-len(pairs) // shards)
    return [pairs[i * size : (i + 1) * size] for i in range(shards)]
