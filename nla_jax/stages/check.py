"""What can be known before anything runs: every function that a config names is found, called once, and answers
rightly."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.config import Config
from nla_jax.data.corpus import IMPORT_PATH
from nla_jax.joint_step import JointStep, init_model, update
from nla_jax.labels.labeller import make_labeller
from nla_jax.objective import Scored
from nla_jax.probes.probe import load_probes
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import resolve
from nla_jax.stages.reading import read_by
from nla_jax.study import compute_features, injections, make_optimizer

ACTIVATIONS, GROUP, WIDTH, TOKENS = 2, 3, 8, 4  # of the made-up batch that functions are called with


def check_functions(config: Config, stages: Sequence[str]) -> None:
    """Calls the functions that these stages would call, on made-up values or shapes.

    Raises `InputError` that names setting, file and line of the first one that is wrong."""
    if {"pretrain", "extract"} & set(stages) and IMPORT_PATH.fullmatch(config.corpus.source):
        resolve(config.corpus.source, "corpus.source")
    if "label" in stages:
        make_labeller(config.label.labeller, config.label.settings)
    if {"sft", "rl", "evaluate"} & set(stages):
        check_injections(config)
    if "sft" in stages:
        check_optimizer(config.sft.av.optimizer, config.sft.av.steps, "sft.av.optimizer")
        check_optimizer(config.sft.ar.optimizer, config.sft.ar.steps, "sft.ar.optimizer")
    if "rl" in stages:
        check_optimizer(config.rl.av_optimizer, config.rl.steps, "rl.av_optimizer")
        check_optimizer(config.rl.ar_optimizer, config.rl.steps, "rl.ar_optimizer")
        check_objective(config)
    if "evaluate" in stages:
        load_probes(config.evaluate.probes)


def check_injections(config: Config) -> None:
    """Each injection keeps the shape of the slots' states."""
    states = jax.ShapeDtypeStruct((ACTIVATIONS, 1, WIDTH), jnp.float32)
    for injection in injections(config):
        found = jax.eval_shape(lambda x, v, f=injection.function: f(x, v, 1.0), states, states)
        if getattr(found, "shape", None) != states.shape:
            raise InputError(f"{injection.function} gives {_shape(found)}, expected shape {states.shape}.")


def check_optimizer(settings: dict, steps: int, what: str) -> None:
    """The optimizer can be made, and makes a step."""
    tx = make_optimizer(settings, steps, what)
    params = {"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}
    with resolve(settings["function"], f"{what}.function").blamed():
        jax.eval_shape(lambda p: update(tx, p, init_model(tx, p)), params)


def check_objective(config: Config) -> None:
    """Reader, features, reward and advantage, one after the other, on a batch of made-up texts."""
    c, B = config.rl, ACTIVATIONS * GROUP
    texts = ["A text about nothing."] * B
    read_by(resolve(c.reader, "rl.reader"), texts[:GROUP], np.random.default_rng(0))
    rows = [{"doc_id": "doc", "text": "A text", "token": "text", "role": "", "position": 1}] * B
    features = compute_features(c.features, texts, rows)
    shape = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    f32, bits = jnp.float32, jnp.bool_
    scored = Scored(
        mse=shape(f32, B),
        cosine=shape(f32, B),
        valid=shape(bits, B),
        mask=shape(bits, B, TOKENS),
        logprobs=shape(f32, B, TOKENS),
        features={name: shape(x.dtype, B) for name, x in features.items()},
    )
    joint = JointStep(None, None, None, None, resolve(c.reward, "rl.reward"), resolve(c.advantage, "rl.advantage"))
    jax.eval_shape(lambda scored: joint.judge(scored, ACTIVATIONS), scored)


def _shape(x) -> str:
    return f"shape {x.shape}" if hasattr(x, "shape") else f"a {type(x).__name__}"
