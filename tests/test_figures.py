import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import assert_close, message, run, segmentation_eval

from simseg_jax import evaluate, figures
from simseg_jax.data.shapes import scene
from simseg_jax.figures import responses_of
from simseg_jax.models.simseg import bind
from simseg_jax.reports.class_figures import read_table
from simseg_jax.weights.load import load_model


@pytest.fixture(scope="module")
def table(workdir):
    """The folder with classes.csv of an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate", f"--checkpoint={workdir}", "--pictures=0"])
        evaluate.main()
    return workdir / "evaluation-4" / "shapes"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(scene(0, "val")[0]).save(path)
    return path


def assert_written(folder, name):
    with Image.open(folder / f"{name}.png") as image:
        assert np.ptp(np.asarray(image.convert("L"))) > 100
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_responses(monkeypatch, capsys, workdir, picture, tmp_path):
    captions = ("a kite beside a brick", "a moon beside a brick")
    out = run(
        monkeypatch, capsys, figures, "responses", f"--checkpoint={workdir}", f"--image={picture}",
        *(f"--caption={c}" for c in captions), f"--output={tmp_path / 'deep' / 'figure'}",
    )  # fmt: skip
    assert str(tmp_path / "deep" / "figure.pdf") in out
    assert_written(tmp_path / "deep", "figure")
    model = load_model(workdir)
    image = Image.fromarray(scene(0, "val")[0])
    settings = segmentation_eval(resolution=32, m_image=2, m_text=1)
    answer = responses_of(model, image, captions, settings)
    assert answer.maps.shape == (2, 4, 4)
    # From the parts: projected patches, the mean of the two strongest responses, cosines.
    network = bind(model.graphdef, model.params)
    _, tokens = network.encode_image(network.normalize(jnp.asarray(answer.image)[None]))
    patches = np.asarray(tokens)[0, 1:]
    own = np.sort(patches, axis=0)[-2:].mean(axis=0)
    cosines = patches @ own / np.linalg.norm(patches, axis=1) / np.linalg.norm(own)
    assert_close(answer.self_map.reshape(-1), cosines)
    texts = network.encode_text(
        *map(jnp.asarray, model.encoder.batch(captions)), m=1, mask_padding=True
    )
    assert_close(answer.scores, np.asarray(texts) @ own / np.linalg.norm(own))


def test_gallery_classes_and_scores(monkeypatch, capsys, workdir, table, tmp_path):
    for kind, *options in (
        ("gallery", f"--checkpoint={workdir}", "--count=2"),
        ("classes", f"--table=LoDA={table}", f"--table={table / 'classes.csv'}"),
        ("scores", f"--table={table}"),
    ):
        run(monkeypatch, capsys, figures, kind, *options, f"--output={tmp_path / kind}")
        assert_written(tmp_path, kind)
    assert read_table(f"LoDA={table}")[0] == "LoDA"
    assert read_table(str(table))[0] == "shapes"


def test_retrieved(monkeypatch, capsys, workdir, tmp_path):
    file = tmp_path / "evals.py"
    file.write_text(
        "from simseg_jax.config import default_config, retrieval_eval\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.evals.retrieval.shapes = retrieval_eval(\n"
        "        format='shapes', split='val', size=4, resize=32, crop=32)\n"
        "    return config\n"
    )
    arguments = (f"--checkpoint={workdir}", f"--config={file}", f"--output={tmp_path / 'found'}")
    run(monkeypatch, capsys, figures, "retrieved", *arguments, "--count=2")
    assert_written(tmp_path, "found")
    error = message(monkeypatch, capsys, figures, "gallery", *arguments)
    assert "no test set of the kind seg" in error


def test_mistakes(monkeypatch, capsys, workdir, tmp_path):
    def error(*arguments):
        return message(monkeypatch, capsys, figures, *arguments, f"--output={tmp_path / 'x'}")

    checkpoint = f"--checkpoint={workdir}"
    responses = ("responses", checkpoint, "--caption=a moon")
    assert "The image is missing" in error(*responses, f"--image={tmp_path / 'none.png'}")
    assert "The table is missing" in error("classes", f"--table={tmp_path / 'none'}")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "is no table of classes" in error("scores", f"--table={tmp_path / 'other.csv'}")
    assert "unrecognized arguments" in error("scores", "--table=x", "--config.evals.seg.x=1")
    standard = "--config.evals.seg.shapes.protocol=standard"
    window = "--config.evals.seg.shapes.window=0"
    assert "needs protocol=paper" in error("gallery", checkpoint, standard, window)
    assert not (tmp_path / "x.png").exists()
