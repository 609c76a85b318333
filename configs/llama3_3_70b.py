"""Llama-3.3-70B-Instruct, K = 53 of 80 blocks: the released pair's setting (128 × 8 samples a step).

    nla plan --config configs/llama3_3_70b.py:v5p_128 --topology v5p:4x4x8
    nla quickstart --config configs/llama3_3_70b.py:v5p_128 --workdir runs/llama3_3_70b --config.corpus.source=TEXTS

TEXTS is a folder of .jsonl or .parquet files, about half web text, half chat.

Planned for v5p:4x4x8, not measured (docs/scaling.md): at most 41.8 of 95 GiB a chip in RL; a step of 1024 samples 6.7 s
without host work; extraction, warm starts and 1000 such steps 2.6 hours.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MESHES = {
    # 64 shards of the width: 128 entries each. Of 64 entries, half a tile, the compiler makes all-reduces instead of
    # all-gathers.
    "v5p_128": (2, 8, 8),  # v5p:4x4x8
}
OWN = {
    "subject": {"path": "meta-llama/Llama-3.3-70B-Instruct", "layer": 53, "architecture": ARCHITECTURE},
    "prompts": {"marker": "㎡", "injection_scale": 30.0},
}


def get_config(variant: str = "") -> ConfigDict:
    """Variants: those of `MESHES` (the first is the default), and "tiny"."""
    released = runpy.run_path(str(Path(__file__).with_name("released.py")))["released"]
    return released(variant, MESHES, TINY, OWN, lr=5e-6, bos=True)
