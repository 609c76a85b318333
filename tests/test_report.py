"""The report page: well-formed, self-contained, escaped, drawn from whatever probes it is given."""

import base64
import copy
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_report import fake_data, fake_probe, fake_score

from nla_jax.probes import probe as probes
from nla_jax.probes.probe import figures, load_probes, probe, run_probe
from nla_jax.runtime.errors import InputError
from nla_jax.tools.report.charts import Line, axis, short, with_running_mean
from nla_jax.tools.report.page import render
from nla_jax.tools.report.pieces import MISSING, interval, written
from nla_jax.tools.report.report import Report, warnings
from nla_jax.tools.report.style import SCRIPT
from nla_jax.verbs.stages import print_headline

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
HOSTILE = ("<script>alert(1)</script>", '"><img onerror=alert(1) src=x>', "</svg></style></title>", "'&amp;<b>")


def page_of(data: dict) -> str:
    return render(Report(**data))


def score_of(data: dict, name: str) -> dict:
    """A score of the data, to be changed."""
    return next(score for one in data["probes"] for score in one["scores"] if score["name"] == name)


def figure_of(html: str, title: str) -> str:
    """The figure of that title."""
    return re.search(f"<figure><h3>{re.escape(title)}</h3>.*?</figure>", html, re.S)[0]


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not balance."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def text_of(html: str) -> str:
    return "".join(Page(html).text)


def broken(value, leaf, key=None):
    """`value` with every leaf replaced by `leaf(leaf, its key)`."""
    if isinstance(value, dict):
        return {key: broken(item, leaf, key) for key, item in value.items()}
    if isinstance(value, list):
        return [broken(item, leaf, key) for item in value]
    return leaf(value, key)


def with_numbers(data: dict, change) -> dict:
    """`data` with every number changed that may be None or not finite: all but steps and the scores of single rows."""
    fixed = ("step", "rows", "layer", "start", "end", *data["seconds"])
    numbers = lambda leaf, key: isinstance(leaf, (int, float)) and key not in fixed
    return broken(data, lambda leaf, key: change(leaf) if numbers(leaf, key) else leaf)


def assert_finite(page: Page) -> None:
    """Every coordinate of every drawing is a finite number, of pixels or per cent."""
    for _, attrs in page.tags:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d", "viewBox", "dx", "dy"):
            if name in attrs:
                assert re.fullmatch(r"[-\d., MLhHVZ]*|-?[\d.]+%", attrs[name]), attrs
    for rect in page.named("rect"):
        assert float(rect["width"].removesuffix("%")) >= 0


@pytest.fixture(scope="module")
def html() -> str:
    return page_of(fake_data())


def test_page_is_balanced_and_finite(html):
    page = Page(html)
    assert_finite(page)
    assert len(page.named("h2")) == len(page.named("section")) == 7
    charts = [svg for svg in page.named("svg") if "preserveaspectratio" not in svg]  # not their inner drawings
    assert len(charts) > 25
    # A bar is passed over by a screen reader: its row has the numbers as text.
    assert all(svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"]) for svg in charts)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")


def test_page_is_self_contained(html):
    for outside in ("http:", "https:", "src=", "url(", "<link", "@import", "srcset"):
        assert outside not in html
    assert Page(html).named("script") == [{}] and f"<script>{SCRIPT}</script>" in html
    policy = next(meta["content"] for meta in Page(html).named("meta") if "http-equiv" in meta)
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"


def test_the_headline_has_its_baselines_beside_it():
    data = fake_data(steps=5)
    tokens = [fake_score("fve_token_ridge", "Regression on the last tokens", 0.3975, 0.38, 0.41)]
    tokens += [fake_score("fve_constant", "The best constant", -0.1546, -0.17, -0.14)]
    data["probes"].append(fake_probe("tokens", tokens, title="Tokens"))
    top = re.search("<header>.*?</header>", page_of(data), re.S)[0]
    rows = re.findall(
        r"<p><span>(.*?)</span> <b>(.*?) \(.*?</p><svg[^>]*>.*?<rect class=\"bar\" x=\"(.*?)%\".*? width=\"(.*?)%", top
    )
    assert [row[:2] for row in rows] == [
        ("AV after RL", "0.604"),
        ("AV warm start", "0.339"),
        ("Gold label text", "0.413"),
        ("No text: regression on the last tokens", "0.398"),
        ("No text: the best constant", "−0.155"),
        ("Control: no injection", "−0.587"),
        ("Control: empty text", "−0.631"),
        ("Control: shuffled pairs", "−0.722"),
    ]
    for _, value, x, width in rows:  # of an axis from the lowest end, −0.75, to 1
        value = float(value.replace("−", "-"))
        assert float(width) == pytest.approx(100 * abs(value) / 1.75, abs=0.1)
        assert float(x) == pytest.approx(100 * (min(value, 0) + 0.75) / 1.75, abs=0.1)
    words = text_of(top)
    assert "0 the error of always guessing the mean activation" in words
    assert "scores below 0 (here −0.155), the text of another activation far below (here −0.722)" in words


def test_each_stage_is_shown_with_what_it_was_made_with(html):
    run = html[html.index("The run</h2>") :]
    rows = re.findall(r'<tr><th scope="row">(\w+)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', run)
    assert ("rl", "633", "2026-11-22 15:00", "0123456789ab") in rows
    assert ("evaluate", "41.9", "2026-11-22 15:00", "ba9876543210") in rows
    assert run.count("nla quickstart") == 1  # one command ran them all
    assert "2048 from 212 texts" in run and "300 steps of 8 activations" in run
    pair = html[html.index("Open the pair</h2>") : html.index("The run</h2>")]
    assert "<pre>nla serve --pair runs/quickstart/pair --open</pre>" in pair
    assert "There is no pair yet" in page_of(fake_data(steps=1) | {"open_with": {}})


class HeatMap(HTMLParser):
    """The strips of a page: of each document its pieces (text, attributes of a token or None), in order."""

    def __init__(self, html: str):
        super().__init__()
        self.strips, self.depth, self.token = [], 0, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("class") == "strip":
            self.strips.append([])
            self.depth = 1
        elif self.depth and tag not in VOID:
            self.depth += 1
            self.token = attrs if attrs.get("role") == "option" else self.token

    def handle_endtag(self, tag):
        if self.depth:
            self.depth -= 1
            self.token = self.token if self.depth > 1 else None

    def handle_data(self, text):
        if self.depth and text != "↵":
            self.strips[-1].append((text, self.token))


def test_seconds_of_probes_are_shown_the_longest_first(html):
    shown = text_of(html)
    assert "Seconds of each probe" in shown
    rows = ["after rl22.5", "warm start12.3", "extraction0.010", "total34.8"]
    places = [shown.index(row) for row in rows]
    assert places == sorted(places)
    assert "Seconds of each probe" not in page_of(fake_data(steps=5) | {"seconds_by_probe": {}})


def test_documents_are_heat_maps(html):
    documents, strips = fake_data()["documents"], HeatMap(html).strips
    assert len(strips) == len(documents) == 2
    for document, strip in zip(documents, strips):
        assert "".join(text for text, _ in strip) == document["text"]
        tokens = [(text, attrs) for text, attrs in strip if attrs]
        by_name = {}
        for text, attrs in tokens:  # a token with a line's end comes in two pieces
            by_name.setdefault(attrs["aria-describedby"], ["", attrs])[0] += text
        rows = document["rows"]
        assert [text for text, _ in by_name.values()] == [document["text"][r["start"] : r["end"]] for r in rows]
        for row, (name, (_, attrs)) in zip(rows, by_name.items(), strict=True):
            hue, share = re.fullmatch(r"--hue:var\(--(\w+)\);--share:(\d+)%", attrs["style"]).groups()
            assert hue == ("alert" if row["fve_rl"] < 0 else "rl")
            assert int(share) == pytest.approx(60 * abs(row["fve_rl"]), abs=0.51)
            assert f"{row['fve_rl']:.3f}".replace("-", "−") in attrs["aria-label"] and attrs["title"] == row["rl"]
            assert f'<p class="said" id="{name}">{row["rl"]}</p>' in html
            assert all(row[key] in html for key in ("labels", "warm"))
        assert f"{len(rows)} of the first {document['tokens']} tokens were evaluated" in text_of(html)
    assert html.count('<div class="map" data-map="0"><') == html.count('<div class="map" data-map="1" hidden>') == 1


def test_a_document_that_is_whole_says_how_it_was_chosen(html):
    data = fake_data(steps=2) | {"whole": f"A rule chose it: {HOSTILE[0]}"}
    data["documents"][0]["note"] = f"Every token has a colour: {HOSTILE[0]}"
    text = text_of(page_of(data))
    assert f"A rule chose it: {HOSTILE[0]} The others are documents of the examples, chosen without" in text
    assert "1. news/17 (whole)" in text and "2. json/dumps#2 (whole)" not in text
    assert f"Every token has a colour: {HOSTILE[0]}" in text and text.count("tokens were evaluated") == 1
    assert "These are documents of the examples" in text_of(html) and "(whole)" not in html


def test_an_evaluation_without_documents_says_so():
    assert "before documents were kept" in text_of(page_of(fake_data(steps=2) | {"documents": None}))
    assert "No document was evaluated" in text_of(page_of(fake_data(steps=2) | {"documents": []}))


def test_contents_lead_to_every_section(html):
    page = Page(html)
    targets = [link["href"].removeprefix("#") for link in page.named("a")]
    assert targets == [section["id"] for section in page.named("section")]


def test_what_made_the_figures_is_shown(html):
    text = text_of(html)
    assert "0.10.2" in text and "2 × cpu" in text and '{"seed": 3}' in text and "nla quickstart" in text
    assert "bigram loss2.471" in text and "total1192" in text and f"injection scale{MISSING}" in text
    assert "seed3" in text and "heldout rows2048" in text


def test_headline_and_interval_are_shown(html):
    text = text_of(html)
    assert "0.604" in text and "95 % interval 0.581 to 0.626" in text and "−0.722" in text
    assert "normalised" in text and "constant reconstruction scores below 0" in text  # what a score of 0 means


def test_rounding_does_not_flatter():
    assert interval([0.5819, 0.6251]) == "0.581 to 0.626"
    assert interval([0.57, 0.58]) == "0.570 to 0.580"
    assert interval([22.41, 23.88]) == "22.4 to 23.9" and interval([0.001011, 0.002221]) == "0.00101 to 0.00223"
    assert interval([-1.2894, -0.9701]) == "−1.290 to −0.970" and written(-0.0312) == "−0.031"
    assert interval([0.9991, 0.99987], "share") == "99.9 to 100.0 %"
    for share, shown in ((0.99987, "99.9 %"), (1, "100.0 %"), (0.29, "29.0 %")):
        assert written(share, "share") == shown


def test_every_example_appears(html):
    page = Page(html)
    assert sum(details.get("class") == "example" for details in page.named("details")) == 30 + 6
    assert all(f"json/json.dumps.{i} " in text_of(html) for i in range(30))


def test_long_contexts_keep_their_end():
    data = fake_data(steps=5)
    data["examples"][0] |= {"context": "x" * 50 + "y" * 299 + "\n", "token": "t"}
    text = text_of(page_of(data))
    assert "…" + "y" * 299 + "\nt" in text and "xy" not in text


def test_three_good_and_three_bad_examples_stand_under_the_headline(html):
    scores = [row["fve_rl"] for row in fake_data()["examples"]]
    ranked = sorted(range(30), key=lambda i: -scores[i])
    picked, listed = html.split("All examples</h2>")
    assert picked.index("Highest FVE") < picked.index("<h2>Measurements")
    numbers = [int(i) - 1 for i in re.findall(r"<summary title=.*?><span>(\d+)</span>", picked)]
    assert numbers == ranked[:3] + ranked[:-4:-1]
    assert "Chosen by their score among the 30 below" in picked
    # What the script sorts by, in the order of the evaluation. Without scripts its controls stay hidden.
    assert [float(x) for x in re.findall(r'data-score="(.*?)"', listed)] == scores
    assert '<form class="controls" hidden>' in listed


def test_few_examples_are_not_picked_twice():
    data = fake_data(steps=5)
    data["examples"] = data["examples"][:4]
    picked = page_of(data).split("All examples</h2>")[0]
    assert len(set(re.findall(r"<summary title=.*?><span>(\d+)</span>", picked))) == picked.count("<details class") == 4


@pytest.mark.parametrize("hostile", HOSTILE)
def test_strings_are_escaped(html, hostile):
    def replaced(leaf, key):
        place = key == "chart" or (isinstance(leaf, str) and leaf.isdigit())  # names of a curve are numbers
        return hostile if isinstance(leaf, str) and not place else leaf

    data = broken(fake_data(steps=5), replaced)
    data["figures"][hostile] = data["run"][hostile] = hostile
    data["seconds"] = data["seconds_by_probe"] = {hostile: 1.0}
    for row in data["history"]:
        row[hostile] = 1.0
    other = copy.deepcopy(data["probes"])
    for one in other:
        one["title"] = one["title"] + " alone"  # without others in its chart
    data["probes"] += other
    page = Page(page_of(data))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in Page(html).tags}
    assert page.named("script") == [{}]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "".join(page.text).count(hostile) >= 7 * 30
    labels = [attrs["aria-label"] for _, attrs in page.tags if "aria-label" in attrs]
    assert sum(hostile in label for label in labels) > 6


@pytest.mark.parametrize("place", ["title", "about", "unit", "axis", "label"])
@pytest.mark.parametrize("chart", ["bars", "curve", "histogram"])
def test_each_string_of_a_probe_is_escaped(chart, place):
    for hostile in HOSTILE:
        score = fake_score("1", hostile if place == "label" else "a", 0.5, 0.4, 0.6, [0.5, 0.6])
        facts = {} if place == "label" else {place: hostile}
        data = fake_data(steps=0) | {"probes": [fake_probe("mine", [score], **{"axis": "x", "chart": chart} | facts)]}
        page = Page(page_of(data))
        assert page.named("img") == [] and page.named("script") == [{}] and page.named("b") != []
        assert hostile in "".join(page.text)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_missing_values_survive(value):
    data = fake_data(steps=5)
    page = Page(page_of(with_numbers(data, lambda number: value)))
    assert_finite(page)
    assert MISSING in "".join(page.text)
    for key in ("probes", "examples", "history"):
        assert_finite(Page(page_of(data | {key: []})))
    for key in data["history"][0].keys() - {"step"}:
        assert_finite(Page(page_of(data | {"history": [row | {key: value} for row in data["history"]]})))
    for i in range(len(data["probes"])):
        assert_finite(Page(page_of(data | {"probes": data["probes"][:i] + data["probes"][i + 1 :]})))


def test_scattered_gaps_and_constant_values_survive():
    rng = random.Random(1)
    data = fake_data(steps=40)
    holes = with_numbers(copy.deepcopy(data), lambda number: rng.choice((number, number, None, math.nan)))
    constant = broken(data, lambda leaf, key: 1.0 if isinstance(leaf, float) else leaf)
    alone = data | {"history": [{"step": 1, "fve": 0.4}]}
    for case in (holes, constant, alone, data | {"history": [], "probes": [], "examples": []}):
        assert_finite(Page(page_of(case)))


def test_a_run_without_rl_leads_with_the_warm_start():
    data = fake_data(steps=0)
    data["probes"] = [one for one in data["probes"] if one["name"] in ("warm_start", "gold")]
    data["examples"] = [
        {key: value for key, value in row.items() if key not in ("fve_rl", "cos_rl")} for row in data["examples"]
    ]
    text = text_of(page_of(data))
    assert "Held-out FVE after the warm start0.339" in text and "No RL steps are recorded" in text
    assert "Highest FVE" in text  # before RL


@probe("Words per text", chart="histogram", unit="words", labels={"words": "after RL"})
def words(context):
    """How long the texts are."""
    return {"words": np.arange(40) % 7}


@probe("Next-token KL", chart="curve", unit="nats", axis="block")
def kl(context):
    """The subject goes on from the reconstruction."""
    return {"0": np.full(40, 0.25), "16": np.linspace(0, 1, 40)}


def ends_with_a_dot(context):
    """Whether the text ends with a dot."""
    return {"dot": np.arange(40) % 4 == 0}


def test_probes_of_a_user_are_drawn():
    """As the evaluation makes them: each kind has its chart, its numbers and its caption."""

    class Context(probes.Context):
        vectors = np.zeros((40, 2))

    names = [f"{__name__}:{name}" for name in ("words", "kl", "ends_with_a_dot")]
    documents = [f"document {i // 4}" for i in range(40)]
    drawn = [figures(one, run_probe(path, one, Context()), documents) for path, one in load_probes(names)]
    html = page_of(fake_data(steps=3) | {"probes": drawn})
    for title, svg, numbers, about in (
        ("Words per text", 'class="area rl"', "after RL2.875", "How long the texts are."),
        ("Next-token KL", 'class="band"', "160.500", "The subject goes on from the reconstruction."),
        ("Ends with a dot", '<rect class="bar"', "dot0.250", "Whether the text ends with a dot."),
    ):
        figure = figure_of(html, title)
        assert svg in figure
        caption = text_of(figure[figure.index("<figcaption>") : figure.index("</figcaption>")] + "</figcaption>")
        assert about in caption and numbers in caption and " to " in caption
    assert '<text class="axis end" x="100%" y="100%" dy="34">block</text>' in figure_of(html, "Next-token KL")
    assert_finite(Page(html))
    assert "Words per text" not in text_of(page_of(fake_data(steps=3)))


def test_a_probe_that_cannot_be_drawn_is_refused_before_it_is():
    class Context(probes.Context):
        vectors = np.zeros((3, 2))

    curve = probe("Mine", chart="curve")(lambda context: {"late": np.zeros(3)})
    with pytest.raises(InputError, match="'late'; a curve's are named by their place"):
        run_probe(load_probes([f"{__name__}:kl"])[0][0], curve, Context())
    with pytest.raises(InputError, match="asks for a chart 'pie'; there are bars, curve, histogram"):
        load_probes([f"{__name__}:pie"])


pie = probe("Mine", chart="pie")(lambda context: {})


def test_probes_of_one_title_and_unit_share_a_chart():
    one, two, three = (fake_probe(name, [fake_score(name, name, 0.5, 0.4, 0.6)], title="T") for name in "abc")
    html = page_of(fake_data(steps=0) | {"probes": [one, two, three | {"unit": "nats"}]})
    shared, alone = re.findall("<figure><h3>T</h3>.*?</figure>", html, re.S)
    assert shared.count("<rect") == 2 and alone.count("<rect") == 1
    curves = [
        fake_probe(name, [fake_score(n, n, y, y - 0.1, y + 0.1) for n in ("0", "8")], title="T", chart="curve")
        for name, y in (("one_way", 0.2), ("other_way", 0.4))
    ]
    shared = figure_of(page_of(fake_data(steps=0) | {"probes": curves}), "T")
    assert shared.count('class="line"') == 2 and "one way" in shared and "other way" in shared


def test_what_held_out_texts_are_has_panels_of_the_steps_that_measure_it():
    """Steps between them miss nothing, and the time of the stage has no panel."""
    data = fake_data(steps=6)
    told = lambda step: {"heldout_true": 0.1 * step, "heldout_length": 20.0 + step} if step % 2 == 0 else {}
    clocks = {"seconds_so_far": 5.0, "cpu_seconds_so_far": 7.0}
    data["history"] = [row | clocks | told(row["step"]) for row in data["history"]]
    html = page_of(data)
    path = lambda title: re.search('class="line" d="(.*?)"', figure_of(html, title))[1]  # in % of axes to 1 and to 30
    assert path("Held-out texts: claims that hold") == "M33.33,80.0h0L66.67,60.0L100.0,40.0"
    assert path("Held-out texts: length of an explanation") == "M33.33,26.67h0L66.67,20.0L100.0,13.33"
    assert "are missing or not" not in html and "so_far" not in html.replace("_<wbr>", "_")
    assert "Held-out texts" not in page_of(fake_data(steps=6))


def test_figures_of_probes_in_training_have_panels_together():
    """Measured before the first step and after every second one; the other panels begin at step 1 and miss nothing."""
    data = fake_data(steps=6)
    names = ("fve_rl", "fve_rl_frozen", "gap_frozen_critic", "gap_quotes_stripped_live", "gap_quotes_stripped_warm")
    names += ("true_after_rl", "last_word_true_after_rl", "mine")
    figures = lambda step: {f"probe/{name}": 0.1 * step + i for i, name in enumerate(names)} | {"seconds_probes": 1.0}
    data["history"] = [{"step": 0}, *data["history"]]
    data["history"] = [row | (figures(row["step"]) if row["step"] % 2 == 0 else {}) for row in data["history"]]
    html = page_of(data)
    lines = {
        "Probes: FVE": ("fve rl", "fve rl frozen", "gap frozen critic"),
        "Probes: lost by quotes stripped": ("live", "warm"),
        "Probes: claims that are true": ("all", "last word"),
        "Probes: mine": (),
    }
    for title, told in lines.items():
        drawn = figure_of(html, title)
        assert drawn.count('class="line"') == max(1, len(told)) and all(f">{line}<" in drawn for line in told), title
    assert "are missing or not" not in html and "seconds_probes" not in html and html.count("<h3>Probes: ") == 4
    assert figure_of(html, "Reward") == figure_of(page_of(fake_data(steps=6)), "Reward")


def test_a_run_that_means_little_says_so_at_its_top(html):
    assert 'role="alert"' not in html

    def warned(data: dict) -> str:
        html = page_of(data)
        assert html.index('role="alert"') < html.index("Held-out FVE")
        return re.search('<div class="warning" role="alert">(.*?)</div>', html)[1]

    data = fake_data(steps=30)
    score_of(data, "extraction_rate")["mean"] = 0.4999
    assert warned(data).startswith("<p>Only 49.9 % of the responses hold an explanation")
    assert warned(data).count("<p>") == 1

    data = fake_data(steps=30)
    for name in ("fve_shuffled", "fve_empty", "fve_no_injection"):
        score_of(data, name)["mean"] = 0.601
    assert "No control scores lower than the headline" in warned(data)
    score_of(data, "fve_empty")["mean"] = 0.5
    assert "No control" not in warned(data)
    assert (
        warned(data).startswith("<p>The text of another activation scores as high") and warned(data).count("<p>") == 1
    )
    score_of(data, "fve_shuffled")["mean"] = 0.5
    assert 'role="alert"' not in page_of(data)

    data = fake_data(steps=30)
    score_of(data, "fve_warm")["mean"] = 0.62
    assert warned(data) == "<p>RL made the explanations worse: 0.620 before, 0.604 after.</p>"

    data = fake_data(steps=30)
    score_of(data, "fve_rl")["mean"], score_of(data, "fve_warm")["mean"] = -0.1, -0.2
    assert warned(data).startswith("<p>The headline is −0.100: always guessing the mean activation would be closer.")

    data = fake_data(steps=30)
    for i in range(3):
        data["history"][i]["skipped"] = True
    assert 'role="alert"' not in page_of(data)
    data["history"][3]["skipped"] = True
    assert "4 of 30 training steps were skipped" in warned(data)

    data = fake_data(steps=30)
    for row in data["history"][-20:]:
        row["identical_texts"] = 0.95
    assert "The AV has collapsed: at the end of RL 95.0 % of its texts equal another sample" in warned(data)
    data["history"][-1]["identical_texts"] = None  # of a step that was skipped
    assert "The AV has collapsed: at the end of RL 95.0 %" in warned(data)
    data["history"][-1]["identical_texts"] = -20.0  # their mean counts
    assert 'role="alert"' not in page_of(data)

    data = fake_data(steps=30)
    data["figures"]["labels_too_long"] = 0.25
    assert "25.0 % of the labels are longer than prompts.max_new_tokens" in warned(data)


def test_before_the_evaluation_the_metrics_of_training_warn():
    data = fake_data(steps=30) | {"probes": [], "examples": [], "documents": [], "state": "This run is not finished."}
    page = page_of(data)
    assert 'role="alert"' not in page and "This run is not finished." in text_of(page)
    assert "Nothing was measured yet" in text_of(page) and "Reward" in page
    for row in data["history"][-20:]:
        row["extraction_rate"] = 0.2
    assert warnings(Report(**data)) == ["Only 20.0 % of the responses hold an explanation; others are scored as empty."]


def test_the_terminal_says_what_the_page_says(tmp_path, capsys):
    data = fake_data(steps=30)
    score_of(data, "extraction_rate")["mean"] = 0.0
    for name in ("fve_shuffled", "fve_empty", "fve_no_injection"):
        score_of(data, name)["mean"] = 0.601
    said = warnings(Report(**data))
    assert len(said) == 2 and all(sentence in page_of(data) for sentence in said)
    scores = {"fve_rl": 0.601, "fve_rl_ci95": [0.5, 0.7], "fve_empty": 0.601}
    (tmp_path / "summary.json").write_text(json.dumps(scores))
    print_headline(tmp_path, said)
    assert capsys.readouterr().out.splitlines()[:2] == [f"WARNING: {sentence}" for sentence in said]


def test_the_step_axis_is_linear_and_ends_at_the_last_step():
    steps = axis("step", [0, 1.05 * 72], last=72)
    assert list(steps.ticks) == [0, 20, 40, 60, 72] and steps(36) == pytest.approx(steps(72) / 2, abs=0.01)
    assert short(12000) == "12\u202f000"
    curve = figure_of(page_of(fake_data(steps=72)), "FVE against RL steps")
    assert 'y="100%" dy="17">72</text>' in curve
    # The final evaluation stands clear of the last held-out dot: 5 % of the narrowest plot are more than two radii.
    dots = [float(x) for x in re.findall(r'<circle class="\w+" cx="([\d.]+)%"', curve)]
    assert dots[-1] == 100 and max(dots[:-1]) < 96


def test_noisy_lines_have_a_running_mean():
    line = Line("a", "rl", [(1, 0.0), (2, 3.0), (3, None), (4, 3.0), (5, 9.0)])
    raw, mean = with_running_mean(line, 3)
    assert raw.points == line.points and raw.css == "rl faint"
    assert mean.points == [(1, 1.5), (2, 1.5), (3, 3.0), (4, 6.0), (5, 6.0)]
    assert with_running_mean(line, 1) == [line]
    html = page_of(fake_data(steps=72))
    assert "running means over 5 steps" in html and figure_of(html, "Reward").count('class="line"') == 2
    assert "running means" not in page_of(fake_data(steps=10))


def test_a_first_step_that_compiles_does_not_set_the_scale():
    durations = figure_of(page_of(fake_data(steps=72)), "Seconds per phase")
    ticks = [float(x) for x in re.findall(r'<text class="end" x="-7" y="[\d.]+%" dy="4">([\d.]+)<', durations)]
    assert max(ticks) <= 2
    assert "Not drawn: 2 values of up to 31.7" in durations


def test_metrics_without_a_panel_of_ours_have_their_own(html):
    assert "Not recorded" not in html
    assert 'class="line"' in figure_of(html, "feature/overlap")
    assert "Not recorded" in figure_of(page_of(fake_data() | {"history": [{"step": 1, "fve": 0.1}]}), "Entropy")


def test_lengths_of_response_and_explanation_have_different_names(html):
    titles = re.findall("<figure><h3>(.*?)</h3>", html)
    assert len(titles) == len(set(titles))
    assert {"Explanation length", "Length of the whole response, with tags and end"} <= set(titles)
