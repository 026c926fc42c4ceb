"""Packaging of flowjax: `pip install -e .` plus the extras named below."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

setup(
    name="flowjax",
    version="0.1.0",
    description="Diffusion and flow matching for images, video and text in JAX: exact, small, fast.",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["flowjax", "flowjax.*", "configs", "configs.*", "experiments", "experiments.*", "tools", "tools.*"]),
    install_requires=[
        # jax 0.11 drops Python 3.11; both lines are supported and tested.
        "jax>=0.10.2,<0.11; python_version < '3.12'",
        "jax>=0.11,<0.12; python_version >= '3.12'",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "einops>=0.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "array-record>=0.8.1",
        "tensorflow-datasets>=4.9.9",
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "msgpack>=1.0",
        "safetensors>=0.6",
        "numpy>=2.0",
        "scipy>=1.14",
        "scikit-learn>=1.5",
        "pillow>=10",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "adaptive": ["diffrax>=0.7"],
        "gcs": ["gcsfs"],  # workdirs in buckets: gs://...
        "text": ["tokenizers>=0.20"],  # data.text of name "file"
        # XLA's TPU compiler, for tools.plan on a machine without a TPU; keep it out of environments that run CPU tests.
        "plan": ["libtpu>=0.0.42,<0.0.43"],
        "test": ["pytest>=8", "pytest-xdist>=3.7", "diffrax>=0.7", "tokenizers>=0.20", "choix>=0.4"],
        # Independent implementations that tests compare with; torch must be a CPU build without torchvision.
        "oracle": ["torch==2.13.0", "diffusers==0.42.1", "torchmetrics==1.9.0", "transformers==5.23.0", "peft==0.21.2"],
    },
)
