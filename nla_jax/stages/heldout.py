"""What RL measures on held-out rows as it goes: how well the explanations are read, how true and how long they are."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nla_jax.config import Config
from nla_jax.data.activations import TEXT
from nla_jax.data.rows import load_rows, spread
from nla_jax.fve import fve
from nla_jax.labels.labeller import FIELDS, label_rows
from nla_jax.pair import Pair
from nla_jax.probes.claims import has_grammar, true_shares
from nla_jax.probes.fidelity import token_counts
from nla_jax.runtime.run import Run
from nla_jax.runtime.user_code import resolve
from nla_jax.stages.evaluate import RunContext


class Heldout:
    """`rl.heldout_rows` held-out rows, and what is measured on them.

    Truth is measured where that costs nothing: the labeller can read what is written as its labels are, and checks it
    against the text and its last token alone, which the rows have."""

    def __init__(self, run: Run):
        self.config = run.config
        self.context = RunContext(run, spread(load_rows(run.workdir, "heldout"), run.config.rl.heldout_rows))
        labeller = resolve(run.config.label.labeller, "label.labeller").function
        checked = has_grammar(labeller) and set(getattr(labeller, "reads", FIELDS)) <= {"text", "token"}
        self.rows = label_rows(self.context.column) if checked and any(self.context.column(TEXT)) else []

    def measure(self, pair: Pair) -> dict[str, float]:
        """`heldout_fve`; `heldout_length`, the mean tokens of an explanation; `heldout_true`, the share of claims that
        hold, as a mean over their kinds."""
        texts = explained(self.config, pair, self.context.vectors)
        found = {
            "heldout_fve": fve_of(pair, texts, self.context.vectors),
            "heldout_length": float(token_counts(pair, texts).mean()),
        }
        shares = true_shares(self.context.labeller, texts, self.rows) if self.rows else {}
        return found | ({"heldout_true": float(np.mean([np.nanmean(of) for of in shares.values()]))} if shares else {})


def explained(config: Config, pair: Pair, vectors: Float[np.ndarray, "n d"]) -> list[str]:
    """The AV's explanations at `rl.heldout_temperature`; an empty text where a response holds none."""
    found = pair.explain(vectors, config.prompts.max_new_tokens, config.rl.heldout_temperature)
    return [explanation.accepted or "" for explanation in found]


def fve_of(pair: Pair, texts: Sequence[str], vectors: Float[np.ndarray, "n d"]) -> float:
    """FVE of what the AR reads from the texts; NaN where it has broken down."""
    recon = pair.reconstruct(texts)
    return fve(recon, vectors) if np.isfinite(recon).all() else math.nan
