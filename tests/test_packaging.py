"""What setup.py installs: the package works without the clone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import simseg_jax

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the files of the wheel, built from what launch/Dockerfile copies."""
    pytest.importorskip("setuptools", reason="needs setuptools")
    folder = tmp_path_factory.mktemp("built")
    copied = (ROOT / "launch/Dockerfile").read_text().partition("\nRUN pip install")[0]
    for line in re.findall(r"^COPY (.*) \S+$", copied, re.M):
        for source in line.split():
            (folder / source).symlink_to(ROOT / source)
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet"]
    command += ["egg_info", f"--egg-base={folder}", "build_py", f"-d{folder / 'lib'}"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return folder


def test_every_file_of_the_package_is_installed(built):
    def files(folder):
        paths = (path for path in folder.rglob("*") if path.suffix in (".py", ".txt"))
        return {str(path.relative_to(folder)) for path in paths}

    configs = {f"configs/{name}" for name in files(ROOT / "configs")}
    assert "configs/shapes.py" in configs
    assert files(built / "lib" / "simseg_jax") == files(ROOT / "simseg_jax") | configs


def test_packaged_configurations_are_found_outside_of_a_clone(built, tmp_path):
    code = (
        "import simseg_jax.config as c\n"
        "print(c.CONFIGS)\n"
        "print(c.load_config('vitb16').model.image.width)\n"  # It starts from vits16.py.
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(built / "lib")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(built / "lib" / "simseg_jax" / "configs"), "768"]


def test_metadata(built):
    info = (built / "simseg_jax.egg-info" / "PKG-INFO").read_text()
    assert f"\nVersion: {simseg_jax.__version__}\n" in info
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{simseg_jax.__version__}]" in changelog
    # On a package index links to files of the repository lead nowhere.
    text = info.partition("\n# simseg_jax\n")[2]
    assert "## Start" in text
    assert re.findall(r"\]\(((?!https://)[^)]*)\)", text) == []
    assert "Contact sheet" not in text
    assert "Eight validation scenes" not in text
