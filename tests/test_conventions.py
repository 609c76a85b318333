"""Pairs of other makers, each with its own conventions, against torch implementations of those; and prompts that stay
as they were trained."""

import dataclasses
import datetime
import json
import re
import shutil

import numpy as np
import pytest
import transformers
import yaml
from conftest import CONFIG, TINY, close, one_sentence
from safetensors.numpy import load_file, save_file
from transformers.utils import chat_template_utils

from nla_jax.autoencoder import Injection, add_norm_matched
from nla_jax.cli import load_config
from nla_jax.io.adapters import save_adapter
from nla_jax.io.conventions import Conventions
from nla_jax.io.heads import HEAD
from nla_jax.models.lora import Lora
from nla_jax.pair import Pair, load_pair, new_pair
from nla_jax.prompts import Prompts, find_marker, read_response
from nla_jax.quickstart.tokenizer import CHAT_TEMPLATE
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.notes import note
from nla_jax.runtime.run import Run
from nla_jax.sidecar import FILE, Sidecar
from nla_jax.stages.sft import fixed_prompts
from nla_jax.stages.table import STAGES

GREEDY = {"max_new_tokens": 16, "temperature": 0.0}
TEXTS = ["The river turns north.", "", "x"]
DATED = CHAT_TEMPLATE.replace("<|bos|>", "<|bos|>Today Date: {{ strftime_now('%d %b %Y') }} ")
THINKS = CHAT_TEMPLATE.replace(
    "{% if add_generation_prompt %}<|assistant|>",
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<th></th>"
    "{% endif %}",
)


def retold(tokenizer, template: str):
    """The tokenizer with another chat template."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=template,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    return made


@pytest.fixture(autouse=True)
def unsaid():
    """Every test hears each note."""
    note.cache_clear()


def set_clock(monkeypatch, year: int) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 3, 4)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


# Prompts stay as they were trained


@pytest.fixture
def dated(pair, tokenizer, sidecar, subject_folder, tmp_path, monkeypatch) -> Pair:
    """A pair whose chat template writes the date, made in 2026."""
    set_clock(monkeypatch, 2026)
    folder = tmp_path / "subject"
    shutil.copytree(subject_folder, folder)
    retold(tokenizer, DATED).save_pretrained(folder)
    marker = find_marker(retold(tokenizer, DATED), sidecar.verbalizer_template)
    made = new_pair(dataclasses.replace(sidecar, marker=marker, base_checkpoint=str(folder)), folder)
    return dataclasses.replace(
        made, verbalizer_params=pair.verbalizer_params, reconstructor_params=pair.reconstructor_params
    )


def test_a_pair_says_the_same_next_year(dated, vectors, tmp_path, monkeypatch, capsys):
    dated.save(tmp_path / "pair")
    said, recon = dated.explain(vectors, **GREEDY), dated.reconstruct(TEXTS)
    assert load_pair(tmp_path / "pair").prompts.drift() == ""
    assert "note:" not in capsys.readouterr().err
    set_clock(monkeypatch, 2027)
    later = load_pair(tmp_path / "pair")
    (line,) = capsys.readouterr().err.splitlines()
    assert "'6 <|user|>" in line and "'7 <|user|>" in line and "ids that the pair was trained with are used" in line
    assert later.prompts.verbalizer_prompt()[0] != dated.prompts.ids().prefix == later.verbalizer.prefix
    assert later.sidecar == dated.sidecar and later.explain(vectors, **GREEDY) == said
    np.testing.assert_array_equal(later.reconstruct(TEXTS), recon)
    later.save(tmp_path / "again")  # and what is saved from it, too
    assert load_pair(tmp_path / "again").verbalizer.prefix == dated.verbalizer.prefix


def test_a_run_fixes_its_prompts_when_the_warm_start_begins(dated, tmp_path, monkeypatch):
    run = Run(load_config(CONFIG, []), tmp_path / "run", STAGES)
    live = lambda: dataclasses.replace(dated.prompts, recorded=None)
    sidecar = dataclasses.replace(dated.sidecar, ids=None)
    first = fixed_prompts(run, sidecar, live())
    set_clock(monkeypatch, 2027)
    assert live().ids() != first and fixed_prompts(run, sidecar, live()) == first
    other = dataclasses.replace(sidecar, reconstructor_template="<text>{explanation}</text>")
    changed = dataclasses.replace(live(), reconstructor_template=other.reconstructor_template)
    assert fixed_prompts(run, other, changed) == changed.ids()  # settings that were changed count


def test_the_ar_reads_the_recorded_ids(pair, tokenizer):
    """Another tokenizer revision adds no BOS, say, and cuts the template's end otherwise."""
    ids = pair.prompts.ids()
    recorded = dataclasses.replace(ids, text_prefix=(7, 8), text_suffix=(9,))
    (row,) = dataclasses.replace(pair.prompts, recorded=recorded).reconstructor_ids(["a mill"])
    (live,) = dataclasses.replace(pair.prompts, recorded=None).reconstructor_ids(["a mill"])
    middle = live[len(ids.text_prefix) : len(live) - len(ids.text_suffix)]
    assert row == [7, 8, *middle, 9] and ids.text_suffix


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("av_prefix", [1, "x"], r"prompt_ids.av_prefix is \[1, 'x'\], expected token ids"),
        ("av_slots", [99], "no places of prompt_ids.av_suffix"),
        ("ar_suffix", None, "lacks the field prompt_ids.ar_suffix"),
        ("av_prefix", [5, 6, 7], "the sidecar belongs to another tokenizer"),
    ],
)
def test_damaged_ids_are_refused(pair, tmp_path, field, value, message):
    pair.save(tmp_path)
    for role in ("av", "ar"):
        content = yaml.safe_load((tmp_path / role / FILE).read_text(encoding="utf-8"))
        content["prompt_ids"][field] = value
        if field == "av_prefix" and value == [5, 6, 7]:
            content["prompt_ids"]["av_suffix"] = [5, 6, 7]
        (tmp_path / role / FILE).write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        load_pair(tmp_path)
    one_sentence(error)


# Makers: a random pair in the form of each, and torch in its way


REFERENCE, EASY = "nla_model", "nla_dataset"


def foreign(pair: Pair, folder, kind: str, **extraction):
    """The pair in another maker's form, with the sidecars that it writes."""
    pair.save(folder)
    m, s = pair.sidecar.marker, pair.sidecar
    for role, older in (("av", "actor"), ("ar", "critic")):
        content = {
            "kind": kind,
            "schema_version": 1,
            "d_model": TINY.width,
            "layer": 99,  # legacy keys mean nothing
            "role_aliases": {"x": 1},
            "training": {"lr": 1e-5},
            "base_checkpoint": f"checkpoints/{role}_sft_step_100",  # each names the folder that it was trained from
            "extraction": {"d_model": TINY.width, "layer_index": s.layer, "norm": "none", **extraction},
            "tokens": {
                "injection_char": m.char,
                "injection_token_id": m.id,
                "injection_left_neighbor_id": m.left,
                "injection_right_neighbor_id": m.right,
            },
            "prompt_templates": {"actor": s.verbalizer_template, "critic": s.reconstructor_template},
        }
        if kind == REFERENCE:
            content["role"] = older
        (folder / role / FILE).write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return folder


def torch_reconstruct(folder, rows: list[list[int]]) -> np.ndarray:
    """K+1 blocks, no final norm, the head, the last token."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    head, states = torch.tensor(load_file(folder / HEAD)["weight"]), []
    model.model.layers[-1].register_forward_hook(
        lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return torch.nn.functional.linear(torch.stack(states), head).numpy()


def torch_ids(folder, prompt: list[int], at: int, vectors, scale: float | None) -> list[list[int]]:
    """Greedy ids from the prompt's embeddings with the vector at length `scale` in the slot. None: the vector is added
    after block 1 instead, at the length of what it is added to."""
    import torch

    model, rows = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for vector in torch.tensor(vectors):
        embeds = model.get_input_embeddings()(torch.tensor(prompt)).detach().clone()
        if scale is not None:
            embeds[at] = vector / vector.norm() * scale

        def added(module, inputs, out, vector=vector):
            states = (out[0] if isinstance(out, tuple) else out).clone()
            if scale is None and states.shape[1] > at:  # the prompt, not what is generated token by token
                states[0, at] += vector / vector.norm() * states[0, at].norm()
            return (states, *out[1:]) if isinstance(out, tuple) else states

        hook = model.model.layers[1].register_forward_hook(added)
        end = model.generation_config.eos_token_id
        ids = model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=GREEDY["max_new_tokens"],
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if isinstance(end, int) else end[0],
        )
        hook.remove()
        rows.append(ids[0].tolist())
    return rows


def torch_texts(pair: Pair, folder, vectors, scale: float | None) -> list[str]:
    """Greedy explanations from `torch_ids`, read by searching for tags."""
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(folder), []
    content = pair.sidecar.verbalizer_template.replace("{injection_char}", pair.sidecar.marker.char)
    asked = [{"role": "user", "content": content}]
    prompt = tokenizer(
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    ).input_ids
    for ids in torch_ids(folder, prompt, prompt.index(pair.sidecar.marker.id), vectors, scale):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found = re.search(r"<explanation>\s*(.*?)\s*</explanation>", text, re.DOTALL)
        texts.append(found[1] if found else text.removeprefix("<explanation>").strip())
    return texts


@pytest.mark.torch
@pytest.mark.parametrize("scale", [20.0, "20", "20.0"])
def test_the_references_pairs(pair, vectors, tmp_path, capsys, scale):
    """BOS before the AR's text, the template as it is, tags searched for; the scale may stand in quotes; AV and AR
    name different parents."""
    folder = foreign(pair, tmp_path, REFERENCE, injection_scale=scale)
    loaded = load_pair(folder)
    assert loaded.sidecar.injection_scale == 20.0 and loaded.sidecar.maker == "the reference"
    said = capsys.readouterr().err
    assert "special_tokens = True" in said and "reading = search" in said and "ar_sft" in said
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ar")
    rows = [tokenizer(f"<text>{text}</text><summary>").input_ids for text in TEXTS]
    assert rows[0][0] == tokenizer.bos_token_id
    close(loaded.reconstruct(TEXTS), torch_reconstruct(folder / "ar", rows), 1e-4)
    theirs = torch_texts(pair, folder / "av", vectors, 20.0)
    assert loaded.verbalize(vectors, **GREEDY) == theirs and any(theirs)


@pytest.mark.torch
def test_easynlas_pairs(pair, tmp_path, capsys):
    """No BOS before the AR's text; the vector is added after block 1, at the length of the state there."""
    folder = foreign(pair, tmp_path, EASY)
    how = Conventions(injections=Injection(add_norm_matched, 1))
    loaded = load_pair(folder, conventions=how)
    assert "special_tokens = False" in capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ar")
    rows = [tokenizer(f"<text>{text}</text><summary>", add_special_tokens=False).input_ids for text in TEXTS]
    expected = torch_reconstruct(folder / "ar", rows)
    close(loaded.reconstruct(TEXTS), expected, 1e-4)
    assert np.abs(pair.reconstruct(TEXTS) - expected).max() > 1e-2  # the BOS matters
    with_bos = load_pair(folder, conventions=dataclasses.replace(how, special_tokens=True))
    close(with_bos.reconstruct(TEXTS), pair.reconstruct(TEXTS), 0)
    many = np.random.default_rng(5).normal(size=(24, TINY.width)).astype(np.float32)
    theirs = torch_texts(pair, folder / "av", many, None)
    assert loaded.verbalize(many, **GREEDY) == theirs and len(set(theirs)) > 1, set(theirs)
    assert "special_tokens" not in capsys.readouterr().err.split("does not say")[-1]


@pytest.mark.parametrize("thinking", ["template", "off"])
def test_the_thinking_block_is_the_pairs(pair, tokenizer, tmp_path, thinking):
    """Qwen3's template writes an empty block of thought where it is told not to think; the reference tells nothing."""
    folder = foreign(pair, tmp_path, REFERENCE, injection_scale=20.0)
    retold(tokenizer, THINKS).save_pretrained(folder / "av")
    for role in ("av", "ar"):
        retold(tokenizer, THINKS).save_pretrained(folder / role)
    given = Conventions(thinking=None if thinking == "template" else thinking)
    loaded = load_pair(folder, conventions=given)
    spelt = loaded.prompts.tokenizer.decode(loaded.verbalizer.suffix)
    assert spelt == "㈎<|assistant|>" + ("<th></th>" if thinking == "off" else "")
    loaded.save(tmp_path / "ours")
    again = load_pair(tmp_path / "ours")
    assert (again.verbalizer.suffix, again.sidecar.thinking) == (loaded.verbalizer.suffix, thinking)


@pytest.mark.parametrize(
    ("response", "tags", "search", "whole"),
    [
        ("<explanation>\nA mill.\n</explanation>", "A mill.", "A mill.", "<explanation>\nA mill.\n</explanation>"),
        ("Sure: <explanation>A mill.</explanation> Done.", "A mill.", "A mill.", None),
        ("<explanation>\nA mi", "A mi", "A mi", None),
        ("- a mill\n- a river ", "", "- a mill\n- a river", "- a mill\n- a river"),
        ("", "", "", ""),
    ],
)
def test_how_a_response_is_read(response, tags, search, whole):
    assert (read_response(response, "tags"), read_response(response, "search")) == (tags, search)
    assert read_response(response, "whole") == (response.strip() if whole is None else whole)


def test_reading_can_be_said_and_is_kept(pair, vectors, tmp_path):
    folder = foreign(pair, tmp_path, REFERENCE, injection_scale=20.0)
    whole = load_pair(folder, conventions=Conventions(reading="whole"))
    assert all(text.startswith("<explanation>") for text in whole.verbalize(vectors, **GREEDY))
    whole.save(tmp_path / "ours")
    assert load_pair(tmp_path / "ours").sidecar.reading == "whole"
    for wrong in ({"reading": "some"}, {"thinking": "hard"}):
        with pytest.raises(InputError, match="must be one of") as error:
            Conventions(**wrong)
        one_sentence(error)


@pytest.mark.parametrize("stated", [{}, {"injection_scale": None}])
def test_a_missing_scale_is_refused_with_what_to_pass(pair, vectors, tmp_path, stated):
    folder = foreign(pair, tmp_path, REFERENCE, **stated)
    with pytest.raises(InputError, match=r"names no injection_scale; pass .*--injection-scale") as error:
        load_pair(folder)
    one_sentence(error)
    given = load_pair(folder, conventions=Conventions(injection_scale=20.0, reading="tags"))
    assert given.verbalize(vectors, **GREEDY) == pair.verbalize(vectors, **GREEDY)
    assert load_pair(folder, conventions=Conventions(injection_scale="raw")).sidecar.injection_scale is None
    with pytest.raises(InputError, match="injection_scale is -1.0, expected a positive number"):
        load_pair(folder, conventions=Conventions(injection_scale=-1.0))


# Layouts


@pytest.fixture
def adapters(sidecar, subject_folder) -> Pair:
    lora = Lora(2, 4.0)
    made = new_pair(
        dataclasses.replace(sidecar, base_checkpoint=str(subject_folder)), subject_folder, adapters=(lora, lora)
    )
    head = np.random.default_rng(1).normal(size=(TINY.width, TINY.width)).astype(np.float32)
    return dataclasses.replace(made, reconstructor_params=made.reconstructor_params | {"head": head})


def test_one_sidecar_for_several_folders(adapters, tmp_path):
    """EasyNLA since 2026: adapters without tokenizers, one sidecar and the head beside them."""
    root = foreign(adapters, tmp_path / "root", EASY)
    for role in ("av", "ar"):
        for file in (root / role).glob("*tokeniz*"):
            file.unlink()
        (root / role).rename(root / f"{role}_lora")
    (root / "av_lora" / FILE).rename(root / FILE)
    (root / "ar_lora" / FILE).unlink()
    (root / "ar_lora" / HEAD).rename(root / f"ar_lora_{HEAD}")
    how = Conventions(special_tokens=True, injections=Injection())
    how = dataclasses.replace(how, injection_scale=20.0)
    loaded = load_pair(root, conventions=how)
    close(loaded.reconstruct(TEXTS), adapters.reconstruct(TEXTS), 1e-6)
    apart = load_pair(root / "av_lora", root / "ar_lora", conventions=how)
    close(apart.reconstruct(TEXTS), adapters.reconstruct(TEXTS), 1e-6)


@pytest.mark.parametrize("name", ["value_head.weight", "model.value_head.weight"])
def test_a_head_among_the_models_tensors(pair, tmp_path, name):
    pair.save(tmp_path)
    head = load_file(tmp_path / "ar" / HEAD)["weight"]
    (tmp_path / "ar" / HEAD).unlink()
    file = tmp_path / "ar/model.safetensors"
    save_file(load_file(file) | {name: head}, file)
    close(load_pair(tmp_path).reconstruct(TEXTS), pair.reconstruct(TEXTS), 0)


def test_a_critic_without_a_tokenizer(pair, tmp_path):
    pair.save(tmp_path)
    for file in (tmp_path / "ar").glob("*tokeniz*"):
        file.unlink()
    close(load_pair(tmp_path).reconstruct(TEXTS), pair.reconstruct(TEXTS), 0)


def test_an_ar_with_another_tokenizer_is_refused(pair, tmp_path):
    pair.save(tmp_path)
    file = tmp_path / "ar/tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:5]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match="cuts text otherwise than the AV's") as error:
        load_pair(tmp_path)
    one_sentence(error)


def integer_keyed(folder):
    save_file(
        {"0.weight": np.eye(32, dtype=np.float32), "1.weight": np.eye(32, dtype=np.float32)}, folder / "ar" / HEAD
    )


def other_sidecar(folder):
    (folder / "ar" / FILE).rename(folder / "ar" / "ar_meta.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (integer_keyed, r"no tensor 'weight' \('0.weight' of shape \(32, 32\), '1.weight'"),
        (other_sidecar, r"has no nla_meta.yaml.*it holds ar_meta.json"),
    ],
)
def test_layouts_that_cannot_be_read_are_named(pair, tmp_path, change, message):
    pair.save(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_pair(tmp_path)
    one_sentence(error)


def test_a_folder_with_a_run_or_without_a_pair(pair, tmp_path):
    pair.save(tmp_path / "run/pair")
    assert load_pair(tmp_path / "run").sidecar == pair.sidecar
    for folder, message in (
        (tmp_path / "run/pair/av", "half of one; name .*pair"),
        (tmp_path, "but run; name AV and AR"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_pair(folder)
        one_sentence(error)


def test_special_tokens_stay_with_a_saved_adapter(adapters, tmp_path):
    """What is imported from others is ours from then on, and says everything."""
    folder = foreign(adapters, tmp_path / "theirs", EASY)
    how = Conventions(injections=Injection(add_norm_matched, 1))
    loaded = load_pair(folder, conventions=how)
    loaded.save(tmp_path / "ours")
    again = load_pair(tmp_path / "ours")
    assert again.sidecar.guessed == () and again.sidecar.special_tokens is False
    close(again.reconstruct(TEXTS), loaded.reconstruct(TEXTS), 0)
    assert isinstance(again.prompts, Prompts) and isinstance(again.sidecar, Sidecar) and callable(save_adapter)
