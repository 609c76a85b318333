"""The programs that are measured: real functions of the package on random weights, each a step that times its own phases."""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.data.batches import pad_tokens
from nla_jax.io.folders import load_params, save_model
from nla_jax.joint_step import (
    Frozen,
    JointBatch,
    JointStep,
    SupervisedStep,
    TextBatch,
    jit_step,
    reconstructor_loss,
    verbalizer_loss,
)
from nla_jax.models.sharding import TRAIN, place_batch, relayout, shardings
from nla_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    abstract_params,
    init_params,
    truncate,
)
from nla_jax.objective import adamw
from nla_jax.quickstart.tokenizer import train_tokenizer
from nla_jax.sampling import decoding_layout, start_all
from nla_jax.sampling import rollout as sample_rollout
from nla_jax.subject import ROWS, Subject, residual_rows
from nla_jax.tools.benchmark.settings import Settings
from nla_jax.tools.flops import (
    blocks,
    decode_bytes,
    reconstructor_flops,
    training_bytes,
    verbalizer_flops,
    weight_bytes,
)


class Clock(dict):
    """Seconds by phase of one step."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase cannot avoid on all devices together: FLOPs, and bytes to and from memory. A phase with neither is the
    host's."""

    flops: float = 0
    bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """`step(clock)` runs one step, times its phases, and returns scalar metrics when the devices are done. `work`: each
    phase's. `more(seconds by phase)`: figures measured apart, after the timed steps."""

    step: Callable[[Clock], dict]
    work: dict[str, Work]
    samples: int
    tokens: int
    more: Callable[[dict], dict] = lambda seconds: {}


def random_params(mesh: Mesh, boxed: dict, init: Callable[[], dict], dtype=jnp.float32, rules=TRAIN) -> dict:
    """The arrays that `init` makes, in `dtype`, each made in its place on the mesh."""
    make = lambda: jax.tree.map(lambda x: x.astype(dtype), nn.unbox(init()))
    return jax.jit(make, out_shardings=shardings(mesh, boxed, rules))()


def random_model(s: Settings, mesh: Mesh, config: TransformerConfig, dtype, truncated: bool = False) -> dict:
    """A whole model's parameters (`truncated`: without final norm and head)."""
    make = lambda: init_params(Transformer(config), jax.random.key(s.seed))
    init = (lambda: truncate(nn.unbox(make()), config.layers)) if truncated else make
    return random_params(mesh, abstract_params(config, truncated), init, dtype)


def random_base(s: Settings, mesh: Mesh, *ranks: int) -> dict | None:
    """The frozen model beneath adapters, where there are any."""
    return random_model(s, mesh, s.config, s.dtype) if any(ranks) else None


def random_verbalizer(s: Settings, mesh: Mesh, model: Verbalizer) -> dict:
    """What is trained of the AV."""
    if not model.lora:
        return random_model(s, mesh, model.model.config, jnp.float32)
    init = lambda: model.lora.init_params(jax.random.key(s.seed), model.model.config)
    return random_params(mesh, model.abstract_params(), init)


def random_reconstructor(s: Settings, mesh: Mesh, model: Reconstructor) -> dict:
    """What is trained of the AR."""
    config = model.model.config

    def init():
        key = jax.random.key(s.seed)
        if model.lora:
            return model.init_params(model.lora.init_params(key, config))
        return model.init_params(truncate(nn.unbox(init_params(model.model, key)), config.layers))

    return random_params(mesh, model.abstract_params(), lambda: jax.tree.map(jnp.asarray, init()))


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


class Sampler:
    """The rollout as the RL loop runs it: parameters re-laid out and cast, then sampled chunk by chunk."""

    def __init__(self, s: Settings, mesh: Mesh, verbalizer: Verbalizer, base: dict | None):
        self.s, self.mesh, self.verbalizer = s, mesh, verbalizer
        self.relayout = decoding_layout(mesh, verbalizer, base)
        self.rows, self.steps = s.activations // s.rollout_chunks, (s.response - 1) * s.rollout_chunks
        self.per_step = decode_bytes(verbalizer, self.rows, s.group, s.response, s.data * s.fsdp)
        self.work = Work(
            verbalizer_flops(verbalizer, s.activations, s.group, s.response).forward,
            self.steps * sum(self.per_step.values()) + s.rollout_chunks * self.per_step["weights"],
        )

    def sample(self, params: dict, vectors: np.ndarray, key: jax.Array, limit: int) -> list:
        """Rollouts on the host; `params` as `relayout` gives them."""
        s = self.s
        parts = jnp.split(place_batch(self.mesh, vectors), s.rollout_chunks)
        rows = len(vectors) // s.rollout_chunks * s.group
        sample = lambda i: sample_rollout(
            self.verbalizer, params, parts[i], key, i * rows, group=s.group, max_new_tokens=limit
        )
        return [jax.device_get(piece) for piece in start_all(self.mesh, sample, len(parts))]

    def decoding(self, params: dict, seconds: dict) -> dict:
        """What one step of decoding takes: the rollout's time without that of its first token, measured apart
        (None where that leaves nothing)."""
        s, vectors, first = self.s, np.zeros((self.s.activations, self.s.width), np.float32), []
        sampler = jax.block_until_ready(self.relayout(params))
        for _ in range(4):
            start = time.perf_counter()
            self.sample(sampler, vectors, jax.random.key(0), 1)
            first.append(time.perf_counter() - start)
        prompt = statistics.median(first[1:])
        rest = seconds["rollout"] - prompt
        return {
            "decode": {
                "steps": self.steps, "rows": self.rows * s.group, "first_token_seconds": prompt,
                "seconds_per_step": rest / self.steps if rest > 0 else None, "bytes_per_step": self.per_step,
            }
        }  # fmt: skip


def rl(s: Settings, mesh: Mesh) -> Program:
    """A whole RL step, as `nla_jax.stages.train.rl` runs it; on the host, ids stand in for text."""
    verbalizer, reconstructor = s.verbalizer(), s.reconstructor()
    boxed = verbalizer.abstract_params(), reconstructor.abstract_params()
    optimizer = adamw(s.steps, lr=1.41e-5)
    joint = JointStep(
        verbalizer, reconstructor, optimizer, optimizer, kl_coefficient=s.kl, micro_batches=s.micro_batches
    )
    base = random_base(s, mesh, s.av_lora, s.ar_lora)
    av = random_verbalizer(s, mesh, verbalizer)
    frozen = Frozen(relayout(mesh, boxed[0], s.dtype, TRAIN)(av), base)
    layout = shardings(mesh, jax.eval_shape(joint.init, jax.random.key(0), *boxed))
    init = jax.jit(joint.init, out_shardings=layout, donate_argnums=(1, 2))
    state = init(jax.random.key(s.seed), av, random_reconstructor(s, mesh, reconstructor))
    train = jit_step(joint, mesh)
    sampler = Sampler(s, mesh, verbalizer, base)
    rng, width = np.random.default_rng(s.seed), s.ar_prefix + s.response + s.ar_suffix
    after = rng.integers(0, s.vocab, s.ar_suffix).tolist()

    def step(clock: Clock) -> dict:
        nonlocal state
        with clock.phase("rollout"):
            vectors = rng.standard_normal((s.activations, s.width), np.float32)
            key = jax.random.fold_in(state.rng, state.step)
            sampled = sampler.sample(sampler.relayout(state.verbalizer), vectors, key, s.response)
        with clock.phase("host"):
            whole = jax.tree.map(lambda *x: np.concatenate(x), *sampled)
            rows = [[*reconstructor.prefix, *row[mask].tolist(), *after] for row, mask in zip(whole.tokens, whole.mask)]
            texts, lengths = pad_tokens(rows, width)
            batch = JointBatch(
                vectors, whole.tokens, whole.mask, whole.logprobs, texts, lengths, np.ones(len(rows), bool)
            )
        with clock.phase("train"):
            state, metrics = train(state, frozen, place_batch(mesh, batch))
            return jax.device_get(metrics)

    samples = s.activations * s.group
    policy = verbalizer_flops(verbalizer, s.activations, s.group, s.response)
    flops = policy.training + bool(s.kl) * policy.forward + reconstructor_flops(reconstructor, samples, width).training
    one_pass = weight_bytes(s.config, verbalizer.lora) * (1.5 if s.kl else 1)  # the reference is read forward alone
    one_pass += weight_bytes(reconstructor.model.config, reconstructor.lora, vocabulary=False)
    trained = count(state.verbalizer) + count(state.reconstructor)
    work = {
        "rollout": sampler.work,
        "host": Work(),
        "train": Work(flops, training_bytes(trained, one_pass, s.micro_batches)),
    }
    return Program(
        step, work, samples, samples * s.response, lambda seconds: sampler.decoding(state.verbalizer, seconds)
    )


def rollout(s: Settings, mesh: Mesh) -> Program:
    """Sampling alone: parameters re-laid out and cast, then one rollout."""
    verbalizer = s.verbalizer()
    params = random_verbalizer(s, mesh, verbalizer)
    sampler = Sampler(s, mesh, verbalizer, random_base(s, mesh, s.av_lora))
    rng, key = np.random.default_rng(s.seed), jax.random.key(s.seed)

    def step(clock: Clock) -> dict:
        with clock.phase("relayout"):
            ready = jax.block_until_ready(sampler.relayout(params))
        with clock.phase("rollout"):
            vectors = rng.standard_normal((s.activations, s.width), np.float32)
            sampled = sampler.sample(ready, vectors, jax.random.fold_in(key, rng.integers(1 << 30)), s.response)
        return {"logprob": np.mean([piece.logprobs.mean() for piece in sampled])}

    samples = s.activations * s.group
    moved = count(params) * (4 + jnp.dtype(s.dtype).itemsize)
    work = {"relayout": Work(bytes=moved), "rollout": sampler.work}
    return Program(step, work, samples, samples * s.response, lambda seconds: sampler.decoding(params, seconds))


def sft_av(s: Settings, mesh: Mesh) -> Program:
    """A step of the AV's warm start. Tokens are counted on whole sequences, prompt and label."""
    model = s.verbalizer()
    flops = verbalizer_flops(model, s.batch, 1, s.sft_response).training
    one_pass = weight_bytes(s.config, model.lora)
    tokens = s.batch * (s.prefix + s.suffix + s.sft_response)
    base, params = random_base(s, mesh, s.av_lora), random_verbalizer(s, mesh, model)
    return _supervised(
        s, mesh, model, params, base, verbalizer_loss(model), s.sft_response, flops, one_pass, tokens
    )  # fmt: skip


def sft_ar(s: Settings, mesh: Mesh) -> Program:
    """A step of the AR's warm start."""
    model, length = s.reconstructor(), s.ar_prefix + s.sft_response + s.ar_suffix
    flops = reconstructor_flops(model, s.batch, length).training
    one_pass = weight_bytes(model.model.config, model.lora, vocabulary=False)
    base, params = random_base(s, mesh, s.ar_lora), random_reconstructor(s, mesh, model)
    return _supervised(
        s, mesh, model, params, base, reconstructor_loss(model), length, flops, one_pass, s.batch * length
    )  # fmt: skip


def _supervised(s, mesh, model, params, base, loss, length, flops, one_pass, tokens) -> Program:
    """One step of `loss` on rows of `length` random tokens and as many random activations."""
    supervised = SupervisedStep(loss, adamw(s.steps, lr=1.41e-5))
    layout = shardings(mesh, jax.eval_shape(supervised.init, model.abstract_params()))
    state = jax.jit(supervised.init, out_shardings=layout, donate_argnums=0)(params)
    train = jit_step(supervised, mesh)
    rng = np.random.default_rng(s.seed)

    def step(clock: Clock) -> dict:
        nonlocal state
        with clock.phase("host"):
            tokens = rng.integers(0, s.vocab, (s.batch, length), np.int32)
            vectors = rng.standard_normal((s.batch, s.width), np.float32)
            batch = place_batch(mesh, TextBatch(tokens, np.full(s.batch, length, np.int32), vectors))
        with clock.phase("train"):
            state, metrics = train(state, batch, base)
            return jax.device_get(metrics)

    work = {"host": Work(), "train": Work(flops, training_bytes(count(state.params), one_pass))}
    return Program(step, work, s.batch, tokens)


def extract(s: Settings, mesh: Mesh) -> Program:
    """Activations at eight tokens of each document, gathered and brought to the host."""
    config = s.config.truncated(s.ar_blocks)
    subject = Subject("random", Path(), s.ar_blocks - 1, Transformer(config), None, None)
    subject = dataclasses.replace(subject, params=random_model(s, mesh, config, s.dtype, truncated=True))
    rng = np.random.default_rng(s.seed)
    positions = [np.linspace(0, s.document - 1, min(8, s.document), dtype=int).tolist()] * s.batch

    def step(clock: Clock) -> dict:
        with clock.phase("host"):
            rows = rng.integers(0, s.vocab, (s.batch, s.document)).tolist()
        with clock.phase("forward"):
            vectors = np.concatenate(list(residual_rows(subject, rows, positions)))
            return {"norm": np.linalg.norm(vectors, axis=1).mean()}

    passes = -(-s.batch // ROWS)
    flops = blocks(config, [(s.batch, s.document, 0)]).forward
    work = {"host": Work(), "forward": Work(flops, passes * weight_bytes(config, vocabulary=False))}
    return Program(step, work, s.batch, s.batch * s.document)


def load(s: Settings, mesh: Mesh) -> Program:
    """Reading the AV's parameters from a Hugging Face folder onto the mesh. The folder was just written, so it is read from
    the system's file cache where that has room for it."""
    scratch = tempfile.TemporaryDirectory(prefix="nla_benchmark_")
    folder = lambda: Path(scratch.name) / "model"  # which lives as long as this function
    save_model(
        folder(), random_model(s, mesh, s.config, s.dtype), s.config, train_tokenizer(["random"], 300), dtype=s.dtype
    )
    size = sum(file.stat().st_size for file in folder().glob("*.safetensors"))
    layout = shardings(mesh, abstract_params(s.config), TRAIN)

    def step(clock: Clock) -> dict:
        with clock.phase("load"):
            params = jax.block_until_ready(load_params(folder(), s.config, dtype=jnp.dtype(s.dtype), layout=layout))
        return {"parameters": count(params)}

    more = lambda seconds: {"file_bytes": size, "file_bytes_per_second": size / seconds["load"]}
    return Program(step, {"load": Work()}, 1, 0, more)


BUILDERS = {program.__name__: program for program in (rl, rollout, sft_av, sft_ar, extract, load)}
