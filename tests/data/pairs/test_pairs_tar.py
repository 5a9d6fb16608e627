import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pairs_support import add_member, make_pairs, settings, write_tar

from simseg_jax.data.pairs import BadExample, open_source
from simseg_jax.errors import UserError

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
            ("d.txt", b"caf\xe9 noir"),  # Not UTF-8.
            ("._c.webp", b"what macOS adds"),
        ],
    )
    source = open_source(settings(path), cache)
    assert captions(source) == [("from txt",), ("from json",), ("from json",), ("caf noir",)]
    assert [source[i]["image"] for i in range(4)] == [b"1", b"2", b"3", b"4"]
    assert source[1]["name"] == f"{path}/b/1.png"
    assert source.problems.count == 0
    other = open_source(settings(path, caption_key="json.alt", image_key="seg.png"), cache)
    assert captions(other) == [("other",)]
    assert other[0]["image"] == b"not the image"
    with pytest.raises(BadExample, match="its JSON has no nix, only caption, alt"):
        open_source(settings(path, caption_key="json.nix"), cache)[0]
    with pytest.raises(UserError, match=r"no pair; its files end in jpg, json, png, seg.png"):
        open_source(settings(path, caption_key="cls"), cache)


def test_what_is_left_out(tmp_path, cache):
    link, device = tarfile.TarInfo("d.jpg"), tarfile.TarInfo("d.txt")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    members = [
        ("/etc/a.jpg", b"1"),
        ("../a.txt", b"1"),
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
        assert source.problems.count == 7
        assert source.problems.first[:3] == [
            f"{path}: the member '/etc/a.jpg' leads out of the archive",
            f"{path}: the member '../a.txt' leads out of the archive",
            f"{path}: the member 'd.jpg' is not a regular file",
        ]
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
    assert source.problems.count == 1
    assert "00000.tar: damaged at byte" in source.problems.first[0]


def test_unusable_shards(tmp_path, cache):
    write_tar(PAIRS, tmp_path)
    (tmp_path / "00002.tar").write_bytes(b"no archive" * 1000)
    (tmp_path / "00003.tar").write_bytes(b"")
    source = open_source(settings(tmp_path), cache)
    assert len(source) == 6
    assert source.problems.count == 4  # Each is unreadable and holds no pair.
    with pytest.raises(UserError, match=r"no usable pair .*00002.tar: unreadable"):
        open_source(settings(tmp_path / "00002.tar"), cache)
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
