"""LoRA adapters: equal to PEFT, merged equal to attached, shared base, and trained from the warm start's adapter."""

import dataclasses
import json
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, close, joint_batch, one_sentence, random_params
from safetensors.numpy import load_file, save_file

from nla_jax.autoencoder import Injection, add_norm_matched
from nla_jax.cli import main
from nla_jax.data.batches import TextBatch
from nla_jax.io.adapters import CONFIG, WEIGHTS, load_adapter
from nla_jax.io.folders import read_config, save_model
from nla_jax.joint_step import Frozen, JointStep, SupervisedStep
from nla_jax.losses import reconstructor_loss, verbalizer_loss
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import DECODE, TRAIN, make_mesh, relayout
from nla_jax.models.transformer import Transformer, abstract_params
from nla_jax.pair import Pair, load_pair, new_pair
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import read_metrics

LORA = Lora(rank=4, alpha=6.0)
IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))


def lively(lora: Lora, config=TINY, seed: int = 0) -> dict:
    """An adapter whose every entry matters (a new one's B is zero)."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, lora.init_params(jax.random.key(0), config)
    )


def logits(params: dict) -> np.ndarray:
    return Transformer(TINY).apply({"params": params}, IDS, method="next_token_logits")


@pytest.fixture(scope="module")
def adapters(subject_folder, sidecar) -> Pair:
    """A pair of two adapters on one base."""
    made = new_pair(
        dataclasses.replace(sidecar, base_checkpoint=str(subject_folder)),
        subject_folder,
        adapters=(LORA, Lora(3, 5.0, True, ("q", "o", "down"))),
    )
    truncated, ar_lora = made.reconstructor.model.config, made.reconstructor.lora
    head = np.random.default_rng(1).normal(size=(TINY.width, TINY.width)).astype(np.float32)
    return dataclasses.replace(
        made,
        verbalizer_params=lively(LORA),
        reconstructor_params={"backbone": lively(ar_lora, truncated), "head": head},
    )


@pytest.mark.parametrize("lora", [LORA, Lora(3, 5.0, True), Lora(2, 8.0, False, ("v", "o", "gate"))])
def test_merged_equals_attached_and_a_new_adapter_changes_nothing(lora, params):
    base = jax.tree.map(jnp.asarray, params)
    adapter = lively(lora)
    attached = logits(lora.attach(base, adapter))
    close(logits(lora.merge(base, adapter)), attached, 1e-5)
    assert np.abs(np.asarray(attached) - np.asarray(logits(base))).max() > 0.1
    close(logits(lora.attach(base, lora.init_params(jax.random.key(1), TINY))), logits(base), 0)


@pytest.mark.parametrize("lora", [None, Lora(4, 6.0, rslora=True)])
def test_a_working_copy_in_bfloat16_is_the_policy_that_is_trained(lora, params):
    """The copies that sample, and that the KL refers to, compute the very logits of the float32 masters."""
    model, mesh = Transformer(dataclasses.replace(TINY, dtype=jnp.bfloat16)), make_mesh()
    boxed = lora.abstract_params(TINY) if lora else abstract_params(TINY)
    trained = lively(lora) if lora else params
    whole = lambda trained: lora.attach(params, trained) if lora else trained
    compute = jax.jit(lambda trained: model.apply({"params": whole(trained)}, IDS, method="next_token_logits"))
    for rules in (TRAIN, DECODE):
        copy = relayout(mesh, boxed, jnp.bfloat16, rules)(jax.tree.map(jnp.asarray, trained))
        np.testing.assert_array_equal(compute(copy), compute(trained))


def test_scales():
    assert Lora(4, 6.0).scale == 1.5 and Lora(4, 6.0, True).scale == 3.0


@pytest.mark.torch
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v", "o", "gate", "up", "down")])
def test_peft_gives_the_same_logits(rslora, targets, subject_folder, params, sidecar, tmp_path):
    import peft
    import torch
    import transformers

    lora = Lora(4, 6.0, rslora, targets)
    sidecar = dataclasses.replace(sidecar, base_checkpoint=str(subject_folder))
    pair = dataclasses.replace(new_pair(sidecar, subject_folder, adapters=(lora, None)), verbalizer_params=lively(lora))
    pair.save(tmp_path / "pair")
    base = transformers.AutoModelForCausalLM.from_pretrained(subject_folder)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "pair" / "av").eval()
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    close(logits(pair.weights[0]), expected, 1e-4)

    model.save_pretrained(tmp_path / "theirs")
    loaded, adapter = load_adapter(tmp_path / "theirs", TINY)
    assert loaded == lora
    close(adapter, pair.verbalizer_params, 1e-6)
    merged = model.merge_and_unload()
    pair.merged().save(tmp_path / "plain")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "av").state_dict()
    close({k: v.numpy() for k, v in ours.items()}, {k: v.numpy() for k, v in merged.state_dict().items()}, 1e-5)


def test_a_saved_pair_of_adapters_loads_and_does_the_same(adapters, vectors, tmp_path):
    adapters.save(tmp_path)
    loaded = load_pair(tmp_path)
    close(loaded.verbalizer_params, adapters.verbalizer_params, 0)
    close(loaded.reconstructor_params, adapters.reconstructor_params, 0)
    assert not (tmp_path / "av/model.safetensors").exists()
    texts = ["one", "two rivers"]
    close(loaded.reconstruct(texts), adapters.reconstruct(texts), 0)
    plain = adapters.merged()
    assert plain.base is None
    close(plain.reconstruct(texts), adapters.reconstruct(texts), 1e-5)
    options = {"max_new_tokens": 12, "temperature": 0.0}
    assert plain.verbalize(vectors, **options) == loaded.verbalize(vectors, **options)
    plain.save(tmp_path / "plain")
    close(load_pair(tmp_path / "plain").reconstruct(texts), adapters.reconstruct(texts), 1e-5)


def test_a_mixed_pair(adapters, subject_folder, tmp_path):
    """An adapter AV beside a whole AR, as EasyNLA trains them."""
    made = new_pair(adapters.sidecar, subject_folder, adapters=(LORA, None))
    assert made.reconstructor.lora is None and made.base is not None
    made.save(tmp_path)
    close(load_pair(tmp_path).reconstruct(["a"]), made.reconstruct(["a"]), 0)


def test_base_found_beside_or_given(adapters, subject_folder, tmp_path):
    lost = dataclasses.replace(adapters, sidecar=dataclasses.replace(adapters.sidecar, base_checkpoint="no/such/base"))
    lost.save(tmp_path / "pair")
    with pytest.raises(InputError, match="no/such/base") as error:
        load_pair(tmp_path / "pair")
    one_sentence(error)
    close(load_pair(tmp_path / "pair", base=subject_folder).verbalizer_params, adapters.verbalizer_params, 0)


def joint_step(pair: Pair) -> JointStep:
    return JointStep(pair.verbalizer, pair.reconstructor, optax.sgd(0.1), optax.sgd(0.1))


def test_adapter_gradients_are_those_of_the_merged_weights(adapters, vectors):
    """d/dA and d/dB by the chain rule from the gradient of the plain model: dB = scale · Aᵀ dW, dA = scale · dW Bᵀ."""
    batch = joint_batch(adapters, vectors, 2, 6, 9)
    whole = adapters.merged()
    frozen = Frozen(lively(LORA, seed=5), adapters.base)
    plain_frozen = Frozen(LORA.merge(adapters.base, frozen.reference))
    of_step = {
        "tokens": batch.response_mask.sum(),
        "texts": jnp.maximum(batch.valid.sum(), 1),
        "vectors": batch.vectors,
    }
    of_batch = batch, jnp.arange(len(batch.vectors)), of_step
    params = lambda pair: {"verbalizer": pair.verbalizer_params, "reconstructor": pair.reconstructor_params}
    grads, _ = jax.jit(joint_step(adapters)._gradients)(params(adapters), frozen, *of_batch)
    plain, _ = jax.jit(joint_step(whole)._gradients)(params(whole), plain_frozen, *of_batch)
    av, ar, av_plain, ar_plain = (tree[name] for tree in (grads, plain) for name in ("verbalizer", "reconstructor"))
    close(ar["head"], ar_plain["head"], 1e-4)
    for lora, found, gradient, params in (
        (LORA, av, av_plain["blocks"], adapters.verbalizer_params),
        (
            adapters.reconstructor.lora,
            ar["backbone"],
            ar_plain["backbone"]["blocks"],
            adapters.reconstructor_params["backbone"],
        ),
    ):
        expected = {}
        for name in lora.targets:
            a, b = (np.asarray(params["blocks"][name][x], np.float64) for x in ("lora_a", "lora_b"))
            flat_a, flat_b = a.reshape(len(a), -1, lora.rank), b.reshape(len(b), lora.rank, -1)
            dw = np.asarray(gradient[name]["kernel"], np.float64).reshape(len(a), flat_a.shape[1], flat_b.shape[2])
            expected[name] = {
                "lora_a": (lora.scale * dw @ flat_b.transpose(0, 2, 1)).reshape(a.shape),
                "lora_b": (lora.scale * flat_a.transpose(0, 2, 1) @ dw).reshape(b.shape),
            }
        close(found["blocks"], expected, 1e-3)


def test_supervised_steps_train_the_adapter_alone(adapters, vectors):
    rng = np.random.default_rng(2)
    batch = TextBatch(rng.integers(5, 300, (4, 10)), np.array([10, 8, 3, 10]), vectors)
    for loss, params in (
        (verbalizer_loss(adapters.verbalizer), adapters.verbalizer_params),
        (reconstructor_loss(adapters.reconstructor), adapters.reconstructor_params),
    ):
        step = SupervisedStep("model", loss, optax.adam(1e-2))
        state, train, losses = step.init(params), jax.jit(step), []
        for _ in range(8):
            state, metrics = train(state, batch, adapters.base)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0] and jax.tree.structure(state.models["model"].params) == jax.tree.structure(params)


@pytest.mark.slow
@pytest.mark.whole_run
def test_the_loop_with_adapters_on_a_mesh(tmp_path):
    """Warm start and RL train adapters to one base, cut over four devices; RL starts from the warm start's."""
    corpus = tmp_path / "topics.jsonl"
    chosen = [(name, text[:1200]) for name, text in sorted(topics.items()) if len(text) > 800][:30]
    corpus.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in chosen))
    overrides = {
        "corpus.source": corpus,
        "sft.av.lora.rank": 4,
        "sft.ar.lora.rank": 2,
        "sft.ar.lora.targets": "('q', 'down')",
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "rl.reward": "nla_jax.objective:negative_log_mse",
        "prompts.inject": "nla_jax.autoencoder:add_norm_matched@0",
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    config = str(Path(__file__).parent / "study.py") + ":tiny"
    assert main(["quickstart", "--config", config, "--workdir", str(tmp_path / "run"), *flags]) == 0
    warm, pair = (load_pair(tmp_path / "run" / name) for name in ("pair_warm", "pair"))
    assert (pair.verbalizer.lora.rank, pair.reconstructor.lora.targets) == (4, ("q", "down"))
    assert pair.verbalizer.injections == (Injection(add_norm_matched, 0),)
    assert max(r["logprob_gap_max"] for r in read_metrics(tmp_path / "run/train/rl/metrics.jsonl")) < 1e-4
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), pair.verbalizer_params, warm.verbalizer_params)
    size = jax.tree.map(lambda a: np.abs(a).max(), warm.verbalizer_params)
    assert all(0 < m < 0.5 * s for m, s in zip(jax.tree.leaves(moved), jax.tree.leaves(size)))


# Adapters that cannot be used


def test_targets_and_rank_are_checked():
    for wrong, message in (
        ({"rank": 0}, "rank of at least 1"),
        ({"rank": 2, "targets": ("query",)}, "no target 'query'"),
    ):
        with pytest.raises(InputError, match=message) as error:
            Lora(**wrong)
        one_sentence(error)


def edit_settings(**changes):
    def damage(folder):
        settings = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(settings))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def other_targets(folder):
    """An adapter to the head alone, which PEFT can make."""
    edit_settings(target_modules=["lm_head"])(folder)
    shapes = {"A": (4, TINY.width), "B": (TINY.vocab_size, 4)}
    tensors = {f"base_model.model.lm_head.lora_{x}.weight": np.ones(shape, np.float32) for x, shape in shapes.items()}
    save_file(tensors, folder / WEIGHTS)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "no json": (lambda f: (f / CONFIG).write_text("{"), "not a JSON object"),
    "kind": (edit_settings(peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (edit_settings(use_dora=True), "use_dora = True is not supported"),
    "rank": (edit_settings(r=7), "does not fit rank 7"),
    "no rank": (edit_settings(r=None), "r or lora_alpha"),
    "rank 0": (edit_settings(r=0), r"adapter_config\.json: r = 0 is no rank"),
    "targets": (other_targets, r"adapter_config\.json: target_modules = \['lm_head'\] are not supported .*q_proj"),
    "only some layers": (
        edit_tensors(lambda t: [t.pop(key) for key in list(t) if "layers.0." in key]),
        r"layers\.0\.self_attn\.q_proj\.lora_A\.weight' is missing",
    ),
    "missing": (edit_tensors(lambda t: t.pop(KEY)), "layers.1.self_attn.q_proj.lora_A.weight' is missing"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=t[KEY])), "'extra' is unexpected"),
    "shape": (edit_tensors(lambda t: t.update({KEY: t[KEY][:, :-1].copy()})), "does not fit"),
    "nan": (edit_tensors(lambda t: t[KEY].fill(np.nan)), "NaN"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "not a readable safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_adapter(case, adapters, tmp_path):
    damage, message = DAMAGE[case]
    adapters.save(tmp_path)
    load_adapter(tmp_path / "av", TINY)
    damage(tmp_path / "av")
    with pytest.raises(InputError, match=message) as error:
        load_adapter(tmp_path / "av", TINY)
    one_sentence(error)


def test_another_base_is_refused(adapters, tokenizer, tmp_path):
    adapters.save(tmp_path / "pair")
    other = dataclasses.replace(TINY, layers=2)
    save_model(tmp_path / "other", random_params(other), other, tokenizer)
    assert read_config(tmp_path / "other").layers == 2
    with pytest.raises(InputError, match="unexpected for its base model") as error:
        load_pair(tmp_path / "pair", base=tmp_path / "other")
    one_sentence(error)
