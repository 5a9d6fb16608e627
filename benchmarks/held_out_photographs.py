"""Takes photographs out of a shard before training, and makes two test sets of them.

    python benchmarks/held_out_photographs.py tinyimagenet.tar held_out

The shard is a WebDataset tar of JPG files with JSON files that name what each one shows ("names",
the first counts). Every 50th photograph is left out. Written into the folder:
- train.tar: all others, for training;
- images/NAME/*.jpg: those left out, for zero-shot classification;
- collages/: 250 images of 2 x 2 of them with four different names, and masks, as a test set of
  `data=folder`. All of a tile counts as its object, although most photographs have a background,
  so the score of perfect maps is unknown; a random patch points at the right tile in a quarter.

`configs/photographs.py` reads all three. The folder appears when all of it is written; one that is
not empty is refused.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from simseg_jax.runtime.errors import UserError, reading, report_user_errors, require_file
from simseg_jax.weights.folder import complete

EVERY = 50
COLLAGES = 250
TILE = 64  # Side of a tile in pixels.


class Photograph(NamedTuple):
    """One photograph left out: its key in the shard, its name and the bytes of its JPG file."""

    key: str
    name: str
    jpg: bytes


def files_of(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files of a shard with their contents."""
    with reading(f"the shard {shard}"), tarfile.open(shard) as tar:
        for member in tqdm(tar, desc="read", unit=" files", mininterval=1):
            if content := tar.extractfile(member):
                yield member, content.read()


def split_shard(shard: Path, train: Path) -> list[Photograph]:
    """Copies all examples but every 50th to the shard `train` and returns those left out."""
    left_out, files, keys = [], {}, {}
    with tarfile.open(train, "w") as target:
        for member, content in files_of(shard):
            key, _, kind = member.name.rpartition(".")
            number = keys.setdefault(key, len(keys))
            if number % EVERY:
                target.addfile(member, io.BytesIO(content))
                continue
            files[kind] = content
            if files.keys() == {"jpg", "json"}:
                left_out.append(Photograph(key, first_name(key, files["json"]), files["jpg"]))
                files = {}
    if not left_out or files:
        raise UserError(f"{shard} must hold pairs KEY.jpg, KEY.json, one after the other.")
    return left_out


def first_name(key: str, text: bytes) -> str:
    """The first of the "names" in a JSON file of the shard."""
    try:
        name = json.loads(text)["names"][0]
    except (ValueError, TypeError, LookupError):
        raise UserError(f'{key}.json has no list "names" of what the photograph shows.') from None
    if not isinstance(name, str) or "/" in name or name.startswith("."):
        raise UserError(f"{key}.json: the name {name!r} cannot be the name of a folder.")
    return name


def write_images(photographs: list[Photograph], folder: Path) -> None:
    """Writes folder/NAME/KEY.jpg."""
    for photograph in photographs:
        path = folder / photograph.name / f"{Path(photograph.key).name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph.jpg)


def write_collages(photographs: list[Photograph], folder: Path) -> None:
    """Writes images, masks and classes.txt of a test set of 2 x 2 photographs; seed 0."""
    names = sorted({photograph.name for photograph in photographs})
    if not 4 <= len(names) <= 255:
        raise UserError(f"Collages need 4 to 255 different names, there are {len(names)}.")
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    by_name = {name: [p for p in photographs if p.name == name] for name in names}
    rng = np.random.default_rng(0)
    for number in range(COLLAGES):
        chosen = rng.choice(len(names), 4, replace=False)
        tiles = []
        for index in chosen:
            same = by_name[names[index]]
            image = Image.open(io.BytesIO(same[rng.integers(len(same))].jpg)).convert("RGB")
            tiles.append(np.asarray(image.resize((TILE, TILE))))
        image = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
        mask = np.kron(chosen.reshape(2, 2), np.ones((TILE, TILE))).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:03}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:03}.png")


@report_user_errors
def main() -> None:
    """Splits the shard, writes the test sets and prints their sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shard", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    require_file(args.shard, "the shard")
    with complete(args.folder) as folder:
        photographs = split_shard(args.shard, folder / "train.tar")
        write_images(photographs, folder / "images")
        write_collages(photographs, folder / "collages")
    print(
        f"{len(photographs)} photographs of {len({p.name for p in photographs})} names left out, "
        f"{COLLAGES} collages: {args.folder}/train.tar, images, collages"
    )


if __name__ == "__main__":
    main()
