"""What the settings of released pairs have in common: data, warm start and joint training at the published
hyper-parameters (Natural Language Autoencoders, Transformer Circuits 2026, and its public implementation). No study by
itself: the configs named after models call `released`."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from nla_jax.prompts import RECONSTRUCTOR_TEMPLATE, VERBALIZER_TEMPLATE  # the paper's

ADAMW = "nla_jax.objective:adamw"


def released(
    variant: str,
    meshes: dict[str, dict],
    *,
    path: str,
    layer: int,
    architecture: dict,
    tiny: dict,
    lr: float,
    marker: str = "",
    injection_scale: float = 0.0,
    activations: int = 128,
    group: int = 8,
    bos: bool = False,
) -> ConfigDict:
    """The config of one setting: the quickstart's fields with the published values.

    `meshes`: by variant, what a topology changes: `mesh=(data, fsdp, tensor)`, and fields of `rl`, `compute`; the first
    is the default. The variant "tiny" has a test's size, its model the `architecture` changed by `tiny`. `bos`: the
    tokenizer begins texts with a token of its own."""
    c = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"](
        "tiny" if variant == "tiny" else ""
    )
    c.subject.update(path=path, layer=layer)
    c.subject.architecture = ConfigDict(architecture)
    c.report.title = path
    c.prompts.marker = marker
    if variant == "tiny":
        c.subject.architecture.update(tiny)
        c.subject.layer, c.prompts.marker = 1, ""
        return c
    if variant not in ("", *meshes):
        raise ValueError(f"there is no variant {variant!r}; there are {', '.join(meshes)} and tiny.")

    c.compute.update(dtype="bfloat16", remat="nothing_saveable")
    # 640,000 positions: one epoch of 1000 batches of 256 for each warm start, 1000 steps of 128 for RL.
    c.corpus.update(source="corpus", max_documents=64_000)
    c.split = ConfigDict({"av_sft": 0.40, "ar_sft": 0.40, "rl": 0.19, "heldout": 0.01})
    c.extract.update(positions=10, min_position=50, max_tokens=1024, shard_documents=2000)
    c.prompts.update(
        verbalizer_template=VERBALIZER_TEMPLATE,
        reconstructor_template=RECONSTRUCTOR_TEMPLATE,
        injection_scale=injection_scale,
        max_new_tokens=150,
    )
    c.sft.checkpoint_every = 100
    for model in (c.sft.av, c.sft.ar):
        model.update(batch=256, steps=1000)
        model.optimizer = ConfigDict({"function": ADAMW, "lr": 2e-5, "final_lr": 2e-6, "warmup": 50})
    c.rl.update(
        steps=1000,
        activations=activations,
        group=group,
        rollout_chunks=1,
        kl_coefficient=0.01,
        checkpoint_every=50,
        heldout_every=50,
    )
    for optimizer in (c.rl.av_optimizer, c.rl.ar_optimizer):
        optimizer.update(lr=lr, warmup=0)
    c.plan.update(prefix=100, suffix=25, text_prefix=6 + bos, text=14 + bos)

    changed = dict(meshes[variant or next(iter(meshes))])
    c.mesh.update(dict(zip(("data", "fsdp", "tensor"), changed.pop("mesh"))))
    c.compute.remat = changed.pop("remat", c.compute.remat)
    c.rl.update(changed)
    return c
