"""Gemma-3-27B-IT, K = 41 of 62 blocks: the released pair's setting (256 × 8 samples a step, published FVE 0.763).

    nla plan --config configs/gemma3_27b.py:v5p_64 --topology v5p:4x4x4
    nla quickstart --config configs/gemma3_27b.py:v5p_64 --workdir runs/gemma3_27b --config.corpus.source=TEXTS

TEXTS is a folder of .jsonl or .parquet files, about half web text, half chat.

Planned for v5p:4x4x4, not measured (docs/scaling.md): at most 43.7 of 95 GiB a chip in RL; a step of 2048 samples 7.0 s
without host work; extraction, warm starts and 1000 such steps 2.3 hours.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ARCHITECTURE = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
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
    # 32 shards of the width: 168 entries each; of 84 entries the compiler makes all-reduces, not all-gathers.
    "v5p_64": (2, 8, 4),  # v5p:4x4x4
}
OWN = {
    "subject": {"path": "google/gemma-3-27b-it", "layer": 41, "architecture": ARCHITECTURE},
    "prompts": {"marker": "㈜", "injection_scale": 60_000.0},
    "rl": {"activations": 256},
}


def get_config(variant: str = "") -> ConfigDict:
    """Variants: those of `MESHES` (the first is the default), and "tiny"."""
    released = runpy.run_path(str(Path(__file__).with_name("released.py")))["released"]
    return released(variant, MESHES, TINY, OWN, lr=1.41e-5, bos=True)
