"""Pairs of every model family: texts, reconstructions and exports equal those of `transformers`, and the whole loop
runs."""

import dataclasses
import json
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from conftest import close
from parity import FAMILIES, torch_model
from safetensors.numpy import load_file

from nla_jax.autoencoder import Injection, add_norm_matched
from nla_jax.cli import main
from nla_jax.data.batches import pad_tokens
from nla_jax.joint_step import Frozen, JointBatch, JointStep
from nla_jax.pair import HEAD, Pair, load_pair, new_pair
from nla_jax.sampling import rollout

torch = pytest.importorskip("torch")

CONFIG = str(Path(__file__).parent / "study.py") + ":tiny"
WIDTH, NEW_TOKENS = 32, 20
VECTORS = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tokenizer, tmp_path_factory) -> Path:
    """A random tiny checkpoint of a family, with a tokenizer, as its users find it."""
    path = tmp_path_factory.mktemp("families") / request.param
    torch_model(request.param).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pair(folder, sidecar) -> Pair:
    made = new_pair(dataclasses.replace(sidecar, base_checkpoint=str(folder)), folder)
    head = np.random.default_rng(1).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    return dataclasses.replace(made, reconstructor_params=made.reconstructor_params | {"head": head})


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def greedy(pair: Pair, vectors=VECTORS) -> np.ndarray:
    """Token ids that the AV writes, the end token no longer ending anything."""
    verbalizer = dataclasses.replace(pair.verbalizer, end=-1)
    return np.asarray(
        rollout(
            verbalizer, pair.weights[0], vectors, jax.random.key(0), group=1, max_new_tokens=NEW_TOKENS, temperature=0
        ).tokens
    )


def generated(model, pair: Pair, slot, vectors=VECTORS) -> np.ndarray:
    """Token ids that `transformers` generates from the prompt's embeddings, with `slot(vector, row)` as the marker's
    row."""
    prompt = torch.tensor(pair.verbalizer.prefix + pair.verbalizer.suffix)
    rows = []
    for vector in torch.tensor(vectors):
        with torch.no_grad():
            embeds = model.get_input_embeddings()(prompt).clone()  # Gemma's module multiplies by sqrt(d)
            embeds[len(pair.verbalizer.prefix)] = slot(vector, embeds[len(pair.verbalizer.prefix)])
            ids = model.generate(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        rows.append(ids[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("scale", [20.0, None])
def test_greedy_tokens_equal_generate(pair, theirs, scale):
    mine = dataclasses.replace(pair, verbalizer=dataclasses.replace(pair.verbalizer, injection_scale=scale))
    expected = generated(theirs, pair, lambda v, _: v if scale is None else scale * v / v.norm())
    np.testing.assert_array_equal(greedy(mine), expected)
    assert len({tuple(row) for row in expected}) > 1  # the activation is seen


def test_norm_matched_addition_equals_a_torch_hook(pair, theirs):
    """Behind block 1: h' = h + |h| v / |v| at the marker, in the prompt's pass alone."""
    injection = Injection(add_norm_matched, 1)
    mine = dataclasses.replace(pair, verbalizer=dataclasses.replace(pair.verbalizer, injections=(injection,)))
    at, current = len(pair.verbalizer.prefix), {}

    def hook(_, __, out):
        states = out[0] if isinstance(out, tuple) else out
        if states.shape[1] > 1:
            h, v = states[0, at], current["vector"]
            states[0, at] = h + h.norm() * v / v.norm()

    handle = theirs.model.layers[1].register_forward_hook(hook)
    try:

        def slot(vector, row):
            current["vector"] = vector
            return row

        expected = generated(theirs, pair, slot)
    finally:
        handle.remove()
    np.testing.assert_array_equal(greedy(mine), expected)
    assert len({tuple(row) for row in expected}) > 1  # the activation is seen


def torch_reconstruct(model, head: np.ndarray, rows: list[list[int]], layer: int) -> np.ndarray:
    """FIELD's AR: K+1 blocks, no final norm, a linear head, the last token."""
    states = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    handle.remove()
    return torch.nn.functional.linear(torch.stack(states), torch.tensor(head.T)).numpy()


def test_reconstruct_equals_torch(pair, theirs):
    texts = ["a river that turns north", "x", ""]
    rows = pair.prompts.tokenizer([f"<text>{text}</text><summary>" for text in texts]).input_ids
    expected = torch_reconstruct(theirs, pair.reconstructor_params["head"], rows, pair.sidecar.layer)
    close(pair.reconstruct(texts), expected, 1e-4)


def joint_batch(pair: Pair) -> JointBatch:
    """Two activations with two made-up responses each."""
    rng = np.random.default_rng(5)
    texts, lengths = pad_tokens(pair.prompts.reconstructor_ids(["one", "two rivers", "three", "the old mill"]))
    return JointBatch(
        vectors=VECTORS[:2],
        responses=rng.integers(5, 300, (4, 6)),
        response_mask=np.ones((4, 6), bool),
        sampler_logprobs=np.zeros((4, 6), np.float32),
        finished=np.ones(4, bool),
        texts=texts,
        text_lengths=lengths,
        valid=np.ones(4, bool),
    )


def test_trained_one_step_and_exported_it_works_in_torch(pair, tmp_path):
    joint = JointStep(pair.verbalizer, pair.reconstructor, optax.adam(1e-2), optax.adam(1e-2))
    state = joint.init(pair.verbalizer_params, pair.reconstructor_params)
    state, metrics, _ = jax.jit(joint)(state, Frozen(pair.verbalizer_params), joint_batch(pair))
    assert not metrics["skipped"]
    av, ar = (state.models[name].params for name in ("verbalizer", "reconstructor"))
    trained = dataclasses.replace(pair, verbalizer_params=av, reconstructor_params=ar)
    trained.save(tmp_path)

    av, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "av", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    ids = np.random.default_rng(6).integers(0, 300, (2, 11))
    ours = pair.verbalizer.model.apply({"params": trained.verbalizer_params}, ids, method="next_token_logits")
    with torch.no_grad():
        close(ours, av.eval()(torch.tensor(ids)).logits.numpy(), 1e-4)

    ar = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ar", attn_implementation="eager").eval()
    assert ar.config.num_hidden_layers == pair.sidecar.layer + 1
    rows = transformers.AutoTokenizer.from_pretrained(tmp_path / "ar")(["<text>mill</text><summary>"]).input_ids
    head = load_file(tmp_path / "ar" / HEAD)["weight"].T
    close(trained.reconstruct(["mill"]), torch_reconstruct(ar, head, rows, pair.sidecar.layer), 1e-4)
    close(load_pair(tmp_path).verbalizer_params, trained.verbalizer_params, 0)


@pytest.mark.slow  # a loop for each family; one of Gemma 3 is in test_configs.py, Llama is the quickstart
def test_the_loop_runs_from_it_with_only_the_path_changed(folder, tmp_path):
    corpus = tmp_path / "topics.jsonl"
    chosen = [(name, text[:1200]) for name, text in sorted(topics.items()) if len(text) > 800][:30]
    corpus.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in chosen))
    command = ["quickstart", "--config", CONFIG, "--workdir", str(tmp_path / "run")]
    assert main([*command, f"--config.corpus.source={corpus}", f"--config.subject.path={folder}"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert np.isfinite([summary[name] for name in ("fve_warm", "fve_rl", "fve_gold_text")]).all()
    assert jnp.isfinite(summary["logprob_gap_max"]) and summary["logprob_gap_max"] < 1e-3
    config = json.loads((tmp_path / "run/pair/av/config.json").read_text())
    assert config["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]
