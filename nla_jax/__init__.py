"""Natural language autoencoders in JAX: activations of a language model as text, and back."""

__version__ = "0.2.0"

from nla_jax.autoencoder import Injection, add_norm_matched, replace
from nla_jax.errors import InputError
from nla_jax.evaluate.fve import fve
from nla_jax.models.lora import Lora
from nla_jax.pair import Pair, load_pair, new_pair
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
