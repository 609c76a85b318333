"""The report page in a real browser. Without one these tests are skipped, and pytest and .ci/run say so."""

import copy

import pytest
from fake_report import fake_data
from playwright.sync_api import expect

from nla_jax.tools.report.page import render
from nla_jax.tools.report.report import Report

HOSTILE = '<img src=x onerror="hacked=1"><script>hacked=1</script></script><b>bold</b>'


@pytest.fixture
def opened(browser, tmp_path):
    """Opens pages with the network off. None may say anything in the console, nor ask for anything but itself."""
    said, asked, contexts = [], [], []

    def open_page(data=None, **settings):
        file = tmp_path / f"{len(contexts)}.html"
        file.write_text(render(Report(**(data or fake_data(steps=20)))), encoding="utf-8")
        contexts.append(browser.new_context(offline=True, **settings))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and len(asked) == len(contexts) and all(url.startswith("file:") for url in asked)


def listed(tab) -> list[int]:
    """The numbers of the examples that are shown, in order."""
    found = tab.locator(".examples .example:visible summary > span:first-child").all_inner_texts()
    return [int(text.split()[-1]) for text in found]


def test_examples_are_sorted_and_filtered(opened):
    rows = fake_data(steps=20)["examples"]
    tab, numbers = opened(), range(1, 31)
    of = lambda key: lambda i: rows[i - 1][key]
    controls = tab.locator("form.controls")
    order, kind, fve = (controls.get_by_label(name) for name in ("Order", "Kind of token", "FVE"))
    assert listed(tab) == list(numbers)
    order.select_option("best first")
    assert listed(tab) == sorted(numbers, key=of("fve_rl"), reverse=True)
    order.select_option("gained most by RL first")
    assert listed(tab) == sorted(numbers, key=lambda i: rows[i - 1]["fve_warm"] - rows[i - 1]["fve_rl"])
    order.select_option("worst first")
    kind.select_option("a word begins")
    assert listed(tab) == sorted((i for i in numbers if (i - 1) % 3 == 2), key=of("fve_rl"))
    kind.select_option("spoken by the user")
    assert sorted(listed(tab)) == [i for i in numbers if i % 2 == 0]
    fve.select_option("0 to 0.5")
    wanted = [i for i in numbers if i % 2 == 0 and 0 <= rows[i - 1]["fve_rl"] < 0.5]
    assert sorted(listed(tab)) == wanted and 0 < len(wanted) < 15
    expect(controls.locator("output")).to_have_text(f"{len(wanted)} of 30")
    fve.select_option("any")
    kind.select_option("any")
    controls.get_by_label("Search").fill("DUMPS.17")
    assert listed(tab) == [18]


def shown(tab) -> str:
    return tab.locator(".reading:visible .said").inner_text()


def test_a_document_is_read_by_pointer_and_keys(opened):
    documents = fake_data(steps=20)["documents"]
    tab = opened()
    tokens = tab.locator(".token:visible")
    assert tokens.count() == len(documents[0]["rows"]) and shown(tab) == "after 0 of news/17"
    tokens.nth(1).hover()
    assert shown(tab) == "after 1 of news/17"
    tab.locator("h1").hover()
    assert shown(tab) == "after 0 of news/17"  # the chosen one again
    tokens.nth(1).click()
    tab.locator("h1").hover()
    assert shown(tab) == "after 1 of news/17" and "before 1 of news/17" in tab.locator(".reading:visible").inner_text()
    tab.keyboard.press("End")
    last = len(documents[0]["rows"]) - 1
    assert shown(tab) == f"after {last} of news/17"
    tab.keyboard.press("ArrowLeft")
    assert shown(tab) == f"after {last - 1} of news/17"
    assert tab.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    assert (
        tab.locator('.token:visible[aria-selected="true"]').count()
        == tab.locator('.token:visible[tabindex="0"]').count()
        == 1
    )
    described = tab.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent"
    )
    assert described == shown(tab)
    tab.locator("form.maps").get_by_label("Document").select_option(label="2. json/dumps#2")
    assert (
        tab.locator(".token:visible").count() == len(documents[1]["rows"]) and shown(tab) == "after 0 of json/dumps#2"
    )


def test_arrows_lead_to_other_lines_of_a_whole_document(opened):
    """Tokens of four letters, of which ten stand in a line, four in the last one."""
    data = fake_data(steps=20)
    words, row = [f"w{i:02} " for i in range(34)], data["documents"][0]["rows"][0]
    rows = [row | {"start": 4 * i, "end": 4 * i + 4, "rl": f"after {i}"} for i in range(34)]
    data["documents"][0] |= {"text": "".join(words), "rows": rows, "note": "Every token has a colour."}
    tab = opened(data)
    tab.add_style_tag(content=".strip { width: calc(40ch + 2 * .9rem) !important; }")
    tab.locator(".token:visible").nth(5).click()
    tab.locator("h1").hover()
    for key, row in (("Down", 15), ("Down", 25), ("Down", 33), ("Down", 33), ("Up", 23), ("Left", 22), ("Up", 12)):
        tab.keyboard.press(f"Arrow{key}")
        assert shown(tab) == f"after {row}", key
    assert tab.locator("select[name=document] option").first.inner_text() == "1. news/17 (whole)"
    assert tab.locator(".map:visible .note").first.inner_text() == "Every token has a colour."


def test_tokens_take_the_colour_of_the_chosen_score(opened):
    rows = fake_data(steps=20)["documents"][0]["rows"]
    tab = opened()
    for choice, of in (
        ("FVE before RL", lambda row: row["fve_warm"]),
        ("what RL changed", lambda row: row["fve_rl"] - row["fve_warm"]),
        ("FVE after RL", lambda row: row["fve_rl"]),
    ):
        tab.get_by_label("Colour").select_option(choice)
        styles = tab.locator(".token:visible").evaluate_all(
            "all => all.map((e) => [e.style.getPropertyValue('--hue'), e.style.getPropertyValue('--share')])"
        )
        for row, (hue, share) in zip(rows, styles, strict=True):
            assert hue == ("var(--alert)" if of(row) < 0 else "var(--rl)")
            assert int(share.rstrip("%")) == pytest.approx(60 * min(1, abs(of(row))), abs=0.51)
    deep, pale = tab.evaluate(
        """() => [0.6, 0].map((share) => { const e = document.querySelector(".token");
        e.style.setProperty("--share", `${100 * share}%`); return getComputedStyle(e).backgroundColor; })"""
    )
    assert deep != pale  # the colour is really drawn


def test_markup_in_texts_is_shown_as_text(opened):
    data = fake_data(steps=5)
    data["documents"][0]["document"] = data["title"] = data["state"] = HOSTILE
    data["documents"][0]["text"] = HOSTILE
    data["documents"][0]["rows"] = [data["documents"][0]["rows"][0] | {"start": 0, "end": len(HOSTILE), "rl": HOSTILE}]
    for row in data["examples"]:
        row |= {"context": HOSTILE, "token": HOSTILE, "rl": HOSTILE, "kinds": [HOSTILE, '"\n<i>']}
    data["open_with"] = {HOSTILE: HOSTILE}
    tab = opened(data)
    assert tab.locator(".strip:visible").inner_text() == HOSTILE and shown(tab) == HOSTILE
    tab.locator("form.controls").get_by_label("Kind").select_option(HOSTILE)
    assert len(listed(tab)) == 30
    assert tab.evaluate("typeof hacked") == "undefined" and tab.locator("main img, main script, main i").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(opened, scheme):
    data = copy.deepcopy(fake_data(steps=20))
    data["documents"][0]["document"] = data["examples"][0]["document"] = data["subject"] = "folder/" + "a" * 300
    data["examples"][0]["rl"] = data["documents"][0]["rows"][0]["rl"] = "wide" * 200
    data["open_with"]["The page"] = f"nla serve --pair {'b' * 300}"
    tab = opened(data, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme=scheme)
    tab.locator(".token:visible").nth(2).tap()
    assert shown(tab) == "after 2 of news/17"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    colours = tab.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
    light = [sum(map(int, c[4:-1].split(", "))) for c in colours]
    assert (light[0] < light[1]) == (scheme == "light") and abs(light[0] - light[1]) > 400


def test_everything_has_a_name_and_nothing_needs_scripts(opened):
    tab = opened()
    nameless = tab.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, section, nav, [role]")]
        .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == [] and tab.locator("html").get_attribute("lang") == "en"
    plain = opened(java_script_enabled=False)
    assert plain.locator("form:visible").count() == 0 and plain.locator(".examples .example:visible").count() == 30
    rows = fake_data(steps=20)["documents"][0]["rows"]
    assert plain.locator(".reading:visible").count() == len(rows)  # of the first document
