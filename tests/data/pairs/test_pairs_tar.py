import gzip
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pairs_support import add_member, make_pairs, settings, write_tar

from simseg_jax.data.pairs import BadExample, Problems, open_source
from simseg_jax.runtime.errors import UserError

PAIRS = make_pairs(6)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def write_members(path, members) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if isinstance(name, tarfile.TarInfo):
                tar.addfile(name)
            else:
                add_member(tar, name, content)
    return str(path)


def captions(source):
    return [source[i]["captions"] for i in range(len(source))]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, cache, form):
    pairs = [(f"{'long' * 60}-é/{name}", *rest) for name, *rest in PAIRS]
    source = open_source(settings(write_tar(pairs, tmp_path, format=form)), cache)
    assert [source[i]["image"] for i in range(6)] == [image for _, image, _ in PAIRS]
    assert captions(source) == [texts for _, _, texts in PAIRS]


def test_keys_and_captions(tmp_path, cache):
    text = json.dumps({"caption": "from json", "alt": " other "}).encode()
    path = write_members(
        tmp_path / "a.tar",
        [
            ("./a/1.JPG", b"1"),
            ("./a/1.txt", b" from txt\n"),
            ("./a/1.json", text),
            ("b/1.json", text),  # Another key; the text is before the image.
            ("b/1.png", b"2"),
            ("b/1.seg.png", b"not the image"),
            ("c.txt", b""),  # An empty text: the JSON counts.
            ("c.webp", b"3"),
            ("c.json", text),
            ("d.jpg", b"4"),
            ("d.txt", "\ufeffcafé".encode()),
            ("._c.webp", b"what macOS adds"),
            ("__MACOSX/._c.webp", b"and"),
            (".ipynb_checkpoints/c.webp", b"what notebooks add"),
        ],
    )
    source = open_source(settings(path), cache)
    assert captions(source) == [("from txt",), ("from json",), ("from json",), ("café",)]
    assert [source[i]["image"] for i in range(4)] == [b"1", b"2", b"3", b"4"]
    assert source[1]["name"] == f"{path}/b/1.png"
    assert source.problems == Problems(
        notes={
            "caption: txt taken, json left out": 1,
            "hidden ._* left out": 1,
            "hidden __MACOSX left out": 1,
            "hidden .ipynb_checkpoints left out": 1,
        }
    )
    other = open_source(settings(path, caption_key="json.alt", image_key="seg.png"), cache)
    assert captions(other) == [("other",)]
    assert other[0]["image"] == b"not the image"
    message = r"no JSON field caption named nix, only caption, alt: .* caption_key to json.FIELD"
    with pytest.raises(UserError, match=message):
        open_source(settings(path, caption_key="json.nix"), cache)
    with pytest.raises(UserError, match=r"no pair; its files end in jpg, json, png, seg.png"):
        open_source(settings(path, caption_key="cls"), cache)


def test_hidden_members_are_counted_by_name(tmp_path, cache):
    names = [f"{k}/._{k}.jpg" for k in "abc"] + [".DS_Store", "d/.DS_Store", ".git/e/f.txt"]
    names += [f".{k}/x.jpg" for k in "ghijk"]
    for shard in range(2):
        members = [*pair_of(f"k{shard}"), *((name, b"1") for name in names)]
        write_members(tmp_path / f"{shard}.tar", members)
    source = open_source(settings(tmp_path), cache)
    assert len(source) == 2
    assert str(source.problems) == (
        "Nothing was left out; hidden ._* left out (6); hidden .DS_Store left out (4); hidden .git "
        "left out (2); hidden .g left out (2); hidden .h left out (2); others (6)"
    )


def pair_of(key, text="x"):
    return [(f"{key}.jpg", key.encode()), (f"{key}.txt", text.encode())]


KEYS = ("1.0", "img v1.2", "a.b.c", "v1.0/x", "./y", "/data/imgs/z", "../up", "Ä.é", "x..y", "n")


@pytest.mark.parametrize("suffixes", [("jpg", "txt"), ("JPG", "TXT"), ("jpeg", "Txt")])
@pytest.mark.parametrize("key", KEYS)
def test_any_key_is_a_key(tmp_path, cache, key, suffixes):
    """Dots, an absolute name, one that leads upwards: nothing is unpacked."""
    image, text = suffixes
    members = [(f"{key}.{image}", b"image"), (f"{key}.{text}", b"text"), *pair_of("other")]
    source = open_source(settings(write_members(tmp_path / "a.tar", members)), cache)
    assert captions(source) == [("text",), ("x",)]
    assert source.problems.count == 0


@pytest.mark.parametrize(
    ("members", "problems"),
    [
        (["a.jpg", "a.b.txt"], ["a: image without caption", "a.b: caption without image"]),
        (["a.1.jpg"], ["a.1: image without caption"]),
        (["k.seg.png", "k.seg.json.gz"], []),  # More fields of the complete pair k.
        (["k.png"], ["k: another image; set image_key to the one meant"]),
        (["k.JPG"], ["'k.JPG' occurs twice"]),
        (["a.jpg", "A.txt"], ["a: image without caption", "A: caption without image"]),
    ],
)
def test_what_is_no_pair_is_counted(tmp_path, cache, members, problems):
    path = write_members(tmp_path / "a.tar", [*pair_of("k"), *((name, b"1") for name in members)])
    source = open_source(settings(path), cache)
    assert captions(source) == [("x",)]
    found = [problem.removeprefix(path).lstrip(":/ ") for problem in source.problems.first]
    assert found == problems


@pytest.mark.parametrize("padding", [0, 512, 1024, 10_240, 100_000])
@pytest.mark.parametrize("same", [False, True])
def test_archives_that_follow_each_other(tmp_path, cache, padding, same):
    """As of `cat a.tar b.tar`; keys may start again."""
    content = b""
    for name in ("first", "second", "third"):
        members = pair_of("key" if same else name, name)
        content += Path(write_members(tmp_path / name, members)).read_bytes() + bytes(padding)
    (tmp_path / "a.tar").write_bytes(content)
    source = open_source(settings(tmp_path / "a.tar"), cache)
    assert captions(source) == [("first",), ("second",), ("third",)]
    assert source.problems.count == 0


@pytest.mark.parametrize("tail", [b"garbage", b"?" * 5000, bytes(600) + b"x", b"ustar" * 900])
def test_bytes_after_an_archive_are_reported(tmp_path, cache, tail):
    path = Path(write_members(tmp_path / "a.tar", pair_of("key")))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + tail)
    source = open_source(settings(path), cache)
    assert captions(source) == [("x",)]
    assert source.problems.count == 1
    assert f"of {size + len(tail)}" in source.problems.first[0]
    # The archive ends at its marks, wherever something follows.
    path.write_bytes(path.read_bytes() + path.read_bytes())
    assert captions(open_source(settings(path), cache)) == [("x",), ("x",)]


def header(name, kind=tarfile.REGTYPE, size=0, **others):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    for key, value in others.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


HOSTILE = {
    "a negative size": header("a.jpg", size=-512),
    "a large negative size": header("a.jpg", size=-(2**60)),
    "a huge size": header("a.jpg", size=2**62),
    "a huge name": header("a", tarfile.GNUTYPE_LONGNAME, 2**50),
    "a huge extension": header("a", tarfile.XHDTYPE, 2**60),
    "a negative extension": header("a", tarfile.XHDTYPE, -5000),
    "a chain": header("a", tarfile.XHDTYPE) * 1200,
    "an odd record": header("a", tarfile.XHDTYPE, 512) + b"99999 path=a".ljust(512, b"\0"),
    "a sparse file": header("a", tarfile.GNUTYPE_SPARSE, 512),
    "no number": header("a.jpg").replace(b"0000644", b"zz!!zzz"),
    "nothing known": header("a.jpg", b"\xff", 5),
    "text": b"ustar" * 1000,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_one_bad_shard_beside_good_ones(tmp_path, cache, what):
    write_tar(PAIRS, tmp_path)
    good = Path(write_members(tmp_path / "good", pair_of("k"))).read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % 512)
    for number, content in enumerate([HOSTILE[what], good + HOSTILE[what] + good]):
        (tmp_path / f"0000{number + 2}.tar").write_bytes(content)
    source = open_source(settings(f"{tmp_path}/*.tar"), cache)
    assert captions(source)[:6] == [texts for _, _, texts in PAIRS]
    assert ("x",) in captions(source)[6:]
    assert source.problems.count
    assert len(str(source.problems)) < 400


DOCUMENTS = {
    '{"caption": "a"}': ("a",),
    '{"captions": ["a", "b"]}': ("a", "b"),
    '{"caption": null, "captions": ["a"]}': ("a",),
    '{"caption": "a", "captions": ["b"]}': ("a",),
    '{"captions": [{"raw": "a"}, {"caption": "b"}, null, " "]}': ("a", "b"),
    '\ufeff{"caption": "a"}': ("a",),
    '{"caption": ["a", 7]}': "no text but int",
    '{"caption": 7}': "no text but int",
    '{"caption": {"x": 1}}': "no text but dict",
    '{"caption": "\\ud800"}': "not UTF-8",
    '{"caption": ""}': "empty caption",
    '{"caption": "None"}': "caption missing, written None",
    '{"caption": "a\\u0000b"}': "a caption with NUL characters",
    '{"url": "x"}': "has no JSON field caption named caption, captions, .*, only url: ",
    "[1]": "has no JSON field caption named caption, captions, .*, only other content",
    "7": "has no JSON field caption named caption, captions",
    '[["a", 1]]': "has no JSON field caption named caption, captions",
    '{"Caption": " ", "title": "a", "url": "x"}': ("a",),
    '{"caption_1": "b", "caption_0": "a", "caption_2": null}': ("a", "b"),
    "{": "Expecting property name",
    "[" * 100_000: "recursion",
    '{"caption": "caf\udce9"}': "can't decode",
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents(tmp_path, cache, document):
    """One odd document costs only itself; where all are odd, they are refused while indexing."""
    content = document.encode(errors="surrogateescape")
    odd = [("odd.jpg", b"1"), ("odd.json", content)]
    good = [("good.jpg", b"2"), ("good.json", b'{"caption": "good"}')]
    path = write_members(tmp_path / "a.tar", [*odd, *good])
    source, expected = open_source(settings(path), cache), DOCUMENTS[document]
    assert source[1]["captions"] == ("good",)
    if isinstance(expected, tuple):
        assert source[0]["captions"] == expected
        named = [key for key in json.loads(document.removeprefix("\ufeff")) if key != "url"]
        notes = {f"caption: JSON field {named[0]} taken, {''.join(named[1:])} left out": 1}
        several = len(named) > 1 and "_1" not in document
        assert source.problems.notes == (notes if several else {})
        return
    with pytest.raises(BadExample, match=expected):
        source[0]
    path = write_members(tmp_path / "b.tar", odd)
    if "JSON field" in expected:
        with pytest.raises(
            UserError, match=rf"no usable pair .*b.tar {expected}.*set caption_key to json.FIELD"
        ):
            open_source(settings(path), cache)


def test_texts_that_cannot_be_decoded(tmp_path, cache):
    members = [*pair_of("a"), *pair_of("b"), ("c.jpg", b"1"), ("c.txt", "été".encode("latin-1"))]
    source = open_source(settings(write_members(tmp_path / "a.tar", members)), cache)
    with pytest.raises(BadExample, match="a caption that is not UTF-8"):
        source[2]
    members = [("a.jpg", b"1"), ("a.txt", "été".encode("utf-16")), ("b.jpg", b"1"),
               ("b.txt", b"x" * (1 << 20) + b"y")]  # fmt: skip
    source = open_source(settings(write_members(tmp_path / "b.tar", members)), cache)
    assert captions(source) == [("été",)]
    assert source.problems.first == [f"{tmp_path}/b.tar/b: a caption of 1,048,577 bytes"]


def test_what_is_left_out(tmp_path, cache):
    link, device = tarfile.TarInfo("d.jpg"), tarfile.TarInfo("d.txt")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    members = [
        (link, b""),
        (device, b""),
        ("e.jpg", b"1"),
        ("f.txt", b"1"),
        ("g.jpg", b"1"),
        ("g.txt", b"good"),
        ("g.txt", b"again"),
        ("h.jpg", b"h" * 200_000),  # Far from its caption: two reads.
        *((f"h{i}.other", b"o" * 20_000) for i in range(5)),
        ("h.txt", b"also good"),
        ("i.jpg", b"1"),
        ("i.txt", b"  "),
    ]
    path = write_members(tmp_path / "a.tar", members)
    for _ in range(2):  # The second time from the cache.
        source = open_source(settings(path), cache)
        assert (source[0]["captions"], source[1]["image"]) == (("good",), b"h" * 200_000)
        assert source[1]["captions"] == ("also good",)
        assert source.problems == Problems(
            5,
            [
                f"{path}: the member 'd.jpg' is not a regular file",
                f"{path}: the member 'd.txt' is not a regular file",
                f"{path}: 'g.txt' occurs twice",
                f"{path}/e: image without caption",
                f"{path}/f: caption without image",
            ],
        )
    # An empty caption is only found when it is read.
    with pytest.raises(BadExample, match=r"a.tar/i.jpg: empty caption"):
        source[2]


def cut_data(content):
    """In the middle of the last image."""
    return content[: content.rindex(b"\xff\xd8\xff\xe0") + 100]


def cut_header(content):
    """In the middle of the header of the last image."""
    return content[: content.rindex(b"00005.jpg") + 100]


def cut_between(content):
    """Right before that header."""
    return content[: content.rindex(b"00005.jpg")]


def flip(content):
    """A header that is no longer one."""
    at = content.rindex(b"00005.jpg")
    return content[:at] + b"?" * 512 + content[at + 512 :]


@pytest.mark.parametrize("damage", [cut_data, cut_header, cut_between, flip])
def test_damaged_shards(tmp_path, cache, damage):
    path = write_tar(PAIRS, tmp_path, shards=1)
    file = Path(path.replace("{00000..00000}", "00000"))
    file.write_bytes(damage(file.read_bytes()))
    source = open_source(settings(path), cache)
    assert captions(source) == [texts for _, _, texts in PAIRS[:5]]
    # After a bad header the reader goes on: the caption of its image is left.
    assert source.problems.count == (2 if damage is flip else 1)
    assert "00000.tar: damaged at byte" in source.problems.first[0]


def test_unusable_shards(tmp_path, cache):
    write_tar(PAIRS, tmp_path)
    (tmp_path / "00002.tar").write_bytes(b"no archive" * 1000)
    (tmp_path / "00003.tar").write_bytes(b"")
    source = open_source(settings(tmp_path), cache)
    assert len(source) == 6
    assert source.problems.count == 2
    with pytest.raises(UserError, match=r"no usable pair .*00002.tar: damaged at byte 0 of 10000"):
        open_source(settings(tmp_path / "00002.tar"), cache)
    (tmp_path / "00004.tar").write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes()))
    with pytest.raises(UserError, match=r"it is compressed: decompress it"):
        open_source(settings(tmp_path / "00004.tar"), cache)
    (tmp_path / "00004.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"00004.tar.gz is compressed.* decompress it first"):
        open_source(settings(tmp_path), cache)


def test_changes_after_indexing(tmp_path, cache):
    path = write_tar(PAIRS, tmp_path, shards=1).replace("{00000..00000}", "00000")
    source = open_source(settings(path), cache)
    write_tar(make_pairs(6, seed=1)[::-1], tmp_path, shards=1)
    with pytest.raises(BadExample, match=r"00000.tar, byte \d+: "):
        source[3]
    # A new index for a new file.
    assert captions(open_source(settings(path), cache))[0] == PAIRS[5][2]
    Path(path).unlink()
    with pytest.raises(BadExample, match="No such file"):
        source[0]


def test_several_readers_at_once(tmp_path, cache):
    path = write_tar(make_pairs(50), tmp_path, shards=5)

    def read(_):
        source = open_source(settings(path), cache)
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda i: source[i]["captions"], range(50)))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, range(4)))
    assert all(result == [texts for _, _, texts in make_pairs(50)] for result in results)
    # An index per shard and the one of all, with their notes: nothing unfinished.
    assert sorted(file.suffix for file in Path(cache).iterdir()) == [".json"] * 6 + [".npy"] * 6
