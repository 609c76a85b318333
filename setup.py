import re
from pathlib import Path

from setuptools import find_packages, setup

ENVIRONMENT = Path("nla_jax/runtime/environment.py").read_text(encoding="utf-8")
VERSION = re.search(r'^VERSION = "(.+)"$', ENVIRONMENT, re.MULTILINE)[1]

setup(
    name="nla_jax",
    version=VERSION,
    description="Natural language autoencoders in JAX: activations of a language model as text, and back",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["nla_jax", "nla_jax.*"]), "nla_jax.configs"],
    package_dir={"nla_jax.configs": "configs"},  # so that commands find configs/NAME.py outside a checkout too
    package_data={
        "nla_jax": [
            "quickstart/subject/*",
            "quickstart/pair/*.json",
            "quickstart/pair/*/*",
            "serve/browser/*",
            "serve/browser/panels/*",
            "tools/report/browser/*",
        ]
    },
    # The lower bounds are those that `make test-oldest` installs and tests.
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.6",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.36",
        "etils[epath]>=1.12.0",
        "fsspec>=2026.1.0",
        "transformers>=5.20.0",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.5.2",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "array_record>=0.8.3",
        "ml-collections>=1.1.0",
        "absl-py>=2.3.1",
        "jaxtyping>=0.3.4",
        "numpy>=2.1.0",
        "pyarrow>=20.0.0",
        "safetensors>=0.8.0",
        "tokenizers>=0.23.1",
        "huggingface_hub>=1.31.0",
        "jinja2>=3.1.6",  # chat templates
        "pyyaml>=6.0.2",
        "tensorboardX>=2.6.4",
        "tqdm>=4.67.1",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "gcs": ["gcsfs"],
        "wandb": ["wandb>=0.22.0"],
        "serve": ["starlette>=1.10.0", "uvicorn>=0.54.0"],
        "labels": ["openai>=3.22.1", "anthropic>=1.13.0"],
        "test": [
            "nla_jax[test-core]",
            "torch==2.13.0",
            "peft>=0.19.0",
        ],
        "test-core": [  # without torch, whose wheel for Linux brings 4.6 GB of CUDA libraries
            "pytest>=8.4.0",
            "pytest-xdist>=3.6.0",
            "pytest-timeout>=2.4.0",
            "beartype>=0.20.0",
            "ruff==0.17.6",
            "gcsfs>=2026.1.0",
            "wandb>=0.22.0",
            "openai>=3.22.1",
            "anthropic>=1.13.0",
            "setuptools>=77.0.3",
            "starlette>=1.10.0",
            "uvicorn>=0.54.0",
            "httpx2>=2.16.2",  # of Starlette's test client
            "playwright>=1.65.2",  # drives the chromium that is installed
        ],
    },
    entry_points={"console_scripts": ["nla=nla_jax.cli:command"]},
)
