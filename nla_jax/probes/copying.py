"""How much of an explanation is copied from its text, word for word."""

import numpy as np

from nla_jax.data.activations import TEXT
from nla_jax.objective import coverage
from nla_jax.probes.probe import Context, probe


@probe(
    "Copied from the text",
    needs=("pair", "warm"),
    unit="share of characters",
    labels={"copied_rl": "after RL", "copied_warm": "warm start"},
)
def copied(context: Context) -> dict[str, np.ndarray]:
    """The share of an explanation's characters that lie in stretches of 12 or more which its text holds too. A
    verbalizer that quotes needs no words of its own."""
    rows = context.column(TEXT)
    return {f"copied_{who}": np.array(list(map(coverage, context.texts(who), rows))) for who in ("rl", "warm")}
