"""Seeded damage to files of weights, and what reading such a file must come to."""

import hashlib
import io
import json
import random
import shutil
import time
import zipfile
from pathlib import Path

from simseg_jax.errors import UserError
from simseg_jax.trained import load_model, open_source
from simseg_jax.weights import authors
from simseg_jax.weights.choice import usual_names
from simseg_jax.weights.towers import find_towers, read_tower

SECONDS, CHARACTERS = 5, 500  # Of this process to read a file, of the message about it.
# Values that a field of a JSON file does not have.
ODD = (
    *(None, True, -1, 0, 1, 3, 7.5, 10**6, 10**9, 10**30, 1e308, float("nan"), float("inf")),
    *("", "x", "²", "../x", "/etc/passwd", "\n", "a" * 10_000, [], [1], [[]], {}, {"a": 1}),
)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, other bytes, a missing end, a part twice or left out."""
    if not data:
        return rng.randbytes(9)
    data = bytearray(data)
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 100))
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice((1, 1, 3))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            data[at : at + length] = rng.choice((b"\xff", b"\0", b"\x7f", b"9")) * length
        case 2:
            del data[at:]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length]
        case 5:
            data[at : at + length] = rng.randbytes(length)
    return bytes(data)


def damage_json(text: str, rng: random.Random) -> str:
    """One field lost, odd, or another's; seldom the text itself or an abyss of brackets."""
    if rng.random() < 0.1:
        return rng.choice(("[" * 200_000, '{"a":' * 200_000, "", "7", "[]", "null", text[:-3]))
    content = json.loads(text)
    groups = [content]
    for group in groups:
        inner = group.values() if isinstance(group, dict) else group
        groups += [value for value in inner if isinstance(value, dict | list) and value]
    group = rng.choice(groups)
    key = rng.choice(list(group)) if isinstance(group, dict) else rng.randrange(len(group))
    if rng.random() < 0.2:
        del group[key]
    elif isinstance(group, dict) and rng.random() < 0.2:
        group[rng.choice(("", "x", "a.b", "blocks.99999999.x", "\n" * 9))] = group.pop(key)
    else:
        group[key] = rng.choice(ODD)
    return json.dumps(content)


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """One member damaged, renamed, compressed or left out, with checksums that are right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        # Most members are arrays, the interesting one is the pickle.
        chosen = rng.choice(([n for n in names if n.endswith(".pkl")] or names) + names[:3])
        how = rng.choice(("bytes", "bytes", "bytes", "name", "compressed", "lost", "twice"))
        for name in names:
            content, kind = old.read(name), zipfile.ZIP_STORED
            if name == chosen and how == "bytes":
                content = damage_bytes(content, rng)
            if name == chosen and how == "compressed":
                content, kind = content + bytes(10**6), zipfile.ZIP_DEFLATED
            if name == chosen and how == "name":
                name = rng.choice(("/", "x", "../x", "a/data.pkl", name.replace("0", "99999999")))
            if name != chosen or how != "lost":
                new.writestr(name, content, kind)
            if name == chosen and how == "twice":
                new.writestr(f"{name}2", content)
    return out.getvalue()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """One field of the header, whose length is right again."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = damage_json(data[8:end].decode(), rng).encode()
    return len(header).to_bytes(8, "little") + header + data[end:]


def damaged_copy(valid: Path, target: Path, rng: random.Random) -> Path:
    """A copy of a weights file or folder or of a converted model with one thing damaged."""
    shutil.rmtree(target, ignore_errors=True)
    if valid.is_file():
        target.mkdir()
        shutil.copy(valid, target)
    else:
        shutil.copytree(valid, target)
    files = [
        f for f in sorted(target.rglob("*")) if f.is_file() and f.suffix not in (".md", ".txt")
    ]
    file = rng.choice(files)
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        data = damage_json(data.decode(), rng).encode()
    elif file.suffix == ".safetensors" and rng.random() < 0.6:
        data = damage_safetensors(data, rng)
    elif zipfile.is_zipfile(file) and rng.random() < 0.7:
        data = damage_zip(data, rng)
    else:
        data = damage_bytes(data, rng)
    file.write_bytes(data)
    if file.name != "manifest.json" and rng.random() < 0.8:
        _seal(target)
    return target / valid.name if valid.is_file() else target


def _seal(folder: Path) -> None:
    """Lists the damaged files of a converted model as if they were right."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text())
        for name in content["sha256"]:
            content["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))


def read_all(source: Path) -> str:
    """ "read", or the message of the `UserError` about a file of weights or a converted model.

    Every other exception passes; an AssertionError says that it took too long or too many words.
    """
    began = time.process_time()
    try:
        path, weights = open_source(source)
        if weights is None:
            load_model(path)
        elif authors.is_whole_model(weights):
            authors.read_model(weights)
        else:
            sides = {form.side for form, _ in find_towers(usual_names(weights.tensors))}
            for side in sorted(sides) or ("image",):
                read_tower(weights, side)
        message = "read"
    except UserError as error:
        message = str(error)
    except OSError as error:  # What a command reports as it is.
        if error.filename is None:
            raise
        message = f"{error.strerror}: {error.filename}"
    seconds = time.process_time() - began
    assert seconds < SECONDS, f"{seconds:.1f} s for {source}: {message[:200]}"
    words = message.replace(str(source), "")
    assert len(words) < CHARACTERS, f"{len(words)} characters: {words[:600]}"
    assert words.isprintable(), words
    return message
