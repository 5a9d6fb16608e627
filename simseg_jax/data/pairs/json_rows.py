"""Rows of the two kinds of JSON files with captions: COCO's and Karpathy's splits."""

import json
import posixpath
from collections.abc import Iterator

from simseg_jax.data.pairs.example import Problems, encoding
from simseg_jax.runtime.errors import UserError, reading, some


def json_rows(table: str, data: bytes, split: str, problems: Problems) -> tuple[Iterator, str]:
    """((place, image name, [caption]) of every caption, the file that lists the images to use).

    split: for COCO's JSON that file, or ''; for Karpathy's the names of splits.
    """
    advice = "JSON Lines are not read: save their images and captions as CSV with a header."
    with reading(f"the caption table {table}", advice):
        code = encoding(data)
        content = json.loads(data.decode(code, "surrogateescape" if code == "utf-8" else "strict"))
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(
            f"{table} is no JSON of COCO captions or Karpathy's splits: it has no list `images`."
        )
    if any(isinstance(image, dict) and "sentences" in image for image in content["images"]):
        return _karpathy_rows(table, content, split, problems), ""
    return _coco_rows(content, problems), split


def _karpathy_rows(table: str, content: dict, split: str, problems: Problems) -> Iterator:
    """(place, image name, [caption]) of the images in `split`: names joined by +, '' for all."""
    images = [image if isinstance(image, dict) else {} for image in content["images"]]
    known = dict.fromkeys(str(image["split"]) for image in images if "split" in image)
    wanted = split.split("+") if split else []
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"{table} has no split {unknown[0]!r}, only {some(known)}.")
    for number, image in enumerate(images):
        where = f"image {number}"
        if split and "split" not in image:
            problems.add(f"{where}: no split")
        elif not split or image["split"] in wanted:
            folder, name = image.get("filepath", ""), image.get("filename")
            sentences = image.get("sentences")
            if not isinstance(folder, str) or not isinstance(name, str):
                problems.add(f"{where}: no filename")
            elif not isinstance(sentences, list):
                problems.add(f"{where}, {name}: no sentences")
            else:
                for sentence in sentences or [None]:
                    yield where, posixpath.join(folder, name), [sentence]


def _coco_rows(content: dict, problems: Problems) -> Iterator:
    """(place, image name, [caption]) of every annotation, image by image."""
    names: dict = {}
    shared = set()
    for number, image in enumerate(content["images"]):
        identity, name = _fields(image, "id", "file_name")
        if name is None:
            problems.add(f"image {number}: no id or file_name")
        elif names.setdefault(identity, name) != name:
            problems.add(f"image {number}, {name}: has the id of {names[identity]}")
            shared.add(identity)
    captions: dict = {identity: [] for identity in names}
    annotations = content.get("annotations")
    for number, annotation in enumerate(annotations if isinstance(annotations, list) else ()):
        identity, caption = _fields(annotation, "image_id", "caption")
        if identity not in captions:
            problems.add(f"annotation {number}: its image is not listed")
        elif identity in shared:
            problems.add(f"annotation {number}: several images have its id {identity}")
        else:
            captions[identity].append((f"annotation {number}", caption))
    for identity, name in names.items():
        if not captions[identity]:
            problems.add(f"{name}: image without caption")
        for where, caption in captions[identity]:
            yield where, name, [caption]


def _fields(entry, identity: str, other: str) -> tuple:
    """(entry[identity], entry[other]), None for a missing one; `entry` may be of any type."""
    if not isinstance(entry, dict) or not isinstance(entry.get(identity), str | int):
        return None, None
    return entry[identity], entry.get(other)
