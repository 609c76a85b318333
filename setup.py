from setuptools import find_packages, setup

setup(
    name="nla_jax",
    version="0.1.0",
    description="Natural language autoencoders in JAX: activations of a language model as text, and back",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["nla_jax", "nla_jax.*"]),
    package_data={"nla_jax": ["quickstart_subject/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "etils[epath]>=1.6",
        "fsspec",
        "transformers>=5.0",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "array_record",
        "ml-collections>=1.0",
        "absl-py",
        "jaxtyping",
        "numpy>=2.0",
        "pyarrow>=17",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "huggingface_hub",
        "jinja2",  # chat templates
        "pyyaml",
        "tensorboardX",
        "tqdm",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "gcs": ["gcsfs"],
        "test": ["pytest>=8", "pytest-xdist", "torch==2.13.0", "peft", "gcsfs"],
    },
    entry_points={"console_scripts": ["nla=nla_jax.cli:main"]},
)
