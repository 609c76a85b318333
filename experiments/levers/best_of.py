"""Best of N at inference: what the reconstructor as a judge is worth, in FVE and in truth, on held-out rows of a run.

python experiments/levers/best_of.py runs/quickstart 1 4
"""

import sys
from pathlib import Path

import numpy as np

import nla_jax as nla
from nla_jax.data.activations import TEXT
from nla_jax.data.rows import load_rows, spread
from nla_jax.labels.extractive import Extractive
from nla_jax.labels.labeller import LabelRow
from nla_jax.probes.claims import true_shares
from nla_jax.tools.explain import Sampling, best_of

ROWS, LIMIT, TEMPERATURE = 1000, 36, 0.0


def main(workdir: str, counts: list[int]) -> None:
    """Prints FVE (of the pair's own AR, and of the one before RL), tokens and truth by kind for each N."""
    pair, before = (nla.load_pair(Path(workdir) / name) for name in ("pair", "pair_warm"))
    data = spread(load_rows(Path(workdir), "heldout"), ROWS)
    rows = [LabelRow(text, "", 0, "", "") for text in data.column(TEXT)]
    for count in counts:
        said = best_of(pair, data.vectors, Sampling(LIMIT, TEMPERATURE, batch=128, best_of=count))
        texts = [found.text for found in said]
        tokens = np.mean([len(ids) for ids in pair.prompts.tokenizer(texts, add_special_tokens=False).input_ids])
        own, fixed = (nla.fve(reader.reconstruct(texts), data.vectors) for reader in (pair, before))
        truth = {kind: np.nanmean(shares) for kind, shares in true_shares(Extractive(), texts, rows).items()}
        print(f"best of {count}: FVE {own:.3f}, AR before RL {fixed:.3f}, {tokens:.1f} tokens", end="")
        print("".join(f", {kind} {share:.3f}" for kind, share in truth.items()))


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2:]])
