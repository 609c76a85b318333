"""Qwen2.5-7B-Instruct, K = 20 of 28 blocks: the released pair's setting (128 × 8 samples a step, published FVE 0.752).

    nla plan --config configs/qwen2_5_7b.py:v5e_32 --topology v5e:4x8
    nla quickstart --config configs/qwen2_5_7b.py:v5e_32 --workdir runs/qwen2_5_7b --config.corpus.source=TEXTS

TEXTS is a folder of .jsonl or .parquet files, about half web text, half chat.

Planned for v5e:4x8, not measured (docs/scaling.md): at most 14.7 of 15.75 GiB a chip in RL; a step of 1024 samples
5.2 s without host work; extraction, warm starts and 1000 such steps 2.0 hours.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MESHES = {
    "v5e_32": (1, 8, 4),  # v5e:4x8
    "v6e_16": (1, 4, 4),  # v6e:4x4
    "v5p_16": (1, 4, 4),  # v5p:2x2x4
}
OWN = {
    "subject": {"path": "Qwen/Qwen2.5-7B-Instruct", "layer": 20, "architecture": ARCHITECTURE},
    "prompts": {"marker": "㈎", "injection_scale": 150.0},
}


def get_config(variant: str = "") -> ConfigDict:
    """Variants: those of `MESHES` (the first is the default), and "tiny"."""
    released = runpy.run_path(str(Path(__file__).with_name("released.py")))["released"]
    return released(variant, MESHES, TINY, OWN, lr=1.41e-5)
