"""What benchmarks share: the packages that they compare with or measure by, and photographs."""

import importlib.util
from pathlib import Path

from simseg_jax.runtime.errors import UserError

# Module -> package. Nobody else needs them: they are the extra `bench`.
PACKAGES = {
    "cv2": "opencv-python-headless",
    "psutil": "psutil",
    "pydensecrf": "pydensecrf2",
    "timm": "timm",
    "torch": "torch",
}


def require(*modules: str) -> None:
    """Raises a `UserError` that says what to install, if anything is missing."""
    missing = [PACKAGES[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'This benchmark needs {", ".join(missing)}: pip install -e ".[bench]" (or '
            '"simseg-jax[bench]").'
        )


def photos(folder: str | Path) -> list[Path]:
    """The JPEG files in a folder, of which there must be one."""
    files = sorted(Path(folder).glob("*.jp*g"))
    if not files:
        raise UserError(f"There are no JPEG files in {folder}.")
    return files
