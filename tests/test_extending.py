"""A study extended from a file of its own: every extension point, used through a config, and written wrongly."""

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CONFIG, TINY, copy_before, history, nla_main, one_line, random_params, talkative
from safetensors.numpy import load_file

from nla_jax.cli import main
from nla_jax.data.rows import load_rows
from nla_jax.io.folders import save_model
from nla_jax.io.safetensors import SINGLE

MINE = '''
import re
from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np
import optax


def documents():
    """A corpus: strings, pairs and dictionaries."""
    chosen = [(name, text[:600]) for name, text in sorted(topics.items()) if len(text) > 800][:40]
    for i, (name, text) in enumerate(chosen):
        yield [text, (name, text), {"id": name, "text": text}][i % 3]


class Shouting:
    """A labeller with settings."""

    def __init__(self, words):
        self.words = words

    def label(self, rows):
        return [" ".join(row.text.split()[-self.words :]).upper() or "NOTHING" for row in rows]


def nudge(states, vectors, scale):
    """A second injection: a little of the activation, added."""
    return states + 0.01 * vectors


def descent(rate):
    """An optimizer that does not ask for the number of steps."""
    return optax.sgd(rate)


def blocks_alone(steps, lr):
    """An optimizer that knows the parameters by name, moves some of them, and keeps factors of their moments."""
    moves = lambda params: {name: "moves" if name == "blocks" else "stays" for name in params}
    moving = optax.adafactor(lr, min_dim_size_to_factor=8)
    return optax.partition({"moves": moving, "stays": optax.set_to_zero()}, moves)


def overlap(texts, rows):
    """A feature: how many words of the text stand in the context."""
    shared = lambda text, row: len(set(text.lower().split()) & set(row["text"].lower().split()))
    return {"overlap": np.array([shared(text, row) for text, row in zip(texts, rows)], np.float32)}


def no_copying(s):
    """A reward of the text: the reconstruction, minus a price for words of the context."""
    return jnp.where(s.valid, -s.mse - 0.1 * s.features["overlap"], -9.0)


def first_word(texts, rng):
    """A reader: the AR sees the first word of each text."""
    return [text.split(" ")[0] for text in texts]


def long(context):
    """Whether the explanation has more than twenty characters."""
    return {"long": np.array([len(text) > 20 for text in context.texts("rl")], float)}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the user's file, found as if commands ran in it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_study.py").write_text(MINE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def flags(folder, tokenizer) -> list[str]:
    """A tiny study made of the user's parts; its subject writes explanations from the start."""
    save_model(folder / "subject", talkative(random_params(TINY), tokenizer), TINY, tokenizer)
    values = {
        "subject.path": folder / "subject",
        "corpus.source": "my_study:documents",
        "corpus.min_chars": 100,
        "extract.max_tokens": 64,
        "extract.shard_documents": 4,
        "prompts.max_new_tokens": 40,
        "label.labeller": "my_study:Shouting",
        "label.settings.words": 3,
        "prompts.inject": "('nla_jax.autoencoder:replace', 'my_study:nudge@0')",
        "sft.av.steps": 1,
        "sft.av.optimizer.lr": 1e-4,
        "sft.ar.steps": 1,
        "rl.steps": 2,
        "rl.heldout_every": 9,
        "rl.reward": "my_study:no_copying",
        "rl.reader": "my_study:first_word",
        "rl.features": "my_study:overlap",
        "rl.subject_kl": True,
        "evaluate.probes": "('nla_jax.probes.fidelity:after_rl', 'my_study:long')",
    }
    config = folder / "study.py"
    config.write_text(
        textwrap.dedent(f"""
        import runpy

        def get_config(variant=""):
            c = runpy.run_path({CONFIG.partition(":")[0]!r})["get_config"]("tiny")
            c.sft.av.optimizer = dict(function="my_study:blocks_alone", lr=1e-4)
            c.rl.ar_optimizer = dict(function="my_study:descent", rate=0.01)
            return c
    """)
    )
    return ["--config", str(config), *(f"--config.{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def extended(flags, folder) -> Path:
    """The working folder of that study."""
    assert main(["quickstart", "--workdir", str(folder / "run"), *flags]) == 0
    return folder / "run"


@pytest.mark.whole_run
def test_every_part_of_the_users_is_used(extended, folder):
    ids = set(load_rows(extended, "rl").column("doc_id"))
    assert any(id.startswith("my_study:documents:") for id in ids) and any(":" not in id for id in ids)
    before, after = (load_file(path / SINGLE) for path in (folder / "subject", extended / "pair_warm/av"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all(".layers." in name for name in moved)
    label = load_rows(extended, "av_sft").column("api_explanation")[0]
    assert label == label.upper() and len(label.split()) <= 3
    records = history(extended)
    assert all("feature/overlap" in record and "ar_lr" not in record and record["av_lr"] > 0 for record in records)
    assert all(0 < record["feature/subject_kl"] < 20 for record in records)
    texts = [json.loads(line) for line in (extended / "train/rl/texts.jsonl").read_text().splitlines()]
    failed = [row for row in texts if not row["valid"]]
    assert len(texts) == 16 and all(row["reward"] == pytest.approx(-9) for row in failed)
    assert any(row["valid"] and row["reward"] < -row["mse"] + 1e-6 for row in texts)
    page = json.loads((extended / "evaluation.json").read_text())
    assert [probe["name"] for probe in page["probes"]] == ["after_rl", "long"]
    assert page["probes"][1]["about"] == "Whether the explanation has more than twenty characters."
    scores = pq.read_table(extended / "evaluation/probes/long.parquet")
    assert scores.column("long").to_pylist() and scores.column("doc_id").to_pylist()
    assert "more than twenty characters" in (extended / "report.html").read_text()
    summary = json.loads((extended / "summary.json").read_text())
    assert 0 <= summary["long"] <= 1 and len(summary["long_ci95"]) == 2


# What each part can be written as, wrongly: (setting, stage, code that replaces `def bad`, words of the sentence)
WRONG = {
    "corpus of another kind": ("corpus.source", "extract", "def bad():\n    yield 7", "Item 1"),
    "corpus that fails": ("corpus.source", "extract", "def bad():\n    raise OSError('gone')", "OSError: gone"),
    "labeller without label": ("label.labeller", "label", "def bad(words):\n    return 3", "has no method `label"),
    "labeller that labels too few": (
        "label.labeller",
        "label",
        "class bad:\n    def __init__(self, words): pass\n    def label(self, rows):\n        return ['one']",
        "1 labels for",
    ),
    "labeller that fails": (
        "label.labeller",
        "label",
        "class bad:\n    def __init__(self, words): pass\n    def label(self, rows):\n        return rows[0].nothing",
        "has no attribute 'nothing'",
    ),
    "labeller with other settings": (
        "label.labeller",
        "label",
        "def bad():\n    pass",
        "unexpected keyword argument 'words'",
    ),
    "injection of another shape": (
        "prompts.inject",
        "sft",
        "def bad(states, vectors, scale):\n    return states[0]",
        "shape",
    ),
    "injection that fails": (
        "prompts.inject",
        "sft",
        "def bad(states, vectors, scale):\n    return states @ 3",
        "TypeError|Error",
    ),
    "optimizer that is none": (
        "sft.av.optimizer.function",
        "sft",
        "def bad(**settings):\n    return 3",
        "GradientTransformation",
    ),
    "optimizer that fails": (
        "sft.av.optimizer.function",
        "sft",
        "def bad(lr, **more):\n    return 1 / 0",
        "ZeroDivisionError",
    ),
    "reward of another shape": (
        "rl.reward",
        "rl",
        "def bad(s):\n    return s.mse.mean()",
        r"shape \(\), expected \(6,\)",
    ),
    "reward that fails": ("rl.reward", "rl", "def bad(s):\n    return s.features['no']", "KeyError: 'no'"),
    "reward with another signature": (
        "rl.reward",
        "rl",
        "def bad(mse, length):\n    return -mse",
        "missing 1 required",
    ),
    "reader of too few": (
        "rl.reader",
        "rl",
        "def bad(texts, rng):\n    return texts[:1]",
        "expected a list of 3 texts",
    ),
    "reader that fails": ("rl.reader", "rl", "def bad(texts, rng):\n    return texts + rng", "TypeError"),
    "feature of another shape": (
        "rl.features",
        "rl",
        "def bad(texts, rows):\n    return {'x': [1.0]}",
        r"shape \(1,\)",
    ),
    "feature that is no mapping": (
        "rl.features",
        "rl",
        "def bad(texts, rows):\n    return [1.0]",
        "expected a mapping",
    ),
    "feature that fails": ("rl.features", "rl", "def bad(texts, rows):\n    return rows[0]['no']", "KeyError: 'no'"),
    "probe of another shape": (
        "evaluate.probes",
        "evaluate",
        "def bad(context):\n    return {'x': [1.0]}",
        r"shape \(1,\)",
    ),
    "probe with a score of a taken name": (
        "evaluate.probes",
        "evaluate",
        "def bad(context):\n    return {'doc_id': [0.0] * len(context.vectors)}",
        "a score 'doc_id', as the documents",
    ),
    "probe that fails": (
        "evaluate.probes",
        "evaluate",
        "def bad(context):\n    return context.nothing",
        "no attribute 'nothing'",
    ),
    "probe that is no function": ("evaluate.probes", "evaluate", "bad = 3", "int, no function"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_written_wrongly_is_named_with_its_line(case, extended, flags, folder, tmp_path, monkeypatch, capsys):
    setting, stage, code, words = WRONG[case]
    module = f"wrong_{re.sub('[^a-z]', '_', case)}"
    (tmp_path / f"{module}.py").write_text(f"# A file of the user's.\n\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    workdir = copy_before(extended, tmp_path, stage)
    if stage == "label":
        shutil.rmtree(workdir / "labels")
    capsys.readouterr()
    assert main([stage, "--workdir", str(workdir), *flags, f"--config.{setting}={module}:bad"]) == 1
    said = one_line(capsys)
    assert re.search(words, said) and f"{module}.py" in said and said.endswith("."), said
    assert re.search(r"line \d+", said) or "no function" in said, said


@pytest.mark.parametrize("setting, stage", sorted({(setting, stage) for setting, stage, *_ in WRONG.values()}))
def test_a_name_that_does_not_exist_is_one_sentence(setting, stage, extended, flags, tmp_path, capsys):
    workdir = copy_before(extended, tmp_path, stage)
    for path, words in (("my_study:nobody", "my_study.py has no such name"), ("nowhere:f", "cannot be found")):
        assert main([stage, "--workdir", str(workdir), *flags, f"--config.{setting}={path}"]) == 1
        said = one_line(capsys)
        assert words in said and setting.split("[")[0] in said, said


def test_wrong_functions_are_found_before_the_first_stage(corpus, tmp_path, capsys):
    """A reward that cannot be imported costs no pretraining."""
    assert nla_main("quickstart", tmp_path / "run", corpus, "--config.rl.reward=nowhere:f") == 1
    assert "rl.reward names the module 'nowhere'" in one_line(capsys)
    assert not (tmp_path / "run/stages").exists()


@pytest.mark.parametrize("name", ["subject_kl", "truth"])
def test_a_feature_cannot_have_a_name_that_a_setting_measures(flags, tmp_path, monkeypatch, capsys, name):
    (tmp_path / f"taken_{name}.py").write_text(f"def mine(texts, rows):\n    return {{'{name}': [0.0] * len(texts)}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    more = [f"--config.rl.features=taken_{name}:mine", f"--config.rl.{name}=True"]
    assert main(["check", "--workdir", str(tmp_path / "run"), *flags, *more]) == 1
    assert f"rl.features give '{name}', which rl.{name} measures too; call yours otherwise." in one_line(capsys)


def test_truth_is_asked_of_a_labeller_that_can_check_claims(flags, tmp_path, capsys):
    assert main(["check", "--workdir", str(tmp_path / "run"), *flags, "--config.rl.truth=True"]) == 1
    said = one_line(capsys)
    assert "rl.truth checks claims, which" in said and "my_study:Shouting" in said and "no methods claims" in said
    assert "Set rl.truth=False" in said
