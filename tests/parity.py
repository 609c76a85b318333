"""Random tiny `transformers` models of every family, and how far our forward pass is from theirs.

python tests/parity.py            # the table of docs/models.md
python tests/parity.py golden     # writes tests/golden/: what one version of torch and transformers computed
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import transformers

from nla_jax.io.folders import load_params, read_config
from nla_jax.models.transformer import Transformer, truncate

transformers.utils.logging.disable_progress_bar()

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, LENGTH = 320, 24
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", factor=8.0)
GEMMA = dict(query_pre_attn_scalar=24, sliding_window=6)
# name: (config class, settings). Windows of 6 are shorter than the 24 tokens of the test's rows.
MODELS = {
    "llama": (transformers.LlamaConfig, dict(rope_theta=5000.0)),
    "llama, llama3 rope": (transformers.LlamaConfig, dict(rope_theta=500.0, rope_scaling=LLAMA3)),
    "llama, linear rope": (transformers.LlamaConfig, dict(rope_scaling=LINEAR)),
    "mistral": (transformers.MistralConfig, dict(sliding_window=6)),
    "mistral, no window": (transformers.MistralConfig, dict(sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2, yarn rope": (transformers.Qwen2Config, dict(rope_theta=500.0, rope_scaling=YARN)),
    "qwen2, windows": (transformers.Qwen2Config, dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3, yarn rope": (transformers.Qwen3Config, dict(rope_theta=500.0, rope_scaling=YARN)),
    "gemma2": (transformers.Gemma2Config, GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": (
        transformers.Gemma3TextConfig,
        GEMMA | dict(num_hidden_layers=7, rope_theta=1e6, rope_local_base_freq=50.0, rope_scaling=LINEAR),
    ),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def torch_config(name: str, **changes):
    """The configuration of a model of `MODELS`."""
    config, settings = MODELS[name]
    return config(**COMMON | settings | changes)


def torch_model(name: str, seed: int = 0, **changes):
    """A random model of `MODELS`; every parameter, norms and biases too, differs from its initial value."""
    import torch

    torch.set_num_threads(1)  # the tests' eight devices share few cores
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(
        torch_config(name, **changes), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def torch_states(model, ids: np.ndarray = IDS) -> list[np.ndarray]:
    """The residual stream after each block, then the logits."""
    import torch

    states = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        states.append(model(torch.tensor(ids)).logits)
    for hook in hooks:
        hook.remove()
    return [state.numpy() for state in states]


def our_states(folder, ids: np.ndarray = IDS) -> list[np.ndarray]:
    """The same of our model, read from its Hugging Face folder."""
    config = read_config(folder)
    params = load_params(folder, config)

    @jax.jit
    def run(params):
        states = []
        embedded = Transformer(config).apply({"params": params}, ids, method="embed")
        for depth in range(1, config.layers + 1):
            part = Transformer(config.truncated(depth))
            states.append(part.apply({"params": truncate(params, depth)}, [embedded])[0][0])
        return [*states, Transformer(config).apply({"params": params}, states[-1], method="logits")]

    return [np.asarray(state) for state in run(params)]


def error(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest entry of each array."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


def table() -> None:
    """Prints, as Markdown, the largest relative error of residuals and of logits of each model."""
    print("| model | residual after every block | logits |\n|---|---|---|")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            model = torch_model(name)
            model.save_pretrained(folder)
            ours, theirs = our_states(folder), torch_states(model)
        print(f"| {name} | {error(ours[:-1], theirs[:-1]):.1e} | {error(ours[-1:], theirs[-1:]):.1e} |")


def golden() -> None:
    """Writes each family's tiny model, rounded to bfloat16, and what torch computes with it in float32."""
    import torch

    for name in FAMILIES:
        model = torch_model(name, hidden_size=16, intermediate_size=24, vocab_size=64, head_dim=8)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        ids = IDS % 64
        states = torch_states(model, ids)
        model.to(torch.bfloat16).save_pretrained(GOLDEN / name)
        np.savez_compressed(GOLDEN / name / "expected.npz", *states, ids=ids)


if __name__ == "__main__":
    golden() if sys.argv[1:] == ["golden"] else table()
