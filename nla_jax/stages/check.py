"""What can be known before anything runs: that every function a config names is found, called once, and answers rightly;
that the mesh divides every batch; and, from the ids of the documents alone, that every split has enough of them."""

import collections
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nla_jax.autoencoder import Reconstructor
from nla_jax.config import Config
from nla_jax.data.corpus import IMPORT_PATH, Document, split_of
from nla_jax.data.dataset_sidecar import check_marker, read_facts, templates_of
from nla_jax.data.interchange import check_sources
from nla_jax.io.files import AnyName, path_to
from nla_jax.io.folders import load_tokenizer
from nla_jax.io.parquet import SIDECAR
from nla_jax.joint_step import init_model, judge, update
from nla_jax.labels.labeller import configured_labeller
from nla_jax.models.transformer import Transformer, TransformerConfig, abstract_params
from nla_jax.objective import SUBJECT_KL, TRUTH, UNCORRELATED, Scored
from nla_jax.probes.probe import ASKS, WHO_ASKS, chosen_probes, load_probes, there
from nla_jax.probes.provider import provider_of
from nla_jax.prompts import find_marker
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.runtime.notes import note
from nla_jax.runtime.user_code import UserFunction, resolve
from nla_jax.stages.deciding import check_decisions
from nla_jax.stages.reading import grammar_of, read_by
from nla_jax.study import compute_features, injections, lora, make_optimizer
from nla_jax.subject import SHIPPED, known_shapes

ACTIVATIONS, GROUP, WIDTH, TOKENS = 2, 3, 8, 4  # of the made-up batch that functions are called with


def check_functions(config: Config, stages: Sequence[str]) -> None:
    """Calls the functions that these stages would call, on made-up values or shapes.

    Raises `InputError` that names setting, file and line of the first one that is wrong."""
    if {"pretrain", "extract"} & set(stages) and IMPORT_PATH.fullmatch(config.corpus.source):
        resolve(config.corpus.source, "corpus.source")
    if "pretrain" in stages or not config.subject.path:
        check_subject(config)
    check_optimizers(config, stages)
    if "extract" in stages and any((sources := config.extract.source.to_dict()).values()):
        check_sources(sources)
    if "label" in stages:
        configured_labeller(config.label).ready()
    if {"sft", "rl", "evaluate"} & set(stages):
        check_injections(config)
        check_templates(config)
    if "sft" in stages:
        read_by(resolve(config.sft.reader, "sft.reader"), ["A text about nothing."], np.random.default_rng(0))
    if "rl" in stages:
        check_objective(config)
        check_probes(config.rl.probes if config.rl.probe_every else (), config, "rl.probes")
        check_decisions(config)
    if "evaluate" in stages:
        if config.evaluate.provider.kind:
            provider_of(config.evaluate.provider, "").ready()
        check_probes(chosen_probes(config.evaluate), config, "evaluate.probes")


def check_probes(chosen: Sequence[str], config: Config, what: str) -> None:
    """Each probe is there, and needs nothing that the run has not."""
    for function, probe in load_probes(chosen, what):
        if absent := set(probe.needs) - set(found := there(config.evaluate)):
            hint = f" ({WHO_ASKS})" if absent & set(ASKS) else ""
            raise InputError(f"{function} needs {min(absent)!r}; a run has {', '.join(found)}{hint}.")


def check_batches(config: Config, mesh: Mesh, stages: Sequence[str]) -> None:
    """The mesh divides the rows of every batch that these stages train on; each device then has an equal part.

    Raises `InputError` that names the batch and the mesh. Otherwise devices would compute the same rows, unnoticed."""
    c, rows = config.rl, config.rl.activations * config.rl.group
    batches = {
        "pretrain": {"pretrain.batch": config.pretrain.batch if config.pretrain.steps else mesh.size},
        "sft": {"sft.av.batch": config.sft.av.batch, "sft.ar.batch": config.sft.ar.batch},
        "rl": {
            "rl.activations * rl.group": rows,
            "rl.activations * rl.group / rl.rollout_chunks": rows // c.rollout_chunks,
            "rl.activations * rl.group / rl.micro_batches": rows // c.micro_batches,
        },
    }
    for name, size in [item for stage in stages for item in batches.get(stage, {}).items()]:
        if size % mesh.size:
            sizes = " x ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
            raise InputError(
                f"{name} is {size} rows, which the {mesh.size} devices of the mesh ({sizes}) do not divide; take a multiple "
                f"of {mesh.size}."
            )


def documents_of_splits(config: Config, documents: Sequence[Document]) -> dict[str, int]:
    """How many documents each split has, known from their ids alone. Raises `InputError` for a split with none."""
    found = collections.Counter(split_of(document, config.split, config.seed) for document in documents)
    if empty := [split for split in config.split if not found[split]]:
        raise InputError(
            f"None of the {len(documents)} documents falls into split {empty[0]!r}; take more documents, or raise "
            f"split.{empty[0]}."
        )
    return {split: found[split] for split in config.split}


def check_documents(config: Config, documents: Sequence[Document]) -> dict[str, int]:
    """How many documents each split has. Raises `InputError` for one that gives fewer activations than a batch has."""
    found = documents_of_splits(config, documents)
    least = {
        "av_sft": ("sft.av.batch", config.sft.av.batch if config.sft.av.steps else 1),
        "ar_sft": ("sft.ar.batch", config.sft.ar.batch if config.sft.ar.steps else 1),
        "rl": ("rl.activations", config.rl.activations if config.rl.steps else 1),
        "heldout": ("the least that can be measured", 2),
    }
    for split, (name, rows) in least.items():
        if (most := found[split] * config.extract.positions) < rows:
            raise InputError(
                f"Split {split!r} has {found[split]} of the {len(documents)} documents, which give at most {most} "
                f"activations, fewer than {name} ({rows}); take more documents, or raise split.{split} or extract.positions."
            )
    if config.rl.probe_every and found["rl"] < 3:
        raise InputError(
            f"Split 'rl' has {found['rl']} of the {len(documents)} documents, too few to set some aside for rl.probes; take "
            f"more documents, raise split.rl, or set rl.probe_every to 0."
        )
    return found


def check_subject(config: Config) -> None:
    """The shapes of a subject from scratch make a model."""
    c = config.pretrain
    if c.init_from:
        return
    try:
        model = TransformerConfig(vocab_size=c.vocab_size, **c.model)
        sizes = {
            name: getattr(model, name) for name in ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_width")
        }
        if wrong := [name for name, n in sizes.items() if not isinstance(n, int) or n < 1]:
            raise InputError(f"pretrain.model.{wrong[0]} is {sizes[wrong[0]]!r}; it must be a whole number from 1 on.")
        if model.heads % model.kv_heads:
            raise InputError(f"pretrain.model.heads is {model.heads}, no multiple of kv_heads ({model.kv_heads}).")
        nn.unbox(abstract_params(model))
    except TypeError as error:
        raise InputError(
            f"pretrain.model makes no model ({first_line(error)}); see `nla settings pretrain.`."
        ) from None
    if not 0 <= config.subject.layer < model.layers:
        raise InputError(
            f"subject.layer {config.subject.layer} does not exist: pretrain.model has {model.layers} blocks."
        )


def check_injections(config: Config) -> None:
    """Each injection keeps the shape of the slots' states."""
    states = jax.ShapeDtypeStruct((ACTIVATIONS, len(config.subject.layers), WIDTH), jnp.float32)
    for injection in injections(config):
        found = jax.eval_shape(lambda x, v, f=injection.function: f(x, v, 1.0), states, states)
        if getattr(found, "shape", None) != states.shape:
            raise InputError(f"{injection.function} gives {_shape(found)}, expected shape {states.shape}.")


def check_templates(config: Config) -> None:
    """Each prompt has as many places as there are things that it is about."""
    layers = len(config.subject.layers)
    shown = "training shows one activation, at one place" if layers == 1 else f"{layers} layers need {layers} places"
    for name, place, expected, what in (
        ("verbalizer_template", "{injection_char}", layers, shown),
        ("reconstructor_template", "{explanation}", 1, "the AR reads one text"),
    ):
        if (count := getattr(config.prompts, name).count(place)) != expected:
            raise InputError(f"prompts.{name} holds {place} {count} times; {what}.")


def check_prompts(config: Config, workdir: AnyName, stages: Sequence[str]) -> None:
    """Where the subject's tokenizer is here already, it makes one token of the marker, in our prompt and in those that
    datasets were made for. Says where these have another marker than `prompts.marker`."""
    c, sources = config.prompts, config.extract.source.to_dict() if "extract" in stages else {}
    files = [path.with_name(path.name + SIDECAR) for path in map(Path, filter(None, sources.values()))]
    made_for = {file: read_facts(file) for file in map(Path.expanduser, files) if file.is_file()}
    if not made_for and "sft" not in stages or (folder := tokenizer_folder(config, workdir)) is None:
        return
    tokenizer = load_tokenizer(folder)
    if "sft" in stages:
        find_marker(tokenizer, c.verbalizer_template, c.marker)
    for file, meta in made_for.items():
        tokens = meta.get("tokens")
        check_marker(file, tokens, templates_of(meta).get("av"), tokenizer)
        char = tokens.get("injection_char") if isinstance(tokens, dict) else None
        if c.marker and char not in (None, c.marker):
            note(f"{file} was made with the marker {char!r}; this pair is trained with prompts.marker = {c.marker!r}.")


def tokenizer_folder(config: Config, workdir: AnyName) -> Path | None:
    """The local folder that has the subject's tokenizer; None where there is none yet."""
    init = SHIPPED if config.pretrain.init_from == "shipped" else config.pretrain.init_from
    places = [config.subject.path] if config.subject.path else [path_to(workdir) / "subject", init]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def check_optimizers(config: Config, stages: Sequence[str]) -> None:
    """Every optimizer of these stages can be made, and makes a step of the parameters that it will train."""
    sft, rl = config.sft, config.rl
    optimizers = {
        "pretrain": (("pretrain.optimizer", config.pretrain.optimizer, config.pretrain.steps, "subject"),),
        "sft": (
            ("sft.av.optimizer", sft.av.optimizer, sft.av.steps, "av"),
            ("sft.ar.optimizer", sft.ar.optimizer, sft.ar.steps, "ar"),
        ),
        "rl": (
            ("rl.av_optimizer", rl.av_optimizer, rl.steps, "av"),
            ("rl.ar_optimizer", rl.ar_optimizer, rl.steps, "ar"),
        ),
    }
    named = [optimizer for stage in stages for optimizer in optimizers.get(stage, ())]
    models = trained(config) if named else {}
    for what, settings, steps, model in named:
        tx = make_optimizer(settings, steps, what)
        if model in models:
            with resolve(settings["function"], f"{what}.function").blamed():
                jax.eval_shape(lambda p, tx=tx: update(tx, p, init_model(tx, p)), nn.unbox(models[model]))


def trained(config: Config) -> dict[str, dict]:
    """Names and (boxed) shapes of the parameters of `subject`, `av` and `ar` that are trained; {} where the subject's
    shapes are not known."""
    if (model := known_shapes(config)) is None:
        return {}
    of_av, of_ar = lora(config.sft.av.lora), lora(config.sft.ar.lora)
    blocks, whole = Transformer(model.truncated(config.subject.layer + 1)), abstract_params(model)
    ar = Reconstructor(blocks, lora=of_ar, layers=len(config.subject.layers)).abstract_params()
    return {"subject": whole, "av": of_av.abstract_params(model) if of_av else whole, "ar": ar}


def check_objective(config: Config) -> None:
    """Reader, features, reward and advantage, one after the other, on a batch of made-up texts."""
    c, B = config.rl, ACTIVATIONS * GROUP
    texts = ["A text about nothing."] * B
    read_by(resolve(c.reader, "rl.reader"), texts[:GROUP], np.random.default_rng(0))
    rows = [{"doc_id": "doc", "text": "A text", "token": "text", "role": "", "position": 1}] * B
    features = compute_features(c.features, texts, rows)
    for name, measured, values in ((TRUTH, c.truth, (0, 1)), (SUBJECT_KL, c.subject_kl, (5, 0))):
        if measured and name in features:
            raise InputError(f"rl.features give {name!r}, which rl.{name} measures too; call yours otherwise.")
        if measured:
            features[name] = np.linspace(*values, B, dtype=np.float32)
    if c.truth:
        grammar_of(config).ready()
    shape = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    f32, bits = jnp.float32, jnp.bool_
    parts = {
        "mse": shape(f32, B),
        "cosine": shape(f32, B),
        "valid": shape(bits, B),
        "mask": shape(bits, B, TOKENS),
        "logprobs": shape(f32, B, TOKENS),
        "features": {name: shape(x.dtype, B) for name, x in features.items()},
        "cosines": shape(f32, B, ACTIVATIONS),
        "own": shape(jnp.int32, B),
    }
    reward, advantage = resolve(c.reward, "rl.reward"), resolve(c.advantage, "rl.advantage")
    jax.eval_shape(lambda parts: judge(reward, advantage, Scored(**parts), ACTIVATIONS), parts)
    check_reward(reward, features)


def check_reward(reward: UserFunction, features: dict[str, np.ndarray]) -> None:
    """The reward of ordinary responses, the first of which has failed, is a finite number."""
    B = ACTIVATIONS * GROUP
    mse = np.linspace(UNCORRELATED, 0.2, B, dtype=np.float32)
    ordinary = Scored(
        mse=jnp.asarray(mse),
        cosine=jnp.asarray(1 - mse / 2),
        valid=jnp.arange(B) > 0,
        mask=jnp.ones((B, TOKENS), bool),
        logprobs=jnp.full((B, TOKENS), -1.0),
        features={name: jnp.asarray(x) for name, x in features.items()},
        cosines=jnp.repeat(jnp.asarray(1 - mse / 2)[:, None], ACTIVATIONS, 1),
        own=jnp.repeat(jnp.arange(ACTIVATIONS), GROUP),
    )
    found = np.asarray(reward(ordinary))
    if not np.isfinite(found).all():
        at = int(np.flatnonzero(~np.isfinite(found))[0])
        kind = "response" if at else "failed response"
        raise InputError(f"{reward} gives {found[at]} for a {kind} of mse {mse[at]:.2f}; a reward must be finite.")


def _shape(x) -> str:
    return f"shape {x.shape}" if hasattr(x, "shape") else f"a {type(x).__name__}"
