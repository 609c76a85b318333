"""Gemma-3-12B-IT, K = 32 of 48 blocks: the released pair's setting (128 × 8 samples a step).

    nla plan --config configs/gemma3_12b.py:v5p_16 --topology v5p:2x2x4
    nla quickstart --config configs/gemma3_12b.py:v5p_16 --workdir runs/gemma3_12b --config.corpus.source=TEXTS

TEXTS is a folder of .jsonl or .parquet files, about half web text, half chat.

Planned for v5p:2x2x4, not measured (docs/scaling.md): at most 36.5 of 95 GiB a chip in RL; a step of 1024 samples 6.5 s
without host work; extraction, warm starts and 1000 such steps 2.3 hours.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ARCHITECTURE = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "hidden_size": 3840,
    "intermediate_size": 15_360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MESHES = {
    "v5p_16": (1, 4, 4),  # v5p:2x2x4
}
OWN = {
    "subject": {"path": "google/gemma-3-12b-it", "layer": 32, "architecture": ARCHITECTURE},
    "prompts": {"marker": "㈜", "injection_scale": 80_000.0},
}


def get_config(variant: str = "") -> ConfigDict:
    """Variants: those of `MESHES` (the first is the default), and "tiny"."""
    released = runpy.run_path(str(Path(__file__).with_name("released.py")))["released"]
    return released(variant, MESHES, TINY, OWN, lr=1e-5, bos=True)
