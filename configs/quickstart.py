"""The whole loop on a laptop: a small subject, real text, ten minutes on two CPU cores.

nla quickstart --workdir runs/quickstart
nla quickstart --config configs/quickstart.py:tiny --workdir runs/tiny         # a minute: does it work here?
nla quickstart --config configs/quickstart.py:truth --workdir runs/truth       # RL pays for true claims too
nla quickstart --config configs/quickstart.py:steady --workdir runs/steady     # RL ends where claims get less true
nla quickstart --config configs/quickstart.py:layers --workdir runs/layers     # one pair for the activations of two blocks
nla quickstart --config configs/quickstart.py:short --workdir runs/short       # or another lever: see LEVERS below
nla pretrain --config configs/quickstart.py:subject --workdir runs/subject     # how the shipped subject was made
nla quickstart --config configs/quickstart.py:pair --workdir runs/pair         # the shipped pair: a longer warm start, more rows
"""

from ml_collections import ConfigDict

ADAMW, MUON = "nla_jax.objective:adamw", "nla_jax.objective:muon"
# rank 0 trains the whole model, a rank above it an adapter to the subject (in RL too).
LORA = {"rank": 0, "alpha": 16.0, "rslora": True, "targets": ("q", "k", "v", "o", "gate", "up", "down")}
QUICKSTART = {
    "seed": 0,
    # auto: bfloat16 on TPU and GPU, and on CPUs that multiply it faster; else float32. `remat` names a policy of
    # jax.checkpoint_policies: what blocks keep for the backward pass. `attention`: xla, cudnn (GPU) or splash (TPU);
    # the kernels pay where texts are long.
    "compute": {"dtype": "auto", "remat": "dots_with_no_batch_dims_saveable", "attention": "xla"},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    # Of every training loop. Kept: the newest `keep` checkpoints, those of steps that `keep_every` divides (0: none),
    # and the newest from before trouble. Trouble: over `window` steps metrics are not finite, or one of RL's stays
    # outside its limit; training then stops. A step that does not move for `stall_minutes` is reported.
    "checkpoints": {"keep": 2, "keep_every": 0},
    "watchdog": {
        "window": 20,
        "stall_minutes": 10.0,
        "min_extraction_rate": 0.25,
        "min_entropy": 0.02,
        "min_length": 2.0,
        "max_length_share": 0.98,  # of prompts.max_new_tokens
        "max_identical_texts": 0.9,  # share of texts that another of their group equals
        # Tripwires: how far figures of rl.probes may move, such as {"true_after_rl": 0.1}, for so many rounds in a row.
        "max_rise": {},
        "max_fall": {},
        "probe_rounds": 2,
    },
    # Text. `source` may also be "tfds:NAME", a .txt/.jsonl/.parquet file or folder, or "package.module:function".
    "corpus": {
        "source": "python_docs",
        "text_field": "text",
        "id_field": "id",
        "split": "train",
        "min_chars": 300,
        "max_documents": 10**9,
    },
    "split": {"av_sft": 0.60, "ar_sft": 0.20, "rl": 0.14, "heldout": 0.06},  # shares of the documents
    # The subject: a folder or hub id; "" means the one that `pretrain` writes. `architecture`: the content of its
    # config.json, for `nla plan` and `nla benchmark` where it is not here.
    # `earlier_layers`: blocks before `layer` that the pair reads too, each in a slot of its own.
    "subject": {"path": "", "layer": 2, "earlier_layers": (), "architecture": {}},
    "pretrain": {
        "init_from": "shipped",  # a folder, "shipped" (comes with the package), or "" (random)
        "steps": 0,
        "batch": 32,
        "length": 256,
        "checkpoint_every": 200,
        "dtype": "bfloat16",
        "vocab_size": 2048,
        "model": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp_width": 384},
        "optimizer": {
            "function": ADAMW,
            "lr": 3e-3,
            "final_lr": 1e-4,
            "warmup": 100,
            "weight_decay": 0.05,
            "b2": 0.98,
        },
    },
    # `source`: Parquet files of activations in the reference's form, to train on instead of running the subject over
    # the corpus. Labels in them are used; without `heldout` it is split off `rl` by document.
    "extract": {
        "positions": 20,
        "min_position": 24,
        "max_tokens": 256,
        "shard_documents": 500,
        "source": {"av_sft": "", "ar_sft": "", "rl": "", "heldout": ""},
    },
    # Who writes the warm start's explanations: docs/labels.md lists models, servers and files that may.
    "label": {"labeller": "nla_jax.labels.extractive:Extractive", "splits": ("av_sft", "ar_sft", "heldout")},
    "prompts": {
        "verbalizer_template": "Explain this activation: {injection_char}",
        # Labels end with the text's last words. The AR reads right there, and so begins where the subject stood.
        "reconstructor_template": "<text>{explanation}",
        "marker": "",  # "" finds one
        "inject": ("nla_jax.autoencoder:replace",),  # or …:add_norm_matched@1, or functions of yours
        "injection_scale": 0.0,  # 0 means the median norm of the training activations
        "max_new_tokens": 44,
    },
    "sft": {
        "checkpoint_every": 200,
        "av": {
            "batch": 64,
            "steps": 1000,
            "lora": dict(LORA),
            "optimizer": {"function": MUON, "lr": 1e-2, "final_lr": 1e-4, "warmup": 50},
        },
        "ar": {
            "batch": 64,
            "steps": 150,
            "lora": dict(LORA),
            "optimizer": {"function": ADAMW, "lr": 1e-3, "final_lr": 1e-4, "warmup": 50},
        },
    },
    "rl": {
        "steps": 50,
        "activations": 48,
        "group": 8,
        "rollout_chunks": 4,
        "micro_batches": 1,
        "temperature": 0.7,  # nearer to the greedy texts that are read later
        "reward": "nla_jax.objective:negative_mse",
        "advantage": "nla_jax.objective:group_normalised",
        "kl_coefficient": 0.03,
        "av_optimizer": {"function": ADAMW, "lr": 4e-4, "warmup": 5},
        "ar_optimizer": {"function": ADAMW, "lr": 3e-4, "warmup": 5},
        "checkpoint_every": 20,
        "heldout_every": 10,
        "heldout_rows": 256,
        # Steps between rounds of probes: is it still true, and would another reader understand it? They are of documents
        # that RL then does not see (docs/probes.md).
        "probe_every": 0,
        "probe_rows": 256,
        "keep_best": {},  # or weights of their figures, such as {"fve_rl": 1, "true_after_rl": 1}: which pair is kept
    },
    "evaluate": {"rows": 2000, "temperature": 0.0, "batch": 128, "examples": 30},
    "report": {"title": "Quickstart"},
    # What only a tokenizer knows, in tokens, for `nla plan` and `nla benchmark`: the AV's prompt before the marker and
    # from it to the response; the AR's template before the text and in all.
    "plan": {"prefix": 11, "suffix": 2, "text_prefix": 1, "text": 2},
}
SUBJECT = {"pretrain": {"init_from": "", "steps": 1200}}
AV_ADAMW = {"function": ADAMW, "lr": 3e-3}
PAIR = {"extract": {"positions": 60}, "sft": {"av": {"steps": 6000, "optimizer": AV_ADAMW}}}
TINY = {  # the compiler takes most of its time: few programs (no rematerialisation, no KL, the headline's probes, RL's
    # held-out texts by the evaluation's program, AdamW), and none is optimized
    "compute": {"dtype": "float32", "remat": "", "optimize": False},
    "corpus": {"source": "nla_jax.quickstart.topics:documents"},
    "split": {"av_sft": 0.5, "ar_sft": 0.2, "rl": 0.15, "heldout": 0.15},
    "subject": {"layer": 1},
    "extract": {"positions": 8, "max_tokens": 128},
    "sft": {"widths": 1, "av": {"batch": 32, "steps": 80, "optimizer": AV_ADAMW}, "ar": {"batch": 32, "steps": 100}},
    "rl": {
        "steps": 4,
        "activations": 16,
        "group": 4,
        "rollout_chunks": 1,
        "kl_coefficient": 0.0,
        "heldout_every": 4,
        "heldout_rows": 64,
        "heldout_temperature": 0.0,
    },
    "evaluate": {
        "rows": 64,
        "batch": 64,
        "examples": 8,
        "probes": tuple(
            f"nla_jax.probes.fidelity:{name}"
            for name in ("after_rl", "warm_start", "gold", "no_injection", "empty", "shuffled", "length", "extraction")
        ),
    },
    "report": {"title": "Quickstart, tiny"},
}
TRUTH = {  # RL pays for true claims too
    "rl": {"truth": True, "reward": "nla_jax.objective:truthful"},
}
STEADY = {  # RL ends where two rounds of probes find fewer true claims, and keeps the best pair by a fixed reader and truth
    "rl": {"probe_every": 9, "keep_best": {"fve_rl_frozen": 1, "true_after_rl": 1}},
    "watchdog": {"max_fall": {"true_after_rl": 0.05}},
}
FRONT = {  # the first tokens say most: labels begin with the last word, and the AR reads half of them cut anywhere
    "label": {"labeller": "nla_jax.labels.extractive:WordsFirst"},
    "sft": {"reader": "nla_jax.objective:prefix_or_whole", "ar": {"steps": 3000, "optimizer": {"lr": 3e-3}}},
}
LAYERS = {  # one pair for the activations of two blocks
    "subject": {"earlier_layers": (0,)},
    "prompts": {"verbalizer_template": "Explain these activations: {injection_char}, {injection_char}"},
}
LEVERS = {  # what RL pays for, and what the AR reads (experiments/levers)
    "short": {"rl": {"reward": "nla_jax.objective:short"}},
    "within": {"rl": {"reward": "nla_jax.objective:within"}},
    "own_words": {"rl": {"features": ("nla_jax.objective:copied",), "reward": "nla_jax.objective:own_words"}},
    "unquoted": {"rl": {"reader": "nla_jax.labels.extractive:without_last_words"}},
    "contrastive": {"rl": {"reward": "nla_jax.objective:contrastive"}},
    "downstream": {"rl": {"subject_kl": True, "reward": "nla_jax.objective:downstream"}},
    "front": FRONT,
}
VARIANTS = {
    "": {},
    "subject": SUBJECT,
    "pair": PAIR,
    "tiny": TINY,
    "truth": TRUTH,
    "steady": STEADY,
    "layers": LAYERS,
} | LEVERS  # what each changes


def get_config(variant: str = "") -> ConfigDict:
    """Variants: "" (starts from the shipped subject), "subject" (trains it from scratch), "pair" (a longer warm start
    on more rows: the shipped pair), "tiny" (a minute: it explains little, but its controls differ), "truth" (RL pays for
    true claims too), "steady" (RL ends where claims get less true), "layers" (one pair for the activations of two
    blocks), and the `LEVERS`."""
    if variant not in VARIANTS:
        *others, last = filter(None, VARIANTS)
        raise ValueError(f"configs/quickstart.py has no variant {variant!r}; there are {', '.join(others)} and {last}.")
    c = ConfigDict(QUICKSTART)
    c.update(VARIANTS[variant])
    return c
