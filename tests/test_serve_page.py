"""The page of `nla serve` as a file: what stands in it, `--export`, and the flags of the verb."""

import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import one_line
from test_serve import CHAT, TEXT

from nla_jax.cli import main
from nla_jax.io.parquet import write_table
from nla_jax.pair import load_pair
from nla_jax.runtime.errors import InputError
from nla_jax.serve.models import short_names
from nla_jax.serve.page import POLICY, SCRIPT, STYLE, page
from nla_jax.subject import extract, load_subject

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{SCRIPT}} <!-- \u2028 &amp;"


class Page(HTMLParser):
    """The tags of a page, and the content of its scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        self.scripts += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_the_page_loads_nothing_and_holds_texts_as_data():
    html = page({"pairs": [{"name": HOSTILE}]})
    found = Page(html)
    assert [tag for tag, _ in found.tags].count("script") == 2 and "img" not in [tag for tag, _ in found.tags]
    data, script = found.scripts
    assert json.loads(data) == {"pairs": [{"name": HOSTILE}]} and script == SCRIPT
    assert not re.search(r"https?://", html) and not any("src" in attrs for _, attrs in found.tags)
    assert [attrs["href"] for _, attrs in found.tags if "href" in attrs] == ["data:,"]
    assert not any(name.startswith("on") or name == "style" for _, attrs in found.tags for name in attrs)
    assert POLICY in html and "unsafe" not in POLICY and "</script" not in SCRIPT and "</style" not in STYLE
    for way in ("innerHTML", "outerHTML =", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert way not in SCRIPT


@pytest.fixture(scope="module")
def place(pair, subject_folder, tmp_path_factory):
    """The folder of the tiny pair, and its subject's."""
    folder = tmp_path_factory.mktemp("serve")
    pair.save(folder / "pair")
    return ["--pair", str(folder / "pair"), "--subject", str(subject_folder)]


def test_export_writes_every_explanation(place, pair, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(f"{TEXT}\n", encoding="utf-8")
    command = ["serve", *place, "--export", str(tmp_path / "text.txt"), "--out", str(tmp_path / "page.html")]
    assert main(command) == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(Page(html).scripts[0])
    assert "".join(data["document"]["tokens"]) == TEXT == data["content"]["text"] and data["saved"]
    loaded = load_pair(place[1])
    expected = loaded.verbalize(extract(load_subject(place[3], 1), [TEXT], "all").vectors, 200, 0.0)
    assert [data["answers"][0][str(row)]["explanation"] for row in range(len(expected))] == expected and any(expected)
    assert data["answers"][0]["0"]["fve"] is None and data["pairs"][0]["fve"] is False  # no variance is recorded
    assert main(command) == 1 and "exists" in one_line(capsys)


def test_a_notebook_shows_the_page_in_a_frame_that_reaches_nothing(place, tmp_path):
    pair, subject = load_pair(place[1]), load_subject(place[3], 1)
    shown = pair.show(TEXT, subject)
    (tag, attributes), *more = Page(shown._repr_html_()).tags
    assert tag == "iframe" and not more and attributes["srcdoc"] == shown.html
    assert set(attributes["sandbox"].split()) == {"allow-scripts", "allow-downloads"}
    data = json.loads(Page(shown.html).scripts[0])
    acts = extract(subject, [TEXT], "all")
    assert data["document"]["tokens"] == acts.tokens and data["pairs"][0]["name"] == "pair"
    assert json.loads(Page(pair.show(TEXT, place[3]).html).scripts[0])["answers"] == data["answers"]
    shown.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == shown.html
    with pytest.raises(InputError, match="exists"):
        shown.save(tmp_path / "page.html")
    with pytest.raises(InputError, match="is not here"):  # "tiny", which the sidecar names
        pair.show(TEXT)
    explained = json.loads(Page(acts[:9].show(pair).html).scripts[0])
    one = lambda answers, row: answers[0][str(row)]["explanation"]
    assert [one(explained["answers"], row) for row in range(9)] == [one(data["answers"], row) for row in range(9)]
    with pytest.raises(InputError, match="activations of layer 0, the pair reads layer 1"):
        dataclasses.replace(acts, layer=0).show(pair)


def test_activations_alone_are_shown_by_their_norms(place):
    acts = extract(load_subject(place[3], 1), [TEXT, "Another text."], "all")
    data = json.loads(Page(acts.show().html).scripts[0])
    assert data["document"]["tokens"] == acts.tokens and data["pairs"][0]["silent"]
    assert set(data["document"]["roles"]) == {"document 0", "document 1"}
    lengths = np.linalg.norm(acts.vectors, axis=1)
    np.testing.assert_allclose(data["document"]["norms"][0], lengths / np.median(lengths), rtol=1e-4)
    with pytest.raises(InputError, match="no activations to show"):
        acts[:0].show()


@pytest.mark.parametrize(
    "names, short",
    [
        (["quickstart"], ["quickstart"]),
        (["runs/a/pair", "runs/a/pair_warm/"], ["pair", "pair_warm"]),
        (["runs/a/pair", "runs/b/pair"], ["a/pair", "b/pair"]),
        (["me/pair", "me/pair"], ["pair", "pair"]),
        (["/x/pair", "y/pair", "pair"], ["x/pair", "y/pair", "pair"]),
    ],
)
def test_a_saved_page_does_not_say_where_pairs_lie(names, short):
    assert short_names(names) == short


def test_export_holds_the_nearest_training_activations(place, tmp_path):
    (tmp_path / "text.txt").write_text("The river.", encoding="utf-8")
    trained = extract(load_subject(place[3], 1), [TEXT], "all")
    write_table(trained.table(), tmp_path / "run/activations/rl-00000-of-00001.parquet")
    flags = ["--workdir", str(tmp_path / "run"), "--export", str(tmp_path / "text.txt")]
    assert main(["serve", *place, *flags, "--out", str(tmp_path / "page.html")]) == 0
    data = json.loads(Page((tmp_path / "page.html").read_text(encoding="utf-8")).scripts[0])
    said = {row for row, answer in data["answers"][0].items() if answer["explanation"]}
    assert data["pairs"][0]["nearest"] and data["nearest"][0].keys() == said and said
    for of in data["nearest"][0].values():
        assert of["among"] == len(trained) and all(found["text"] in trained.texts for found in of["nearest"])


def test_export_of_a_chat(place, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(CHAT), encoding="utf-8")
    assert main(["serve", *place, "--export", str(tmp_path / "chat.json"), "--out", str(tmp_path / "c.html")]) == 0
    data = json.loads(Page((tmp_path / "c.html").read_text(encoding="utf-8")).scripts[0])
    assert data["content"] == {"messages": CHAT} and set(data["document"]["roles"]) == {"user", "assistant"}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--export", "x.txt"], "--out"),
        (["--out", "x.html"], "give both"),
        (["--export", "x.txt", "--out", "x.txt"], ".html"),
        (["--export", "nowhere.txt", "--out", "x.html"], "nowhere.txt"),
        (["--port", "70000"], "--port"),
        (["--batch", "0"], "--batch"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--queue", "0"], "--queue"),
        (["--confidence", "0"], "--confidence of 1 or more"),
        (["--labeller", "a:b", "--export", "x.txt", "--out", "x.html"], "--confidence N; give both"),
        (["--labeller", "json:JSONDecoder"], "cannot read claims"),
        (["--seconds", "0"], "--seconds"),
        (["--pair", "nowhere"], "nowhere"),
        (["--workdir", "nowhere"], "holds no training activations"),
        (["--host", "256.0.0.1"], "cannot listen"),
    ],
    ids=str,
)
def test_wrong_flags_get_one_sentence(place, capsys, flags, said):
    assert main(["serve", *place, "--port", "0", *flags]) == 1
    assert said in one_line(capsys)


def test_a_port_that_is_taken_gets_one_sentence(place, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", *place, "--port", str(taken.getsockname()[1])]) == 1
    assert "give another --port" in one_line(capsys)


def test_the_command_serves_until_it_is_stopped(place):
    """Elsewhere than on this machine alone: only who has the address with its token is answered. Ended amid work."""
    command = [sys.executable, "-m", "nla_jax.cli", "serve", *place, "--host", "0.0.0.0", "--port", "0"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        address = re.search(r"http://0\.0\.0\.0:(\d+)/\?token=(\S+)", server.stdout.readline())
        port, token = address.groups()
        opened = lambda query: urllib.request.urlopen(f"http://127.0.0.1:{port}/{query}", timeout=20)
        with opened(f"?token={token}") as response:
            assert SCRIPT in response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            opened("")
        headers = {"x-token": token, "content-type": "application/json"}
        posted = lambda **fields: urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/ask", json.dumps(fields).encode(), headers), timeout=20
        )
        with posted(do="read", text=TEXT * 9) as response:
            document = json.loads(response.readline())
        waiting = posted(do="explain", document=document["id"], rows=list(range(len(document["tokens"]))))
    finally:
        server.send_signal(signal.SIGINT)
    waiting.close()
    assert server.wait(20) == 130 and server.stderr.read() == "nla: stopped.\n"
