"""What the settings of released pairs have in common: data, warm start and joint training at the published
hyper-parameters (Natural Language Autoencoders, Transformer Circuits 2026, and its public implementation). No study by
itself: the configs named after models call `released`."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from nla_jax.prompts import RECONSTRUCTOR_TEMPLATE, VERBALIZER_TEMPLATE  # the paper's

ADAMW = "nla_jax.objective:adamw"


WARM_START = {
    "batch": 256,
    "steps": 1000,
    "optimizer": {"function": ADAMW, "lr": 2e-5, "final_lr": 2e-6, "warmup": 50},
}
RELEASED = {
    "compute": {"dtype": "bfloat16", "remat": "nothing_saveable"},
    # 640,000 positions: one epoch of 1000 batches of 256 for each warm start, 1000 steps of 128 for RL.
    "corpus": {"source": "corpus", "max_documents": 64_000},
    "split": {"av_sft": 0.40, "ar_sft": 0.40, "rl": 0.19, "heldout": 0.01},
    "extract": {"positions": 10, "min_position": 50, "max_tokens": 1024, "shard_documents": 2000},
    "prompts": {
        "verbalizer_template": VERBALIZER_TEMPLATE,
        "reconstructor_template": RECONSTRUCTOR_TEMPLATE,
        "max_new_tokens": 150,
    },
    "sft": {"checkpoint_every": 100, "av": WARM_START, "ar": WARM_START},
    "rl": {
        "steps": 1000,
        "activations": 128,
        "group": 8,
        "temperature": 1.0,
        "rollout_chunks": 1,
        "kl_coefficient": 0.01,
        "av_optimizer": {"warmup": 0},
        "ar_optimizer": {"warmup": 0},
        "checkpoint_every": 50,
        "heldout_every": 50,
        "probe_every": 0,  # probes in training (docs/probes.md) set documents aside
    },
    "plan": {"prefix": 100, "suffix": 25, "text_prefix": 6, "text": 14},
}

# The variant "tiny" of every setting: a test's size, which learns nothing.
TINY = {
    "corpus": {"max_documents": 60},
    "subject": {"layer": 1},
    "split": {"av_sft": 0.4, "ar_sft": 0.2, "rl": 0.2, "heldout": 0.2},
    "extract": {"positions": 4, "max_tokens": 128, "shard_documents": 10},
    "prompts": {"max_new_tokens": 64},
    "sft": {
        "checkpoint_every": 2,
        "av": {"batch": 8, "steps": 6, "optimizer": {"function": ADAMW, "lr": 3e-3}},
        "ar": {"batch": 8, "steps": 6},
    },
    "rl": {
        "steps": 4,
        "activations": 4,
        "group": 4,
        "temperature": 1.0,
        "rollout_chunks": 1,
        "checkpoint_every": 1,
        "heldout_every": 2,
        "heldout_rows": 8,
    },
    "evaluate": {"rows": 16, "batch": 16, "examples": 4},
}


def released(
    variant: str, meshes: dict[str, tuple[int, int, int]], tiny: dict, own: dict, *, lr: float, bos: bool = False
) -> ConfigDict:
    """The config of one setting: the quickstart's fields, with the published values, with those of its `own`.

    `meshes`: the sizes (data, fsdp, tensor) of each variant's mesh; the first is the default. The variant "tiny" has a
    test's size, and the subject's architecture changed by `tiny`. `lr`: of AV and AR in RL. `bos`: the tokenizer begins
    texts with a token of its own."""
    if variant not in ("", "tiny", *meshes):
        raise ValueError(f"there is no variant {variant!r}; there are {', '.join(meshes)} and tiny.")
    quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]
    c = quickstart()
    c.report.title = own["subject"]["path"]
    if variant == "tiny":
        c.update(TINY)
        c.subject.update(own["subject"])
        c.subject.architecture.update(tiny)
        c.subject.layer = 1
        return c
    c.update(RELEASED)
    for optimizer in (c.rl.av_optimizer, c.rl.ar_optimizer):
        optimizer.lr = lr
    c.plan.update(text_prefix=c.plan.text_prefix + bos, text=c.plan.text + bos)
    c.update(own)
    c.mesh.update(dict(zip(("data", "fsdp", "tensor"), meshes[variant or next(iter(meshes))])))
    return c
