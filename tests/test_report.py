"""The report page: well-formed, self-contained, escaped, and unmoved by missing values."""

import copy
import math
import random
import re
from html.parser import HTMLParser

import pytest

from nla_jax.tools.report.page import MISSING, interval, percent, render

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = ("<script>alert(1)</script>", '"><img onerror=alert(1) src=x>', "</svg></style></title>", "'&amp;<b>")


def fake_data(steps: int = 300, seed: int = 0) -> dict:
    """A run of realistic shape: FVE grows with log(step), scores are skewed, some lines are noisy."""
    rng = random.Random(seed)
    history = []
    for step in range(1, steps + 1):
        progress = math.log1p(step) / math.log1p(steps)
        fve = 0.34 + 0.28 * progress
        history.append({
            "step": step, "reward": -0.9 + 0.42 * progress + rng.gauss(0, 0.03), "fve": fve + rng.gauss(0, 0.035),
            "kl": 0.35 * progress**2 + abs(rng.gauss(0, 0.01)), "entropy": 1.6 - 0.7 * progress + rng.gauss(0, 0.04),
            "length": 88 + 14 * progress + rng.gauss(0, 3),
            "extraction_rate": min(1, 0.96 + 0.04 * rng.random()), "logprob_gap_mean": 0.004 + 0.002 * rng.random(),
            "logprob_gap_max": 0.05 + rng.expovariate(30), "av_grad_norm": 0.6 + rng.expovariate(4),
            "ar_grad_norm": 1.4 - 0.5 * progress + rng.expovariate(8),
            "samples_per_second": 410 + rng.gauss(0, 12), "seconds_rollout": 1.3 + rng.random() / 10,
            "seconds_host": 0.09 + rng.random() / 50, "seconds_train": 0.6 + rng.random() / 20, "skipped": 0})
        if step in (1, 3, 10, 30, 100, 200, steps):
            history[-1]["heldout_fve"] = fve - 0.015 + rng.gauss(0, 0.006)
    context = ('def dumps(obj, *, skipkeys=False, ensure_ascii=True,\n          allow_nan=True, indent=None):\n'
               '    """Serialize ``obj`` to a JSON formatted ``str``.\n\n    If ``skipkeys`` is true then ``dict`` '
               'keys that are not basic types\n    will be skipped instead of raising a ``Type')
    text = ("A docstring of a Python serialisation function, listing what its keyword arguments do. The sentence "
            "names an exception that is not raised when the flag is set. The final token completes an exception name "
            "inside double backticks, so closing backticks and a full stop are expected next.")
    examples = [{
        "document": f"json/json.dumps.{i}", "context": context * (1 + i % 3),
        "token": ("Error", "\n", " the", "``")[i % 4],
        "after": "``.\n\n    If ``ensure_ascii`` is false, then the return value can contain non-ASCII characters",
        "label": text, "warm": text[:150], "rl": text + " It may be a `TypeError`.", "fve_warm": rng.gauss(0.34, 0.2),
        "fve_rl": rng.gauss(0.6, 0.15), "cos_rl": rng.gauss(0.85, 0.04)} for i in range(30)]
    return {
        "title": "quickstart", "subject": "byte-docs-6l", "layer": 3, "created": "2026-11-22 16:00",
        "command": "nla quickstart --config configs/quickstart.yaml --set rl.steps=300 --set out=runs/quickstart",
        "summary": {
            "fve_warm": 0.3391, "fve_rl": 0.6038, "fve_rl_ci95": [0.5811, 0.6252], "fve_rl_median": 0.6391,
            "fve_rl_meannorm": 0.7012, "cos_rl": 0.8514, "fve_gold_text": 0.4127, "fve_shuffled": -0.7215,
            "fve_empty": -0.0312, "fve_no_injection": -0.0871, "extraction_rate": 0.99987, "mean_length": 101.3,
            "logprob_gap_max": 0.1934, "subject_loss": 1.213, "bigram_loss": 2.471, "unigram_loss": 3.114,
            "heldout_documents": 212, "heldout_rows": 2048,
            "seconds_by_stage": {"pretrain": 412.7, "activations": 11.2, "warm start": 93.4, "rl": 633.1,
                                 "evaluate": 41.9}},
        "history": history,
        "prefix_curve": {"tokens": [0, 4, 8, 16, 32, 48, 64, 96, 128],
                         "fve": [-0.03, 0.08, 0.17, 0.29, 0.42, 0.50, 0.55, 0.596, 0.603]},
        "row_fve": {"warm": [1 - rng.lognormvariate(-0.5, 0.45) for _ in range(2048)],
                    "rl": [1 - rng.lognormvariate(-1.05, 0.5) for _ in range(2048)],
                    "shuffled": [1 - rng.lognormvariate(0.5, 0.3) for _ in range(2048)]},
        "lengths": [max(12, min(160, int(rng.gauss(101, 16)))) for _ in range(2048)],
        "examples": examples}


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


def broken(value, leaf):
    """`value` with every leaf replaced."""
    if isinstance(value, dict):
        return {key: broken(item, leaf) for key, item in value.items()}
    if isinstance(value, list):
        return [broken(item, leaf) for item in value]
    return leaf(value)


def assert_finite(page: Page) -> None:
    """Every coordinate of every drawing is a finite number."""
    for _, attrs in page.tags:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d", "viewBox"):
            if name in attrs:
                assert re.fullmatch(r"[-\d., MLhZ]*|100%", attrs[name]), attrs
    for rect in page.named("rect"):
        assert float(rect["width"]) >= 0


@pytest.fixture(scope="module")
def html() -> str:
    return render(fake_data())


def test_page_is_balanced_and_finite(html):
    page = Page(html)
    assert_finite(page)
    assert len(page.named("h2")) == 8
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.named("svg"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")


def test_page_is_self_contained(html):
    for outside in ("http:", "https:", "src=", "url(", "<link", "@import", "<script", "srcset"):
        assert outside not in html


def test_what_made_the_figures_is_shown():
    made = {"seed": 3, "nla_jax": "0.2.0", "jax": "0.10.2", "commit": None, "devices": "2 × cpu"}
    text = "".join(Page(render(fake_data() | {"run": made, "config": '{"seed": 3}'})).text)
    assert "0.10.2" in text and "2 × cpu" in text and '{"seed": 3}' in text and "nla quickstart" in text


def test_headline_and_interval_are_shown(html):
    text = "".join(Page(html).text)
    assert "0.604" in text and "95 % interval 0.581 to 0.626" in text and "−0.722" in text


def test_rounding_does_not_flatter():
    assert interval([0.5819, 0.6251]) == "0.581 to 0.626"
    assert interval([0.57, 0.58]) == "0.570 to 0.580"
    assert percent(0.99987) == "99.9 %" and percent(1) == "100.0 %" and percent(0.29) == "29.0 %"


def test_every_example_appears(html):
    page = Page(html)
    assert sum(details.get("class") == "example" for details in page.named("details")) == 30
    assert all(f"json/json.dumps.{i} " in page.text for i in range(30))


def test_long_contexts_keep_their_end():
    data = {"examples": [{"context": "x" * 50 + "y" * 299 + "\n", "token": "t"}]}
    text = "".join(Page(render(data)).text)
    assert "…" + "y" * 299 + "\nt" in text and "xy" not in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_strings_are_escaped(html, hostile):
    data = broken(fake_data(steps=5), lambda leaf: hostile if isinstance(leaf, str) else leaf)
    data["summary"][hostile] = hostile
    data["summary"]["seconds_by_stage"] = {hostile: 1.0}
    page = Page(render(data))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in Page(html).tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "".join(page.text).count(hostile) >= 7 * 30


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "", "not a number"])
def test_missing_values_survive(value):
    data = fake_data(steps=5)
    page = Page(render(broken(data, lambda leaf: value)))
    assert_finite(page)
    assert MISSING in "".join(page.text)
    for key in data:
        assert_finite(Page(render({**data, key: value})))
        assert_finite(Page(render({k: v for k, v in data.items() if k != key})))
    for key in data["summary"]:
        assert_finite(Page(render({**data, "summary": {**data["summary"], key: value}})))


def test_scattered_gaps_and_constant_values_survive():
    rng = random.Random(1)
    data = fake_data(steps=40)
    holes = broken(copy.deepcopy(data), lambda leaf: rng.choice((leaf, leaf, None, math.nan)))
    constant = broken(data, lambda leaf: 1.0 if isinstance(leaf, (int, float)) else leaf)
    for case in (holes, constant, {"history": [{"step": 1, "fve": 0.4}]}, {}):
        assert_finite(Page(render(case)))


def test_a_run_without_rl_leads_with_the_warm_start():
    data = fake_data(steps=0)
    data["summary"].update(fve_rl=None, fve_rl_ci95=None)
    text = "".join(Page(render(data)).text)
    assert "Held-out FVE after the warm start" in text and "No RL steps are recorded" in text
