"""The packages that benchmarks compare with or measure by: nobody else needs them."""

import importlib.util

# Module -> package.
PACKAGES = {
    "cv2": "opencv-python-headless",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydensecrf": "pydensecrf2",
    "ray": "ray",
    "torch": "torch",
}


def require(*modules: str) -> None:
    """Ends the benchmark with one sentence that says what to install, if anything is missing."""
    missing = [PACKAGES[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"This benchmark needs more packages: pip install {' '.join(missing)}")
