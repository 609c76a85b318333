"""How the tests hold the types and shapes in our signatures: jaxtyping's import hook decorates every function with
`held`."""

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

jaxtyping.Array = jax.Array | np.ndarray  # a function that takes JAX's arrays takes NumPy's as well
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int does where a float is asked for


def held(function):
    """The function with its signature checked at every call. Dataclasses are made with whatever their trees hold:
    arrays, shapes, shardings."""
    return function if function.__name__ == "__init__" else check(function)


def install() -> None:
    """Checks whatever is imported of nla_jax from now on."""
    jaxtyping.install_import_hook("nla_jax", "typechecks.held")
