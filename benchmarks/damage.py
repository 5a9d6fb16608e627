"""Small files of every kind that the drills damage, and the damage, drawn from a generator."""

import csv
import importlib.util
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

Generator = np.random.Generator

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
# The format PIL writes, modes of the pixels.
FORMATS = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "P"),
    "GIF": ("P",),
    "TIFF": ("RGB", "I;16", "F", "CMYK"),
    "PPM": ("RGB",),
    "ICO": ("RGBA",),
}


def damaged(data: bytes, rng: Generator) -> bytes:
    """The bytes with one kind of damage that disks, networks and attackers do."""
    start, stop = sorted(int(place) for place in rng.integers(0, len(data) + 1, 2))
    stop = min(stop, start + int(rng.choice([1, 16, 4096])))
    kind = int(rng.integers(8))
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[stop:]
    if kind == 2:
        return data[:start] + data[start:stop] + data[start:]
    if kind == 3:
        return data[:start] + bytes(stop - start) + data[stop:]
    if kind == 4:
        return data[:start] + rng.bytes(stop - start) + data[stop:]
    changed = bytearray(data)
    if kind == 5 and len(changed) >= start + 4:
        extreme = int(rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
        changed[start : start + 4] = extreme.to_bytes(4, "little" if rng.random() < 0.5 else "big")
    # Else, and most often, single bits; half of them in the head, which says what the rest is.
    for _ in range(int(rng.choice([1, 1, 8]))):
        reach = min(len(changed), 256) if rng.random() < 0.5 else len(changed)
        if reach:
            changed[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def odd_value(rng: Generator):
    """What may stand in a JSON file in the place of something sensible."""
    nested: list = []
    for _ in range(200):
        nested = [nested]
    values = [None, True, 0, -1, 7, 7.5, 10**6, 2**70, 1e308, float("nan"), "", " ", "\0", "²"]
    values += ["x" * 10_000, "../../x", "/etc/passwd", "a,b", [], {}, [7], ["a", 5], {"a": None}]
    return [*values, nested][int(rng.integers(len(values) + 1))]


def odd_json(content, rng: Generator):
    """Parsed JSON of which one value, drawn from all depths, is odd, lost, or under another key."""
    if not (isinstance(content, dict | list) and len(content)) or rng.random() < 0.1:
        return odd_value(rng)
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key, changed = keys[int(rng.integers(len(keys)))], content.copy()
    if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.8:
        changed[key] = odd_json(content[key], rng)
    elif (kind := rng.random()) < 0.2:
        del changed[key]
    elif kind < 0.4 and isinstance(changed, dict):
        names = ["", "x", "a.b", "blocks.99999999.x", "\n" * 9]
        changed[names[int(rng.integers(len(names)))]] = changed.pop(key)
    else:
        changed[key] = odd_value(rng)
    return changed


def odd_text(data: bytes, rng: Generator) -> bytes:
    """A JSON file with `odd_json` in it, seldom an abyss of brackets or nothing."""
    if rng.random() < 0.1:
        return [b"[" * 200_000, b'{"a":' * 200_000, b"", b"7"][int(rng.integers(4))]
    return json.dumps(odd_json(json.loads(data), rng)).encode()


def odd_safetensors(data: bytes, rng: Generator) -> bytes:
    """Weights with one odd field in the header, whose length is right again."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = odd_text(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def odd_zip(data: bytes, rng: Generator) -> bytes:
    """An archive (.pth, .npz) one of whose members is damaged, lost, renamed or compressed.

    Checksums are right again. The pickle of a .pth is as likely as all of its arrays together.
    """
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith(".pkl")]
        of = pickles if pickles and rng.random() < 0.5 else names
        chosen, kind = of[int(rng.integers(len(of)))], int(rng.integers(6))
        for name in names:
            content = old.read(name)
            if name != chosen:
                new.writestr(name, content)
            elif kind == 1:
                others = ["/", "x", "../x", "a/data.pkl", name.replace("0", "99999999")]
                new.writestr(others[int(rng.integers(len(others)))], content)
            elif kind == 2:
                new.writestr(name, content + bytes(10**6), zipfile.ZIP_DEFLATED)
            elif kind > 2:
                new.writestr(name, damaged(content, rng))
    return result.getvalue()


def weights(file: Path, rng: Generator) -> None:
    """Damages a file of weights or one beside them, by its format or as any file."""
    data = file.read_bytes()
    change = damaged
    if rng.random() < 0.7:
        if file.suffix == ".json":
            change = odd_text
        elif file.suffix == ".safetensors":
            change = odd_safetensors
        elif zipfile.is_zipfile(file):
            change = odd_zip
    file.write_bytes(change(data, rng))


def damage_tree(folder: Path, rng: Generator) -> str:
    """Damages one file below a folder; says which and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Half of the time any file, half of the time in proportion to their sizes.
    sizes = np.array([path.stat().st_size for path in files], float)
    shares = sizes / sizes.sum() if rng.random() < 0.5 and sizes.sum() else None
    file = files[int(rng.choice(len(files), p=shares))]
    kind = str(rng.choice(["removed", "emptied", "exchanged", *["damaged"] * 5]))
    if kind == "removed":
        file.unlink()
    elif kind == "damaged":
        file.write_bytes(damaged(file.read_bytes(), rng))
    else:
        other = files[int(rng.integers(len(files)))]
        file.write_bytes(other.read_bytes() if kind == "exchanged" else b"")
    return f"{file.relative_to(folder)} {kind}"


def image(rng: Generator) -> tuple[str, bytes]:
    """(name, bytes) of a small image in any format that people have, sometimes a wrong suffix."""
    form = str(rng.choice(list(FORMATS)))
    mode = str(rng.choice(FORMATS[form]))
    pixels = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8))
    if mode == "I;16":
        pixels = Image.fromarray(rng.integers(0, 65535, (20, 30), np.uint16))
    file = io.BytesIO()
    (pixels if mode == "I;16" else pixels.convert(mode)).save(file, form)
    suffix = form.lower() if rng.random() < 0.8 else str(rng.choice(["jpg", "png", "gif"]))
    if rng.random() < 0.05:
        return f"image.{suffix}", EPS
    return f"image.{suffix}", file.getvalue()


def captions(folder: Path, rng: Generator) -> Path:
    """Writes eight pairs in a format drawn at random, sound but for one place; what to open."""
    picture = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 20, 20)).save(picture, "JPEG")
    rows = [(f"{n}.jpg", f"a red square, seen {n} times") for n in range(8)]
    parquet_too = ["parquet"] if importlib.util.find_spec("pyarrow") else []
    form = str(rng.choice(["csv", "tsv", "json", "tar", *parquet_too]))
    file = folder / f"pairs.{form}"
    if form != "tar":
        for name, _ in rows:
            (folder / name).write_bytes(picture.getvalue())
    if form in ("csv", "tsv"):
        with file.open("w", newline="", encoding="utf-8") as text:
            table = csv.writer(text, delimiter="," if form == "csv" else "\t")
            table.writerows([("image", "caption"), *rows])
    elif form == "json":
        content = {
            "images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(rows)],
            "annotations": [{"image_id": n, "caption": text} for n, (_, text) in enumerate(rows)],
        }
        changed = odd_json(content, rng) if rng.random() < 0.6 else content
        file.write_text(json.dumps(changed))
    elif form == "tar":
        with tarfile.open(file, "w") as archive:
            for name, text in rows:
                field = odd_value(rng) if rng.random() < 0.1 else text
                parts = {name: picture.getvalue(), f"{name[:-4]}.json": {"caption": field}}
                for part, content in parts.items():
                    data = content if isinstance(content, bytes) else json.dumps(content).encode()
                    member = tarfile.TarInfo(part)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    else:
        import pyarrow as pa  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]

        names, texts = zip(*rows, strict=True)
        images = [{"bytes": picture.getvalue(), "path": name} for name in names]
        parquet.write_table(pa.table({"image": images, "caption": list(texts)}), file)
    if form not in ("json", "tar") or rng.random() < 0.4:
        file.write_bytes(damaged(file.read_bytes(), rng))
    return file
