"""The web page: its answers, its limits, and the whole way through a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import message

from simseg_jax import Segmentation, demo
from simseg_jax.data.shapes import CATEGORIES, scene
from simseg_jax.reports.page import heat_maps, layers, reasons, score_chart
from simseg_jax.runtime.errors import UserError
from simseg_jax.segment import find_images, segment_files
from simseg_jax.zeroshot.settings import SegmentationConfig

pytest.importorskip("gradio", reason="gradio is missing: pip install -e '.[demo]'")
httpx = pytest.importorskip("httpx", reason="httpx comes with gradio: pip install -e '.[demo]'")
# Gradio and what it uses: sockets of its event loop, names that Starlette is about to rename.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WORDS = ["star", "moon"]


def answer(scores, threshold, drawn, mask):
    labels = ("background", *[name for name in scores if name != "contrast"])
    mask = np.array(mask, np.uint8)
    image = Image.new("RGB", mask.shape[::-1])
    maps = {name: np.eye(2, dtype=np.float32) for name in scores}
    return Segmentation(mask, labels, drawn, scores, threshold, maps, image, "x")


@pytest.mark.parametrize(
    ("scores", "threshold", "drawn", "mask", "refine", "expected"),
    [
        ([0.3, 0.2], 0.24, ("a",), [[1, 0]], "crf", ["it covers 50%", "0.20 is below .* 0.24"]),
        ([0.2401, 0.1], 0.2402, (), [[0]], "crf", [r"0\.2401 is below .* 0\.2402", "below"]),
        ([0.3, 0.25], 0.2, ("a",), [[1]], "crf", ["100%", "only the best 5 classes"]),
        ([0.3, 0.25], 0.2, ("a", "b"), [[1]], "none", ["", r"claimed by a, of higher score\.$"]),
        (
            [0.3, 0.25],
            0.2,
            ("a", "b"),
            [[1]],
            "crf",
            ["", "claimed by a, of higher .*, or the ref"],
        ),
        ([0.3, 0.25], 0.2, ("a", "b"), [[2]], "crf", ["but the refinement left no pixel", "100%"]),
        ([-0.1, -0.2], -0.3, ("a", "b"), [[0]], "crf", ["positive score", "positive score"]),
        ([0.3, 0.2], None, ("a",), [[1]], "none", ["100%", "more similar at every pixel"]),
    ],
)
def test_why_a_word_is_not_drawn(scores, threshold, drawn, mask, refine, expected):
    result = answer(dict(zip("ab", scores, strict=True)), threshold, drawn, mask)
    told = reasons(result, SegmentationConfig(refine=refine))
    for word, pattern in zip("ab", expected, strict=True):
        assert re.search(pattern, told[word]), told[word]
        assert told[word].startswith("Drawn") == (result.labels.index(word) in result.mask)


def test_contrast_words_claim_pixels():
    result = answer({"a": 0.3, "contrast": 0.4}, 0.2, ("a",), [[0]])
    told = reasons(result, SegmentationConfig(refine="none"))
    assert told == {
        "a": "Not drawn: its score reaches the threshold, but its pixels were claimed by contrast, "
        "of higher score."
    }


def test_html_shows_words_as_text():
    word = "<script>alert(1)</script>"
    result = answer({word: 0.4, "contrast": -0.2}, 0.1, (word,), [[1, 0]])
    page = score_chart(result, reasons(result, SegmentationConfig())) + heat_maps(result)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3  # Chart, alternative text, caption.
    assert "Contrast words (1)" in page
    assert page.count('class="line" style="left:calc(50.00% - 1px)"') == 2


@pytest.mark.parametrize(("side", "shown"), [(10, 380), (500, 500), (3000, 1024)])
def test_layers_have_the_size_of_the_page(side, shown):
    mask = np.zeros((side, side), np.uint8)
    mask[: side // 2] = 2
    image, [(area, word)] = layers(answer({"a": 0.1, "b": 0.2}, 0, ("b",), mask))
    assert word == "b"
    assert image.size == area.shape == (shown, shown)
    assert area.mean() == pytest.approx(0.3, abs=0.01)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """The address of the page that the command serves, with one example."""
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    (folder / "examples").mkdir()
    Image.fromarray(scene(1, "val")[0]).save(folder / "examples" / "one.png")
    command = [sys.executable, "-m", "simseg_jax.demo", f"--checkpoint={trained}"]
    command += [f"--examples={folder / 'examples'}", f"--port={port}"]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(Path.cwd())}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        lines = [server.stdout.readline() for _ in range(2)]
        expected = f"http://127.0.0.1:{port}/"
        assert lines == ["Loading and compiling ...\n", f"Ready: {expected}  (Ctrl-C ends it)\n"]
        yield expected
        assert server.poll() is None
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 130
        server.stdout.close()
    assert not list(folder.glob("simseg_jax_demo_*"))  # Uploads do not outlive the page.


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


def asked(path, **options):
    from gradio_client import handle_file

    return {"image": handle_file(path), "words": WORDS, "api_name": "/segment", **options}


def expected_mask(trained, path, folder, **settings):
    """The bytes that `segment` writes for one image."""
    segmenter = demo.Segmenter.from_pretrained(trained, maps=False, **settings)
    files, _ = find_images([str(path)])
    segment_files(segmenter, segmenter.classes(WORDS), files, folder, {}, {})
    return (folder / f"{path.stem}_mask.png").read_bytes()


@pytest.mark.slow
def test_programs_get_what_segment_writes(client, trained, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(scene(0, "val")[0]).resize((90, 70)).save(path)
    record, mask, overlay = client.predict(**asked(path, sigma_weight=-1))
    (tmp_path / "out").mkdir()
    expected = expected_mask(trained, path, tmp_path / "out", sigma_weight=-1)
    with open(mask, "rb") as file:
        assert file.read() == expected
    assert Image.open(overlay).width >= 90
    assert record["words"] == WORDS
    assert set(record["contrast"]) == set(CATEGORIES) - set(WORDS)
    assert (record["settings"]["sigma_weight"], record["image"]) == (-1, "photo.png")
    assert set(record["reasons"]) == set(WORDS)
    less, *_ = client.predict(**asked(path, contrast=demo.NONE, m_image=1))
    assert (less["contrast"], less["settings"]["m_image"]) == ([], 1)
    own = {"contrast": demo.THESE, "contrast_words": ["apple, leaf"]}
    assert client.predict(**asked(path, **own))[0]["contrast"] == ["apple", "leaf"]


@pytest.mark.slow
def test_mistakes_are_sentences(client, tmp_path):
    image, text = tmp_path / "x.png", tmp_path / "text.png"
    Image.new("RGB", (9, 9)).save(image)
    text.write_text("text")
    wrong = {
        "Give at least one word": asked(image, words=[]),
        "Give at most 100 words": asked(image, words=[f"a{i}" for i in range(101)]),
        "given twice: star": asked(image, words=["star, star"]),
        "Cannot decode text.png: no image in a known format": asked(text),
        "Give an image first": asked(image, image=None),
        "not in the list of choices": asked(image, resolution=4000),
    }
    for expected, request in wrong.items():
        with pytest.raises(Exception, match=expected) as error:
            client.predict(**request)
        assert "Traceback" not in str(error.value)
        assert "simseg_jax_demo" not in str(error.value)  # The folder of uploads.


def raw(address, trained, path):
    """What a program gets that sends the path itself, where the client would upload the file."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [file, WORDS, demo.NONE, [], 1, 0, "", 0, trained.name]
    call = f"{address}gradio_api/call/segment"
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    return httpx.get(f"{call}/{event}", timeout=60).text


@pytest.mark.slow
def test_the_page_reads_nothing_but_uploads(address, trained, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(scene(0, "val")[0]).save(photo)
    upload = {"files": ("x.png", photo.read_bytes())}
    (uploaded,) = httpx.post(f"{address}gradio_api/upload", files=upload).json()
    assert raw(address, trained, uploaded).startswith("event: complete")
    assert httpx.get(f"{address}gradio_api/file={uploaded}").status_code == 200
    own = str(Path(uploaded).parents[2] / "examples" / "one.png")  # Below the server's cwd.
    assert Path(own).is_file()
    for path in ("/etc/passwd", "examples/one.png", own, demo.__file__, str(photo)):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 403, path
        assert raw(address, trained, path).startswith("event: error"), path
    refused = raw(address, trained, "https://192.0.2.1/x.png")
    assert refused.startswith("event: error")
    assert "downloads nothing" in refused


@pytest.mark.slow
def test_large_requests_are_refused(address):
    large = b"0" * (demo.UPLOAD + 2**17)
    upload = httpx.post(f"{address}gradio_api/upload", files={"files": ("x.png", large)})
    assert upload.status_code == 413
    assert httpx.post(f"{address}gradio_api/queue/join", content=large).status_code in (400, 413)


@pytest.mark.slow
def test_the_page_names_no_other_server(address):
    text = httpx.get(address).text
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', text)
    theme = httpx.get(f"{address}theme.css").text
    assert "http" not in theme.replace("xmlns='http://www.w3.org/2000/svg'", "")
    assert '"analytics_enabled":false' in text.replace(" ", "")


def test_files_of_visitors_are_deleted(trained, tmp_path):
    column = demo.Column(str(trained), "x", 10**6, tmp_path)
    for name in ("kept", "old", "new"):
        (tmp_path / name).mkdir()
    column.kept = {tmp_path / "kept"}
    for name in ("kept", "old"):
        hours_ago = time.time() - 2 * demo.HOUR
        demo.os.utime(tmp_path / name, (hours_ago, hours_ago))
    with pytest.raises(UserError, match="Give an image first"):
        column.segment(None, WORDS)
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "new"}


def test_mistakes_in_the_command(monkeypatch, capsys, tmp_path, trained):
    arguments = (f"--checkpoint={trained}", f"--examples={tmp_path / 'none'}")
    assert "There is no folder --examples=" in message(monkeypatch, capsys, demo, *arguments)
    arguments = (f"--checkpoint={trained}", f"--examples={tmp_path}")
    assert "holds no images" in message(monkeypatch, capsys, demo, *arguments)
    monkeypatch.setitem(sys.modules, "gradio", None)
    expected = "error: The demo needs gradio: pip install -e '.[demo]', or pip install gradio."
    assert message(monkeypatch, capsys, demo, "--checkpoint=x") == expected


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that keeps downloads in `tmp_path / "downloads"`."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is missing: pip install -e '.[browser]'"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(f"{'Chromium' if chromium is None else 'chromedriver'} is missing")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "window-size=1280,1000",
    ):
        options.add_argument(f"--{argument}")
    folder = str(tmp_path / "downloads")
    options.add_experimental_option("prefs", {"download.default_directory": folder})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
def test_from_upload_to_download(browser, address, trained, tmp_path):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def wait(condition, what):
        ignored = [StaleElementReferenceException]  # The page replaces its elements.
        waiting = WebDriverWait(browser, 60, 0.02, ignored_exceptions=ignored)
        return waiting.until(lambda _: condition(), what)

    def all_of(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    path = tmp_path / "photo.png"
    Image.fromarray(scene(3, "val")[0]).resize((120, 80)).save(path)
    browser.get(address)
    wait(lambda: all_of(".scores li"), "first answer")
    all_of(".given button[aria-label='Remove Image']")[0].click()
    upload = wait(lambda: all_of(".given input[type=file]"), "place for an image")
    upload[0].send_keys(str(path))
    wait(lambda: all_of(".given img"), "uploaded image")
    words = browser.find_element(By.CSS_SELECTOR, "input[aria-label='Words']")
    words.send_keys(Keys.BACKSPACE * 3)  # The words of the example.
    for word in WORDS:
        words.send_keys(word, Keys.ENTER)
    words.send_keys(Keys.ESCAPE)
    before = time.perf_counter()
    browser.find_element(By.XPATH, "//button[normalize-space()='Segment']").click()

    def names():
        rows = all_of(".scores > ul .name")
        return sorted(row.text.split()[0] for row in rows)

    wait(lambda: names() == sorted(WORDS), "scores of the words")
    print(f"click to answer: {time.perf_counter() - before:.2f} s")
    assert len(all_of(".maps img")) == len(WORDS)
    assert all_of(".annotated img")[0].is_displayed()
    browser.find_element(By.XPATH, "//button[normalize-space()='Mask']").click()
    saved = tmp_path / "downloads" / "photo_mask.png"
    wait(saved.exists, "downloaded mask")
    (tmp_path / "out").mkdir()
    assert saved.read_bytes() == expected_mask(trained, path, tmp_path / "out")
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked_for = {
        entry["params"]["request"]["url"]
        for entry in log
        if entry["method"] == "Network.requestWillBeSent"
    }
    assert len(asked_for) > 10
    assert {u for u in asked_for if not u.startswith((address, "data:", "blob:"))} == set()
