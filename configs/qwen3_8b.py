"""Qwen3-8B, K = 24 of 36 blocks: a LoRA AV and a whole AR, 256 × 8 samples a step, as EasyNLA trains this model (its
figure: FVE 0.67 to 0.70). Its learning rates are not published: the AR's is the 7B pair's, the adapter's ten times
that.

    nla plan --config configs/qwen3_8b.py:v5p_8 --topology v5p:2x2x2
    nla quickstart --config configs/qwen3_8b.py:v5p_8 --workdir runs/qwen3_8b --config.corpus.source=TEXTS

TEXTS is a folder of .jsonl or .parquet files, about half web text, half chat.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
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
    "head_dim": 8,
}
MESHES = {
    "v5p_8": (1, 2, 4),  # v5p:2x2x2
}
OWN = {
    "subject": {"path": "Qwen/Qwen3-8B", "layer": 24, "architecture": ARCHITECTURE},
    "rl": {"activations": 256},
}


def get_config(variant: str = "") -> ConfigDict:
    """Variants: those of `MESHES` (the first is the default), and "tiny"."""
    released = runpy.run_path(str(Path(__file__).with_name("released.py")))["released"]
    c = released(variant, MESHES, TINY, OWN, lr=1.41e-5)
    c.sft.av.lora.rank = 4 if variant == "tiny" else 128
    if variant != "tiny":
        c.sft.av.optimizer.update(lr=2e-4, final_lr=2e-5)
        c.rl.av_optimizer.lr = 1.41e-4
    return c
