"""Hugging Face folders: parity with torch both ways, wrapped and sharded checkpoints, what a damaged folder says."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest
import transformers
from conftest import TINY, close, one_sentence
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nla_jax.io.files import new_folder
from nla_jax.io.folders import load_params, load_tokenizer, read_config, save_model
from nla_jax.io.hub import fingerprint, locate
from nla_jax.io.safetensors import INDEX, SINGLE
from nla_jax.models.sharding import DECODE, TRAIN, make_mesh, shardings
from nla_jax.models.transformer import abstract_params, truncate
from nla_jax.runtime.errors import InputError

# Parity with torch


@pytest.mark.parametrize("family", parity.FAMILIES)
def test_recorded_states_of_torch(family):
    """Residuals and logits that `python tests/parity.py golden` recorded."""
    with np.load(parity.GOLDEN / family / "expected.npz") as recorded:
        ids = recorded["ids"]
        expected = [recorded[f"arr_{i}"] for i in range(len(recorded.files) - 1)]
    assert parity.error(parity.our_states(parity.GOLDEN / family, ids), expected) < 1e-4
    assert ids.shape[1] > (read_config(parity.GOLDEN / family).window or 0)


SHAPES = [  # key/value heads, tied head
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"num_key_value_heads": 4},
]
CASES = [
    *((name, {}) for name in parity.MODELS),
    *((name, shape) for name in parity.FAMILIES for shape in SHAPES),
    ("llama", {"head_dim": None}),
    ("qwen2, yarn rope", {"rope_scaling": parity.YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "factor": 2.0}}),
    (
        "gemma3",
        {"rope_parameters": None, "rope_theta": 50.0, "rope_local_base_freq": 50.0, "rope_scaling": None},
    ),  # equal ropes
    ("gemma2", {"layer_types": ["full_attention"] * 3}),
    ("gemma3", {"layer_types": ["full_attention"] * 7}),
]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda x: str(x))
def test_parity_with_torch_both_ways(name, changes, tmp_path, tokenizer):
    theirs = parity.torch_model(name, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = parity.torch_states(theirs)
    assert parity.error(parity.our_states(tmp_path / "theirs"), expected) < 1e-4

    config = read_config(tmp_path / "theirs")
    save_model(tmp_path / "ours", load_params(tmp_path / "theirs", config), config, tokenizer)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(again) is type(theirs)  # AutoModel makes another class of a mistral with layer_types
    assert parity.error(parity.torch_states(again.eval()), expected) < 1e-5
    names = [set(load_file(tmp_path / folder / SINGLE)) for folder in ("theirs", "ours")]
    assert names[0] == names[1]
    assert read_config(tmp_path / "ours") == config
    assert semantics(again.config) == semantics(theirs.config)


def semantics(config: transformers.PreTrainedConfig) -> dict:
    """What a model computes with, of a config as `transformers` reads it."""
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "layer_types",
        "rope_parameters",
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "tie_word_embeddings",
        "max_position_embeddings",
    )
    found = {field: config.to_dict().get(field) for field in fields}
    found["head_dim"] = found["head_dim"] or found["hidden_size"] // found["num_attention_heads"]
    ropes = found["rope_parameters"]
    for rope in ropes.values() if "full_attention" in ropes else [ropes]:
        for field in ("beta_slow", "beta_fast", "attention_factor"):  # we write the defaults of yarn, too
            rope.pop(field, None)
    if not found["layer_types"] or "sliding_attention" not in found["layer_types"]:
        found |= {"layer_types": None, "sliding_window": None}
    return found


def test_a_stretched_rope_of_local_layers_is_refused(tmp_path):
    """No released model has one, and version 4 of `transformers` has no field for it."""
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
    }
    config = parity.torch_config("gemma3", rope_parameters=ropes, rope_scaling=None, rope_local_base_freq=None)
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="local layers") as error:
        read_config(tmp_path)
    one_sentence(error)


# Multimodal checkpoints


def wrap(plain, folder, prefix: str, head: str) -> None:
    """`plain`, a Gemma 3 folder, as the text model of a multimodal one with sparse fields."""
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    defaults = transformers.Gemma3TextConfig().to_dict()
    text = {key: value for key, value in config.items() if key not in defaults or defaults[key] != value}
    text |= {name: config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8, "model_type": "siglip"}}
    (folder / "config.json").write_text(json.dumps(outer | {"architectures": ["Gemma3ForConditionalGeneration"]}))
    tensors = {
        (head if name == "lm_head.weight" else prefix + name.removeprefix("model.")): value
        for name, value in load_file(plain / SINGLE).items()
    }
    towers = [prefix.removesuffix("language_model.model.").removesuffix("language_model.") + "vision_tower.x.weight"]
    towers += [towers[0].replace("vision_tower", "multi_modal_projector")]
    save_file(tensors | {name: np.zeros((2, 2), np.int64) for name in towers}, folder / SINGLE)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [("language_model.model.", "language_model.lm_head.weight"), ("model.language_model.", "lm_head.weight")],
)
def test_text_model_of_a_multimodal_checkpoint(prefix, head, tmp_path):
    plain = parity.GOLDEN / "gemma3"
    wrap(plain, tmp_path / "wrapped", prefix, head)
    config = read_config(tmp_path / "wrapped")
    assert config == read_config(plain)
    close(load_params(tmp_path / "wrapped", config), load_params(plain, config), 0)

    tensors = load_file(tmp_path / "wrapped" / SINGLE)
    norm = prefix + "norm.weight"
    save_file(tensors | {"model.norm.weight": tensors[norm]}, tmp_path / "wrapped" / SINGLE)
    with pytest.raises(InputError, match="'model.norm.weight' is duplicate") as error:
        load_params(tmp_path / "wrapped", config)
    one_sentence(error)
    assert norm in str(error.value)


@pytest.mark.torch
def test_multimodal_checkpoint_written_by_transformers(tmp_path):
    text = parity.torch_config("gemma3", tie_word_embeddings=True)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    whole.save_pretrained(tmp_path)
    alone = transformers.Gemma3ForCausalLM(text).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    assert parity.error(parity.our_states(tmp_path), parity.torch_states(alone)) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_outer_config_says_whether_the_head_is_tied(tied, tmp_path):
    """As in `transformers`, where the text model's config does not say."""
    text = json.loads((parity.GOLDEN / "mistral" / "config.json").read_text())
    del text["tie_word_embeddings"]
    config = {"model_type": "mistral3", "tie_word_embeddings": tied, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).tied_head is tied


# Files and devices


def split(folder, count: int = 2) -> list[str]:
    """Spreads the tensors of a folder over several files with an index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in sorted(tensors)[i::count]}, folder / file)
    where = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


@pytest.fixture
def copy(subject_folder, tmp_path):
    return shutil.copytree(subject_folder, tmp_path / "model")


def test_several_files_read_the_same(copy, params):
    split(copy, 3)
    close(load_params(copy, read_config(copy)), params, 0)


def test_several_files_are_written(params, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("nla_jax.io.safetensors.SHARD_BYTES", 50_000)
    save_model(tmp_path / "m", params, TINY, tokenizer)
    files = sorted(tmp_path.glob("m/*.safetensors"))
    listed = json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
    assert len(files) > 2 and not (tmp_path / "m" / SINGLE).exists()
    assert listed == {name: file.name for file in files for name in load_file(file)}
    close(load_params(tmp_path / "m", read_config(tmp_path / "m")), params, 0)


def test_first_blocks_are_read_without_head(subject_folder, params):
    config = read_config(subject_folder).truncated(2)
    close(load_params(subject_folder, config, truncated=True), truncate(params, 2), 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rules", [TRAIN, DECODE], ids=["train", "decode"])
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 1, 2)], ids=str)
def test_loading_onto_a_mesh(mesh, rules, dtype):
    folder = parity.GOLDEN / "qwen2"  # with biases
    config = read_config(folder)
    layout = shardings(make_mesh(*mesh), abstract_params(config), rules)
    params = load_params(folder, config, dtype=dtype, layout=layout)
    close(params, jax.tree.map(lambda x: x.astype(dtype), load_params(folder, config)), 0)
    for array, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True):
        assert array.dtype == dtype and array.sharding.is_equivalent_to(sharding, array.ndim)


CASTS = [  # a dtype that is stored, and one that is asked for
    (np.float32, jnp.float32),
    (np.float32, jnp.bfloat16),
    (np.float16, jnp.float32),
    (ml_dtypes.bfloat16, jnp.bfloat16),
    (ml_dtypes.bfloat16, jnp.float16),
]


@pytest.mark.parametrize(("stored", "dtype"), CASTS, ids=lambda x: np.dtype(x).name)
def test_reading_to_memory_is_reading_to_any_device(stored, dtype, tmp_path, monkeypatch, tokenizer):
    folder = parity.GOLDEN / "qwen2"  # with biases
    config = read_config(folder)
    save_model(tmp_path / "m", load_params(folder, config), config, tokenizer, dtype=stored)
    load = lambda: load_params(tmp_path / "m", config, dtype=dtype, scales=np.float32)
    here = load()
    monkeypatch.setattr("jax.default_backend", lambda: "an accelerator")
    there = load()
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all())
    assert all(jax.tree.leaves(jax.tree.map(same, here, there)))


@pytest.mark.parametrize("backend", ["cpu", "an accelerator"])
@pytest.mark.parametrize(
    "stored", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda x: np.dtype(x).name
)
def test_a_number_that_is_not_finite_is_found(stored, backend, copy, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    sound = {name: tensor.astype(stored) for name, tensor in load_file(copy / SINGLE).items()}
    dtype = np.float32 if stored is np.float64 else stored
    most = ml_dtypes.finfo(dtype).max
    for number in (most, -most, 0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan):
        changed = {name: tensor.copy() for name, tensor in sound.items()}
        changed[NORM][-1] = number
        save_file(changed, copy / SINGLE)
        with (
            contextlib.nullcontext() if np.isfinite(number) else pytest.raises(InputError, match=f"'{NORM}' holds NaN")
        ):
            load_params(copy, read_config(copy), dtype=dtype)


def test_bfloat16_round_trip(params, tmp_path, tokenizer):
    save_model(tmp_path / "m", params, TINY, tokenizer, dtype="bfloat16")
    with safe_open(tmp_path / "m" / SINGLE, framework="np") as tensors:
        names = tensors.keys()
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    close(load_params(tmp_path / "m", read_config(tmp_path / "m")), rounded, 0)


# Damage: each function changes a sound folder; the message must match the pattern


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return damage


def set_dtype(stored: str):
    """A tensor whose header says another dtype of the same size."""

    def damage(folder):
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[NORM]["dtype"] = stored
        if stored.startswith("F8"):
            header[NORM]["shape"][0] *= 4
        text = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def edit_index(change):
    def damage(folder):
        files = split(folder)
        index = json.loads((folder / INDEX).read_text())
        change(folder, index["weight_map"], files)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def unlink(name: str):
    return lambda folder: (folder / name).unlink()


def cut_file(folder):
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:-1000])


def twice(folder, where, files):
    save_file(load_file(folder / files[0]) | load_file(folder / files[1]), folder / files[1])


def elsewhere(folder):
    shutil.copy(folder / SINGLE, folder.parent / "x.safetensors")


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "no config": (unlink("config.json"), "no config.json"),
    "invalid JSON": (write("config.json", "{"), r"config\.json is not valid JSON"),
    "JSON list": (write("config.json", "[]"), r"config\.json is not valid JSON"),
    "text config": (edit_config(text_config="x"), r"config\.json is not valid JSON"),
    "family": (
        edit_config(model_type="mamba"),
        r"model_type 'mamba' is not supported \(supported: llama, .*\); .* nla_jax/models/families\.py",
    ),
    "model_type is a list": (edit_config(model_type=["llama"]), "model_type .* is not supported"),
    "no model_type": (edit_config(model_type=None), "model_type 'None' is not supported"),
    "rope type": (edit_config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "rope scaling .*dynamic"),
    "rope without factor": (
        edit_config(rope_scaling={"rope_type": "llama3"}),
        r"config\.json cannot be used: .*factor",
    ),
    "activation": (edit_config(hidden_act="gelu"), "activation function 'gelu' is not supported"),
    "bias": (edit_config(attention_bias=True), "attention_bias = True is not supported"),
    "MLP bias": (edit_config(mlp_bias=True), "mlp_bias = True is not supported"),
    "width": (edit_config(hidden_size="x"), r"config\.json cannot be used: .*hidden_size"),
    "no heads": (edit_config(num_attention_heads=0), r"config\.json cannot be used: "),
    "kv heads": (edit_config(num_key_value_heads=3), r"config\.json cannot be used: "),
    "field": (edit_config(hidden_size=None), "lacks the field 'hidden_size'"),
    "left to defaults": (
        edit_config(num_attention_heads=None, head_dim=None),
        "num_attention_heads = 32 must be a mul",
    ),
    "no weights": (unlink(SINGLE), r"neither model\.safetensors nor"),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), f"{NORM}' is missing"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=t[NORM])), "'extra' is unexpected"),
    "one layer more": (
        edit_tensors(lambda t: t.update({NORM.replace("1", "3"): t[NORM]})),
        r"'model\.layers\.3\.input_layernorm\.weight' is unexpected in a llama of 3 blocks",
    ),
    "shape": (edit_tensors(lambda t: t.update({NORM: t[NORM][:-1]})), rf"{NORM}' has shape \(31,\), expected \(32,\)"),
    "integers": (set_dtype("I32"), rf"{SINGLE}: tensor '{NORM}' is stored as I32, expected one of .*F32"),
    "F8": (set_dtype("F8_E4M3"), rf"{SINGLE}: tensor '{NORM}' is stored as F8_E4M3, .*quantised"),
    "NaN": (edit_tensors(lambda t: t[NORM].fill(np.nan)), f"{NORM}' holds NaN"),
    "infinity": (
        edit_tensors(lambda t: t["lm_head.weight"].__setitem__((7, 7), -np.inf)),
        "'lm_head.weight' holds NaN",
    ),
    "truncated file": (cut_file, r"model\.safetensors is missing or is not a readable safetensors file"),
    "empty file": (write(SINGLE, ""), r"model\.safetensors is missing or is not a readable safetensors file"),
    "corrupt header": (write(SINGLE, "x" * 4000), r"model\.safetensors is missing or is not a readable"),
    "missing index": (
        lambda f: (split(f), (f / INDEX).unlink()),
        "model-00001-of-00002.safetensors, whose index is missing",
    ),
    "invalid index": (write(INDEX, "{"), "is not a valid checkpoint index"),
    "index without map": (write(INDEX, "{}"), "is not a valid checkpoint index"),
    "index of numbers": (write(INDEX, '{"weight_map": {"a": 1}}'), "names 1, which is not a safetensors file of"),
    "index leads out": (
        lambda f: (elsewhere(f), edit_index(lambda _, where, __: where.update({NORM: "../x.safetensors"}))(f)),
        r"names '\.\./x\.safetensors', which is not a safetensors file of the same folder",
    ),
    "index to a path": (
        edit_index(lambda folder, where, files: where.update({NORM: str(folder / files[0])})),
        "names '/.*', which is not a safetensors file of the same folder",
    ),
    "missing shard": (
        edit_index(lambda folder, _, files: (folder / files[1]).unlink()),
        "model-00002-of-00002.safetensors is missing",
    ),
    "corrupt shard": (
        edit_index(lambda folder, _, files: (folder / files[1]).write_text("{}")),
        "model-00002-of-00002.safetensors is",
    ),
    "in two shards": (edit_index(twice), "is duplicate: in model-00001-of-00002.safetensors and model-00002-of"),
    "index lacks a tensor": (edit_index(lambda _, where, __: where.pop(NORM)), f"does not say that tensor '{NORM}'"),
    "index has a tensor more": (
        edit_index(lambda _, where, files: where.update(extra=files[0])),
        "says that tensor 'extra' is in model-00001",
    ),
    "index names the other shard": (
        edit_index(lambda _, where, files: where.update({NORM: next(f for f in files if f != where[NORM])})),
        f"does not say that tensor '{NORM}'",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder(case, copy):
    damage, message = DAMAGE[case]
    damage(copy)
    with pytest.raises(InputError, match=message) as error:
        load_params(copy, read_config(copy))
    one_sentence(error)
    assert str(copy) in str(error.value)


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


def test_replacing_a_folder_never_deletes_before_it_renames(tmp_path, monkeypatch):
    """A process that ends at the rename leaves the old folder whole, under its name or aside."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").touch()

    def ends(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "m") as scratch:
        (scratch / "new").touch()
        monkeypatch.setattr("pathlib.Path.rename", ends)
    monkeypatch.undo()
    assert (tmp_path / "m" / "old").exists() and (scratch / "new").exists()
    with new_folder(tmp_path / "m") as scratch:
        (scratch / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "new"]


def test_a_killed_save_keeps_what_was_there(tmp_path):
    """SIGKILL in the middle of a save."""
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        import jax
        import numpy as np
        from nla_jax.io.files import new_folder
        from nla_jax.io.safetensors import save_tensors
        with new_folder(Path(sys.argv[1])) as scratch:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            form = jax.ShapeDtypeStruct((2,), np.float32)
            save_tensors(scratch, [("a", form, lambda: np.zeros(2, np.float32)), ("b", form, kill)])
    """
    for old in (False, True):
        if old:
            shutil.copytree(parity.GOLDEN / "llama", tmp_path / "m")
        ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], cwd=parity.GOLDEN.parents[1])
        assert ended.returncode == -signal.SIGKILL
        assert (tmp_path / "m").exists() is old
    assert fingerprint(tmp_path / "m") == fingerprint(parity.GOLDEN / "llama")


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
