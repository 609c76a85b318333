"""Natural language autoencoders in JAX: activations of a language model as text, and back."""

import importlib

from nla_jax.fve import fve
from nla_jax.runtime.environment import VERSION as __version__
from nla_jax.runtime.errors import InputError

# Where the other names live. Each module is imported when a name of it is first used: JAX and transformers take
# seconds.
_HOMES = {
    "Activations": "data.activations",
    "Conventions": "io.conventions",
    "Injection": "autoencoder",
    "Lora": "models.lora",
    "Pair": "pair",
    "Provider": "probes.provider",
    "Subject": "subject",
    "add_norm_matched": "autoencoder",
    "extract": "subject",
    "load_pair": "pair",
    "load_subject": "subject",
    "make_mesh": "models.sharding",
    "new_pair": "pair",
    "patch": "patching",
    "probe": "tools.probe",
    "replace": "autoencoder",
    "steer": "steering",
}

__all__ = ["InputError", "__version__", "fve", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'nla_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nla_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
