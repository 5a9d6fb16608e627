"""The segment_dataset command: inputs, outputs, damage, resuming, actors of Ray."""

import collections
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import fsspec
import numpy as np
import pytest
from PIL import Image
from support import message, run

from simseg_jax import segment_dataset
from simseg_jax.bulk import worker
from simseg_jax.data.shapes import scene
from simseg_jax.runtime import actors
from simseg_jax.segmenter import Segmenter

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[parquet]'")
WORDS = "--words=star, moon"


def png(index):
    content = io.BytesIO()
    Image.fromarray(scene(index, "val")[0]).resize((40, 30 + index)).save(content, "PNG")
    return content.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def photos(tmp_path):
    """Seven images, of which number 3 is damaged."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index in range(7):
        path = folder / f"{'more/' * (index > 4)}{index}.png"
        path.write_bytes(png(index) if index != 3 else png(index)[:200])
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="module")
def segmenter(trained):
    return Segmenter.from_pretrained(trained, maps=False)


def go(monkeypatch, capsys, trained, *arguments):
    return run(monkeypatch, capsys, segment_dataset, f"--checkpoint={trained}", *arguments)


def rows(folder):
    """Key -> row of all files; every key is there once."""
    listed = [
        row for p in sorted(folder.glob("*.parquet")) for row in parquet.read_table(p).to_pylist()
    ]
    found = {row["key"]: row for row in listed}
    assert len(found) == len(listed)
    return found


def test_a_folder_becomes_files_with_a_row_per_image(
    monkeypatch, capsys, trained, photos, tmp_path, segmenter
):
    out = tmp_path / "out"
    arguments = [photos, f"file://{out}", WORDS, "--shard_size=3", "--sigma_weight=-1"]
    said = go(monkeypatch, capsys, trained, *arguments)
    assert "Left out: 1 .txt" in said
    assert "7 images, 1 with an error (1 image file is truncated" in said
    names = [f"{n:05d}-of-00003.parquet" for n in range(3)]
    assert sorted(p.name for p in out.iterdir()) == [*names, "job.json"]
    found = rows(out)
    assert list(found) == ["0", "1", "2", "3", "4", "more/5", "more/6"]
    assert "truncated" in found["3"]["error"]
    assert found["3"]["mask"] is None
    job = json.loads((out / "job.json").read_text())
    assert job["words"] == ["star", "moon"]
    other = Segmenter(segmenter.model, maps=False, sigma_weight=-1)
    expected = other(png(5), ["star", "moon"])
    row = found["more/5"]
    assert (row["height"], row["width"], row["error"]) == (35, 40, None)
    assert row["mask"] == expected.mask_png()
    assert row["drawn"] == list(expected.drawn)
    assert row["threshold"] == pytest.approx(expected.threshold, rel=1e-6)
    scores = [expected.scores[name] for name in (*job["words"], *job["contrast"])]
    np.testing.assert_allclose(row["scores"], scores, rtol=1e-6)


def test_finished_files_stay_and_others_are_written(monkeypatch, capsys, trained, photos, tmp_path):
    out = tmp_path / "out"
    arguments = [photos, out, WORDS, "--shard_size=3", "--refine=none"]
    go(monkeypatch, capsys, trained, *arguments)
    first, second, third = sorted(out.glob("*.parquet"))
    before = second.read_bytes()
    second.unlink()
    (out / ".dead.partial").touch()
    kept = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    said = go(monkeypatch, capsys, trained, *arguments)
    assert "3 images" in said
    assert "2 of 3 files were there before" in said
    assert second.read_bytes() == before
    assert (first.stat().st_mtime_ns, third.stat().st_mtime_ns) == kept
    assert not (out / ".dead.partial").exists()
    checkpoint = f"--checkpoint={trained}"

    def refusal(*changed):
        return message(monkeypatch, capsys, segment_dataset, checkpoint, *changed)

    assert "words=['star', 'moon'] instead of ['star']" in refusal(
        photos, out, "--words=star", "--shard_size=3", "--refine=none", "--contrast="
    )
    assert "shards=3 instead of 2" in refusal(photos, out, WORDS, "--shard_size=4", "--refine=none")
    assert "settings=" in refusal(photos, out, WORDS, "--shard_size=3", "--sigma_weight=0")
    (photos / "0.png").write_bytes(png(1))
    assert "have changed since" in refusal(*arguments)
    assert "holds other files" in refusal(photos, photos, WORDS)
    assert "--words is needed" in refusal(photos, out)
    assert "vocabulary of the model knows no word of: 犬" in refusal(photos, out, "--words=犬")


def test_tars_and_run_lengths(monkeypatch, capsys, trained, tmp_path, segmenter):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for index in range(3):
            add(tar, f"{index}.txt", b"a star")
            add(tar, f"{index}.png", png(index))
        add(tar, "2.seg.png", png(5))
        add(tar, "._0.png", b"of macOS")
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: 512 * 5])  # Cut off in its second image.
    (tmp_path / "2.tar").write_bytes(b"no archive")
    out = tmp_path / "out"
    options = [WORDS, "--masks=rle", "--refine=none", "--sigma_weight=-1"]
    said = go(monkeypatch, capsys, trained, tmp_path, out, *options)
    assert "2 damage between images" in said
    first, second, third = (
        parquet.read_table(p).to_pylist() for p in sorted(out.glob("*.parquet"))
    )
    assert [row["key"] for row in first] == ["0", "1", "2", "2#3"]
    assert [row["error"] for row in first] == [None] * 4
    changes = {"sigma_weight": -1, "refine": "none"}
    expected = Segmenter(segmenter.model, maps=False, **changes)(png(5), ["star", "moon"])
    assert json.loads(first[3]["annotations"]) == json.loads(json.dumps(expected.to_coco(3)))
    assert second[-1]["key"] == str(tmp_path / "1.tar")
    assert "damaged at byte" in second[-1]["error"]
    assert [row["key"] for row in third] == [str(tmp_path / "2.tar")]

    out = tmp_path / "tars"
    go(
        monkeypatch,
        capsys,
        trained,
        tmp_path / "0.tar",
        out,
        WORDS,
        "--to=webdataset",
        "--refine=none",
    )
    with tarfile.open(out / "00000-of-00001.tar") as tar:
        names = tar.getnames()
        assert names[:4] == ["0.json", "0.mask.png", "1.json", "1.mask.png"]
        mask = Image.open(tar.extractfile("1.mask.png"))
        assert json.load(tar.extractfile("1.json"))["height"] == mask.height == 31


def test_parquet_and_embeddings(monkeypatch, capsys, trained, tmp_path, segmenter):
    table = pytest.importorskip("pyarrow")
    structs = [
        {"bytes": png(0), "path": "a"},
        {"bytes": b"x", "path": "b"},
        {"bytes": png(2)},
        None,
    ]
    content = table.Table.from_pylist([{"image": s, "id": i // 3} for i, s in enumerate(structs)])
    parquet.write_table(content, tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:300])
    out = tmp_path / "out"
    monkeypatch.setattr(worker, "CHUNK", 2)
    go(monkeypatch, capsys, trained, tmp_path, out, "--what=embeddings")
    found = rows(out)
    assert list(found) == ["0", "0#1", "0#2", "1", str(tmp_path / "1.parquet")]
    errors = [row["error"] for row in found.values()]
    assert errors[0] is errors[2] is None
    assert errors[1] == errors[3] == "no image in a known format"
    assert "unreadable" in errors[4]
    vectors = segmenter.embed_images([png(0), png(2)])
    np.testing.assert_allclose(found["0"]["embedding"], vectors[0], atol=1e-6)
    np.testing.assert_allclose(found["0#2"]["embedding"], vectors[1], atol=1e-6)
    assert found["1"]["embedding"] is None


def test_addresses(monkeypatch, capsys, trained):
    system = fsspec.filesystem("memory")
    for index in range(3):
        system.pipe(f"/in/more/{index}.png", png(index))
    system.pipe("/in/.hidden.png", png(0))
    options = [WORDS, "--shard_size=2", "--refine=none"]
    said = go(monkeypatch, capsys, trained, "memory://in", "memory://out", *options)
    assert "3 images, none with an error" in said
    assert sorted(name.rpartition("/")[2] for name in system.find("/out")) == [
        *("00000-of-00002.parquet", "00001-of-00002.parquet", "job.json")
    ]
    table = parquet.read_table(io.BytesIO(system.cat("/out/00000-of-00002.parquet")))
    assert table["key"].to_pylist() == ["more/0.png", "more/1.png"]
    again = go(monkeypatch, capsys, trained, "memory://in", "memory://out", *options)
    assert "2 of 2 files were there before" in again


def test_cores_are_shared_between_actors():
    assert actors.cores_each([2], 1) == 2
    assert actors.cores_each([2], 2) == 1
    assert actors.cores_each([2], 5) == 1
    assert actors.cores_each([8, 8, 8], 4) == 4  # With 6, one node had room for one only.
    assert actors.cores_each([], 1) == 1


# Ray forks and starts its processes; it leaves open what it logs to.
quiet = pytest.mark.filterwarnings(
    "ignore:os.fork", "ignore::ResourceWarning", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def cluster():
    """One Ray for the tests of this file."""
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    with actors.connected(None) as ray:
        yield ray


@quiet
@pytest.mark.slow
def test_actors_that_die_are_replaced(cluster, tmp_path):
    def deadly(item):
        """Ends its process at its first call with 1, and at every call with 2."""
        if item == 2 or (item == 1 and not (tmp_path / "died").exists()):
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.environ["NPROC"], item * 10

    def make(cores):
        return deadly

    found = {item: rest for item, *rest in actors.results(cluster, make, range(4), 1, 0)}
    cores = str(os.cpu_count())
    assert {i: found[i] for i in (0, 1, 3)} == {i: [(cores, 10 * i), ""] for i in (0, 1, 3)}
    assert found[2][0] is None
    assert "3 processes died" in found[2][1]


@quiet
def test_actors_write_the_same(cluster, monkeypatch, capsys, trained, photos, tmp_path):
    options = [WORDS, "--shard_size=3", "--refine=none"]
    go(monkeypatch, capsys, trained, photos, tmp_path / "here", *options)
    said = go(monkeypatch, capsys, trained, photos, tmp_path / "there", *options, "--actors=1")
    assert "7 images, 1 with an error" in said
    here, there = rows(tmp_path / "here"), rows(tmp_path / "there")
    assert list(here) == list(there)
    for key, row in here.items():
        assert row["error"] == there[key]["error"]
        np.testing.assert_allclose(row["scores"] or [], there[key]["scores"] or [], atol=1e-5)


@pytest.mark.slow
def test_a_job_that_is_stopped_or_killed_continues(trained, tmp_path):
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for index in range(80):
        (photos / f"{index}.png").write_bytes(png(index % 7))
    command = [sys.executable, "-m", "simseg_jax.segment_dataset", photos, out, WORDS]
    command += [f"--checkpoint={trained}", "--shard_size=1", "--refine=none", "--actors=1"]
    command = [*map(str, command)]
    seen = 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        try:
            end = time.monotonic() + 180
            while len(list(out.glob("*.parquet"))) < seen + 2:
                assert job.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
        finally:
            # SIGTERM to the whole group also ends Ray, which may end the command before it speaks.
            (os.kill if number == signal.SIGTERM else os.killpg)(job.pid, number)
        _, errors = job.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert job.returncode == -number
        else:
            assert job.returncode == 130, errors
            assert "are kept; the same command continues" in errors
            assert f"Stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in errors
            assert "Traceback" not in errors
        seen = len(list(out.glob("*.parquet")))
        assert seen < 80
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of 80 files were there before" in done.stdout
    keys = [key for p in out.glob("*.parquet") for key in parquet.read_table(p)["key"].to_pylist()]
    assert collections.Counter(keys) == {str(index): 1 for index in range(80)}
    assert not list(out.glob(".*.partial"))
