"""The page of `nla serve` in a real browser. Without one these tests are skipped, and pytest and .ci/run say so."""

import contextlib
import json

import pytest
from playwright.sync_api import expect
from test_serve import CHAT, running, within

from nla_jax.serve import actions
from nla_jax.serve.actions import Desk, Limits
from nla_jax.serve.page import page as page_of
from nla_jax.serve.worker import Worker

TEXT = "The river turns north.\nOnly bread is left."
HOSTILE = '<img src=x onerror="hacked=1"><script>hacked=1</script></script><b>bold</b> {{SCRIPT}}'


@pytest.fixture
def desk(served):
    worker = Worker(16, 20_000)
    yield Desk(served, worker, Limits())
    worker.close()


@pytest.fixture
def address(desk):
    with running(desk) as found:
        yield found


@pytest.fixture
def opened(browser, address):
    """Opens tabs. None of them may say anything in the console, nor ask another host for anything."""
    said, asked, contexts = [], [], []

    def open_tab(url=address, **settings):
        contexts.append(browser.new_context(**settings))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(url)
        return tab

    yield open_tab
    for context in contexts:
        context.close()
    own = (address, "data:", "file:", f"blob:{address}", "blob:null")
    assert said == [] and [url for url in asked if not url.startswith(own)] == []


def read(tab, text=TEXT, wait=True):
    """Pastes a text and reads it."""
    tab.locator("#text").fill(text)
    tab.get_by_role("button", name="Read", exact=True).click()
    tab.locator(".token").first.wait_for()
    if wait:
        expect(tab.locator("#pause")).to_be_hidden(timeout=30_000)


def chosen(tab) -> int:
    return int(tab.locator('.token[aria-selected="true"]').get_attribute("data-row"))


def explanations(tab) -> list[str]:
    return tab.locator(".said .text").all_inner_texts()


def saved(tab, button, folder):
    """The file that a button gives."""
    with tab.expect_download() as download:
        tab.get_by_role("button", name=button).click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


def test_paste_click_keys_search_alternatives(opened, served, desk):
    tab = opened()
    assert tab.locator("#pairs").inner_text().count("after block 1") == 2
    read(tab)
    (document,) = desk.documents.values()
    assert "".join(tab.locator(".token").all_text_contents()).replace("↵", "") == TEXT
    tab.locator(".token").nth(5).click()
    expect(tab.locator("#panels h2").first).to_contain_text(f"token 6 of {len(document.tokens)}")
    shown = lambda row: [document.answers[pair, row]["explanation"] for pair in (0, 1)]
    assert [text.strip(" …") for text in explanations(tab)] == [text.strip() or "–" for text in shown(5)]
    assert tab.locator(".said h3").all_inner_texts() == ["first", "second"]
    places = {"ArrowRight": 6, "ArrowLeft": 5, "End": len(document.tokens) - 1, "Home": 0}
    for key, row in places.items():
        tab.keyboard.press(key)
        assert chosen(tab) == row and tab.evaluate("document.activeElement.dataset.row") == str(row)
    tab.keyboard.press("ArrowDown")
    assert chosen(tab) >= len(TEXT.split("\n")[0]) // 8 and "\n" in "".join(document.tokens[: chosen(tab)])
    tab.keyboard.press("ArrowUp")
    assert chosen(tab) == 0
    words = next(answer["explanation"] for answer in document.answers.values() if answer["explanation"].strip()).strip()
    tab.get_by_label("Words").fill(words)
    holding = [a for a in document.answers.values() if words.lower() in a["explanation"].lower()]
    expect(tab.locator("#hits")).to_contain_text(f"{len(holding)} found")
    assert tab.locator(".token.hit").count() == len({answer["row"] for answer in holding})
    tab.locator("#found button").last.click()
    assert chosen(tab) == max(answer["row"] for answer in holding)
    tab.locator("#sample").click()
    expect(tab.locator("#panels h2", has_text="best first")).to_be_visible()
    expect(tab.locator(".others").first.locator("li")).to_have_count(8)
    tab.get_by_label("Colour").select_option("norm")
    expect(tab.locator("#scale")).to_contain_text("times the usual")
    tab.get_by_label("Whose values").select_option("1")
    fve = document.answers[0, 0]["fve"]
    assert fve is None or tab.locator(".token").first.evaluate("e => e.style.getPropertyValue('--share')") != ""


def test_the_address_restores_the_view(opened):
    first = opened()
    read(first)
    first.locator(".token").nth(7).click()
    first.get_by_label("Colour").select_option("norm")
    second = opened(first.url)
    expect(second.locator("#pause")).to_be_hidden(timeout=30_000)
    assert chosen(second) == 7 and second.get_by_label("Colour").input_value() == "norm"
    assert explanations(second) == explanations(first) and second.locator("#text").input_value() == TEXT
    second.reload()
    expect(second.locator('.token[data-row="7"][aria-selected="true"]')).to_be_visible()


def test_a_saved_page_opens_offline(opened, served, tmp_path):
    tab = opened()
    read(tab, f"{TEXT} {HOSTILE}")
    tab.locator(".token").nth(4).click()
    file = saved(tab, "Save page", tmp_path)
    data = json.loads(saved(tab, "Download JSON", tmp_path).read_text(encoding="utf-8"))
    assert "".join(data["document"]["tokens"]) == f"{TEXT} {HOSTILE}"
    offline = opened(file.as_uri(), offline=True)
    assert chosen(offline) == 4 and explanations(offline) == explanations(tab)
    assert offline.locator(".token").all_text_contents() == tab.locator(".token").all_text_contents()
    expect(offline.locator("#source")).to_be_hidden()
    offline.locator(".token").nth(2).click()
    assert all(text.strip() for text in explanations(offline)) and offline.evaluate("typeof hacked") == "undefined"
    offline.get_by_label("Order").select_option("-1")
    expect(offline.locator("#hits")).to_contain_text("found")
    again = saved(offline, "Save page", tmp_path).read_text(encoding="utf-8")
    exported = page_of(data | {"row": 2})
    script = lambda html: html[html.rindex("<script>") :].split("</script>")[0]
    assert script(again) == script(exported) and again.count("Content-Security-Policy") == 1


def test_markup_is_shown_as_text(opened, desk, monkeypatch):
    def explain(one, number, wanted, batch):
        claims = [{"kind": HOSTILE, "value": HOSTILE, "true": None}]
        about = {"explanation": HOSTILE, "cut": True, "cosine": 0.5, "fve": -3.0, "claims": claims}
        return [{"pair": number, "row": row} | about for _, row in wanted]

    monkeypatch.setattr(actions, "explain", explain)
    tab = opened()
    read(tab, HOSTILE)
    tab.get_by_label("Words").fill("bold")
    expect(tab.locator("#found button").first).to_contain_text(HOSTILE)
    assert "".join(tab.locator(".token").all_text_contents()) == HOSTILE
    assert all(HOSTILE in text for text in explanations(tab))
    assert tab.evaluate("typeof hacked") == "undefined"
    assert tab.locator("main img, main b, main script").count() == 0


def test_a_chat_is_read_by_roles(opened):
    tab = opened()
    tab.get_by_label("Chat").check()
    for place, message in zip(tab.get_by_label("What is said").all(), CHAT):
        place.fill(message["content"])
    tab.get_by_role("button", name="Read", exact=True).click()
    expect(tab.locator(".role")).to_have_text(["user", "assistant"])
    expect(tab.locator("#pause")).to_be_hidden(timeout=30_000)
    assert opened(tab.url).get_by_label("What is said").first.input_value() == CHAT[0]["content"]


def test_refusals_are_said_on_the_page(opened, desk):
    desk.limits = Limits(tokens=5)
    tab = opened()
    tab.locator("#text").fill(TEXT)
    tab.locator("#text").press("Control+Enter")
    expect(tab.get_by_role("alert")).to_contain_text("more than the 5 ")
    desk.limits = Limits()
    read(tab)
    expect(tab.get_by_role("alert")).to_be_hidden()


def test_two_tabs_and_a_long_text(opened, desk, tokenizer):
    long, other = opened(), opened()
    sentence = "The river turns north at the mill. "
    text = sentence * (3900 // len(tokenizer(sentence, add_special_tokens=False).input_ids))
    read(long, text, wait=False)
    (document,) = desk.documents.values()
    assert 3500 < len(document.tokens) <= 4000 and long.locator(".token").count() == len(document.tokens)
    read(other)  # which does not wait for the long text
    assert desk.worker.waiting > 500
    long.keyboard.press("Tab")
    long.locator(".token").nth(1).focus()
    long.keyboard.press("End")
    expect(long.locator(".said .text")).to_have_count(2)
    long.get_by_role("button", name="Pause").click()
    within(10, lambda: desk.worker.waiting == 0)
    long.get_by_role("button", name="Continue").click()
    within(10, lambda: desk.worker.waiting > 0)
    long.close()  # a closed tab takes its work with it
    within(10, lambda: desk.worker.waiting == 0)


def test_a_server_that_comes_back_is_asked_again(browser, served, desk):
    with contextlib.ExitStack() as stack:
        with running(desk) as address:
            tab = browser.new_page()
            tab.goto(address)
            read(tab)
            tab.get_by_role("button", name="Read", exact=True).wait_for()
        tab.locator("#text").fill("Another text.")
        tab.get_by_role("button", name="Read", exact=True).click()
        expect(tab.get_by_role("alert")).to_contain_text("The server does not answer")
        assert tab.locator(".token").count() > 10  # what is here stays
        stack.enter_context(running(desk, int(address.rsplit(":", 1)[1].strip("/"))))
        desk.documents.clear()
        expect(tab.locator("#strip")).to_contain_text("Another text.", timeout=20_000)
        expect(tab.get_by_role("alert")).to_be_hidden()
        desk.documents.clear()  # it has forgotten the text, which the page sends again
        tab.locator("#sample").click()
        expect(tab.locator(".others").first.locator("li")).to_have_count(8)
        tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(opened, scheme):
    tab = opened(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme)
    read(tab, f"{TEXT} {'a' * 300}")
    tab.locator(".token").nth(3).tap()
    tab.get_by_label("Order").select_option("1")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    colours = tab.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
    light = [sum(map(int, c[4:-1].split(", "))) for c in colours]
    assert (light[0] < light[1]) == (scheme == "light") and abs(light[0] - light[1]) > 400


def test_everything_has_a_name_for_a_screen_reader(opened):
    tab = opened()
    read(tab)
    nameless = tab.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, progress, section, [role=img]")]
        .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length
            || e.getAttribute("aria-labelledby"))).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    strip = tab.get_by_role("listbox", name="Tokens")
    assert strip.get_by_role("option", selected=True).count() == 1
    assert tab.locator('[tabindex="0"].token').count() == 1 and tab.locator("html").get_attribute("lang") == "en"
