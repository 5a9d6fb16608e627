"""Photographs taken out of a shard: neither lost nor trained on, and named rightly in collages."""

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pairs_support import add_member
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "held_out_photographs.py"
GREY = {"cat": 10, "dog": 60, "pig": 110, "cow": 160, "hen": 210}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["held_out_photographs.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def write_shard(path, facts):
    """A shard; facts: the content of every JSON file."""
    with tarfile.open(path, "w") as tar:
        for number, fact in enumerate(facts):
            stream = io.BytesIO()
            grey = GREY.get(str((fact.get("names") or [""])[0]), 0)
            Image.new("RGB", (64, 64), (grey,) * 3).save(stream, "jpeg")
            files = {"jpg": stream.getvalue(), "json": json.dumps(fact).encode()}
            for suffix, content in files.items():
                add_member(tar, f"{number:05}.{suffix}", content)
    return path


def read_shard(path):
    """{name: content} of all files, in their order."""
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


@pytest.fixture
def shard(tmp_path):
    """251 photographs; number 50 i shows the i-th name in its own grey."""
    shown = [list(GREY)[number // 50 % len(GREY)] for number in range(251)]
    return write_shard(tmp_path / "all.tar", [{"names": [name, "other"]} for name in shown])


def test_every_50th_is_left_out_and_the_others_are_copied(shard, tmp_path, monkeypatch, capsys):
    run(monkeypatch, shard, tmp_path / "out")
    assert "6 photographs of 5 names left out" in capsys.readouterr().out
    kept = {name: file for name, file in read_shard(shard).items() if int(name[:5]) % 50}
    copied = read_shard(tmp_path / "out/train.tar")
    assert list(copied) == list(kept)
    assert copied == kept
    images = {str(p.relative_to(tmp_path / "out/images")) for p in tmp_path.glob("out/images/*/*")}
    assert images == {
        *("cat/00000.jpg", "dog/00050.jpg", "pig/00100.jpg"),
        *("cow/00150.jpg", "hen/00200.jpg", "cat/00250.jpg"),
    }


def test_masks_of_collages_name_their_tiles(shard, tmp_path, monkeypatch):
    run(monkeypatch, shard, tmp_path / "out")
    folder = tmp_path / "out/collages"
    names = (folder / "classes.txt").read_text().split()
    images = sorted(folder.glob("images/*.png"))
    assert len(images) == 250
    assert set(names) == set(GREY)
    places = set()
    for path in images:
        image = np.asarray(Image.open(path))[..., 0]
        mask = np.asarray(Image.open(folder / "masks" / path.name))
        assert mask.shape == image.shape == (128, 128)
        assert len(np.unique(mask)) == 4
        expected = np.array([GREY[name] for name in names])[mask]
        assert np.abs(image.astype(int) - expected).max() <= 2  # JPEG rounds greys.
        places |= {(int(mask[y, x]), y, x) for y in (0, 64) for x in (0, 64)}
    assert len(places) == len(GREY) * 4  # Every name comes to every place.


def test_what_cannot_be_read_or_replaced_is_refused(shard, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.tar").write_text("no tar")
    for arguments, message in {
        (shard, tmp_path): f"{tmp_path} exists",
        (shard, shard): f"{shard} exists",
        (tmp_path / "none.tar", tmp_path / "out"): f"no file {tmp_path}/none.tar",
        (tmp_path / "text.tar", tmp_path / "out"): f"Cannot read the shard {tmp_path}/text.tar",
    }.items():
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"all.tar", "text.tar"}


@pytest.mark.parametrize("fact", [{}, {"names": []}, {"names": ["../out"]}, {"names": [3]}])
def test_a_photograph_without_a_usable_name_is_refused(fact, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, write_shard(tmp_path / "all.tar", [fact]), tmp_path / "out")
    assert "00000.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["all.tar"]
