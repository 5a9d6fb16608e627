import sys
from pathlib import Path

import pytest
from pairs_support import make_pairs, settings, write_parquet

from simseg_jax.data.pairs import open_source
from simseg_jax.runtime.errors import UserError

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
    images, texts = [b"1", b"2", b"1", b"4"], list("abcd")
    path = write(
        tmp_path / "a.parquet", image=images, caption=texts, image_id=["x", None, "x", None]
    )
    assert examples(open_source(settings(path), cache)) == [
        (b"1", ("a", "c")),
        (b"2", ("b",)),
        (b"4", ("d",)),
    ]


@pytest.mark.parametrize("ids", [[[0, 1], [0, 1]], [[0, 0], [0, 0]], [["0", None], [None, "0"]]])
def test_an_id_that_means_several_images(tmp_path, cache, ids):
    """Ids that start again in every file, or are all the same: no caption changes its image."""
    for part in range(2):
        images = [f"image {part}{row}".encode() for row in range(2)]
        texts = [f"text {part}{row}" for row in range(2)]
        write(tmp_path / f"{part}.parquet", image=images, caption=texts, image_id=ids[part])
    # Only an equal image with the same id is the same example.
    write(tmp_path / "2.parquet", image=[b"image 00"], caption=["again"], image_id=[ids[0][0]])
    source = open_source(settings(tmp_path), cache)
    found = dict(examples(source))
    assert found.pop(b"image 00") == ("text 00", "again")
    assert found == {f"image {k}".encode(): (f"text {k}",) for k in ("01", "10", "11")}
    assert (len(source), source.problems.count) == (4, 0)


IMAGE_TYPES = {
    "binary": pa.binary(),
    "large": pa.large_binary(),
    "view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
    "struct": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "struct of views": pa.struct({"bytes": pa.binary_view(), "path": pa.string()}),
}
TEXT = ["a", "b"]
CAPTION_TYPES = {
    "string": pa.array(TEXT),
    "large": pa.array(TEXT, pa.large_string()),
    "view": pa.array(TEXT, pa.string_view()),
    "binary": pa.array([b"a", b"b"]),
    "dictionary": pa.array(TEXT).dictionary_encode(),
    "list": pa.array([["a"], ["b"]]),
    "large list": pa.array([["a"], ["b"]], pa.large_list(pa.string())),
    "records": pa.array([[{"raw": "a", "id": 1}], [{"raw": "b", "id": 2}]]),
    "captions": pa.array([[{"caption": "a"}], [{"caption": "b"}]]),
    "a record": pa.array([{"text": "a"}, {"text": "b"}]),
    "JSON": pa.array(['["a"]', '["b"]']),
}


@pytest.mark.parametrize("image", IMAGE_TYPES)
def test_types_of_images(tmp_path, cache, image):
    images = [{"bytes": b"1"}, {"bytes": b"2"}] if "struct" in image else [b"1", b"2"]
    path = write(tmp_path / "a.parquet", image=pa.array(images, IMAGE_TYPES[image]), text=TEXT)
    assert examples(open_source(settings(path), cache)) == [(b"1", ("a",)), (b"2", ("b",))]


@pytest.mark.parametrize("caption", CAPTION_TYPES)
@pytest.mark.parametrize("column", ["caption", "captions", "sentences_raw", "sentences", "raw"])
def test_types_and_columns_of_captions(tmp_path, cache, caption, column):
    columns = {"image": [b"1", b"2"], column: CAPTION_TYPES[caption]}
    path = write(tmp_path / "a.parquet", **columns)
    assert examples(open_source(settings(path), cache)) == [(b"1", ("a",)), (b"2", ("b",))]


@pytest.mark.parametrize("names", ["caption_{}", "caption{}", "text_{}", "Sentence{}"])
def test_numbered_columns(tmp_path, cache, names):
    columns = {names.format(k): [f"a{k}", f"b{k}" if k < 2 else None] for k in range(12)}
    path = write(tmp_path / "a.parquet", image=[b"1", b"2"], **columns)
    expected = tuple(f"a{k}" for k in range(12))
    source = open_source(settings(path), cache)
    assert examples(source) == [(b"1", expected), (b"2", ("b0", "b1"))]
    assert source.problems.count == 0


def test_text_that_is_not_utf8_costs_its_row(tmp_path, cache):
    texts = [b"a", "é".encode("latin-1"), b"c"]
    for name, captions in (
        ("binary", pa.array(texts)),
        ("string", pa.array(texts).view(pa.string())),
    ):
        path = write(tmp_path / f"{name}.parquet", image=[b"1", b"2", b"3"], caption=captions)
        source = open_source(settings(path), cache)
        assert examples(source) == [(b"1", ("a",)), (b"3", ("c",))]
        assert source.problems.count == 1
        assert source.problems.first[0].startswith(f"{path}, row 1")
        assert "not UTF-8" in source.problems.first[0]


def test_a_file_without_the_columns_beside_good_ones(tmp_path, cache):
    write(tmp_path / "a.parquet", image=[b"1"], caption=["a"])
    write(tmp_path / "b.parquet", url=["http://x"], caption=["b"])
    write(tmp_path / "c.parquet", image=[b"3"], caption=[3])
    source = open_source(settings(tmp_path), cache)
    assert examples(source) == [(b"1", ("a",))]
    assert "b.parquet has no column image" in source.problems.first[0]
    assert "c.parquet: column caption is of type int64, not text" in source.problems.first[1]


MIB = 1 << 20


@pytest.mark.parametrize(
    ("image", "caption", "rows"),
    [
        (80 * MIB, 1, 1),  # One large value,
        (8 * MIB, 1, 64),  # a smaller one that many rows repeat,
        (1, 80 * MIB, 1),
        (1, 8 * MIB, 64),
        (1, 1, 10**6),  # many rows.
    ],
)
def test_small_files_do_not_decompress_to_much(tmp_path, cache, image, caption, rows):
    indices = pa.array([0] * rows, pa.int32())
    values = {"image": bytes(image), "caption": "a" * caption}
    columns = {
        key: pa.DictionaryArray.from_arrays(indices, pa.array([value]))
        for key, value in values.items()
    }
    path = tmp_path / "bomb.parquet"
    pq.write_table(
        pa.table(columns), path, compression="zstd", dictionary_pagesize_limit=1 << 30,
        write_statistics=False, store_schema=False,
    )  # fmt: skip
    assert path.stat().st_size < 50_000
    write(tmp_path / "good.parquet", image=[b"1"], caption=["a"])
    source = open_source(settings(tmp_path), cache)
    assert examples(source) == [(b"1", ("a",))]
    assert "bomb.parquet" in source.problems.first[0]
    # What was written of it is gone.
    assert sum(file.stat().st_size for file in Path(cache).iterdir()) < MIB


def test_large_row_groups_are_read_in_parts(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("simseg_jax.data.pairs.parquet.BATCH_BYTES", 1000)
    path = write_parquet(PAIRS, tmp_path)
    assert examples(open_source(settings(path), cache)) == EXPECTED


def test_columns_of_any_name(tmp_path, cache):
    _, images, texts = zip(*PAIRS, strict=True)
    path = write(tmp_path / "a.parquet", pic=images, words=[list(text) for text in texts])
    assert examples(open_source(settings(path, image_key="pic", caption_key="words"), cache)) == (
        EXPECTED
    )
    with pytest.raises(
        UserError, match=r"no column image named image, .*only pic, words: .*set image_key"
    ):
        open_source(settings(path), cache)


def test_names_of_columns(tmp_path, cache):
    path = write(tmp_path / "a.parquet", Image=[b"1", b"2"], TEXT=["a", "NULL"], Image_ID=[1, 2],
                 Caption=["b", "c\0d"])  # fmt: skip
    source = open_source(settings(path), cache)
    assert examples(source) == [(b"1", ("b",))]
    assert source.problems.notes == {"caption: column Caption taken, TEXT left out": 1}
    assert source.problems.first == [f"{path}, row 1, 2: a caption with NUL characters"]
    source = open_source(settings(path, caption_key="text"), cache)
    assert examples(source) == [(b"1", ("a",))]
    assert source.problems.first == [f"{path}, row 1, 2: caption missing, written NULL"]
    assert not source.problems.notes


@pytest.mark.parametrize("names", [("caption", "caption"), ("caption", "Caption"), ("url", "url")])
def test_columns_of_one_name(tmp_path, cache, names):
    table = pa.table([[b"1"], ["a"], ["b"], ["c"]], names=["image", *names, "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    if names[0] == "url":
        assert examples(open_source(settings(tmp_path), cache)) == [(b"1", ("c",))]
        return
    with pytest.raises(UserError, match="has several columns caption: rename all but the one"):
        open_source(settings(tmp_path), cache)


def test_what_is_left_out(tmp_path, cache):
    images = [b"1", None, b"3", b"4", b""]
    path = write(tmp_path / "a.parquet", image=images, text=["a", "b", " ", None, "e"])
    write(tmp_path / "numbers.parquet", image=[b"1"], text=[7])
    with pytest.raises(UserError, match=r"column text is of type int64, not text.*caption_key"):
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
