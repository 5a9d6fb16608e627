"""The notebooks of the documentation run from top to bottom."""

import os
import shutil
import sys
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient (extra docs) is not installed")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel", reason="ipykernel (extra docs) is not installed")

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
pytestmark = [
    pytest.mark.slow,
    # Of the libraries that start the kernel.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Runs a notebook in a folder of its own, with other values in its cell "parameters"."""

    def run(name, parameters=""):
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", ()):
                assert parameters
                cell.source = parameters
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        monkeypatch.setenv("PATH", path)  # The notebooks start `python`.
        monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parents[1]))
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
        return notebook

    return run


def text_of(notebook):
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )


def pictures_of(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_segment(executed, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs" / "shapes")
    notebook = executed("segment")
    assert len(list(tmp_path.glob("out/*_mask.png"))) == 4
    assert pictures_of(notebook) == 5
    assert "annotations, the first" in text_of(notebook)


def test_train(executed, tmp_path):
    notebook = executed("train", "IMAGES, STEPS = 64, 12")
    assert (tmp_path / "runs/mine/checkpoints/12").is_dir()
    assert "Done in" in text_of(notebook)
    assert pictures_of(notebook) == 4


@pytest.mark.parametrize("name", ["segment", "train"])
def test_the_stored_notebook_was_executed_in_order(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, 1 + len(code)))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
