"""Steering by an edited explanation: against torch, and the verb as a user runs it."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import SENTENCES, one_line, one_sentence

import nla_jax as nla
from nla_jax.cli import main
from nla_jax.data.chats import chat_tokens
from nla_jax.io.hub import fingerprint
from nla_jax.sidecar import FILE
from nla_jax.steering import (
    EDIT,
    NOTHING,
    PARAPHRASE,
    RANDOM,
    UNRELATED,
    UNSTEERED,
    first_tokens,
    moved,
    normalised,
    read,
    steer_along,
)
from nla_jax.subject import extract, load_subject

TEXT, SAID = SENTENCES[0][:48], "The river and the mill."
EDITING = ("river", "market")


@pytest.fixture(scope="module")
def subject(subject_folder):
    return load_subject(subject_folder, 1)


@pytest.fixture(scope="module")
def steered(subject, pair):
    return nla.steer(subject, pair, TEXT, EDITING, token=4, explanation=SAID, strengths=(0.5, 1.0, 2.0), new_tokens=6)


def test_no_edit_changes_nothing_and_every_direction_steps_as_far(steered):
    unsteered, *rows = steered.rows
    assert (unsteered.direction, unsteered.strength, unsteered.kl) == (UNSTEERED, 0, 0)
    assert [(row.direction, row.strength) for row in rows] == [
        (name, strength) for name in (EDIT, NOTHING, PARAPHRASE, UNRELATED, RANDOM) for strength in (0.5, 1, 2)
    ]
    for row in rows:
        if row.direction == NOTHING:
            assert row.kl == 0 and row.continuation == unsteered.continuation
            np.testing.assert_array_equal(row.logprobs, unsteered.logprobs)
        else:
            assert row.kl > 0
    assert (steered.explanation, steered.edited) == (SAID, SAID.replace(*EDITING)) and steered.position == 4


def test_the_step_is_along_the_difference_that_the_ar_makes(steered, subject, pair):
    assert steered.paraphrase == normalised(SAID) == "the river and the mill"
    recon = pair.reconstruct([SAID, SAID.replace(*EDITING), steered.unrelated, steered.paraphrase])
    h = extract(subject, [TEXT], 4).vectors[0]
    unit = lambda x: x / np.linalg.norm(x)
    ids = extract(subject, [TEXT]).token_ids
    differences = {EDIT: recon[1] - recon[0], UNRELATED: recon[2] - recon[0], PARAPHRASE: recon[3] - recon[0]}
    for name, delta in differences.items():
        for row in (row for row in steered.rows if row.direction == name):
            state = h + row.strength * np.linalg.norm(h) * unit(delta)
            (expected,) = nla.patch(subject, ids, [4], state[None], rescale=False)
            np.testing.assert_allclose(row.logprobs, expected[-1], atol=1e-3)
    assert np.linalg.norm(moved(h, recon[0], 0.25) - h) == pytest.approx(np.linalg.norm(h) / 4, rel=1e-4)
    np.testing.assert_array_equal(moved(h, 0 * h, 2.0), h)


@pytest.mark.torch
def test_continuations_and_divergence_are_torchs(subject, subject_folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(subject_folder, attn_implementation="eager").eval()
    delta = np.random.default_rng(0).normal(size=32).astype(np.float32)
    rows = steer_along(subject, TEXT, {"mine": delta}, token=3, strengths=[2.0], new_tokens=8)
    ids = extract(subject, [TEXT]).token_ids[0]
    state = torch.tensor(moved(extract(subject, [TEXT], 3).vectors[0], delta, 2.0))

    def replaced(_, __, out):
        (out[0] if isinstance(out, tuple) else out)[0, 3] = state
        return out

    def greedy():
        found, probabilities = list(ids), None
        with torch.no_grad():
            for _ in range(8):
                logits = model(torch.tensor([found])).logits[0, -1]
                probabilities = logits.log_softmax(-1).double() if probabilities is None else probabilities
                found.append(int(logits.argmax()))
        return subject.tokenizer.decode(found[len(ids) :], skip_special_tokens=True), probabilities

    plain, p = greedy()
    hook = model.model.layers[1].register_forward_hook(replaced)
    changed, q = greedy()
    hook.remove()
    assert [row.continuation for row in rows] == [plain, changed]
    assert rows[1].kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    np.testing.assert_allclose(rows[1].logprobs, q, atol=1e-4)


def test_a_words_probability_is_that_of_its_first_tokens(steered):
    found = first_tokens(steered.tokenizer, "mill")
    of = {steered.tokenizer(text, add_special_tokens=False).input_ids[0] for text in ("mill", " mill")}
    assert set(found) == of
    assert steered.probability("mill", steered.rows[1]) == pytest.approx(
        sum(np.exp(steered.rows[1].logprobs[list(of)]))
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"edit": ("rabbit", "mouse")}, "does not contain 'rabbit', .* it says 'The river and the mill.'"),
        ({"edit": ("", "mouse")}, "the old one not empty"),
        ({"edit": "rabbit"}, "pair of texts"),
        ({"token": 900}, "Position 900"),
        ({"strengths": [float("nan")]}, "strengths are finite"),
        ({"strengths": []}, "strengths are finite"),
        ({"strengths": [10**400]}, "strengths are finite"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"text": ""}, "empty"),
    ],
)
def test_wrong_input_is_named(subject, pair, change, said):
    given = {"text": TEXT, "edit": EDITING, "explanation": SAID} | change
    with pytest.raises(nla.InputError, match=said) as error:
        nla.steer(subject, pair, **given)
    one_sentence(error)


def test_the_pair_reads_the_subjects_layer(subject_folder, pair):
    with pytest.raises(nla.InputError, match="reads layer 1, the subject gives layer 0"):
        nla.steer(load_subject(subject_folder, 0), pair, TEXT, EDITING)


def test_a_direction_has_the_subjects_width(subject):
    with pytest.raises(nla.InputError, match="32 finite numbers"):
        steer_along(subject, TEXT, {"mine": np.ones(8)})
    with pytest.raises(nla.InputError, match="32 finite numbers"):
        steer_along(subject, TEXT, {"mine": np.full(32, 1j)})


# The verb


@pytest.fixture(scope="module")
def place(pair, subject_folder, tmp_path_factory):
    """A folder with a pair that names its subject, which lies beside it."""
    folder = tmp_path_factory.mktemp("steer")
    pair.save(folder / "pair")
    shutil.copytree(subject_folder, folder / "subject")
    for role in ("av", "ar"):
        file = folder / "pair" / role / FILE
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content["provenance"] = {"base_hash": fingerprint(subject_folder)}
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return folder


@pytest.fixture
def command(place):
    """The verb with a pair, its subject and an edit."""
    flags = {"--edit": "river=>market", "--explanation": SAID, "--strength": "0.5,1", "--new-tokens": "4"}
    where = ["--pair", str(place / "pair"), "--subject", str(place / "subject")]

    def made(*more, text=TEXT, **changes):
        chosen = flags | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        return [
            "steer",
            *([] if text is None else [text]),
            *where,
            *[part for flag in chosen.items() if flag[1] is not None for part in flag],
            *more,
        ]

    return made


def test_the_verb_prints_what_the_function_finds(command, capsys, subject, pair):
    assert main(command("--json", token="2", words="mill, sea")) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = nla.steer(subject, pair, TEXT, EDITING, token=2, explanation=SAID, strengths=(0.5, 1), new_tokens=4)
    for name in ("position", "token", "explanation", "edited", "paraphrase", "unrelated"):
        assert printed[name] == getattr(expected, name)
    for row, own in zip(printed["rows"], expected.rows, strict=True):
        assert (row["direction"], row["strength"], row["continuation"]) == (
            own.direction,
            own.strength,
            own.continuation,
        )
        assert row["kl"] == pytest.approx(own.kl, abs=1e-5)
        assert list(row["probabilities"]) == ["mill", "sea"]
        assert row["probabilities"]["sea"] == pytest.approx(expected.probability("sea", own), rel=1e-3)


def test_the_table_shows_the_edit_beside_its_controls(command, capsys):
    assert main(command()) == 0
    out = capsys.readouterr().out
    assert f"explanation: {SAID}" in out and "edited:      The market and the mill." in out
    assert "p(market)" in out and "p(river)" in out
    starts = [line.split("  ")[0] for line in out.splitlines()]
    assert [starts.count(n) for n in (UNSTEERED, EDIT, NOTHING, PARAPHRASE, UNRELATED, RANDOM)] == [1, 2, 2, 2, 2, 2]


def test_a_paraphrase_of_ones_own_is_the_control(command, capsys, subject, pair):
    other = "A mill, a stream."
    assert main(command("--json", paraphrase=other)) == 0
    printed = json.loads(capsys.readouterr().out)
    recon = pair.reconstruct([SAID, other])
    expected = steer_along(subject, TEXT, {PARAPHRASE: recon[1] - recon[0]}, strengths=(0.5, 1), new_tokens=4)
    rows = [row for row in printed["rows"] if row["direction"] == PARAPHRASE]
    assert printed["paraphrase"] == other and len(rows) == 2
    assert [row["kl"] for row in rows] == pytest.approx([row.kl for row in expected[1:]], rel=1e-3)
    assert [row["continuation"] for row in rows] == [row.continuation for row in expected[1:]]


CHAT = [
    {"role": "user", "content": "Where is the old mill?"},
    {"role": "assistant", "content": "It is at the river."},
    {"role": "user", "content": "And the market?"},
]


def test_in_a_chat_the_answer_is_steered_by_what_was_said(command, capsys, tmp_path, subject, tokenizer):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": CHAT}))
    assert main(command("--chat", str(file), "--json", text=None)) == 0
    printed = json.loads(capsys.readouterr().out)
    ids, roles = chat_tokens(tokenizer, CHAT)
    last = max(i for i, role in enumerate(roles) if role)
    assert printed["position"] == last and printed["token"] == tokenizer.decode([ids[last]]) == "?"
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert len(whole) > len(ids) and read(subject, CHAT, None) == (whole, last)
    (clean,) = nla.patch(subject, [whole], [last], {"clean": None}).values()
    rows = steer_along(subject, CHAT, {"mine": np.ones(32)}, new_tokens=3, strengths=[1])
    np.testing.assert_allclose(rows[0].logprobs, clean[0][-1], atol=1e-5)
    said = roles.index("assistant")
    assert main(command("--chat", str(file), "--json", text=None, token=str(said))) == 0
    assert json.loads(capsys.readouterr().out)["position"] == said
    assert read(subject, CHAT[:2], None)[0] == chat_tokens(tokenizer, CHAT[:2])[0]  # the assistant goes on


@pytest.mark.parametrize(
    "content, flags, said",
    [
        ([CHAT, CHAT], {}, "holds 2 conversations; one is steered at a time"),
        ([CHAT], {"token": "0"}, "Position 0 of the conversation is none at which somebody speaks"),
        ([CHAT], {"text": TEXT}, "Give a text to steer or --chat FILE, one of them"),
        ([[{"role": "user", "content": ""}]], {}, "In the conversation nobody says anything"),
    ],
)
def test_a_chat_that_cannot_be_steered_is_refused(command, capsys, tmp_path, content, flags, said):
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in content))
    assert main(command("--chat", str(tmp_path / "chat.jsonl"), **{"text": None} | flags)) == 1
    assert said in one_line(capsys)


def test_without_text_or_chat_there_is_nothing_to_steer(command, capsys):
    assert main(command(text=None)) == 1
    assert "Give a text to steer or --chat FILE" in one_line(capsys)


def test_the_verb_asks_the_pair_for_an_explanation(command, capsys, subject, pair):
    said = pair.verbalize(extract(subject, [TEXT]), temperature=0.0)[0]
    word = said.split()[0]
    assert main(command("--json", explanation=None, edit=f"{word}=>mill", words="mill")) == 0
    assert json.loads(capsys.readouterr().out)["explanation"] == said


@pytest.mark.parametrize(
    "change, said",
    [
        ({"edit": "rabbit"}, "--edit must be OLD=>NEW"),
        ({"edit": "=>mouse"}, "--edit must be OLD=>NEW"),
        ({"edit": "rabbit=>mouse"}, "it says 'The river and the mill.'"),
        ({"strength": "much"}, "--strength must be numbers"),
        ({"words": "a,,b"}, "--words must be words"),
        ({"text": "  "}, "no text to steer"),
        ({"token": "99"}, "Position 99 does not exist"),
    ],
)
def test_the_verb_refuses_wrong_input_in_one_line(command, capsys, change, said):
    assert main(command(**change)) == 1
    assert said in one_line(capsys)
