"""The `evaluate` stage: the pairs of a run on held-out documents, measured by a list of probes."""

import dataclasses
import functools
import hashlib
import json
import secrets
import sys
from typing import Any

import numpy as np
import pyarrow as pa

from nla_jax.data.corpus import document_of
from nla_jax.data.rows import LABEL, Rows, load_rows, spread
from nla_jax.io.files import AnyPath
from nla_jax.io.folders import open_params, read_config
from nla_jax.io.heads import HEAD
from nla_jax.io.hub import fingerprint, locate
from nla_jax.io.parquet import read_table, schema_of, write_table
from nla_jax.labels.labeller import Labeller, configured_labeller
from nla_jax.models.sharding import host_mesh
from nla_jax.pair import Pair, new_pair
from nla_jax.probes.probe import Context, Probe, asks, chosen_probes, figures, load_probes, measure
from nla_jax.probes.provider import Provider, provider_of
from nla_jax.runtime.distributed import barrier, from_writer, is_writer, source_hash
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress, write_atomically
from nla_jax.runtime.run import Run
from nla_jax.runtime.user_code import UserFunction
from nla_jax.sidecar import FILE as SIDECAR
from nla_jax.stages.sft import load
from nla_jax.stages.shown import DOCUMENTS, Shown
from nla_jax.stages.whole_document import documents
from nla_jax.study import Study, lora
from nla_jax.subject import Subject, load_subject


def evaluate(run: Run) -> None:
    """Runs `evaluate.probes`, and writes `{workdir}/evaluation.json` and the scores of each row.

    A response without an explanation counts as an empty text."""
    with run.stage("evaluate") as result:
        if result is None:
            return
        run.require("rl")
        probes = load_probes(chosen_probes(run.config.evaluate))
        context = RunContext(run)
        if any(asks(probe) for _, probe in probes):
            context.provider.ready()
        progress, scores, drawn, seconds = Progress("evaluate", len(probes)), {}, [], {}
        unfinished = run.workdir / "evaluation" / "unfinished"
        measured = f"{measured_of(context)}-{from_writer(lambda: begun(unfinished))}"
        for function, probe in probes:
            own, found, seconds[probe.name] = once(function, probe, context, measured)
            if own:
                drawn.append(found)
                scores |= own
            progress.update()
        progress.close()
        result["summary"] = summary(drawn) | {
            "heldout_documents": len(set(context.documents)),
            "heldout_rows": len(context.vectors),
        }
        shown, count = Shown(context, scores), run.config.evaluate.examples
        page = {"probes": drawn, "examples": shown.examples(count)} | documents(context, shown, min(count, DOCUMENTS))
        write_atomically(run.workdir / "evaluation.json", text := json.dumps(page))
        from_writer(lambda: unfinished.unlink(missing_ok=True))  # docs/extending.md tells people when to remove it
        result["seconds_by_probe"] = seconds
        tell_longest(seconds)
        result["hash"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


PARTS = (HEAD, SIDECAR)  # of a pair's folders, besides the models whose fingerprint is known


def measured_of(context: "RunContext") -> str:
    """What the probes of an evaluation are measured of: code, pairs, rows, labels, settings and the stages before."""
    run, c = context.run, context.run.config
    stages = [file for file in sorted(run.workdir.glob("stages/*.json")) if file.stem not in ("evaluate", "report")]
    folders = [run.workdir / pair / role for pair in ("pair", "pair_warm") for role in ("av", "ar")]
    parts = [folder / name for folder in folders for name in PARTS if (folder / name).exists()]
    said = [source_hash(), list(map(fingerprint, folders)), [file.read_bytes() for file in (*stages, *parts)]]
    said += [c.evaluate.rows, c.evaluate.batch, c.evaluate.temperature, c.prompts, c.label.labeller, c.label.settings]
    said += [c.seed, c.compute.dtype, context.column("doc_id"), context.texts("labels")]
    return hashlib.blake2b(repr(said).encode() + context.vectors.tobytes(), digest_size=8).hexdigest()


def begun(unfinished: AnyPath) -> str:
    """The name of the evaluation that is under way, which a file holds until it is finished."""
    if not unfinished.exists():
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(unfinished, secrets.token_hex(8))
    return unfinished.read_text(encoding="utf-8")


MEASURED = b"nla_jax_measured"  # in a probe's file: of what its rows were measured, and in how many seconds


def once(
    function: UserFunction, probe: Probe, context: "RunContext", measured: str
) -> tuple[dict[str, np.ndarray], dict, float]:
    """`measure`, whose rows are kept in `evaluation/probes`: a probe that an evaluation had measured before it was stopped is
    not measured again. One that asks a provider is: the answers are kept by themselves."""
    path = context.run.workdir / "evaluation" / "probes" / f"{probe.name}.parquet"
    key = f"{measured}-{function.path}-{function.source}"
    seconds = None if asks(probe) else from_writer(lambda: kept_of(path, key))
    if seconds is not None:
        rows = rows_of(path)
        return rows, figures(probe, rows, context.documents), seconds
    rows, found, seconds = measure(function, probe, context)
    if rows and is_writer():
        table = pa.table({"doc_id": context.column("doc_id")} | rows)
        said = {MEASURED: json.dumps({"of": key, "seconds": seconds})}
        write_table(table.replace_schema_metadata(said), path)
    return rows, found, seconds


def rows_of(path: AnyPath) -> dict[str, np.ndarray]:
    """The scores that a probe's file holds."""
    table = read_table(path).drop_columns("doc_id")
    return {name: np.asarray(table.column(name)) for name in table.column_names}


def kept_of(path: AnyPath, key: str) -> float | None:
    """The seconds that a probe's rows took, where they were measured of what `key` says."""
    if not path.exists():
        return None
    try:
        said = json.loads(schema_of(path).metadata[MEASURED])
        rows_of(path)
        return float(said["seconds"]) if said["of"] == key else None
    except (InputError, KeyError, TypeError, ValueError):  # damaged: measured again
        return None


def tell_longest(seconds: dict[str, float], count: int = 5) -> None:
    """Says which probes took most of the time."""
    longest = sorted(seconds, key=seconds.get, reverse=True)[:count]
    if is_writer() and longest:
        said = ", ".join(f"{name} {seconds[name]:.1f}" for name in longest)
        print(f"evaluate: seconds of the longest of {len(seconds)} probes: {said}.", file=sys.stderr)


TRAINING = 20_000  # rows of the warm start that baselines and linear probes are fitted to, at most


@dataclasses.dataclass(eq=False)
class RunContext(Context):
    """What the probes of a run read (`probes.probe.Context`). `rows`: those that are measured; by default the held-out
    ones."""

    run: Run
    rows: Rows | None = None

    def __post_init__(self):
        c = self.run.config
        if self.rows is None:
            self.rows = spread(load_rows(self.run.workdir, "heldout"), c.evaluate.rows)
        self.vectors = self.rows.vectors
        self.documents = [document_of(id) for id in self.rows.column("doc_id")]
        self.seed, self.max_new_tokens = c.seed, c.prompts.max_new_tokens
        self.column, self._sampled = map(functools.cache, (self.column, self._sampled))

    @property
    def batch(self) -> int:
        """`evaluate.batch`."""
        return self.run.config.evaluate.batch

    @functools.cached_property
    def pair(self) -> Pair:
        """The pair after RL."""
        return load(self.run, "pair")

    @functools.cached_property
    def warm(self) -> Pair:
        """The pair before RL."""
        return load(self.run, "pair_warm")

    @functools.cached_property
    def training(self) -> Rows:
        """Rows of the warm start, at most `TRAINING` of them."""
        return spread(load_rows(self.run.workdir, "av_sft"), TRAINING)

    @functools.cached_property
    def reader_rows(self) -> Rows:
        """Rows of the AR's warm start, at most `TRAINING` of them, and no more than it read."""
        c = self.run.config.sft.ar
        return spread(load_rows(self.run.workdir, "ar_sft"), min(TRAINING, max(1, c.steps) * c.batch))

    @functools.cached_property
    def study(self) -> Study:
        """The run's settings and programs."""
        c, pair = self.run.config, self.pair
        width = pair.prompts.text_width(c.prompts.max_new_tokens)
        return Study(c, self.run.mesh, pair.verbalizer, pair.reconstructor, width)

    def untrained(self) -> Pair:
        """A new pair, as the warm start begins with it."""
        c, how = self.run.config, self.run.config.compute
        return new_pair(
            self.pair.sidecar,
            locate(self.run.subject_folder),
            how.dtype,
            how.remat,
            how.attention,
            adapters=(lora(c.sft.av.lora), lora(c.sft.ar.lora)),
            seed=c.seed,
            mesh=self.run.mesh,
        )

    @functools.cached_property
    def subject(self) -> Subject:
        """The run's subject up to layer K; on several hosts each has it on its own devices."""
        c, mesh = self.run.config, host_mesh(self.run.mesh)
        place = mesh if mesh.size > 1 else None
        how = c.compute.dtype, place, c.compute.attention
        earlier = c.subject.earlier_layers
        return load_subject(self.run.subject_folder, c.subject.layer, *how, earlier=earlier)

    @functools.cached_property
    def embedding(self) -> np.ndarray:
        """The subject's embedding of each token [V, E]."""
        folder = locate(self.run.subject_folder)
        return np.asarray(open_params(folder, read_config(folder).truncated(1), truncated=True)["embedding"][()])

    @functools.cached_property
    def labeller(self) -> Labeller:
        """The run's labeller."""
        return configured_labeller(self.run.config.label).labeller

    @functools.cached_property
    def provider(self) -> Provider | None:
        """The model that writes and judges, if the config names one; its answers are kept in `evaluation/answers`."""
        c = self.run.config.evaluate.provider
        return provider_of(c, self.run.workdir / "evaluation" / "answers") if c.kind else None

    def column(self, name: str) -> list:
        """A column of the held-out rows."""
        return self.rows.column(name)

    def texts(self, name: str) -> list[str]:
        """The texts of one condition, sampled once and kept on disk."""
        c = self.run.config.evaluate
        if name == "labels":
            return [label or "" for label in self.column(LABEL)]
        conditions = {
            "rl": ("pair", c.temperature, True),
            "warm": ("pair_warm", c.temperature, True),
            "rl_temperature_1": ("pair", 1.0, True),
            "no_injection": ("pair", c.temperature, False),
        }
        if name not in conditions:
            raise InputError(f"There are no texts {name!r}; there are {', '.join(['labels', *conditions])}.")
        return self._sampled(name, *conditions[name])

    def _sampled(self, name: str, folder: str, temperature: float, inject: bool) -> list[str]:
        """A file for each batch of rows: a restart samples those that are missing or were made from something else."""
        c, batch, files = self.run.config, self.run.config.evaluate.batch, []
        weights = fingerprint(self.run.workdir / folder / "av")
        progress = Progress(f"texts {name}", -(-len(self.vectors) // batch))
        for start in range(0, len(self.vectors), batch):
            vectors = self.vectors[start : start + batch]
            made_from = repr((weights, c.prompts, temperature, inject, c.seed, start)).encode() + vectors.tobytes()
            key = hashlib.blake2b(made_from, digest_size=6).hexdigest()
            path = self.run.workdir / "evaluation" / f"{name}-{start:07d}-{key}.parquet"
            if not from_writer(path.exists):
                pair = self.pair if folder == "pair" else self.warm
                found = pair.explain(
                    vectors, c.prompts.max_new_tokens, temperature, c.seed, inject=inject, batch=batch, first=start
                )
                written = [explanation.accepted or "" for explanation in found]
                if is_writer():
                    write_table(pa.table({"explanation": pa.array(written, pa.string())}), path)
            files.append(path)
            progress.update()
        progress.close()
        barrier(f"the texts {name}")
        return [text for file in files for text in read_table(file, ["explanation"]).column(0).to_pylist()]

    def keep(self, name: str, learned: Any) -> None:
        """Writes what a probe has learned of the pair to a file in the pair's folder."""
        learned.write(self.run.workdir / "pair" / name)


def summary(probes: list[dict]) -> dict:
    """The mean of each score, with its interval under `{name}_ci95`; of the headline the median too."""
    found = {}
    for score in [score for probe in probes if probe["chart"] != "curve" for score in probe["scores"]]:
        found |= {score["name"]: score["mean"], f"{score['name']}_ci95": list(score["ci95"])}
        if score["name"] == "fve_rl":
            found["fve_rl_median"] = score["median"]
    return found
