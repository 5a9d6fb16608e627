import json
import re

import pytest
from conftest import SHARED
from pairs_support import make_pairs, settings, write_coco, write_csv

from simseg_jax.data.pairs import BadExample, open_source
from simseg_jax.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    write_csv(make_pairs(3), tmp_path)
    for number, letter in enumerate("abc"):
        (tmp_path / "Images" / f"0000{number}.jpg").rename(tmp_path / "Images" / f"{letter}.jpg")
    (tmp_path / "captions.csv").write_text(
        'image,caption\na.jpg,"A dog, running"\nb.jpg, A cat \na.jpg,Two dogs\nc.jpg, \n'
    )
    (tmp_path / "train.txt").write_text("b.jpg\na.jpg\n")
    return tmp_path


def captions(folder, **others):
    source = open_source(settings(folder / "captions.csv", **others))
    return [source[i]["captions"] for i in range(len(source))]


def fails(message, path, **others):
    with pytest.raises(UserError, match=message):
        open_source(settings(path, **others))


def test_images_come_with_all_their_captions(folder):
    assert captions(folder) == [("A dog, running", "Two dogs"), ("A cat",)]
    assert captions(folder, split="train.txt") == [("A cat",), ("A dog, running", "Two dogs")]
    problems = open_source(settings(folder / "captions.csv")).problems
    assert (problems.count, problems.first) == (1, ["line 5, c.jpg: empty caption"])


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("image,caption,image_id,caption_id", "a.jpg,A dog,7,1"),  # The authors' valid_anno.csv.
        ("title\tfilepath", "A dog\ta.jpg"),  # open_clip.
        ("\ufeffimage,caption", 'a.jpg,"A dog"'),
    ],
)
def test_layouts(folder, header, row):
    (folder / "captions.csv").write_text(f"{header}\n{row}\n")
    assert captions(folder) == [("A dog",)]


def test_columns_of_any_name(folder):
    (folder / "captions.csv").write_text("file,text\na.jpg,A dog\n")
    assert captions(folder, image_key="file", caption_key="text") == [("A dog",)]
    fails("no column image named pic, only file, text: .* set image_key", folder / "captions.csv",
          image_key="pic")  # fmt: skip


def test_names_that_leave_the_folder(folder):
    (folder / "captions.csv").write_text(
        "image,caption\n../train.txt,x\n/etc/passwd,x\n,x\na.jpg,A dog\nsub/../../b.jpg,x\n"
        "..\\b.jpg,x\nb\0.jpg,x\n"
    )
    assert captions(folder) == [("A dog",)]
    problems = open_source(settings(folder / "captions.csv")).problems
    assert problems.count == 6
    assert problems.first[0] == "line 2: '../train.txt' is outside the image folder; set images"
    assert problems.first[2] == "line 4: '' is no name of an image"


def test_spellings_of_a_name(folder):
    names = ("a.jpg", "./a.jpg", "x/../a.jpg", f"{folder}/Images/a.jpg", ".\\a.jpg", " a.jpg ")
    rows = "".join(f"{name},A dog\n" for name in names)
    (folder / "captions.csv").write_text(f"image,caption\n{rows}")
    assert captions(folder) == [("A dog",) * len(names)]
    # Absolute names are used wherever the folder of the images allows them.
    (folder / "captions.csv").write_text(f"image,caption\n{folder}/Images/a.jpg,A dog\n")
    assert captions(folder, images="/") == [("A dog",)]


def write_table(folder, text, name="captions.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return open_source(settings(folder / name))


def examples(source):
    return {source[i]["name"].rpartition("/")[2]: source[i]["captions"] for i in range(len(source))}


TWO = {"a.jpg": ("A dog", "Two dogs"), "b.jpg": ("A café",)}
ROWS = (("a.jpg", "A dog"), ("b.jpg", "A café"), ("a.jpg", "Two dogs"))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "| ", ", "])
def test_separators_encodings_and_line_ends(folder, separator, encoding, ending):
    rows = [separator.join(row) for row in (("Image", " Caption "), *ROWS)]
    mark = "\ufeff" if encoding.endswith("e") else ""  # Python writes the others' itself.
    text = mark + ending.join([*rows, "", ""])
    assert examples(write_table(folder, text, encoding=encoding)) == TWO


@pytest.mark.parametrize(
    "header",
    ["image,caption", "filepath,title", "IMAGE,Caption", "image_name,comment", "filename,raw",
     '"image","caption"', "\n\nimage,caption"],
)  # fmt: skip
def test_headers(folder, header):
    text = "\n".join([header, *map(",".join, ROWS)])
    assert examples(write_table(folder, text)) == TWO


def test_flickr_forms(folder):
    token = "a.jpg#0\tA dog\nb.jpg#0\tA café\na.jpg#1\tTwo dogs\na.jpg\tno number\n"
    source = write_table(folder, token, "Flickr8k.token.txt")
    assert examples(source) == TWO
    assert source.problems.first == ["line 4: not of the form `image#number`, tab, caption"]
    results = "image_name| comment_number| comment\n" + "".join(
        f'{name}| {k}| " {text} " is it\n' for k, (name, text) in enumerate(ROWS)
    )
    results += "b.jpg| 4   A dog runs .\n"  # As line 19,999 of the real one.
    source = write_table(folder, results, "results.csv")
    assert examples(source)["b.jpg"] == ('" A café " is it',)
    assert source.problems.first == ["line 5: 2 columns, not 3 as the header has"]
    text = "image,caption\n" + "\n".join(map(",".join, ROWS))
    assert examples(write_table(folder, text, "captions.txt")) == TWO


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('"a{s} b"', "a{s} b"),
        ('"say ""hi"" to it"', 'say "hi" to it'),
        ('the "old" dog', 'the "old" dog'),
        ('5" wide', '5" wide'),
        ('"two\nlines{s} or so\nor three"', "two\nlines{s} or so\nor three"),
        ('"best dog', None),
        ('"best" dog', None),
        ('"say \\"hi\\" to it"', None),
        ("a{s} b{s} c", None),
        ('"x" y{s} "z"', None),
        ("x" * 200_000, None),
        ('"' + "x" * 200_000 + '"', None),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_row_costs_only_itself(folder, separator, caption, expected, place):
    rows = [separator.join(row) for row in ROWS]
    rows.insert(place, f"c.jpg{separator}{caption.format(s=separator)}")
    source = write_table(folder, "\n".join([separator.join(("image", "caption")), *rows]))
    others = {} if expected is None else {"c.jpg": (expected.format(s=separator),)}
    assert examples(source) == TWO | others
    assert source.problems.count == (expected is None)
    if expected is None:
        assert source.problems.first[0].startswith(f"line {place + 2}: ")
        assert len(str(source.problems)) < 400


def test_no_row_ends_up_in_a_caption(folder):
    """Two stray quotes look like one long field: the rows between them are rows all the same."""
    rows = [f"{name},{text}" for name, text in ROWS]
    text = "\n".join(["image,caption", 'c.jpg,"first', *rows, 'c.jpg,last"', "c.jpg,end"])
    source = write_table(folder, text)
    assert examples(source) == TWO | {"c.jpg": ('last"', "end")}
    assert source.problems.first == ["line 2: a quote without its partner"]


def test_what_is_wrong_with_a_quote(folder):
    rows = ['c.jpg,"one" and more', 'c.jpg,"none', 'c.jpg,x "y"']
    source = write_table(folder, "\n".join(["image,caption", *rows]))
    assert examples(source) == {"c.jpg": ('x "y"',)}
    assert source.problems.first == [
        "line 2: text after the closing quote of a field: double quotes that are text",
        "line 3: a quote without its partner",
    ]


@pytest.mark.parametrize("name", ["captions.tsv", "captions.csv"])
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('"best dog', '"best dog'),
        ('best dog"', 'best dog"'),
        ('"best" dog', '"best" dog'),
        ('"a whole one"', '"a whole one"'),
        ('the "old" dog', 'the "old" dog'),
        ('"two\nlines', None),  # Unpaired, and a row of one column.
        ("a, b; c | d", "a, b; c | d"),
        ("don't\rstop", "don't\rstop"),
        ("a\tb", None),
    ],
)
def test_quotes_beside_tabs_are_text(folder, name, caption, expected):
    rows = ["\t".join(row) for row in (("filepath", "title"), *ROWS, ("c.jpg", caption), *ROWS)]
    source = write_table(folder, "\n".join(rows), name)
    others = {} if expected is None else {"c.jpg": (expected,)}
    if caption.startswith('"two'):
        others = {"c.jpg": ('"two',)}
    assert examples(source) == {key: 2 * texts for key, texts in TWO.items()} | others
    assert source.problems.count == (expected is None)


FIELDS = ("a\tb", "a | b", "two\nlines", "two\r\nlines", 'say "hi"', '"', '"all"', "a, b", '5" x')


@pytest.mark.parametrize("separator", ["\t", "|"])
@pytest.mark.parametrize("writer", ["pandas", "excel", "spaces", "texts"])
@pytest.mark.parametrize("count", [1, len(FIELDS)])
def test_quotes_that_enclose_what_needs_it(folder, separator, writer, count):
    """Fields are quoted below a header that is not: read back as they were written."""
    special = {"excel": f'[",\n{separator}]', "spaces": r'[",\s|]', "texts": r"\D"}.get(
        writer, f'["\n{separator}]'
    )

    def quoted(text):
        doubled = text.replace('"', '""')
        return f'"{doubled}"' if re.search(special, text) else text

    for start in range(len(FIELDS) if count == 1 else 1):
        texts = FIELDS[start : start + count]
        rows = [*ROWS, *(("c.jpg", text) for text in texts)]
        lines = [separator.join(map(quoted, row)) for row in rows]
        source = write_table(folder, "\n".join([separator.join(("image", "caption")), *lines]))
        assert examples(source) == TWO | {"c.jpg": texts}
        assert source.problems.count == 0


@pytest.mark.parametrize("stray", ['"best dog', 'the "old" dog', '"best" dog', '"a whole one"'])
def test_quotes_of_both_kinds_are_refused(folder, stray):
    rows = "".join(f"{name}\t{text}\n" for name, text in ROWS)
    (folder / "a.tsv").write_text(f'image\tcaption\n{rows}c.jpg\t{stray}\nc.jpg\t"a\tb"\n{rows}')
    fails(r"read in two ways: quotes enclose a field in line 6 but are text in line 5",
          folder / "a.tsv")  # fmt: skip


def test_rows_between_stray_quotes_stay_rows(folder):
    """Whatever the suffixes of the images are."""
    for name in "123":
        (folder / "Images" / f"x.{name}").write_bytes(b"1")
    (folder / "a.tsv").write_text('image\tcaption\nx.1\t"first\nx.2\tA dog\nx.3\tlast"\n')
    source = open_source(settings(folder / "a.tsv"))
    assert examples(source) == {"x.1": ('"first',), "x.2": ("A dog",), "x.3": ('last"',)}


def test_the_column_that_was_taken_is_said(folder):
    text = "path,title,IMAGE,Caption\nx.jpg,no,a.jpg,A dog\n"
    source = write_table(folder, text)
    assert examples(source) == {"a.jpg": ("A dog",)}
    assert str(source.problems) == (
        "Nothing was left out; image: column IMAGE taken, path left out (1); "
        "caption: column Caption taken, title left out (1)"
    )
    keys = {"image_key": "Image", "caption_key": "title"}
    assert not open_source(settings(folder / "captions.csv", **keys)).problems


@pytest.mark.parametrize("form", ["csv", "tsv", "token", "coco"])
def test_missing_values_are_no_captions(folder, form):
    missing = ["nan", "None", "NULL", "N/A", " <NA> "]
    texts = [*missing, "b\0d", "nan bread", "Null"]
    if form == "coco":
        path = folder / "captions.json"
        annotations = [{"image_id": 1, "caption": text} for text in texts]
        images = [{"id": 1, "file_name": "a.jpg"}]
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
    else:
        row = {"csv": "a.jpg,{}\n", "tsv": "a.jpg\t{}\n", "token": "a.jpg#0\t{}\n"}[form]
        header = "" if form == "token" else row.format("caption").replace("a.jpg", "image")
        path = folder / "a.csv"
        path.write_text(header + "".join(map(row.format, texts)))
    source = open_source(settings(path))
    assert examples(source) == {"a.jpg": ("nan bread", "Null")}
    assert source.problems.count == 6
    assert source.problems.first[0].endswith("a.jpg: caption missing, written nan")


def test_a_quoted_header_tells_of_quoted_tabs(folder):
    text = '"filepath"\t"title"\n"a.jpg"\t"A\tdog"\n"b.jpg"\t"two\nlines"\n'
    assert examples(write_table(folder, text)) == {"a.jpg": ("A\tdog",), "b.jpg": ("two\nlines",)}


def test_bytes_that_are_not_utf8_are_never_dropped(folder):
    table = folder / "captions.csv"
    table.write_bytes("image,caption\na.jpg,A café\nb.jpg,A dog\ncafé.jpg,x\n".encode("latin-1"))
    source = open_source(settings(table))
    assert examples(source) == {"b.jpg": ("A dog",)}
    assert source.problems.first == [
        "line 2, a.jpg: a caption that is not UTF-8: recode the file",
        "line 4: the name of the image is not UTF-8",
    ]
    table.write_bytes("image,caption\na.jpg,A café\n".encode("utf-16")[:-1])
    fails("Cannot read the caption table .*utf-16.*Save it as UTF-8", table)
    table.write_bytes("image,caption\na.jpg,A café\n".encode("utf-16-le"))
    fails("has NUL bytes. Save it as UTF-8", table)


def test_several_captions_in_a_row(folder):
    text = 'image,caption_0,caption_1\na.jpg,A dog,Two dogs\nb.jpg,"A café",\n'
    assert examples(write_table(folder, text)) == TWO
    (folder / "captions.csv").write_text(f"image,caption_{'9' * 5000}\na.jpg,A dog\n")
    fails("no column caption named caption, .*only image, caption_9", folder / "captions.csv")
    listed = json.dumps(["A dog", "Two dogs"]).replace('"', '""')
    text = f"image,raw\na.jpg,\"{listed}\"\nb.jpg,A café\nc.jpg,\"['x', 'y']\"\na.jpg,[]\n"
    source = write_table(folder, text)
    assert examples(source) == TWO
    assert source.problems.first == [
        "line 4, c.jpg: a caption that looks like a list but is no JSON",
        "line 5, a.jpg: empty caption",
    ]


@pytest.mark.parametrize("missing", [[0], [1], [2], [0, 1], [1, 2]])
def test_the_same_tolerance_whichever_image_is_missing(folder, missing):
    (folder / "captions.csv").write_text("image,caption\na.jpg,A\nb.jpg,B\nc.jpg,C\n")
    for number in missing:
        (folder / "Images" / f"{'abc'[number]}.jpg").unlink()
    source = open_source(settings(folder / "captions.csv"))
    assert len(source) == 3
    for number in range(3):
        if number in missing:
            with pytest.raises(BadExample, match=rf"{'abc'[number]}.jpg: .*No such file"):
                source[number]
        else:
            assert source[number]["captions"] == ("ABC"[number],)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_images(folder, encoding):
    text = "./b.jpg\r\n\r\na.jpg\r\nc.jpg\r\na.jpg\r\n../x.jpg"
    (folder / "train.txt").write_bytes(text.encode(encoding))
    source = open_source(settings(folder / "captions.csv", split="train.txt"))
    assert [source[i]["captions"] for i in range(len(source))] == [
        ("A cat",),
        ("A dog, running", "Two dogs"),
    ]
    assert source.problems.first[1:] == [
        "train.txt, line 4: 'c.jpg' has no caption in the table",
        "train.txt, line 5: 'a.jpg' is listed twice",
        "train.txt, line 6: '../x.jpg' is outside the image folder; set images",
    ]


def test_a_vanished_image(folder):
    source = open_source(settings(folder / "captions.csv"))
    (folder / "Images" / "b.jpg").unlink()
    with pytest.raises(BadExample, match=r"Images/b.jpg: .*No such file"):
        source[1]
    assert source[0]["image"]


def test_mistakes_are_named(folder):
    table = folder / "captions.csv"
    fails(r"caption table is missing: no file .*nowhere.csv", folder / "nowhere.csv")
    fails("list of images is missing", table, split="nowhere.txt")
    fails(r"None of 2 .* looked for exists, such as .*Pictures/a.jpg: set images", table,
          images="Pictures")  # fmt: skip
    (folder / "train.txt").write_text("c.jpg\n")
    fails(r"no usable pair .*'c.jpg' has no caption", table, split="train.txt")
    table.write_text("words;text\n")
    fails(r"header line .*: its first line has no column image named image, .*words, text", table)
    table.write_text("a.jpg,A dog\nb.jpg,A cat\n")
    for key in ("", "a.jpg"):  # It would lose the first row.
        fails("must start with a header .* is a row: a.jpg, A dog. Add the header", table,
              image_key=key)  # fmt: skip
    table.write_text("image,caption,Caption\n")
    fails("has several columns caption: rename", table)
    table.write_text("image,caption\na.jpg, \n")
    fails("no usable pair .* Left out: 1, first line 2, a.jpg: empty caption", table)
    for content in ("", "\n\n", "a.jpg,A dog\n", "sep=;\n", "x" * 200_000):
        table.write_text(content)
        fails("must start with a header line", table)


def test_coco(folder):
    path = write_coco(make_pairs(3), folder)
    content = json.loads((folder / "captions.json").read_text())
    content["images"].insert(0, {"id": 99, "file_name": "silent.jpg"})
    content["annotations"].append({"image_id": 1234, "caption": "of nothing"})
    (folder / "captions.json").write_text(json.dumps(content))
    source = open_source(settings(path))
    assert len(source) == 3
    assert source.problems.first == [
        "annotation 6: its image is not listed",
        "silent.jpg: image without caption",
    ]
    for text in ("[]", "7", '{"images": 7}', "{}"):
        (folder / "captions.json").write_text(text)
        fails("is no JSON of COCO captions", path)
    lines = '{"image": "a.jpg", "caption": "A dog"}\n' * 2
    for name in ("captions.json", "captions.jsonl"):
        (folder / name).write_text(lines)
        fails("JSON Lines are not read: save .* as CSV", folder / name)
    for text in ("", "{", "[" * 200_000, "\xff"):
        (folder / "captions.json").write_text(text)
        fails("Cannot read the caption table", path)
    (folder / "captions.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    fails("no usable pair .*image 0: no id or file_name", path)


ODD = (None, 7, 1.5, True, [], ["a", "b"], {}, {"x": 1}, "", " ", "\ud800")


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize("form", ["coco", "karpathy"])
@pytest.mark.parametrize("what", ["caption", "image", "name"])
def test_one_odd_entry_of_a_json(folder, form, what, odd):
    """Whatever stands in the place of a caption, a name or an entry is counted, others are used."""
    write_coco(make_pairs(3), folder)
    content = json.loads((folder / "captions.json").read_text())
    images, annotations = content["images"], content["annotations"]
    if form == "karpathy":
        for image in images:
            mine = [a["caption"] for a in annotations if a["image_id"] == image["id"]]
            image |= {"filename": image["file_name"], "split": "train"}
            image["sentences"] = [{"raw": text} for text in mine]
    # The second image has two captions, the third three.
    if what == "caption":
        annotations[1]["caption"] = odd
        if form == "karpathy":
            images[1]["sentences"][0]["raw"] = odd
    elif what == "image":
        images[1] = odd
    else:
        images[1]["file_name"] = images[1]["filename"] = odd
    (folder / "captions.json").write_text(json.dumps(content))
    source = open_source(settings(folder / "captions.json"))
    found = examples(source)
    expected = {name: texts for name, _, texts in make_pairs(3)}
    expected["00001.jpg"] = expected["00001.jpg"][1:]
    if what != "caption":
        del expected["00001.jpg"]
    assert found == expected
    assert source.problems.count
    assert str(source.problems).encode()  # It can be printed.


def test_images_that_share_an_id(folder):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"},
              {"id": 2, "file_name": "c.jpg"}, {"id": 2, "file_name": "c.jpg"}]  # fmt: skip
    annotations = [{"image_id": 1, "caption": "A"}, {"image_id": 2, "caption": "C"}]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    source = open_source(settings(path))
    assert examples(source) == {"c.jpg": ("C",)}
    assert source.problems.first == [
        "image 1, b.jpg: has the id of a.jpg",
        "annotation 0: several images have its id 1",
        "a.jpg: image without caption",
    ]


def test_karpathy_splits(folder):
    images = [
        {"filename": f"{letter}.jpg", "split": split, "sentences": [{"raw": letter}]}
        for letter, split in zip("abc", ("train", "test", "val"), strict=True)
    ]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": [{}, *images]}))
    for split, expected in (("", "abc"), ("test", "b"), ("train+val", "ac")):
        source = open_source(settings(path, split=split))
        assert examples(source) == {f"{letter}.jpg": (letter,) for letter in expected}
        assert source.problems.first == [f"image 0: no {'split' if split else 'filename'}"]
    fails("has no split 'dev', only train, test, val", path, split="dev")


def test_real_coco():
    table = SHARED / "data" / "coco" / "annotations" / "captions_val2017.json"
    if not table.is_file():
        pytest.skip(f"COCO is missing: {table}")
    source = open_source(settings(table, images="../val2017"))
    assert len(source) >= 100
    assert len(source[0]["captions"]) >= 5
