"""Prompts, explanation tags, the reconstructor's template, and the sidecar that pins them to a tokenizer."""

import dataclasses

import numpy as np
import pytest
import yaml
from conftest import (
    RECONSTRUCTOR_TEMPLATE,
    SENTENCES,
    VERBALIZER_TEMPLATE,
    one_sentence,
)

from nla_jax.prompts import Prompts, chat_text, end_of_turn, find_marker, plain_ids
from nla_jax.quickstart.tokenizer import train_tokenizer
from nla_jax.runtime.errors import InputError
from nla_jax.sidecar import FILE, Sidecar


@pytest.fixture(scope="module")
def prompts(tokenizer, sidecar) -> Prompts:
    return sidecar.prompts(tokenizer)


@pytest.fixture
def without_template():
    """A tokenizer that has no chat template."""
    tokenizer = train_tokenizer(SENTENCES, 300)
    tokenizer.chat_template = None
    return tokenizer


def test_the_prompt_is_cut_at_the_marker(prompts, tokenizer):
    prefix, suffix, slots = prompts.verbalizer_prompt()
    assert slots == (0,)
    assert tokenizer.decode(prefix) == "<|bos|><|user|>Explain this: "
    assert tokenizer.decode(suffix) == "㈎<|assistant|>"
    assert suffix[0] == prompts.marker.id == tokenizer.convert_tokens_to_ids("㈎")
    assert (prompts.marker.left, prompts.marker.right) == (prefix[-1], suffix[1])


def test_a_tokenizer_without_chat_template(without_template):
    marker = find_marker(without_template, VERBALIZER_TEMPLATE)
    prefix, suffix, _ = Prompts(without_template, marker, VERBALIZER_TEMPLATE).verbalizer_prompt()
    assert without_template.decode(prefix + suffix) == "<|bos|>Explain this: ㈎\n"
    assert end_of_turn(without_template) == without_template.eos_token_id
    assert chat_text(without_template, "a", "b") == "<|bos|>a\nb<|end|>"


def test_the_turn_ends_where_the_chat_template_says(tokenizer, without_template):
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    without_template.chat_template = "{% for m in messages %}{{ m['content'] }}<|user|>{% endfor %}"
    assert end_of_turn(without_template) == without_template.convert_tokens_to_ids("<|user|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if messages %}{{ messages[0]", "cannot render a chat"),
        ("{{ messages[0].content.nothing() }}", "cannot render a chat"),
        ("{{ raise_exception('no users') }}", r"cannot render a chat \(no users\)"),
        ("{% for m in messages %}<|user|>{% endfor %}", "leaves out what the model says"),
    ],
)
def test_a_broken_chat_template_is_one_sentence(without_template, template, message):
    without_template.chat_template = template
    with pytest.raises(InputError, match=message) as error:
        end_of_turn(without_template)
    one_sentence(error)


def test_a_marker_must_be_one_token_that_stands_once(tokenizer):
    for template, char, problem in [
        (VERBALIZER_TEMPLATE, "㋿", "not one token"),
        ("㈎ is {injection_char}", "㈎", "too often"),
    ]:
        with pytest.raises(InputError, match=problem) as error:
            find_marker(tokenizer, template, char)
        one_sentence(error)
    marker = find_marker(tokenizer, VERBALIZER_TEMPLATE)
    for wrong, problem in [
        (dataclasses.replace(marker, left=5), f"stands between {marker.left} and {marker.right}"),
        (dataclasses.replace(marker, id=1_000_000), "stands 0 times"),
    ]:
        with pytest.raises(InputError, match=problem) as error:
            Prompts(tokenizer, wrong, VERBALIZER_TEMPLATE).verbalizer_prompt()
        one_sentence(error)
    with pytest.raises(InputError, match="stands 2 times"):
        Prompts(tokenizer, marker, "㈎ is {injection_char}").verbalizer_prompt()


def test_a_prompt_of_several_slots(tokenizer):
    template = "First {injection_char}, then {injection_char}."
    marker = find_marker(tokenizer, template)
    prefix, suffix, slots = Prompts(tokenizer, marker, template).verbalizer_prompt()
    assert len(slots) == 2 and slots[0] == 0 and {suffix[i] for i in slots} == {marker.id}
    assert tokenizer.decode(prefix + suffix) == "<|bos|><|user|>First ㈎, then ㈎.<|assistant|>"


# Responses


def as_batch(rows, width=80):
    tokens = np.zeros((len(rows), width), np.int32)
    for target, row in zip(tokens, rows):
        target[: len(row)] = row
    return tokens, np.arange(width) < np.array([len(row) for row in rows])[:, None]


def test_responses_round_trip(prompts):
    texts = ["The river turns north.", "Two lines,\n\nand a {brace} é漢 <b>.", "a < b"]
    rows = prompts.response_ids(texts)
    assert all(row[-1] == end_of_turn(prompts.tokenizer) for row in rows)
    tokens, mask = as_batch(rows)
    assert prompts.explanations(prompts.responses(tokens, mask), np.ones(3, bool)) == texts
    assert prompts.explanations(prompts.responses(tokens, mask), np.array([True, False, True])) == [
        texts[0],
        None,
        texts[2],
    ]
    assert (
        prompts.explanations(prompts.responses(np.where(mask, tokens, 40), mask), np.ones(3, bool)) == texts
    )  # padding is not read


@pytest.mark.parametrize(
    "response",
    [
        "no tags",
        "<explanation>\nnever closed",
        "never opened</explanation>",
        "so <explanation>x</explanation>",
        "<explanation>x</explanation> and more",
        "",
        "<explanation>",
    ],
)
def test_a_response_without_its_tags_is_no_explanation(prompts, response):
    tokens, mask = as_batch([plain_ids(prompts.tokenizer, [response])[0] + [end_of_turn(prompts.tokenizer)]])
    assert prompts.explanations(prompts.responses(tokens, mask), np.array([True])) == [None]


# The reconstructor's template


def test_reconstructor_ids_are_the_filled_template_with_bos(prompts, tokenizer):
    (row,) = prompts.reconstructor_ids(["The river turns."])
    assert tokenizer.decode(row) == "<|bos|><text>The river turns.</text><summary>"


@pytest.mark.parametrize("text", ["The river turns north at the old mill.", "é漢😀" * 6, "\ufffd" * 12, "x" * 40])
def test_truncation_keeps_the_template_whole(prompts, tokenizer, text):
    """Whatever the last character's bytes: the explanation loses its end, and the template nothing."""
    whole = len(prompts.reconstructor_ids([text])[0])
    for limit in range(4, whole + 2):
        tokens, lengths = prompts.reconstructor_batch([text, ""], limit)
        assert tokens.shape == (2, limit) and lengths[1] == 4
        kept = tokenizer.decode(tokens[0, : lengths[0]])
        assert kept.startswith("<|bos|><text>") and kept.endswith("</text><summary>")
        body = kept.removeprefix("<|bos|><text>").removesuffix("</text><summary>")
        assert text.startswith(body.rstrip("\ufffd"))
        assert body == text if limit >= whole else len(body) < len(text)
    with pytest.raises(InputError, match="limit of 3") as error:
        prompts.reconstructor_batch([text], 3)
    one_sentence(error)


# The sidecar


@pytest.mark.parametrize("role", ["av", "ar"])
def test_sidecar_round_trip(sidecar, tmp_path, role):
    sidecar.write(tmp_path / FILE, role)
    assert Sidecar.read(tmp_path, role) == sidecar
    content = yaml.safe_load((tmp_path / FILE).read_text(encoding="utf-8"))
    assert content["kind"] == "nla_model" and content["role"] == role
    assert content["extraction"]["layer_index"] == sidecar.layer and content["tokens"]["injection_char"] == "㈎"


def older_names(content: dict) -> dict:
    """The same sidecar in the first naming generation."""
    templates = content["prompt_templates"]
    new = content | {"role": {"av": "actor", "ar": "critic"}[content["role"]]}
    new["prompt_templates"] = {"actor": templates["av"], "critic": templates["ar"]}
    if "ar" in new:
        new["critic"] = new.pop("ar")
        new["extraction"] = {k: v for k, v in new["extraction"].items() if k != "layer_index"}
    return new


@pytest.mark.parametrize("role", ["av", "ar"])
def test_both_naming_generations_are_read(sidecar, tmp_path, role):
    sidecar.write(tmp_path / FILE, role)
    content = older_names(yaml.safe_load((tmp_path / FILE).read_text(encoding="utf-8")))
    (tmp_path / FILE).write_text(yaml.safe_dump(content), encoding="utf-8")
    assert Sidecar.read(tmp_path, role) == sidecar


def test_scale_by_name(sidecar, tmp_path):
    sidecar.write(tmp_path / FILE, "av")
    text = (tmp_path / FILE).read_text(encoding="utf-8")
    assert "injection_scale: 20.0" in text
    (tmp_path / FILE).write_text(text.replace("scale: 20.0", "scale: sqrt_d_model"), encoding="utf-8")
    assert Sidecar.read(tmp_path, "av").injection_scale == sidecar.d_model**0.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("role: av", "role: ar", "role is 'ar', expected 'av'"),
        ("d_model: 32", "d_model: wide", "d_model is 'wide'"),
        ("d_model: 32", "", "lacks the field d_model"),
        ("injection_token_id:", "other:", "lacks the field tokens.injection_token_id"),
        ("injection_scale: 20.0", "injection_scale: big", "scale is 'big', expected a positive number"),
        ("injection_scale: 20.0", "injection_scale: -1", "scale is -1, expected a positive number"),
        ("injection_scale: 20.0", "injection_scale: .nan", "scale is nan, expected a positive number"),
        ("layer_index: 1", "layer_index: true", "layer_index is True"),
        ("layer_index: 1", "layer_index: -1", "layer_index is -1, expected at least 0"),
        ("kind: nla_model", "kind: image", "kind is 'image'"),
        ("critic_suffix_ids:\n", "critic_suffix_ids:\n  - x\n", "critic_suffix_ids is .*, expected token ids"),
        ("provenance:", "provenance: &a [&b [1, 1], *b, *b]\nmore:", "provenance is .*, of the wrong type"),
        ("checkpoint: tiny", "checkpoint: !!python/object/apply:os.system ['touch {marker}']", "not plain YAML"),
        ("kind: nla_model", "kind: [", "not plain YAML"),
    ],
)
def test_a_wrong_sidecar_is_refused(sidecar, tmp_path, old, new, message):
    sidecar.write(tmp_path / FILE, "av")
    text = (tmp_path / FILE).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / FILE).write_text(text.replace(old, new.format(marker=tmp_path / "executed")), encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        Sidecar.read(tmp_path, "av")
    one_sentence(error)
    assert not (tmp_path / "executed").exists()


def test_a_missing_sidecar_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"has no {FILE}") as error:
        Sidecar.read(tmp_path, "av")
    one_sentence(error)


def test_the_live_tokenizer_must_fit(sidecar, tokenizer):
    other = train_tokenizer(["quite different words zebra"], 300)
    for changed, live, message in [
        (sidecar, other, r"stands 0 times"),
        (dataclasses.replace(sidecar, suffix_ids=(1, 2)), tokenizer, r"critic_suffix_ids is \[1, 2\], but .* gives \["),
        (dataclasses.replace(sidecar, reconstructor_template="<text>"), tokenizer, r"must contain \{explanation\}"),
        (dataclasses.replace(sidecar, verbalizer_template="?"), tokenizer, r"must contain \{injection_char\}"),
        (dataclasses.replace(sidecar, verbalizer_template=VERBALIZER_TEMPLATE + "!"), tokenizer, "stands between"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            changed.prompts(live)
        one_sentence(error)


def test_braces_in_a_template_are_text(sidecar, tokenizer):
    """A template may show an example in braces: only its own placeholder is filled."""
    braces = dataclasses.replace(sidecar, reconstructor_template="{json} " + RECONSTRUCTOR_TEMPLATE)
    (row,) = braces.prompts(tokenizer).reconstructor_ids(["a {b}"])
    assert tokenizer.decode(row) == "<|bos|>{json} <text>a {b}</text><summary>"
