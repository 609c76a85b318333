"""Hugging Face folders: parity with torch in both directions, and what a damaged folder says."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conftest import TINY, close, one_sentence
from nla_jax.errors import InputError
from nla_jax.models.pretrained import fingerprint, load_params, load_tokenizer, locate, read_config, save_model
from nla_jax.models.transformer import Transformer, truncate

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 7))


def torch_model(family: str, **changes):
    """A random model; every parameter, norms and biases too, differs from its initial value."""
    config, model = FAMILIES[family]
    settings = dict(
        vocab_size=TINY.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=5000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    made = model(config(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def torch_states(model) -> list[np.ndarray]:
    """The residual stream after each block, then the logits."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        states.append(model(torch.tensor(IDS)).logits)
    for hook in hooks:
        hook.remove()
    return [state.numpy() for state in states]


def our_states(folder, layers: int) -> list[np.ndarray]:
    config = read_config(folder)
    params = load_params(folder, config)

    @jax.jit
    def run(params):
        states = []
        for depth in range(1, layers + 1):
            part = Transformer(config.truncated(depth))
            states.append(part.apply({"params": truncate(params, depth)}, params["embedding"][IDS])[0])
        return [*states, Transformer(config).apply({"params": params}, states[-1], method="logits")]

    return run(params)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_torch_both_ways(family, kv_heads, tied, tmp_path, tokenizer):
    theirs = torch_model(family, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_states(theirs)
    close(our_states(tmp_path / "theirs", 2), expected, 1e-4)

    config = read_config(tmp_path / "theirs")
    save_model(tmp_path / "ours", load_params(tmp_path / "theirs", config), config, tokenizer)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    close(torch_states(again.eval()), expected, 1e-6)
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("theirs", "ours")]
    assert names[0] == names[1]


def test_sharded_folder_reads_the_same(subject_folder, params, tmp_path, tokenizer):
    tensors = load_file(subject_folder / "model.safetensors")
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shutil.copy(subject_folder / "config.json", tmp_path)
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::2]}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    close(load_params(tmp_path, read_config(tmp_path)), params, 0)
    (tmp_path / files[1]).unlink()
    with pytest.raises(InputError, match=files[1]) as error:
        load_params(tmp_path, read_config(tmp_path))
    one_sentence(error)


def test_first_blocks_are_read_without_head(subject_folder, params):
    config = read_config(subject_folder).truncated(2)
    close(load_params(subject_folder, config, truncated=True), truncate(params, 2), 0)


def test_bfloat16_round_trip(params, tmp_path, tokenizer):
    save_model(tmp_path / "m", params, TINY, tokenizer, dtype="bfloat16")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}
    rounded = jax.tree.map(lambda x: torch.tensor(x).to(torch.bfloat16).float().numpy(), params)
    close(load_params(tmp_path / "m", read_config(tmp_path / "m")), rounded, 0)


# Damage: each function changes a sound folder; the message must match the pattern


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "invalid JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "JSON list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is not valid JSON"),
    "family": (edit_config(model_type="mamba"), "model_type 'mamba' is not supported"),
    "rope scaling": (edit_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope scaling .*yarn"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act"),
    "field": (edit_config(hidden_size=None), "lacks the field 'hidden_size'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), f"{NORM}' is missing"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=t[NORM])), "'extra' is unexpected"),
    "shape": (edit_tensors(lambda t: t.update({NORM: t[NORM][:-1]})), rf"{NORM}' has shape \(31,\), expected \(32,\)"),
    "NaN": (edit_tensors(lambda t: t[NORM].fill(np.nan)), f"{NORM}' holds NaN"),
    "truncated file": (cut_file, r"model\.safetensors is missing or is not a readable safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder(case, subject_folder, tmp_path):
    damage, message = DAMAGE[case]
    folder = tmp_path / "model"
    shutil.copytree(subject_folder, folder)
    load_params(folder, read_config(folder))
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_params(folder, read_config(folder))
    one_sentence(error)
    assert str(folder) in str(error.value)


def test_missing_tokenizer(subject_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(subject_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(InputError, match="tokenizer cannot be loaded") as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "nothing"])
def test_no_such_folder(name):
    with pytest.raises(InputError, match=f"no model folder {name}") as error:
        locate(name)
    one_sentence(error)


def test_interrupted_save_keeps_what_was_there(params, tmp_path, tokenizer):
    def interrupt(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "m", params, TINY, tokenizer, extra_files={"last.txt": interrupt})
    assert not (tmp_path / "m").exists()
    save_model(tmp_path / "m", params, TINY, tokenizer)
    before = fingerprint(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "m", jax.tree.map(np.zeros_like, params), TINY, tokenizer, extra_files={"x": interrupt})
    assert fingerprint(tmp_path / "m") == before
    save_model(tmp_path / "m", jax.tree.map(np.zeros_like, params), TINY, tokenizer)
    assert fingerprint(tmp_path / "m") != before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_saved_tokenizer_suits_transformers_4_and_5(subject_folder, tokenizer):
    settings = json.loads((subject_folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Version 4 calls .keys() on this field, which version 5 writes as a list.
    assert isinstance(settings.get("extra_special_tokens", {}), dict)
    again = load_tokenizer(subject_folder)
    text = "The ㈎ river <text>turns</text> <|user|>\n  north é漢."
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.all_special_ids == tokenizer.all_special_ids
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
