"""`nla explain`: what the activations of a text say, token by token."""

from pathlib import Path

from nla_jax.autoencoder import Injection
from nla_jax.io.files import path_to
from nla_jax.pair import find_base, load_pair
from nla_jax.runtime.errors import InputError
from nla_jax.subject import extract, load_subject


def explain_text(
    text: str,
    pair: str | Path,
    *,
    subject: str | None = None,
    tokens: str = "last",
    temperature: float = 0.0,
    max_new_tokens: int = 150,
    seed: int = 0,
    injection: Injection | None = None,
) -> list[dict]:
    """One dict for each token asked for (`tokens`: "last", "all", or indices such as "3,-1"): `position, token,
    explanation, cosine, fve`, where fve = 1 - mse / variance with the variance of the pair's training activations (None
    where its sidecar records none). `injection`: as for `load_pair`. Raises `InputError` where text, pair or subject cannot be
    used."""
    if not text.strip():
        raise InputError("There is no text to explain; give --text, --file or standard input.")
    loaded = load_pair(pair, base=subject, injection=injection)
    model = load_subject(subject or find_base(loaded.sidecar.base_checkpoint, path_to(pair)), loaded.sidecar.layer)
    if model.model.config.width != loaded.sidecar.d_model:
        raise InputError(
            f"The subject {model.name} has width {model.model.config.width}, the pair {loaded.sidecar.d_model}."
        )
    expected = loaded.sidecar.provenance.get("base_hash")
    if expected and expected != model.fingerprint:
        raise InputError(f"{model.name} is not the subject that {pair} was trained on (its weights have another hash).")
    if tokens not in ("last", "all"):
        try:
            tokens = [int(i) for i in tokens.split(",")]
        except ValueError:
            raise InputError(f"--tokens must be last, all, or indices such as 3,-1; found {tokens!r}.") from None
    activations = extract(model, [text], tokens)
    if not len(activations):
        raise InputError("The text has no tokens to explain.")
    explanations = loaded.verbalize(activations.vectors, max_new_tokens, temperature, seed)
    scores = loaded.score(explanations, activations.vectors)
    variance = loaded.sidecar.provenance.get("activation_variance")
    if not isinstance(variance, (int, float, type(None))):
        raise InputError(f"The sidecar of {pair} says activation_variance {variance!r}, expected a number.")
    return [
        {
            "position": int(activations.positions[i]),
            "token": activations.tokens[i],
            "explanation": explanations[i],
            "cosine": float(scores["cosine"][i]),
            "fve": float(1 - scores["mse"][i] / variance) if variance else None,
        }
        for i in range(len(activations))
    ]
