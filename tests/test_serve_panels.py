"""The panels of the served page that ask the subject and the reconstructor, in a real browser."""

import dataclasses
import json
import re
import threading

import pytest
import test_serve_browser
from conftest import SENTENCES
from playwright.sync_api import expect
from test_serve import within
from test_serve_browser import explanations, read, saved

from nla_jax.io.parquet import write_table
from nla_jax.labels.extractive import Extractive, label_one
from nla_jax.serve import actions
from nla_jax.serve.claims import claims_of
from nla_jax.serve.nearest import training_of
from nla_jax.subject import extract
from nla_jax.tools.claims import ClaimReader

ROW = 4
HOSTILE = "<b>bold</b><script>hacked=1</script>"
desk, address, opened = (getattr(test_serve_browser, name) for name in ("desk", "address", "opened"))  # fixtures


@pytest.fixture
def talking(monkeypatch):
    """The pairs say what the labeller would."""

    def explain(one, number, wanted, batch):
        answers = []
        for document, row in wanted:
            said = label_one(document.context(row))
            claims = claims_of(said, document.context(row), document.tokens[row])
            about = {"explanation": said, "cut": False, "cosine": 0.5, "fve": 0.5, "claims": claims}
            answers.append(document.answers.setdefault((number, row), {"pair": number, "row": row} | about))
        return answers

    monkeypatch.setattr(actions, "explain", explain)


@pytest.fixture
def trained(desk, tmp_path):
    """The run that trained the pairs is here, when the server starts."""
    file = tmp_path / "run/activations/av_sft-00000-of-00001.parquet"
    write_table(extract(desk.served[0].subject, [*SENTENCES, HOSTILE], "all").table(), file)
    training = training_of(tmp_path / "run", desk.served[0].pair, "first")
    desk.served = [dataclasses.replace(one, training=training) for one in desk.served]
    return training


def panel(tab, name):
    return tab.get_by_role("region", name=name, exact=True)


def cells(panel) -> list[list[str]]:
    """What a table shows, row by row."""
    return [row.locator("th, td").all_inner_texts() for row in panel.locator("tbody tr").all()]


def test_patch_and_steer(opened, desk, talking, tmp_path):
    tab = opened()
    read(tab)
    tab.locator(".token").nth(ROW).click()
    tab.get_by_role("button", name="Put the reconstruction in its place").click()
    patch, steer = panel(tab, "Patch"), panel(tab, "Steer")
    expect(patch.locator("tbody tr")).to_have_count(4, timeout=30_000)
    found = cells(patch)
    assert [row[0] for row in found][:2] == ["the activation itself", "reconstruction of the explanation"]
    assert found[0][1] == "0.00" and all(float(row[1]) > 0 for row in found[1:]) and found[0][3]
    assert patch.locator("tbody tr").first.locator(".next").count() == 5

    edited = tab.get_by_label("The explanation, to be edited")
    assert edited.input_value() == explanations(tab)[0]
    edited.press("Control+Enter")
    expect(steer.get_by_role("status")).to_contain_text("The explanation is not changed")
    edited.fill(f"The market is open. {HOSTILE}")
    edited.press("Control+Enter")
    expect(steer.locator("tbody tr")).to_have_count(6, timeout=30_000)
    assert [row[0] for row in cells(steer)] == [
        "unsteered",
        "edit",
        "no edit",
        "paraphrase",
        "unrelated edit",
        "random direction",
    ]
    (_, none, *_), (_, edit, *_), (_, nothing, *_), *_ = cells(steer)
    assert none == nothing == "0.00" and float(edit) > 0
    expect(steer.locator("#delta")).to_contain_text(HOSTILE)
    assert "p(market)" in steer.locator("thead").inner_text()
    assert edited.evaluate("e => e === document.activeElement")  # nobody took the pen away
    expect(steer.get_by_role("status")).to_have_text("", timeout=30_000)  # every strength is here

    slider = tab.get_by_label("Strength")
    slider.press("ArrowLeft")
    expect(tab.locator("#strength-said")).to_have_text("0.5 × the activation's length")
    assert slider.get_attribute("aria-valuetext") == "0.5 times the activation's length"
    weaker = cells(steer)
    assert float(weaker[1][1]) != float(edit)
    tab.locator(".token").nth(1).click()
    assert panel(tab, "Patch").locator("table").count() == 0
    tab.locator(".token").nth(ROW).click()
    assert cells(steer) == weaker and cells(patch) == found and edited.input_value().startswith("The market")

    offline = opened(saved(tab, "Save page", tmp_path).as_uri(), offline=True)
    assert cells(panel(offline, "Patch")) == found and cells(panel(offline, "Steer"))[1][1] == edit
    offline.get_by_label("Strength").press("ArrowLeft")
    assert cells(panel(offline, "Steer")) == weaker
    assert offline.get_by_role("button", name="Steer").count() == 0
    assert offline.evaluate("typeof hacked") == "undefined" and offline.locator("#steered b").count() == 0


def test_steering_starts_again_with_another_edit(opened, talking):
    tab = opened()
    read(tab)
    tab.locator(".token").nth(ROW).click()
    for text in ("The market is open.", "The river is open."):
        tab.get_by_label("The explanation, to be edited").fill(text)
        tab.get_by_role("button", name="Steer", exact=True).click()
    expect(tab.locator("#delta")).to_contain_text("to “The river is open.”", timeout=30_000)
    expect(panel(tab, "Steer").get_by_role("status")).to_have_text("", timeout=30_000)
    tab.get_by_role("button", name="Undo the edit").click()
    assert tab.get_by_label("The explanation, to be edited").input_value() == explanations(tab)[0]


def test_a_subject_that_cannot_be_loaded_is_said_in_the_panel(opened, desk, talking, tmp_path):
    gone = dataclasses.replace(desk.served[0].subject, folder=tmp_path / "gone")
    desk.served = [dataclasses.replace(one, subject=gone) for one in desk.served]
    tab = opened()
    read(tab)
    tab.get_by_role("button", name="Put the reconstruction in its place").click()
    expect(panel(tab, "Patch").get_by_role("status")).to_contain_text("need the whole subject, which cannot be loaded")
    assert tab.get_by_role("alert").is_hidden()


def test_claims_are_weighed_under_the_pointer_and_by_keys(opened, desk, talking, tmp_path):
    tab = opened()
    read(tab)
    tab.locator(".token").nth(ROW).click()
    claims = tab.locator(".said").first.get_by_role("listitem")
    worth = lambda tab: tab.locator(".said").first.locator(".worth").all_inner_texts()
    assert worth(tab) == ["", "", "", ""]
    claims.nth(1).hover()
    expect(claims.nth(1)).to_contain_text("without it: FVE ")
    (document,) = desk.documents.values()
    (ablated,) = [answer for key, answer in document.kept.items() if key == ("ablate", 0, ROW)]
    signed = lambda value, digits: f"{value:+.{digits}f}".replace("-", "−")
    assert worth(tab) == [
        f"without it: FVE {signed(one['fve'], 2)}, error {signed(one['mse'], 0)} %" for one in ablated["ablations"]
    ]
    other = tab.locator(".said").nth(1).get_by_role("listitem")  # of the other pair, by keys alone
    claims.last.focus()
    tab.keyboard.press("Tab")
    expect(other.first).to_contain_text("without it: FVE ")
    assert tab.evaluate("document.activeElement.dataset.key") == "claim 1 0"  # though the panel was drawn again
    offline = opened(saved(tab, "Save page", tmp_path).as_uri(), offline=True)
    assert worth(offline) == worth(tab)


def test_a_pointer_that_rests_takes_nothing_from_the_keys(opened, desk, talking):
    """Where the panel is drawn again beneath it, it enters another claim without having moved."""
    tab = opened()
    read(tab)
    tab.locator(".token").nth(ROW).click()
    claim = tab.locator(".said").first.get_by_role("listitem").nth(1)
    claim.hover()
    expect(claim).to_contain_text("without it: FVE ", timeout=20_000)  # so nothing more is asked for this pair
    tab.evaluate("""() => {
        const [ours, other] = [...document.querySelectorAll(".said")].map((said) => said.querySelectorAll("li"));
        other[0].focus();
        ours[1].dispatchEvent(new MouseEvent("mouseenter"));
    }""")
    other = tab.locator(".said").nth(1).get_by_role("listitem").first
    expect(other).to_contain_text("without it: FVE ", timeout=20_000)


@pytest.fixture
def sure(desk, monkeypatch):
    """The server knows how sure one may be of claims: of the last word little, and of a claim that has no check."""

    def confidence(one, number, document, row):
        usual = 0.9 if row else 0.2
        claims = [(claim["kind"], claim["value"], usual) for claim in document.answers[number, row]["claims"]]
        claims[-1:] = [(*claims[-1][:2], 0.1), ("sentence", HOSTILE, 0.4)]
        made = [{"kind": kind, "text": text, "confidence": p} for kind, text, p in claims]
        return {"pair": number, "row": row, "confidence": made}

    monkeypatch.setattr(actions, "confidence", confidence)
    desk.served = [dataclasses.replace(one, claims=ClaimReader(Extractive(), 3)) for one in desk.served]


def test_doubtful_claims_are_marked_in_words(sure, opened, desk, talking, tmp_path):
    tab = opened()
    read(tab)
    tab.locator(".token").nth(ROW).click()
    lines = lambda tab: tab.locator(".said").first.get_by_role("listitem").all_text_contents()
    assert not any("confidence" in line for line in lines(tab))
    tab.locator(".said").nth(1).get_by_role("button", name="How sure? Ask 3 samples").click()  # of one pair
    expect(tab.locator(".said").nth(1).get_by_role("listitem").first).to_contain_text("confidence 0.90")
    tab.locator(".token").nth(ROW).press("c")  # and of the others, by a key
    expect(tab.locator(".said").first.get_by_role("listitem")).to_have_count(5)
    said, why = lines(tab), "confidence 0.10doubtful: fewer than half of the samples say so"
    assert ["confidence 0.90" in line for line in said] == [True] * 3 + [False] * 2
    assert ["doubtful" in line for line in said] == [False] * 3 + [True] * 2
    assert why in said[3] and HOSTILE in said[4] and "confidence 0.40" in said[4]
    expect(tab.locator("#spoken")).to_contain_text("doubtful, confidence 0.10: ")
    expect(tab.locator(".said").first).to_contain_text("the share of 3 sampled explanations that make the same claim")
    assert tab.get_by_role("button", name="How sure?").count() == 0

    tab.get_by_label("Colour").select_option("confidence")
    expect(tab.locator("#sure-known")).to_have_text(f"known: 1 of {tab.locator('.token').count()} tokens")
    mean = (3 * 0.9 + 0.1 + 0.4) / 5
    expect(tab.locator(".token").nth(ROW)).to_have_attribute("aria-label", re.compile(f", mean confidence {mean:.2f}"))
    assert (
        tab.locator(".token").nth(ROW).evaluate("e => e.style.getPropertyValue('--share')")
        == f"{60 * (2 * mean - 1):.0f}%"
    )
    tab.get_by_role("button", name="Ask for all tokens").click()
    expect(tab.locator("#sure-all")).to_be_hidden(timeout=30_000)
    marked = tab.locator(".token.unsure")  # in the strip too, and not by colour alone
    assert marked.first.get_attribute("data-row") == "0"
    assert all("doubtful, mean confidence" in one.get_attribute("aria-label") for one in marked.all())

    offline = opened(saved(tab, "Save page", tmp_path).as_uri(), offline=True)
    assert lines(offline) == said and offline.evaluate("typeof hacked") == "undefined"
    offline.get_by_label("Colour").select_option("confidence")
    assert offline.locator(".token.unsure").count() == marked.count()
    data = json.loads(saved(tab, "Download JSON", tmp_path).read_text(encoding="utf-8"))
    assert data["confidence"][0][str(ROW)][3]["confidence"] == 0.1 and data["confidence"][1].keys() == {str(ROW)}


def test_who_moves_on_gives_up_to_ask_how_sure(sure, opened, desk, talking, monkeypatch):
    tab, going, asked, known = opened(), threading.Event(), [], actions.confidence

    def slow(one, number, document, row):
        asked.append((number, row))
        going.wait(20)
        return known(one, number, document, row)

    monkeypatch.setattr(actions, "confidence", slow)
    read(tab)
    tab.locator(".token").nth(ROW).click()
    tab.keyboard.press("c")
    within(10, lambda: asked and desk.worker.waiting == 1)  # one pair is asked, the other one waits
    tab.keyboard.press("ArrowRight")
    within(10, lambda: desk.worker.waiting == 0)
    going.set()
    tab.keyboard.press("c")
    expect(tab.locator(".said").nth(1).get_by_role("listitem").first).to_contain_text("confidence 0.90")
    assert asked[0][1] == ROW and sorted(asked[1:]) == [(0, ROW + 1), (1, ROW + 1)]


def test_the_nearest_training_activations(trained, opened, desk, talking, tmp_path):
    tab = opened()
    read(tab)
    tab.locator(".token").nth(ROW).click()
    near = panel(tab, "Nearest training activations")
    expect(near.get_by_role("listitem")).to_have_count(5)
    expect(near).to_contain_text(f"among {len(trained)}")
    (document,) = desk.documents.values()
    lines = near.get_by_role("listitem").all_inner_texts()
    for line, found in zip(lines, document.kept["nearest", 0, ROW]["nearest"]):
        assert line.startswith(f"{found['cosine']:.2f}".replace("-", "−"))
        assert f"{found['document']}, position {found['position']}" in line
    tab.keyboard.press("ArrowRight")
    expect(near.get_by_role("listitem")).to_have_count(5)
    tab.keyboard.press("ArrowLeft")
    assert near.get_by_role("listitem").all_inner_texts() == lines  # it is not asked for again
    offline = opened(saved(tab, "Save page", tmp_path).as_uri(), offline=True)
    assert panel(offline, "Nearest training activations").get_by_role("listitem").all_inner_texts() == lines
    assert tab.evaluate("typeof hacked") == "undefined"


def test_a_phone_shows_the_panels_without_scrolling_sideways(opened, talking):
    tab = opened(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    read(tab)
    tab.locator(".token").nth(ROW).tap()
    tab.get_by_role("button", name="Put the reconstruction in its place").tap()
    tab.get_by_label("The explanation, to be edited").fill("The market is open, and nothing else is said here.")
    tab.get_by_role("button", name="Steer", exact=True).tap()
    expect(panel(tab, "Patch").locator("tbody tr")).to_have_count(4, timeout=30_000)
    expect(panel(tab, "Steer").locator("tbody tr")).to_have_count(6, timeout=30_000)
    tab.locator(".said").first.get_by_role("listitem").first.tap()
    expect(tab.locator(".said").first.get_by_role("listitem").first).to_contain_text("without it")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_notebook_shows_the_strip(opened, served):
    acts = extract(served[0].subject, SENTENCES[:2], "all")
    tab = opened("about:blank")
    tab.set_content(f"<h1>A notebook</h1>{acts.show()._repr_html_()}{acts[:6].show(served[0].pair)._repr_html_()}")
    alone, explained = (tab.frame_locator("iframe").nth(i) for i in (0, 1))
    expect(alone.locator(".token")).to_have_count(len(acts))
    expect(alone.locator(".role")).to_have_text(["document 0", "document 1"])
    alone.locator(".token").nth(3).click()
    expect(alone.locator("#panels h2")).to_contain_text(f"token 4 of {len(acts)}, document 0")
    assert alone.get_by_label("Colour").input_value() == "norm" and alone.locator("#words").is_hidden()
    assert "".join(alone.locator(".token").all_text_contents()[:9]) == "".join(acts.tokens[:9])
    explained.locator(".token").nth(2).click()
    explained.locator(".token").nth(2).press("ArrowRight")
    expect(explained.locator("#panels h2").first).to_contain_text("token 4 of 6")
    expect(explained.locator(".said .text")).to_have_count(1)
