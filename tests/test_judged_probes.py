"""Probes that ask a language model, through a server on loopback: judges and readers built by hand that each of them has
to find out."""

import re

import numpy as np
import pytest
from fake_llm import FakeLLM
from fake_readers import COLOURS, READERS, SHAPES, Reader, context_of, explanations, words_of

from nla_jax.config import Provider as Settings
from nla_jax.fve import mse, row_fve
from nla_jax.probes.hidden_codes import QUOTE
from nla_jax.probes.judged_claims import MOST, SHOWN, judged_ablation, judged_truth, warm_judged_truth
from nla_jax.probes.judged_matches import TAIL, judged_position, judged_source
from nla_jax.probes.paraphrases import (
    TASKS,
    paraphrase_gap,
    paraphrase_retention,
    paraphrased,
    paraphrases,
    warm_paraphrase_retention,
    warm_paraphrases,
)
from nla_jax.probes.probe import told
from nla_jax.probes.provider import DryRun, Provider
from nla_jax.probes.writing import CRITERIA, warm_writing, writing

TEXT = re.compile(r"<text>\n(.*)\n</text>", re.DOTALL)
OTHERS = {"red": "crimson", "green": "emerald", "blue": "azure", "black": "inky"}  # words of the same meaning


@pytest.fixture
def server():
    server = FakeLLM()
    yield server
    server.close()


def asking(server, tmp_path, reader, texts, rows=60, **facts):
    provider = Provider("openai", "m", connection={"base_url": f"{server.url}/v1"}, folder=tmp_path, rows=rows)
    return context_of(reader, texts, provider=provider, **facts)


# Paraphrases


def reword(prompt, text):
    """Every word by another one, that of a colour by one of the same meaning; quotes too, unless they shall stay. A light
    paraphrase changes the quotes alone."""
    change = lambda part: re.sub(r"\w+", lambda word: OTHERS.get(word[0], f"{word[0][::-1]}q"), part)
    if TASKS["light"] in prompt:
        return QUOTE.sub(lambda quote: change(quote[0]), text)
    if TASKS["quotes_kept"] not in prompt:
        return change(text)
    quotes = QUOTE.findall(text)
    return change(QUOTE.sub("", text)) + " ".join(quotes)


MEANING = Reader(COLOURS, lambda text: [c for c in COLOURS if words_of(c, OTHERS[c])(text)])
KEEPS = {  # which paraphrases leave a reader what it reads
    "the quote": (READERS["the quote"], {"quotes_kept"}),
    "the words of a claim": (READERS["the first claim"], {"light"}),
    "the order of statements": (READERS["the order of statements"], {"light"}),
    "the meaning of a claim": (MEANING, set(TASKS)),
}


@pytest.mark.parametrize("name", KEEPS)
def test_a_reader_is_found_out_by_the_paraphrases_that_take_what_it_reads(name, server, tmp_path):
    server.writes = reword
    reader, keeps = KEEPS[name]
    context = asking(server, tmp_path, reader, explanations(90), warm=MEANING)
    found = {key.removeprefix("retention_"): v for key, v in paraphrase_retention(context).items()}
    assert found.keys() == TASKS.keys() and all(np.isfinite(values).sum() == 60 for values in found.values())
    means = {key: np.nanmean(values) for key, values in found.items()}
    whole = {key for key, mean in means.items() if mean == pytest.approx(1)}
    assert whole == keeps and all(means[key] < 0.5 for key in TASKS.keys() - whole)
    sentences = told(paraphrase_retention, context)
    assert len(sentences) == len(TASKS) and all("60 of 60 questions answered." in one for one in sentences)


def test_a_paraphrase_is_scored_as_its_text(server, tmp_path):
    server.writes = reword
    reader, texts = READERS["the quote"], explanations(90)
    half = Reader(reader.things, lambda text: reader.read(text)[:1])
    context = asking(server, tmp_path, reader, texts, warm=half)
    found = paraphrases(context)
    at = np.flatnonzero(~np.isnan(found["fve_heavy"]))
    assert at.tolist() == np.unique(np.linspace(0, 89, 60).astype(int)).tolist()
    whole = row_fve(reader.reconstruct([reword(TASKS["heavy"], text) for text in texts]), context.vectors)
    np.testing.assert_allclose(found["fve_heavy"][at], whole[at])
    warm = warm_paraphrases(context)["fve_light_warm"]
    expected = row_fve(context.warm.reconstruct([reword(TASKS["light"], text) for text in texts]), context.vectors)
    np.testing.assert_allclose(warm[at], expected[at])
    assert server.prompts.total() == 60 * len(TASKS) and set(server.prompts.values()) == {1}


def test_retention_is_a_ratio_of_means_of_the_rows_that_have_a_paraphrase(server, tmp_path):
    server.writes = reword
    texts = explanations(90)
    for text in texts[::2]:
        server.replies[text] = ["refused"] * 9
    half = Reader(READERS["the quote"].things, lambda text: READERS["the quote"].read(text)[:1])
    context = asking(server, tmp_path, READERS["the quote"], texts, rows=90, warm=half)
    kept = warm_paraphrase_retention(context)["retention_heavy_warm"]
    assert np.isnan(kept[::2]).all() and np.isfinite(kept[1::2]).all()
    own = context.row_fve(texts, half)[1::2].mean()
    rewritten = context.row_fve([reword("", text) for text in texts], half)[1::2].mean()
    assert np.nanmean(kept) == pytest.approx(rewritten / own)
    assert "heavy paraphrase: 45 of 90 questions answered (45 refused)." in context.provider.told()


def test_a_paraphrase_that_lost_its_quotes_counts_as_none(server, tmp_path):
    server.writes = lambda prompt, text: text.replace("…", "...") if "w1 " in text else text
    texts = ["The colour is red. It ends: … w1 w2", "The colour is red. It ends: … w3 w2"] * 3 + [""]
    context = asking(server, tmp_path, READERS["the quote"], texts)
    found = paraphrased(context, "quotes_kept")
    assert [one if isinstance(one, str) else one.why for one in found.values()] == [
        *["with other quotes", texts[1]] * 3,
        "",
    ]  # nobody is asked about an empty text
    assert context.provider.told()[0].endswith("3 of 6 questions answered (3 with other quotes).")


def test_only_a_reader_that_came_to_read_wording_has_a_gap(server, tmp_path):
    server.writes = reword
    context = asking(server, tmp_path, READERS["the first claim"], explanations(90), warm=MEANING)
    gaps = {name: np.nanmean(values) for name, values in paraphrase_gap(context).items()}
    assert gaps["gap_heavy_live"] > 0.5 and gaps["gap_heavy_warm"] == pytest.approx(0, abs=1e-9)
    assert gaps["gap_heavy_difference"] == pytest.approx(gaps["gap_heavy_live"])
    assert gaps["gap_light_difference"] == pytest.approx(0, abs=1e-9)


# Claims


def lists(prompt):
    """The colours and shapes of a text, as claims."""
    words = words_of(*COLOURS, *SHAPES)(TEXT.search(prompt)[1])
    level = lambda word: "theme" if word in COLOURS else "detail"
    return {"claims": [{"claim": f"It is {word}.", "words": word, "level": level(word)} for word in words]}


def judging(verdict):
    """A model that lists claims, and judges each by `verdict(document, claim)`."""

    def calls(tool, prompt):
        if tool == "list_claims":
            return lists(prompt)
        document = re.search(r"<document>\n(.*)\n</document>", prompt, re.DOTALL)[1]
        claims = re.findall(r"^\d+\. It is (\w+)\.$", TEXT.search(prompt)[1], re.MULTILINE)
        return {"verdicts": [verdict(document, claim) for claim in claims]}

    return calls


def honest(document, claim):
    return "true" if claim in document else "false_but_related"


def described(server, tmp_path, texts, shown, rows=90, **facts):
    columns = {"detokenized_text_truncated": shown}
    return asking(server, tmp_path, READERS["the first claim"], texts, rows, column=columns.__getitem__, **facts)


def test_an_honest_judge_finds_the_share_of_true_claims(server, tmp_path):
    """Every third text claims another colour than its document's."""
    server.calls = judging(honest)
    texts = explanations(90)
    documents = [text if i % 3 else text.replace("colour is", "colour is not") for i, text in enumerate(texts)]
    documents = [re.sub(r"not \w+", "white", document) for document in documents]
    context = described(server, tmp_path, texts, documents)
    found = judged_truth(context)
    assert np.nanmean(found["claims_theme_true"]) == pytest.approx(2 / 3)
    assert np.nanmean(found["claims_detail_true"]) == 1 and "claims_entity_true" in found
    assert np.isnan(found["claims_entity_true"]).all()
    expected = [0.5 if i % 3 == 0 else 1 for i in range(90)]
    np.testing.assert_allclose(found["claims_all_true"], expected)
    assert 0.1 < np.nanmean(found["claims_detail_control"]) < 0.4 and np.nanmean(found["claims_undecided"]) == 0
    assert [one.split(":")[0] for one in told(judged_truth, context)] == [
        "claims of the texts (rl)",
        "truth of the claims (rl)",
        "the same by another document (rl)",
    ]


def test_a_judge_that_always_says_yes_is_caught_by_its_control(server, tmp_path):
    server.calls = judging(lambda document, claim: "true")
    texts = explanations(60)
    found = judged_truth(described(server, tmp_path, texts, texts))
    assert np.nanmean(found["claims_all_true"]) == 1 == np.nanmean(found["claims_all_control"])


def test_what_the_judge_cannot_tell_is_neither_true_nor_false(server, tmp_path):
    server.calls = judging(lambda document, claim: "cannot_tell" if claim in COLOURS else honest(document, claim))
    texts = explanations(30)
    found = judged_truth(described(server, tmp_path, texts, texts))
    assert np.isnan(found["claims_theme_true"]).all() and np.nanmean(found["claims_all_true"]) == 1
    assert np.nanmean(found["claims_undecided"]) == 0.5


def test_verdicts_that_do_not_come_leave_a_row_out(server, tmp_path):
    """Too few verdicts, a refused list, and an answer without the call: counted, and nothing is made of them."""
    texts, good = explanations(30), judging(honest)
    short = lambda tool, prompt: {"verdicts": good(tool, prompt)["verdicts"][:1]}
    server.calls = lambda tool, prompt: (short if tool == "judge_claims" and texts[4] in prompt else good)(tool, prompt)
    server.replies[texts[0]] = ["refused"]
    server.replies[texts[1]] = ["bare"]
    context = described(server, tmp_path, texts, texts)
    found = judged_truth(context)
    missing = np.flatnonzero(np.isnan(found["claims_all_true"])).tolist()
    assert {0, 1, 4} <= set(missing) == {i for i, text in enumerate(texts) if text in (texts[0], texts[1], texts[4])}
    said = context.provider.told()
    assert "28 of 30 questions answered (1 no tool call, 1 refused)." in said[0]
    assert "27 of 28 questions answered (1 malformed)." in said[1]


def test_the_claims_of_the_warm_start_and_what_the_judge_sees(server, tmp_path):
    server.calls = judging(honest)
    long = [f"{'beginning ' * 300}{text}" for text in explanations(30)]
    context = described(server, tmp_path, explanations(30), long)
    context.texts = {"rl": explanations(30), "warm": ["It is white."] * 29 + ["It is red."]}.__getitem__
    found = warm_judged_truth(context)
    assert np.isfinite(found["claims_all_true_warm"]).sum() == 1  # the others claim nothing that is listed
    shown = [prompt for prompt in server.prompts if "<document>" in prompt]
    assert len(shown) == 2 and all(long[i][-SHOWN:] in "".join(shown) for i in (29,))
    assert not any("beginning " * 210 in prompt for prompt in shown)
    assert judged_truth(described(server, tmp_path, [""] * 30, long, vectors=context.vectors)) == {}


def test_one_document_has_no_control(server, tmp_path):
    server.calls = judging(honest)
    texts = explanations(12)
    context = described(server, tmp_path, texts, texts, documents=["d"] * 12)
    found = judged_truth(context)
    assert np.isnan(found["claims_all_control"]).all() and np.nanmean(found["claims_all_true"]) == 1


def test_a_judged_claim_is_worth_what_the_reader_reads_of_it(server, tmp_path):
    """The AR reads colours alone; the activations hold another colour in half of the rows."""
    server.calls = judging(lambda document, claim: "true" if claim in document else "false_and_unrelated")
    reader, texts = READERS["the first claim"], ["It is red and round.", "It is blue and flat."] * 6
    gold = reader.reconstruct(["red green"] * 12)
    gold[1::2] = reader.reconstruct(["black"])
    context = described(server, tmp_path, texts, ["a red thing", "a flat thing"] * 6, vectors=gold)
    found = judged_ablation(context)
    change = lambda i, word: (
        100
        * (
            mse(reader.reconstruct([texts[i].replace(word, "")]), gold[i : i + 1])
            / mse(reader.reconstruct([texts[i]]), gold[i : i + 1])
            - 1
        )[0]
    )
    assert change(0, "red") > 10 > 0 > change(1, "blue")
    np.testing.assert_allclose(found["judged_effect_true"][:2], [change(0, "red"), 0], atol=1e-6)
    np.testing.assert_allclose(found["judged_effect_false_and_unrelated"][:2], [0, change(1, "blue")], atol=1e-6)
    assert np.isnan(found["judged_effect_cannot_tell"]).all()


# Matches


def picks(prompt):
    """The passage that has the words that the explanation quotes."""
    words = TEXT.search(prompt)[1].partition("… ")[2]
    passages = re.findall(r"<passage_(\d)>\n(.*?)\n</passage_\d>", prompt, re.DOTALL)
    return {"passage": next((int(k) for k, passage in passages if words and passage.endswith(words)), 1)}


def told_apart(count=90):
    """Explanations that quote the end of their documents, which differ."""
    texts = [f"The colour is {COLOURS[i % 4]}. It ends: … {i:02d} w{i % 20}" for i in range(count)]
    return texts, [f"{'word ' * 200}… {i:02d} w{i % 20}" for i in range(count)]


@pytest.mark.parametrize("one, what, chance", [(judged_source, "source", 1 / 4), (judged_position, "place", 1 / 3)])
def test_a_judge_that_can_tell_is_right_and_the_control_is_at_chance(one, what, chance, server, tmp_path):
    server.calls = lambda tool, prompt: picks(prompt)
    texts, documents = told_apart()
    found = one(described(server, tmp_path, texts, documents))
    assert found[f"{what}_rl"].mean() == 1 and set(found[f"{what}_chance"]) == {chance}
    assert found[f"{what}_control"].mean() == pytest.approx(chance, abs=0.15)
    assert all(
        len(passage) == TAIL for prompt in server.prompts for passage in re.findall(r">\n(w?ord .*?)\n<", prompt)
    )


@pytest.mark.parametrize("one, what, chance", [(judged_source, "source", 1 / 4), (judged_position, "place", 1 / 3)])
def test_a_judge_that_always_names_the_first_is_right_by_chance(one, what, chance, server, tmp_path):
    server.calls = lambda tool, prompt: {"passage": 1}
    found = one(described(server, tmp_path, *told_apart()))
    assert found[f"{what}_rl"].mean() == pytest.approx(chance, abs=0.15)
    assert found[f"{what}_control"].mean() == pytest.approx(chance, abs=0.15)


def test_what_cannot_be_matched_is_left_out(server, tmp_path):
    """Documents with one row have no other place; equal ends are no choice; an empty text guesses; a number that is no
    passage is no answer."""
    server.calls = lambda tool, prompt: {"passage": 9} if "… 03 " in TEXT.search(prompt)[1] else picks(prompt)
    texts, documents = told_apart(12)
    texts[5] = ""
    names = ["a", "a", "b", "c", "c", "c", "d", "d", "d", "d", "d", "d"]
    documents[1] = documents[0]
    context = described(server, tmp_path, texts, documents, vectors=np.ones((12, 5)))
    context.documents = names
    found = judged_position(context)["place_rl"]
    assert np.isnan(found[:4]).all() and found[4] == 1 and found[5] == pytest.approx(1 / 3)
    assert (found[6:] == 1).all()
    assert "7 of 8 questions answered (1 malformed)" in context.provider.told()[0]
    assert judged_position(described(server, tmp_path, texts, [""] * 12)) == {}


# Writing


def rates(prompt):
    """Likes whole sentences; half as much again where clarity is asked for first."""
    ordered = TEXT.search(prompt)[1].startswith("The")
    return {"rating": (6 if ordered else 2) + 2 * (prompt.index(CRITERIA[0]) < prompt.index(CRITERIA[1]))}


def test_writing_has_its_noise_and_its_control_beside_it(server, tmp_path):
    server.calls = lambda tool, prompt: rates(prompt)
    texts = [f"The colour of number {i} is red." for i in range(40)] + [""]
    context = asking(server, tmp_path, READERS["the first claim"], texts)
    found = writing(context)
    assert found["writing"][:40].mean() == 8 and found["writing_again"][:40].mean() == 6
    assert found["writing_noise"][:40].mean() == 2 and found["writing_shuffled"][:40].mean() < 6
    assert [values[40] for values in found.values()] == [1, 1, 0, 1]  # an empty text has the lowest rating
    context.texts = {"warm": ["broken"] * 41}.__getitem__
    assert warm_writing(context)["writing_warm"].mean() == 4


def test_a_judge_that_likes_everything_likes_shuffled_words(server, tmp_path):
    server.calls = lambda tool, prompt: {"rating": 8}
    found = writing(asking(server, tmp_path, READERS["the first claim"], explanations(30)))
    assert found["writing"].mean() == 8 == found["writing_shuffled"].mean() and found["writing_noise"].mean() == 0


# What it costs


def test_a_dry_run_counts_what_is_then_asked(server, tmp_path):
    """With as many claims as it expects."""
    server.calls = lambda tool, prompt: (
        {"claims": [{"claim": f"It is {k}.", "words": "w", "level": "theme"} for k in range(6)]}
        if tool == "list_claims"
        else {"verdicts": ["true"] * 6}
        if tool == "judge_claims"
        else {"passage": 1}
        if tool == "pick_passage"
        else {"rating": 5}
    )
    server.writes = lambda prompt, text: text
    texts, documents = told_apart(30)
    context = described(server, tmp_path, texts, documents)
    real = context.provider
    probes = (paraphrases, judged_truth, judged_source, judged_position, writing)
    c = Settings("openai", "m", connection={"base_url": f"{server.url}/v1"})
    context.provider = dry = DryRun(c, tmp_path, len, "characters")
    for one in probes:
        one(context)
    assert not server.asked
    context.provider = real
    for one in probes:
        one(context)
    assert dry.tokens.prompts == len(server.prompts) == server.prompts.total() and MOST >= 6
