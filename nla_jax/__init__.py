"""Natural language autoencoders in JAX: activations of a language model as text, and back."""

from nla_jax.errors import InputError
from nla_jax.evaluate.fve import fve
from nla_jax.pair import Pair, load_pair
from nla_jax.subject import Activations, Subject, extract, load_subject

__all__ = ["Activations", "InputError", "Pair", "Subject", "extract", "fve", "load_pair", "load_subject"]
