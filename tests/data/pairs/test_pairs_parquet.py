import sys

import pytest
from pairs_support import make_pairs, settings, write_parquet

from simseg_jax.data.pairs import open_source
from simseg_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
PAIRS = make_pairs(12)
EXPECTED = [(image, captions) for _, image, captions in PAIRS]


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def write(path, **columns) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return str(path)


def examples(source):
    return [(source[i]["image"], source[i]["captions"]) for i in range(len(source))]


def test_retrieval_files_of_the_authors(tmp_path, cache):
    rows = [(i, image, text) for i, (_, image, texts) in enumerate(PAIRS) for text in texts]
    # One row per caption, not sorted by image, over two files.
    rows = sorted(rows, key=lambda row: len(row[2]) * 100 + row[0] * 7 % 13)
    order = list(dict.fromkeys(number for number, _, _ in rows))
    for part, name in ((rows[:15], "a"), (rows[15:], "b")):
        numbers, images, texts = zip(*part, strict=True)
        ids = list(range(len(part)))
        write(tmp_path / f"{name}.parquet", imbytes=images, caption=texts, image_id=numbers, id=ids)
    source = open_source(settings(tmp_path), cache)
    assert [source[i]["image"] for i in range(12)] == [PAIRS[n][1] for n in order]
    for i, number in enumerate(order):
        assert sorted(source[i]["captions"]) == sorted(PAIRS[number][2])
    assert source.problems.count == 0
    # Images are kept once per file.
    images = sum(source.table["image"].is_valid().to_pylist())
    assert images < len(rows)


def test_a_row_without_image_id_stands_alone(tmp_path, cache):
    _, images, texts = zip(*PAIRS[:4], strict=True)
    texts = [text[0] for text in texts]
    path = write(
        tmp_path / "a.parquet", image=images, caption=texts, image_id=["x", None, "x", None]
    )
    assert examples(open_source(settings(path), cache)) == [
        (images[0], (texts[0], texts[2])),
        (images[1], (texts[1],)),
        (images[3], (texts[3],)),
    ]


def test_columns_of_any_name(tmp_path, cache):
    _, images, texts = zip(*PAIRS, strict=True)
    path = write(tmp_path / "a.parquet", pic=images, words=[list(text) for text in texts])
    assert examples(open_source(settings(path, image_key="pic", caption_key="words"), cache)) == (
        EXPECTED
    )
    with pytest.raises(UserError, match=r"no column image .*set image_key to one of pic, words"):
        open_source(settings(path), cache)


def test_what_is_left_out(tmp_path, cache):
    images = [b"1", None, b"3", b"4", b""]
    path = write(tmp_path / "a.parquet", image=images, text=["a", "b", " ", None, "e"])
    write(tmp_path / "numbers.parquet", image=[b"1"], text=[7])
    with pytest.raises(UserError, match=r"no usable pair .*row 0: empty caption"):
        open_source(settings(tmp_path / "numbers.parquet"), cache)
    for _ in range(2):
        source = open_source(settings(path), cache)
        assert examples(source) == [(b"1", ("a",))]
        assert source.problems.count == 4
        assert source.problems.first[0] == f"{path}, row 1: no image"
        assert source.problems.first[1] == f"{path}, row 2: empty caption"


def test_damaged_shards(tmp_path, cache):
    write_parquet(PAIRS, tmp_path)
    content = (tmp_path / "train-00001-of-00002.parquet").read_bytes()
    (tmp_path / "train-00002-of-00002.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "train-00003-of-00002.parquet").write_bytes(b"")
    (tmp_path / "train-00004-of-00002.parquet").write_bytes(
        content[:1000] + b"?" * 3000 + content[4000:]
    )
    source = open_source(settings(tmp_path), cache)
    assert examples(source) == EXPECTED
    assert source.problems.count == 3
    assert "train-00002-of-00002.parquet: unreadable shard" in source.problems.first[0]


def test_mistakes_are_named(tmp_path, cache, monkeypatch):
    def fails(message, path):
        with pytest.raises(UserError, match=message):
            open_source(settings(path), cache)

    fails("column image is of type string, not the bytes of images; download",
          write(tmp_path / "a.parquet", image=["http://a/b.jpg"], text=["a"]))  # fmt: skip
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    paths = pa.array([{"bytes": None, "path": "b.jpg"}], kind)
    fails("holds the paths of its images, not their bytes",
          write(tmp_path / "b.parquet", image=paths, text=["a"]))  # fmt: skip
    fails("no usable pair", write(tmp_path / "c.parquet", image=[b"1"], text=[""]))
    path = write(tmp_path / "d.parquet", image=[b"1"], text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails("need pyarrow: pip install pyarrow", path)
