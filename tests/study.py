"""The study that the tests run: the quickstart's settings at a size that takes seconds and learns nothing."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.py"
TINY = {
    "compute": {"dtype": "float32"},
    "corpus": {"max_documents": 60},
    "pretrain": {
        "init_from": "",
        "steps": 6,
        "batch": 4,
        "length": 64,
        "vocab_size": 400,
        "model": {"width": 32, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_width": 48},
    },
    "subject": {"layer": 1},
    "split": {"av_sft": 0.4, "ar_sft": 0.2, "rl": 0.2, "heldout": 0.2},
    "extract": {"positions": 4, "max_tokens": 128, "shard_documents": 10},
    "prompts": {"max_new_tokens": 64},
    "sft": {"checkpoint_every": 2, "av": {"batch": 8, "steps": 6}, "ar": {"batch": 8, "steps": 6}},
    "rl": {
        "steps": 4,
        "activations": 4,
        "group": 4,
        "rollout_chunks": 1,
        "checkpoint_every": 1,
        "heldout_every": 2,
        "heldout_rows": 8,
        "probe_every": 0,
    },
    "evaluate": {"rows": 16, "batch": 16, "examples": 4},
}


def get_config(variant: str) -> ConfigDict:
    """The only variant is "tiny"."""
    if variant != "tiny":
        raise ValueError(f"tests/study.py has no variant {variant!r}; there is tiny.")
    c = runpy.run_path(str(QUICKSTART))["get_config"]()
    c.update(TINY)
    return c
