"""One study, described once: its models, optimisers, objective and layouts, and the programs that they make.

Stages execute these programs, `nla plan` lowers them, `nla benchmark` times them, the sharding tests run them on every
mesh: what is planned and measured is what is executed.

| program | does | runs |
|---|---|---|
| extract | the subject's residual stream of some documents | once per batch of documents |
| sft_av, sft_ar | one step of a warm start | each step |
| relayout | the AV's parameters as the sampler reads them | each RL step |
| rollout | samples explanations | each chunk of an RL step |
| joint_step | one optimiser step on AV and AR | each RL step |
| reconstruct | activations from texts | each batch of an evaluation |
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.autoencoder import Injection, PromptIds, Reconstructor, Verbalizer, autoencoder, reconstruct, residual
from nla_jax.config import Config, LoraSettings
from nla_jax.data.batches import TextBatch
from nla_jax.joint_step import Frozen, JointBatch, JointStep, SupervisedStep, TrainState
from nla_jax.losses import reconstructor_loss, verbalizer_loss
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import (
    DECODE,
    TRAIN,
    batch_sharding,
    device_bytes,
    host_mesh,
    placed,
    placed_batch,
    relayout,
    state_shapes,
)
from nla_jax.models.transformer import Transformer, TransformerConfig, abstract_params
from nla_jax.objective import SUBJECT_KL, TRUTH
from nla_jax.runtime.compiler import jit_step
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import resolve
from nla_jax.sampling import Rollout, decoding_layout, rollout, start_all
from nla_jax.subject import ROWS


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a study: a jitted function, and the shapes (with shardings) that it is called with."""

    mesh: Mesh
    function: Callable
    arguments: tuple
    options: dict = dataclasses.field(default_factory=dict)  # static keyword arguments
    samples: int = 1  # rows that it works on
    runs: int = 0  # how often the configured run executes it (0: unknown)
    beside: float = 0.0  # bytes that a device holds beside the arguments
    copies: int = 1  # how many run at a time, each on its own mesh

    @property
    def least_memory(self) -> float:
        """Bytes that a device holds before the program allocates anything."""
        return device_bytes(self.arguments) + self.beside


@dataclasses.dataclass(frozen=True)
class Study:
    """A config on a mesh with its AV and AR. `text_width`: tokens of the AR's longest input in training."""

    config: Config
    mesh: Mesh
    verbalizer: Verbalizer
    reconstructor: Reconstructor
    text_width: int

    @classmethod
    def of_shapes(cls, config: Config, mesh: Mesh, model: TransformerConfig) -> "Study":
        """A study of a subject of which only the shapes are known; prompts have the lengths under `plan`."""
        p = config.plan
        earlier = config.subject.earlier_layers
        slots = tuple(range(len(config.subject.layers)))
        suffix = tuple(range(max(p.suffix, len(slots))))
        prompt = PromptIds(tuple(range(p.prefix)), suffix, slots, -1, tuple(range(p.text_prefix)))
        av, ar = autoencoder(
            model,
            config.subject.layer,
            prompt,
            config.prompts.injection_scale or 1.0,
            injections(config),
            (lora(config.sft.av.lora), lora(config.sft.ar.lora)),
            earlier,
        )
        return cls(config, mesh, av, ar, -(-(p.text + config.prompts.max_new_tokens) // 8) * 8)

    # The steps

    @functools.cached_property
    def joint(self) -> JointStep:
        """The joint step, as the config describes it."""
        c = self.config.rl
        return JointStep(
            self.verbalizer,
            self.reconstructor,
            make_optimizer(c.av_optimizer, c.steps, "rl.av_optimizer"),
            make_optimizer(c.ar_optimizer, c.steps, "rl.ar_optimizer"),
            reward=resolve(c.reward, "rl.reward"),
            advantage=resolve(c.advantage, "rl.advantage"),
            kl_coefficient=c.kl_coefficient,
            temperature=c.temperature,
            micro_batches=c.micro_batches,
        )

    @functools.cached_property
    def sft_av(self) -> SupervisedStep:
        """A step of the AV's warm start."""
        c = self.config.sft.av
        tx = make_optimizer(c.optimizer, c.steps, "sft.av.optimizer")
        return SupervisedStep("verbalizer", verbalizer_loss(self.verbalizer), tx)

    @functools.cached_property
    def sft_ar(self) -> SupervisedStep:
        """A step of the AR's warm start."""
        c = self.config.sft.ar
        tx = make_optimizer(c.optimizer, c.steps, "sft.ar.optimizer")
        return SupervisedStep("reconstructor", reconstructor_loss(self.reconstructor), tx)

    @functools.cached_property
    def joint_program(self) -> Callable[[TrainState, Frozen, JointBatch], tuple[TrainState, dict, dict]]:
        """The compiled joint step; the state that it is given is consumed."""
        c = self.config.compute
        return jit_step(self.joint, self.mesh, c.optimize, dtype=c.dtype)

    @functools.cached_property
    def boxed(self) -> tuple[dict, dict]:
        """Shapes of what is trained of AV and AR, with logical axis names."""
        return self.verbalizer.abstract_params(), self.reconstructor.abstract_params()

    # What an RL step executes

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state of RL."""
        return placed(self.mesh, state_shapes(self.joint.init, *self.boxed))

    def init(self, verbalizer: dict, reconstructor: dict) -> TrainState:
        """The state before the first RL step, laid out on the mesh; the parameters are consumed."""
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        places = [layout.models[name].params for name in ("verbalizer", "reconstructor")]
        placed = jax.device_put((verbalizer, reconstructor), tuple(places))
        return jax.jit(self.joint.init, out_shardings=layout, donate_argnums=(0, 1))(*placed)

    def frozen(self, verbalizer: dict, base: dict | None) -> Frozen:
        """The warm-started AV as the KL reads it (no copy where nothing does), and the base beneath adapters."""
        if not self.config.rl.kl_coefficient:
            return Frozen(None, base)
        to_training = relayout(self.mesh, self.boxed[0], self.verbalizer.model.config.dtype, TRAIN)
        return Frozen(to_training(verbalizer), base)

    def decoding(self, base: dict | None) -> Callable[[dict], dict]:
        """A function from the AV's trained parameters to those that `sample` reads."""
        return decoding_layout(self.mesh, self.verbalizer, base)

    def sample(self, sampler: dict, vectors: list[jax.Array], key: jax.Array) -> Iterator[Rollout]:
        """Rollouts of an RL step, one for each chunk of `vectors` [A/chunks, D]; all are started at once.

        Their rows are cut over the devices as training cuts a batch."""
        rows = len(vectors[0]) * self.config.rl.group

        def one(i: int) -> Rollout:
            sampled = rollout(self.verbalizer, sampler, vectors[i], key, i * rows, **self.rollout_options)
            return jax.device_put(sampled, jax.tree.map(lambda x: batch_sharding(self.mesh, x.shape), sampled))

        return start_all(self.mesh, one, len(vectors))

    @property
    def rollout_options(self) -> dict:
        """The static arguments of the rollout."""
        c = self.config.rl
        return {
            "group": c.group,
            "max_new_tokens": self.config.prompts.max_new_tokens,
            "temperature": c.temperature,
        }

    # The programs, from shapes

    def programs(self, host: Mesh | None = None) -> dict[str, Program]:
        """Every program at its largest shapes, in the order in which a run needs them.

        `host`: the devices of one host, which extracts from documents of its own (default: those of the mesh's first).
        Raises `InputError` where the mesh does not divide a parameter."""
        extract = self._extract(host)
        c, mesh = self.config, self.mesh
        dtype, place = self.verbalizer.model.config.dtype, functools.partial(placed, mesh)
        base = place(abstract_params(self.verbalizer.model.config), dtype=dtype) if self._adapters else None
        state = self.abstract_state()
        reference = place(self.boxed[0], dtype=dtype) if c.rl.kl_coefficient else None
        frozen = Frozen(reference, base)
        kept = device_bytes((state, frozen))  # through the whole of RL
        sampler, second, shared = self._sampler()
        chunks, trained = c.rl.rollout_chunks, state.models["verbalizer"].params
        A, B = c.rl.activations, c.rl.activations * c.rl.group
        vectors = placed_batch(mesh, _floats(A // chunks, self.reconstructor.width))
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        return {
            "extract": extract,
            "sft_av": self._supervised(self.sft_av, c.sft.av, c.prompts.max_new_tokens, base),
            "sft_ar": self._supervised(self.sft_ar, c.sft.ar, self.text_width, base),
            "relayout": Program(
                mesh,
                relayout(mesh, self.boxed[0], dtype, DECODE),
                (trained,),
                samples=B,
                runs=c.rl.steps,
                beside=kept - device_bytes(trained) + second,
            ),
            "rollout": Program(
                mesh,
                rollout,
                (self.verbalizer, sampler, vectors, key, 0),
                self.rollout_options,
                B // chunks,
                c.rl.steps * chunks,
                kept - shared,
            ),
            "joint_step": Program(
                mesh, self.joint_program, (state, frozen, self.joint_batch()), samples=B, runs=c.rl.steps, beside=second
            ),
            "reconstruct": self._reconstruct(),
        }

    def joint_batch(self) -> JointBatch:
        """Shapes of a batch of the joint step."""
        c, width = self.config, self.reconstructor.width
        A, R, T = c.rl.activations, c.prompts.max_new_tokens, self.text_width
        B = A * c.rl.group
        return placed_batch(
            self.mesh,
            JointBatch(
                vectors=_floats(A, width),
                responses=_ints(B, R),
                response_mask=_bits(B, R),
                sampler_logprobs=_floats(B, R),
                finished=_bits(B),
                texts=_ints(B, T),
                text_lengths=_ints(B),
                valid=_bits(B),
                features=dict(self.feature_shapes),
            ),
        )

    @functools.cached_property
    def feature_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what `rl.features` computes, whose functions are called once, on two empty texts, and of what the
        labeller and the subject are asked."""
        c = self.config.rl
        B = c.activations * c.group
        found = compute_features(c.features, [""] * 2, [{}] * 2)
        shapes = {name: jax.ShapeDtypeStruct((B,), x.dtype) for name, x in found.items()}
        asked = {TRUTH: c.truth, SUBJECT_KL: c.subject_kl}
        return shapes | {name: _floats(B) for name, wanted in asked.items() if wanted}

    @property
    def _adapters(self) -> bool:
        return bool(self.verbalizer.lora or self.reconstructor.lora)

    def _sampler(self) -> tuple[dict, float, float]:
        """The sampler's parameters, and the bytes of its copy of a frozen base: as a second one, and as a shared
        one."""
        config = self.verbalizer.model.config
        decoding = placed(self.mesh, self.boxed[0], DECODE, config.dtype)
        if not self.verbalizer.lora:
            return decoding, 0.0, 0.0
        base = placed(self.mesh, abstract_params(config), DECODE, config.dtype)
        blocks = {name: part | decoding["blocks"].get(name, {}) for name, part in base["blocks"].items()}
        # One device decodes with the frozen base itself, several with a copy.
        second, shared = (device_bytes(base), 0.0) if self.mesh.size > 1 else (0.0, device_bytes(base))
        return base | {"blocks": blocks}, second, shared

    def _supervised(self, step: SupervisedStep, settings, width: int, base: dict | None) -> Program:
        """A warm start; the other model's parameters stay in memory meanwhile."""
        own, other = self.boxed if step.name == "verbalizer" else reversed(self.boxed)
        n = settings.batch
        batch = placed_batch(self.mesh, TextBatch(_ints(n, width), _ints(n), _floats(n, self.reconstructor.width)))
        state = placed(self.mesh, state_shapes(step.init, own))
        return Program(
            self.mesh,
            jit_step(step, self.mesh, self.config.compute.optimize, dtype=self.config.compute.dtype),
            (state, batch, base),
            samples=n,
            runs=settings.steps,
            beside=device_bytes(placed(self.mesh, other)),
        )

    def _extract(self, host: Mesh | None) -> Program:
        hosts = {device.process_index for device in self.mesh.devices.flat}
        host = host or host_mesh(self.mesh, min(hosts))
        c, model = self.config, Transformer(self.reconstructor.model.config)
        params = placed(host, abstract_params(model.config, truncated=True), dtype=model.config.dtype)
        tokens = placed_batch(host, _ints(ROWS, c.extract.max_tokens))
        known = c.corpus.max_documents < 10**9  # 10**9 and more: as many as there are
        return Program(
            host,
            jax.jit(residual, static_argnums=(0, 3)),
            (model, params, tokens, c.subject.earlier_layers),
            samples=ROWS,
            runs=-(-c.corpus.max_documents // (ROWS * len(hosts))) if known else 0,
            copies=len(hosts),
        )

    def _reconstruct(self) -> Program:
        n = self.config.evaluate.batch
        params = placed(self.mesh, self.boxed[1])
        if self.reconstructor.lora:
            base = placed(self.mesh, abstract_params(self.reconstructor.model.config, truncated=True))
            params = jax.eval_shape(self.reconstructor.assemble, params, base)
        rows = placed_batch(self.mesh, (_ints(n, self.text_width), _ints(n)))
        return Program(
            self.mesh,
            reconstruct,
            (self.reconstructor, params, *rows),
            samples=n,
            runs=-(-self.config.evaluate.rows // n),
        )


# From settings to values


def lora(settings: LoraSettings) -> Lora | None:
    """The adapter that a config asks for; None (the whole model is trained) where its rank is 0."""
    return Lora(settings.rank, settings.alpha, settings.rslora, settings.targets) if settings.rank else None


def injections(config: Config) -> tuple[Injection, ...]:
    """How activations enter the prompt: `package.module:function`, or `package.module:function@BLOCK`."""
    found = []
    for text in config.prompts.inject:
        path, at, block = text.partition("@")
        if at and not block.removeprefix("-").isdigit():
            raise InputError(f"prompts.inject holds {text!r}; write the number of a block after @, such as @1.")
        found.append(Injection(resolve(path, "prompts.inject"), int(block) if at else -1))
    return tuple(found)


def make_optimizer(settings: dict, steps: int, what: str) -> optax.GradientTransformation:
    """The optimizer that `settings` describe: `function`, called with all the others (and with `steps` if it takes it).

    Raises `InputError` for a setting that the function does not take."""
    settings = dict(settings)
    function = resolve(settings.pop("function", ""), f"{what}.function")
    parameters = inspect.signature(function.function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "steps" in parameters:
        settings["steps"] = steps
    unknown = sorted(settings.keys() - parameters.keys())
    if unknown and not open_ended:
        raise InputError(f"{function} takes no {unknown[0]!r}; it takes {', '.join(parameters)}.")
    try:
        tx = function(**settings)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    if not isinstance(tx, optax.GradientTransformation):
        raise InputError(f"{function} returns {type(tx).__name__}, expected an optax.GradientTransformation.")
    return tx


def compute_features(paths: tuple[str, ...], texts: list[str], rows: list[dict]) -> dict[str, np.ndarray]:
    """What the functions of `rl.features` say of the texts: arrays `[B]` by name.

    Raises `InputError` for one that is no array of numbers with an entry for each text, and for a name used twice."""
    found: dict[str, np.ndarray] = {}
    for path in paths:
        function = resolve(path, "rl.features")
        result = function(texts, rows)
        if not isinstance(result, Mapping):
            raise InputError(f"{function} returns {type(result).__name__}, expected a mapping of names to arrays.")
        for name, values in result.items():
            values = np.asarray(values)
            values = values.astype(np.float32) if values.dtype == np.float64 else values
            if values.shape != (len(texts),) or values.dtype.kind not in "bif":
                raise InputError(
                    f"{function} returns {name!r} of shape {values.shape} and type {values.dtype}, expected a number for "
                    f"each of the {len(texts)} texts."
                )
            if name in found:
                raise InputError(f"{function} returns {name!r}, a name that another of rl.features uses already.")
            found[name] = values
    return found


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _bits(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)
