"""Natural language autoencoders in JAX: activations of a language model as text, and back."""

from nla_jax.autoencoder import Injection, add_norm_matched, replace
from nla_jax.fve import fve
from nla_jax.models.lora import Lora
from nla_jax.pair import Pair, load_pair, new_pair
from nla_jax.runtime.environment import VERSION as __version__
from nla_jax.runtime.errors import InputError
from nla_jax.subject import Activations, Subject, extract, load_subject

__all__ = [
    "Activations",
    "Injection",
    "InputError",
    "Lora",
    "Pair",
    "Subject",
    "add_norm_matched",
    "extract",
    "fve",
    "load_pair",
    "load_subject",
    "new_pair",
    "replace",
]
