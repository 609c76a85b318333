"""A subject that was not trained here: a Llama of 260K parameters (TinyStories; d = 64, 5 blocks, vocabulary 512).

    python experiments/stories260k/sample_corpus.py --model MODEL --out runs/stories.jsonl
    nla quickstart --config configs/stories260k.py --workdir runs/stories260k \
        --config.subject.path=MODEL --config.corpus.source=runs/stories.jsonl

MODEL is its Hugging Face folder. Its tokenizer has no chat template and mostly spells words out: labels take twice as
many tokens as the quickstart's. experiments/stories260k/README.md has figures, with older labels.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The quickstart with longer texts; no variants."""
    if variant:
        raise ValueError(f"configs/stories260k.py has no variants; found {variant!r}.")
    c = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    c.subject.layer = 3
    c.corpus.min_chars = 150
    c.extract.update(positions=12, min_position=20)
    c.prompts.max_new_tokens = 96
    c.sft.av.steps = 600
    c.rl.update(steps=30, activations=32, temperature=1.0)
    c.report.title = "TinyStories, 260K parameters"
    return c
