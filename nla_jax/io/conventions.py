"""How pairs of several makers differ, where a sidecar may not say it.

Each of these facts lowers the quality of a pair without an error where it is guessed wrong."""

import dataclasses

from nla_jax.autoencoder import Injection
from nla_jax.prompts import READINGS, THINKING
from nla_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Facts of a pair, said by who loads it. None: as its sidecar says, or as its maker is known to do (`MAKERS`).

    `special_tokens`: the AR's input begins with the BOS that its tokenizer adds. `thinking`: one of `THINKING`.
    `reading`: one of `READINGS`. `injections`: how activations enter the prompt. `injection_scale`: their length
    there, or "raw" for their own. Raises `InputError` for a value that there is not."""

    special_tokens: bool | None = None
    thinking: str | None = None
    reading: str | None = None
    injections: tuple[Injection, ...] | Injection | None = None
    injection_scale: float | str | None = None

    def __post_init__(self):
        for name, known in (("thinking", THINKING), ("reading", READINGS)):
            if getattr(self, name) not in (None, *known):
                raise InputError(f"{name} must be one of {', '.join(known)}; found {getattr(self, name)!r}.")
        given = (self.injections,) if isinstance(self.injections, Injection) else self.injections
        if given is not None and not (
            isinstance(given, tuple) and given and all(isinstance(x, Injection) for x in given)
        ):
            raise InputError(f"injections must be an Injection, or a tuple of some; found {self.injections!r:.50}.")
        if not isinstance(self.special_tokens, (bool, type(None))):
            raise InputError(f"special_tokens must be True or False; found {self.special_tokens!r:.50}.")


MAKERS = {  # recognised by their sidecars (`Sidecar.read`)
    "nla_jax": Conventions(special_tokens=True, thinking="off", reading="tags"),
    "the reference": Conventions(special_tokens=True, thinking="template", reading="search"),
    "EasyNLA or nanoNLA": Conventions(special_tokens=False, thinking="template", reading="search"),
}
