"""Shared fixtures: a tiny tokenizer, tiny random models, a tiny pair, and a tiny run. Eight CPU devices stand in for a
pod."""

import os

from xla_flags import known_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "32"  # XLA's thread pool: with as many threads as devices, waiting collectives leave none to work
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Compiling is most of the run time: these make it five times shorter.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    # Eight devices on few cores: work split over the thread pool that waits in a collective can starve it.
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_cpu_collective_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)


if "NLA_TEST_FLAGS" not in os.environ:  # set by the process that starts the test workers
    os.environ["NLA_TEST_FLAGS"] = " ".join(known_flags(FLAGS))
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {os.environ['NLA_TEST_FLAGS']}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"

import typechecks

typechecks.install()

import dataclasses
import gc
import importlib.util
import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.cli import NEW_OBJECTS, load_config, main
from nla_jax.config import read
from nla_jax.io.folders import save_model
from nla_jax.joint_step import JointBatch
from nla_jax.models.transformer import Transformer, TransformerConfig, abstract_params
from nla_jax.pair import Pair, new_pair
from nla_jax.prompts import Prompts, find_marker
from nla_jax.quickstart.tokenizer import train_tokenizer
from nla_jax.runtime.metrics import read_metrics
from nla_jax.runtime.run import Run
from nla_jax.serve.models import Served
from nla_jax.sidecar import Sidecar
from nla_jax.stages.loop import Loop
from nla_jax.stages.table import STAGES
from nla_jax.subject import load_subject

jax.config.update("jax_cpu_enable_async_dispatch", False)  # likewise: one program at a time
gc.set_threshold(NEW_OBJECTS)  # as `nla` does
gc.freeze()  # what was imported stays: the search for garbage, half a second of every stage otherwise, leaves it out

SENTENCES = [
    "The river turns north at the old mill and runs through three villages before it reaches the sea.",
    "Every function in this module returns a new list and leaves its argument as it was.",
    "In the morning the market opens; by noon the fish are gone and only bread is left.",
    "She measured the length of the shadow twice and wrote both numbers in the margin.",
]
VERBALIZER_TEMPLATE = "Explain this: {injection_char}"
RECONSTRUCTOR_TEMPLATE = "<text>{explanation}</text><summary>"
TINY = TransformerConfig(
    vocab_size=320, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48, tied_head=False
)


def random_params(config: TransformerConfig, seed: int = 0) -> dict:
    """Parameters of a lively random model: every tensor (norms and biases too) differs from its initial value."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name = jax.tree_util.keystr(path)
        spread = 0.5 if "embedding" in name or "head" in name else 0.2
        return (rng.normal(size=shape.shape) * spread + ("scale" in name)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract_params(config)))


def close(actual, expected, tolerance: float) -> None:
    """Two trees of arrays agree within `tolerance`, each leaf relative to its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound = tolerance * max(1e-3, np.nanmax(np.abs(b), initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def joint_batch(pair: Pair, vectors: np.ndarray, group: int, R: int, T: int) -> JointBatch:
    """A made-up rollout: responses and texts of several lengths, some of them failed."""
    rng = np.random.default_rng(0)
    B = len(vectors) * group
    lengths, prefix = rng.integers(1, R + 1, B), pair.reconstructor.prefix
    texts = rng.integers(4, TINY.vocab_size, (B, T)).astype(np.int32)
    texts[:, : len(prefix)] = prefix
    return JointBatch(
        vectors=vectors,
        responses=rng.integers(4, TINY.vocab_size, (B, R)).astype(np.int32),
        response_mask=np.arange(R) < lengths[:, None],
        sampler_logprobs=-rng.random((B, R)).astype(np.float32),
        finished=np.arange(B) % 7 != 3,
        texts=texts,
        text_lengths=rng.integers(1 + len(prefix), T + 1, B).astype(np.int32),
        valid=np.arange(B) % 5 != 1,
    )


def one_sentence(error) -> None:
    """What a user reads: one line that ends."""
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?")), message


def supervised_loop(folder: Path, steps: int, *, every: int = 100, sizes: tuple[int, ...] = (1, 1, 1), **watchdog):
    """A loop of `steps` steps under `{folder}/train/test` that saves a checkpoint after every `every`-th."""
    settings = ConfigDict(load_config(CONFIG, []).to_dict())
    settings.pretrain.checkpoint_every = every
    settings.mesh = dict(zip(("data", "fsdp", "tensor"), sizes))
    settings.watchdog.update(watchdog)
    return Loop(Run(read(settings.to_dict(), "test"), folder, STAGES), "pretrain", "test", steps, {})


def talkative(params: dict, tokenizer) -> dict:
    """An untied model's parameters, changed so that it writes `<explanation>`, words, `</explanation>` and the end.

    Three dimensions of the embedding flag the turn's start, the opening and the closing tag; a fourth the ordinary
    tokens. The head reads them: each flag forces or forbids what may follow. The words depend on the random blocks."""
    start, opening, closing = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<explanation>", "</explanation>"])
    params = jax.tree.map(np.copy, params)
    embedding, head = params["embedding"], params["head"]
    for name in ("o", "down"):
        params["blocks"][name]["kernel"][..., :4] = 0  # no block writes to the flags
    embedding[:, :4] = 0, 0, 0, 4
    for i, token in enumerate((start, opening, closing)):
        embedding[token, :4] = 0
        embedding[token, i] = 30
    markup = [*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(["<text>", "</text>"]), opening, closing]
    head[:4] = 0
    head[1, markup] = head[3, markup] = -10
    head[3, closing] = 2
    head[0, opening] = head[2, tokenizer.eos_token_id] = 10
    params["final_norm"]["scale"][:4] = 1
    return params


CORE = 1  # tests of a file, with --core


def pytest_addoption(parser):
    parser.addoption("--core", action="store_true", help="one case of each test that needs no whole run of a study")


def pytest_collection_modifyitems(config, items):
    """With `--core`: leaves out the tests that need a whole run, but for files that have no others, all cases of a test but
    the first, and where a file has more than `CORE` tests then, some of these, evenly spaced. Tests that compare with torch
    run where there is torch."""
    if not config.getoption("--core"):
        return
    runs = {"finished", "talking", "alone", "trained"}
    torch = importlib.util.find_spec("torch")
    here = [item for item in items if torch or not item.get_closest_marker("torch")]
    quick = [item for item in here if runs.isdisjoint(item.fixturenames) and not item.get_closest_marker("whole_run")]
    files = {item.path for item in quick}
    able = [item for item in here if item in quick or item.path not in files]
    first = {(item.path, getattr(item, "originalname", item.name)): item for item in reversed(able)}
    of_file = {}
    for item in items:
        if item in first.values():
            of_file.setdefault(item.path, []).append(item)
    even = lambda tests: [tests[i * len(tests) // CORE] for i in range(CORE)] if len(tests) > CORE else tests
    kept = [item for tests in of_file.values() for item in even(tests)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="module")
def browser():
    """Chromium. Where there is none, tests that ask for it are skipped."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("There is no Chromium: install it (apt-get install chromium), or name it in CHROMIUM.")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


MOST_MAPS = 15_000  # Linux allows a process 65,530


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets the compiled programs of earlier files where they have become many. Each takes some twenty memory maps of
    the process, and XLA aborts where it gets no more."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES * 3, TINY.vocab_size)


@pytest.fixture(scope="session")
def model() -> Transformer:
    return Transformer(TINY)


@pytest.fixture(scope="session")
def params() -> dict:
    return random_params(TINY)


@pytest.fixture(scope="session")
def subject_folder(tokenizer, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject") / "subject"
    save_model(folder, params, TINY, tokenizer)
    return folder


@pytest.fixture(scope="session")
def sidecar(tokenizer) -> Sidecar:
    marker = find_marker(tokenizer, VERBALIZER_TEMPLATE)
    prompts = Prompts(tokenizer, marker, VERBALIZER_TEMPLATE, RECONSTRUCTOR_TEMPLATE)
    return Sidecar(
        base_checkpoint="tiny",
        d_model=TINY.width,
        layer=1,
        injection_scale=20.0,
        marker=marker,
        verbalizer_template=VERBALIZER_TEMPLATE,
        reconstructor_template=RECONSTRUCTOR_TEMPLATE,
        suffix_ids=tuple(prompts.suffix_ids()),
        provenance={"note": "made by the tests"},
    )


@pytest.fixture(scope="session")
def pair(subject_folder, sidecar, tokenizer) -> Pair:
    """A pair whose AV writes explanations in their tags, and whose AR's head is not the identity."""
    new = new_pair(sidecar, subject_folder)
    head = np.random.default_rng(1).normal(size=(TINY.width, TINY.width)).astype(np.float32)
    return dataclasses.replace(
        new,
        verbalizer_params=talkative(new.verbalizer_params, tokenizer),
        reconstructor_params=new.reconstructor_params | {"head": head},
    )


@pytest.fixture(scope="session")
def verbalizer(pair) -> Verbalizer:
    return pair.verbalizer


@pytest.fixture(scope="session")
def reconstructor(pair) -> Reconstructor:
    return pair.reconstructor


@pytest.fixture(scope="session")
def vectors() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(4, TINY.width)).astype(np.float32)


VARIANCE, LIMIT = 0.7, 16  # of the pairs that are served: what their sidecars say, and the tokens of an explanation


@pytest.fixture(scope="session")
def served(pair, subject_folder) -> list[Served]:
    """Two pairs that say different things of the same activations: the second one's AV gets them twice as long."""
    subject = load_subject(subject_folder, 1)
    sidecar = dataclasses.replace(pair.sidecar, provenance={"activation_variance": VARIANCE})
    first = dataclasses.replace(pair, sidecar=sidecar)
    louder = dataclasses.replace(pair.verbalizer, injection_scale=2.0 * pair.verbalizer.injection_scale)
    second = dataclasses.replace(first, verbalizer=louder)
    return [Served("first", first, subject, LIMIT), Served("second", second, subject, LIMIT)]


# The whole loop on a tiny config, as a user runs it

CONFIG = str(Path(__file__).parent / "study.py") + ":tiny"
LOOP = tuple(STAGES)
SPLITS = ("av_sft", "ar_sft", "rl", "heldout")
TIMES = ("seconds_rollout", "seconds_host", "seconds_train", "seconds_probes", "samples_per_second")
TIMES += ("seconds_so_far", "cpu_seconds_so_far")  # of the stage


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty real documents: Python's help topics."""
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    chosen = [(name, text[:1500]) for name, text in sorted(topics.items()) if len(text) > 800][:40]
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in chosen))
    return path


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory) -> Path:
    """The working folder of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    assert nla_main("quickstart", workdir, corpus) == 0
    return workdir


def nla_main(verb: str, workdir: Path, corpus: Path, *overrides: str) -> int:
    return main([verb, "--config", CONFIG, "--workdir", str(workdir), f"--config.corpus.source={corpus}", *overrides])


def copy_before(finished: Path, tmp_path: Path, stage: str) -> Path:
    """A copy of a finished run in which `stage` and all after it never happened."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    for later in list(STAGES)[list(STAGES).index(stage) :]:
        (workdir / "stages" / f"{later}.json").unlink(missing_ok=True)
    made = {"rl": ["train/rl", "pair"], "sft": ["train/sft_av", "train/sft_ar", "train/rl", "pair", "pair_warm"]}
    for folder in made.get(stage, []) + ["activations"] * (stage == "extract"):
        shutil.rmtree(workdir / folder)
    shutil.rmtree(workdir / "evaluation", ignore_errors=True)
    return workdir


def weights(workdir: Path) -> dict:
    """All tensors of a run's trained pair."""
    files = [
        workdir / "pair" / file
        for file in ("av/model.safetensors", "ar/model.safetensors", "ar/value_head.safetensors")
    ]
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def history(workdir: Path) -> list[dict]:
    """The RL metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(workdir / "train/rl/metrics.jsonl")]


def same_run(a: Path, b: Path) -> None:
    assert history(a) == history(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def one_line(capsys) -> str:
    """What was printed on standard error by `nla` itself: one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nla: ")]
    assert len(lines) == 1
    return lines[0]


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Changes one bit of a file, as a failing disk does; `at`: which byte."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)
