"""Shapes for `nla benchmark`: random weights, no data, nothing to download. Not a study to train.

    nla benchmark rl                        # also rollout, sft_av, sft_ar, extract, load
    nla benchmark rl --config configs/benchmark.py:smollm2 --config.rl.activations=8
    nla benchmark rl --config configs/benchmark.py:qwen2_5_7b --config.compute.attention=cudnn \
        --config.sft.av.lora.rank=128 --config.rl.micro_batches=8       # one H200

Variants:

    ""           a small Qwen2 for two CPU cores, a step of RL takes seconds; the shapes of experiments/benchmark
    qwen2_5_7b   Qwen2.5-7B, K = 20: one large GPU with an adapter for the AV, or a slice
    smollm2      SmolLM2-135M, K = 20: a laptop, minutes

What was a flag of its own before is now a field of the config:

    --family, --vocab, --width          subject.architecture.model_type, .vocab_size, .hidden_size
    --layers, --mlp-width               subject.architecture.num_hidden_layers, .intermediate_size
    --heads, --kv-heads, --head-dim     subject.architecture.num_attention_heads, .num_key_value_heads, .head_dim
    --untied-head                       subject.architecture.tie_word_embeddings (the opposite)
    --ar-blocks N                       subject.layer = N - 1
    --prefix, --suffix                  plan.prefix, plan.suffix
    --ar-prefix P, --ar-suffix S        plan.text_prefix = P, plan.text = P + S; rows are padded to a multiple of 8
    --response                          prompts.max_new_tokens; exactly: the end token never comes
    --sft-response                      prompts.max_new_tokens: labels of sft_av and sft_ar are as long as responses
    --activations, --group              rl.activations, rl.group
    --kl                                rl.kl_coefficient
    --micro-batches, --rollout-chunks   rl.micro_batches, rl.rollout_chunks
    --batch                             sft.av.batch, sft.ar.batch; extract reads 16 documents at a time
    --document                          extract.max_tokens
    --av-lora, --ar-lora                sft.av.lora.rank, sft.ar.lora.rank
    --dtype, --remat, --attention       compute.dtype, compute.remat ("" for none), compute.attention
    --data, --fsdp, --tensor            mesh.data, mesh.fsdp, mesh.tensor
    --seed                              seed
    --preset NAME                       --config configs/benchmark.py:NAME
    --steps, --warmup, --peak-tflops, --bandwidth-gbs and --interactive are flags still.

Any other config serves as well: `nla benchmark rl --config configs/qwen2_5_7b.py:v5e_32` on the devices of its mesh.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SMALL = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}


def get_config(variant: str = "") -> ConfigDict:
    """Variants: "", "qwen2_5_7b" and "smollm2". What is not set here has the package's default (`nla settings`)."""
    c = ConfigDict()
    # No model has this path, so that the shapes are those of `architecture`.
    c.subject = ConfigDict({"path": "random", "layer": 4, "architecture": SMALL})
    c.compute = ConfigDict({"dtype": "float32", "remat": "dots_with_no_batch_dims_saveable", "attention": "xla"})
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    c.plan = ConfigDict({"prefix": 100, "suffix": 25, "text_prefix": 8, "text": 13})
    c.prompts = ConfigDict({"max_new_tokens": 64, "injection_scale": 10.0})
    c.extract = ConfigDict({"max_tokens": 512, "positions": 8})
    lora = {"rank": 0, "alpha": 16.0}
    c.sft = ConfigDict({"av": {"batch": 64, "lora": dict(lora)}, "ar": {"batch": 64, "lora": dict(lora)}})
    c.rl = ConfigDict({"activations": 8, "group": 8, "kl_coefficient": 0.01, "micro_batches": 1, "rollout_chunks": 1})
    c.evaluate = ConfigDict({"batch": 64})

    if variant == "qwen2_5_7b":
        released = runpy.run_path(str(Path(__file__).with_name("qwen2_5_7b.py")))
        c.subject = ConfigDict({"path": "random", "layer": 20, "architecture": released["ARCHITECTURE"]})
        c.compute.update(dtype="bfloat16", remat="nothing_saveable")
        c.plan.update(prefix=111, suffix=14)
        c.prompts.max_new_tokens = 150
        c.rl.update(activations=64, group=8)
    elif variant == "smollm2":
        c.subject = ConfigDict({"path": "random", "layer": 20, "architecture": SMOLLM2})
        c.plan.update(prefix=30, suffix=8)
        c.prompts.max_new_tokens = 48
        c.rl.update(activations=4, group=8)
        c.sft.av.batch, c.extract.max_tokens = 32, 256
    elif variant:
        raise ValueError(f"configs/benchmark.py has no variant {variant!r}; there are qwen2_5_7b and smollm2.")
    return c
