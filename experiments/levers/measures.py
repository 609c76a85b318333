"""Copying in the quickstart, whose quotations are of at most twenty characters: stretches of six instead of twelve.

nla quickstart --config configs/quickstart.py:own_words --workdir runs/own_words --config.rl.features=experiments.levers.measures:copied_6
"""

import functools

import numpy as np

from nla_jax.data.activations import TEXT
from nla_jax.objective import copied, coverage
from nla_jax.probes.probe import probe

copied_6 = functools.partial(copied, span=6)


@probe("Copied from the text, stretches of six characters", unit="share of characters", labels={"copied_6": "after RL"})
def copied_short(context):
    """As `nla_jax.probes.copying:copied`, with shorter stretches."""
    texts, rows = context.texts("rl"), context.column(TEXT)
    return {"copied_6": np.array([coverage(text, row, 6) for text, row in zip(texts, rows)])}
