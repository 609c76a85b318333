"""What `nla benchmark` measures: a study's own programs on random weights, with ids instead of text.

Each benchmark runs a step exactly as the stages do, through `Study`, and times the step's phases.
"""

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.data.batches import TextBatch, pad_tokens
from nla_jax.io.folders import load_params, save_model
from nla_jax.joint_step import JointBatch
from nla_jax.models.sharding import place_batch, placed
from nla_jax.models.transformer import abstract_params
from nla_jax.quickstart.tokenizer import train_tokenizer
from nla_jax.sampling import Rollout
from nla_jax.stages.rl import joined
from nla_jax.study import Program, Study
from nla_jax.subject import ROWS, Subject, residual_rows
from nla_jax.tools.flops import Work, decode_bytes, parameters, work_of


class Clock(dict):
    """Seconds by phase of one step."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of its block to a phase."""
        start = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One thing to measure.

    `step(clock)` runs one step, times its phases, and returns scalar metrics when the devices are done. `work`: what
    each phase cannot avoid (a phase without any is the host's). `samples`, `tokens`: those of one step. `more(seconds
    by phase)`: figures that are measured apart, after the timed steps."""

    step: Callable[[Clock], dict]
    work: dict[str, Work]
    samples: int
    tokens: int
    more: Callable[[dict], dict] = lambda seconds: {}


def random_arrays(shapes: Any, seed: int) -> Any:
    """Arrays of a tree of shapes with shardings, each made in its place on the mesh.

    Normal numbers with the standard deviation of new weights, 0.02; around one for the scales of norms, around zero for
    everything else."""
    paths, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def draw() -> Any:
        keys = jax.random.split(jax.random.key(seed), len(paths))
        mean = lambda path: 1 if path[-1].key == "scale" else 0
        drawn = [mean(path) + 0.02 * jax.random.normal(key, x.shape, x.dtype) for key, (path, x) in zip(keys, paths)]
        return jax.tree.unflatten(tree, drawn)

    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()


def random_vectors(study: Study, rng: np.random.Generator, n: int) -> np.ndarray:
    """Activations [n, W], float32."""
    return rng.standard_normal((n, study.reconstructor.width), np.float32)


def random_base(study: Study, program: Program) -> dict | None:
    """The frozen model beneath adapters, of the joint step's arguments; None where there are no adapters."""
    base = program.arguments[1].base
    return None if base is None else random_arrays(base, study.config.seed)


class Sampler:
    """The rollout as the RL loop runs it: parameters re-laid out and cast, then sampled chunk by chunk."""

    def __init__(self, study: Study, base: dict | None):
        self.study, self.config = study, study.config.rl
        self.to_decoding = study.decoding(base)
        self.rng, self.steps = np.random.default_rng(study.config.seed), itertools.count()
        chunk = work_of(study)["rollout"]
        self.work = Work(chunk.flops * self.config.rollout_chunks, chunk.bytes * self.config.rollout_chunks)

    def start(self, sampler: dict) -> tuple[list[jax.Array], Iterator[Rollout]]:
        """New activations [A/chunks, D] for each chunk, and their rollouts, which are under way."""
        c, mesh = self.config, self.study.mesh
        vectors = random_vectors(self.study, self.rng, c.activations)
        parts = [place_batch(mesh, part) for part in np.split(vectors, c.rollout_chunks)]
        key = jax.random.fold_in(jax.random.key(self.study.config.seed), next(self.steps))
        return parts, self.study.sample(sampler, parts, key)

    def decoding(self, params: dict, seconds: dict) -> dict:
        """What one step of decoding takes: the rollout's time without that of its first token, which is measured here.

        `seconds_per_step` is None where the rollout is too short to tell."""
        study, c, first = self.study, self.config, []
        prompts = dataclasses.replace(study.config.prompts, max_new_tokens=1)
        short = dataclasses.replace(study, config=dataclasses.replace(study.config, prompts=prompts))
        sampler = jax.block_until_ready(self.to_decoding(params))
        parts, _ = self.start(sampler)
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(list(short.sample(sampler, parts, jax.random.key(0))))
            first.append(time.perf_counter() - start)
        prompt, limit = statistics.median(first[1:]), study.config.prompts.max_new_tokens
        rest, steps, rows = (
            seconds["rollout"] - prompt,
            (limit - 1) * c.rollout_chunks,
            c.activations // c.rollout_chunks,
        )
        copies = study.mesh.shape["data"] * study.mesh.shape["fsdp"]
        return {
            "decode": {
                "steps": steps,
                "rows": rows * c.group,
                "first_token_seconds": prompt,
                "seconds_per_step": rest / steps if rest > 0 else None,
                "bytes_per_step": decode_bytes(study.verbalizer, rows, c.group, limit, copies),
            }
        }


class Ids:
    """The host's part of an RL step without a tokenizer: the response's ids stand for the text that the AR reads."""

    def __init__(self, study: Study):
        self.study, plan = study, study.config.plan
        vocabulary = study.verbalizer.model.config.vocab_size
        rng = np.random.default_rng(study.config.seed)
        self.after = rng.integers(0, vocabulary, max(plan.text - plan.text_prefix, 0)).tolist()

    def read(self, vectors: jax.Array, sampled: Rollout) -> JointBatch:
        """The batch that a rollout becomes; `vectors` [A/chunks, D] are its activations."""
        tokens, mask = jax.device_get((sampled.tokens, sampled.mask))
        prefix, n = self.study.reconstructor.prefix, len(tokens)
        rows = [[*prefix, *row[real].tolist(), *self.after] for row, real in zip(tokens, mask)]
        features = {name: np.zeros(n, x.dtype) for name, x in self.study.feature_shapes.items()}
        made = (*pad_tokens(rows, self.study.text_width), np.ones(n, bool), features)
        texts, lengths, valid, features = place_batch(self.study.mesh, made)
        return JointBatch(
            vectors=vectors,
            responses=sampled.tokens,
            response_mask=sampled.mask,
            sampler_logprobs=sampled.logprobs,
            finished=sampled.finished,
            texts=texts,
            text_lengths=lengths,
            valid=valid,
            features=features,
        )


def rl(study: Study) -> Benchmark:
    """A whole RL step, as `nla_jax/stages/rl.py` runs it."""
    c, program = study.config.rl, study.programs()["joint_step"]
    shapes, base = program.arguments[0].models, random_base(study, program)
    av, ar = (random_arrays(shapes[name].params, study.config.seed) for name in ("verbalizer", "reconstructor"))
    frozen, sampler, ids = study.frozen(av, base), Sampler(study, base), Ids(study)
    state = study.init(av, ar)
    del av, ar, program, shapes

    def step(clock: Clock) -> dict:
        nonlocal state
        with clock.phase("rollout"):
            params = sampler.to_decoding(state.models["verbalizer"].params)
            parts, pieces = sampler.start(params)
        batches = []
        for part in parts:  # one is read while the next is sampled
            with clock.phase("rollout"):
                piece = jax.block_until_ready(next(pieces))
            with clock.phase("host"):
                batches.append(ids.read(part, piece))
        del params, pieces  # a whole copy of the AV, for which the step below has no room
        with clock.phase("train"):
            state, metrics, _ = study.joint_program(state, frozen, joined(batches))
            return jax.device_get(metrics)

    samples = c.activations * c.group
    work = {"rollout": sampler.work, "host": Work(), "train": work_of(study)["joint_step"]}
    decoding = lambda seconds: sampler.decoding(state.models["verbalizer"].params, seconds)
    return Benchmark(step, work, samples, samples * study.config.prompts.max_new_tokens, decoding)


def rollout(study: Study) -> Benchmark:
    """Sampling alone: parameters re-laid out and cast, then one rollout."""
    c, programs = study.config.rl, study.programs()
    params = random_arrays(programs["relayout"].arguments[0], study.config.seed)
    sampler = Sampler(study, random_base(study, programs["joint_step"]))

    def step(clock: Clock) -> dict:
        with clock.phase("relayout"):
            ready = jax.block_until_ready(sampler.to_decoding(params))
        with clock.phase("rollout"):
            sampled = jax.device_get(list(sampler.start(ready)[1]))
        return {"logprob": np.mean([piece.logprobs.mean() for piece in sampled])}

    samples = c.activations * c.group
    work = {"relayout": work_of(study)["relayout"], "rollout": sampler.work}
    decoding = lambda seconds: sampler.decoding(params, seconds)
    return Benchmark(step, work, samples, samples * study.config.prompts.max_new_tokens, decoding)


def sft_av(study: Study) -> Benchmark:
    """A step of the AV's warm start. Tokens are counted on whole sequences, prompt and label."""
    tokens = study.verbalizer.prompt_length + study.config.prompts.max_new_tokens
    return _supervised(study, "sft_av", study.config.sft.av.batch * tokens)


def sft_ar(study: Study) -> Benchmark:
    """A step of the AR's warm start."""
    return _supervised(study, "sft_ar", study.config.sft.ar.batch * study.text_width)


def _supervised(study: Study, name: str, tokens: int) -> Benchmark:
    """A step of a warm start on rows of random ids, as long as the longest label, and as many random activations."""
    step, program = getattr(study, name), study.programs()[name]
    shapes, (rows, length), base = program.arguments[0], program.arguments[1].tokens.shape, program.arguments[2]
    params = random_arrays(shapes.models[step.name].params, study.config.seed)
    base = None if base is None else random_arrays(base, study.config.seed)
    layout = jax.tree.map(lambda x: x.sharding, shapes)
    state = jax.jit(step.init, out_shardings=layout, donate_argnums=0)(params)
    rng, vocabulary = np.random.default_rng(study.config.seed), study.verbalizer.model.config.vocab_size

    def one(clock: Clock) -> dict:
        nonlocal state
        with clock.phase("host"):
            ids = rng.integers(0, vocabulary, (rows, length), np.int32)
            batch = TextBatch(ids, np.full(rows, length, np.int32), random_vectors(study, rng, rows))
            batch = place_batch(study.mesh, batch)
        with clock.phase("train"):
            state, metrics = program.function(state, batch, base)
            return jax.device_get(metrics)

    return Benchmark(one, {"host": Work(), "train": work_of(study)[name]}, rows, tokens)


def extract(study: Study) -> Benchmark:
    """Activations of one batch of documents of the greatest length, gathered and brought to the host."""
    c, program = study.config.extract, study.programs()["extract"]
    model, params, _, earlier = program.arguments
    params = random_arrays(params, study.config.seed)
    subject = Subject("random", Path(), study.config.subject.layer, model, params, None, program.mesh, earlier)
    rng = np.random.default_rng(study.config.seed)
    positions = [np.linspace(0, c.max_tokens - 1, min(c.positions, c.max_tokens), dtype=int).tolist()] * ROWS

    def step(clock: Clock) -> dict:
        with clock.phase("host"):
            rows = rng.integers(0, model.config.vocab_size, (ROWS, c.max_tokens)).tolist()
        with clock.phase("forward"):
            vectors = np.concatenate(list(residual_rows(subject, rows, positions)))
            return {"norm": np.linalg.norm(vectors, axis=1).mean()}

    work = {"host": Work(), "forward": work_of(study)["extract"]}
    return Benchmark(step, work, ROWS, ROWS * c.max_tokens)


def load(study: Study) -> Benchmark:
    """Reading the AV's parameters from a Hugging Face folder onto the mesh.

    The folder was just written, so it is read from the system's file cache where that has room for it."""
    scratch = tempfile.TemporaryDirectory(prefix="nla_benchmark_")
    folder = lambda: Path(scratch.name) / "model"  # the folder lives as long as this function
    config = study.verbalizer.model.config
    shapes = placed(study.mesh, abstract_params(config), dtype=config.dtype)
    tokenizer = train_tokenizer(["random"], 300)
    save_model(folder(), random_arrays(shapes, study.config.seed), config, tokenizer, dtype=config.dtype)
    size = sum(file.stat().st_size for file in folder().glob("*.safetensors"))
    layout = jax.tree.map(lambda x: x.sharding, shapes)

    def step(clock: Clock) -> dict:
        with clock.phase("load"):
            params = load_params(folder(), config, dtype=jnp.dtype(config.dtype), layout=layout)
            jax.block_until_ready(params)
        return {"parameters": parameters(params)}

    more = lambda seconds: {"file_bytes": size, "file_bytes_per_second": size / seconds["load"]}
    return Benchmark(step, {"load": Work()}, 1, 0, more)


BENCHMARKS = {benchmark.__name__: benchmark for benchmark in (rl, rollout, sft_av, sft_ar, extract, load)}
