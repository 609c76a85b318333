"""What a probe is: a measurement of a trained pair on held-out rows. Write one in any file and name it in a config.

    def ends_with_a_dot(context):
        "Whether the explanation ends with a dot."
        return {"dot": np.array([text.endswith(".") for text in context.texts("rl")], float)}

and `--config.evaluate.probes="('nla_jax.probes.fidelity:after_rl', 'my_file:ends_with_a_dot')"`. Each array has an
entry for every row; NaN where it says nothing of that row. Means over the others, intervals (documents redrawn), tables and
charts are made from them. `probe(...)` says more about one. A probe that cannot say anything of a run returns {}.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from nla_jax.config import Evaluate
from nla_jax.data.rows import Rows
from nla_jax.fve import row_fve
from nla_jax.labels.labeller import Labeller
from nla_jax.pair import Pair
from nla_jax.probes.provider import Provider
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import UserFunction, resolve
from nla_jax.study import Study
from nla_jax.subject import Subject

ASKS = ("writer", "judge")  # what a provider is: a probe has it write texts, or judge
NEEDS = ("pair", "warm", "labels", "training", "subject", "study", *ASKS)
WHO_ASKS = "evaluate.provider of a config, or --judge, names the model that writes and judges"
CHARTS = ("bars", "curve", "histogram")
READINGS = 8  # reconstructions of all rows that a context keeps; of the scores it keeps all


@runtime_checkable
class Context(Protocol):
    """What a probe may read. All lists and arrays have an entry for each of the n held-out rows."""

    vectors: Float[np.ndarray, "n d"]  # the activations, raw; of several layers `fve.joined`
    documents: list[str]  # which document each row comes from
    pair: Pair  # after RL; among `rl.probes` as it is at that step
    warm: Pair  # before RL; among `rl.probes` its AR alone is
    training: Rows  # of the warm start, with their labels (`column("api_explanation")`)
    embedding: Float[np.ndarray, "V E"]  # of the subject's tokens
    labeller: Labeller  # of the run
    subject: Subject  # its blocks 0..K; `subject.whole` is all of it
    provider: Provider | None  # a language model that writes and judges
    study: Study  # the run's settings and programs
    reader_rows: Rows  # of the AR's warm start
    seed: int
    max_new_tokens: int
    batch: int = 64  # rows that a pair reads at a time

    def untrained(self) -> Pair:
        """A new pair, as the warm start begins with it."""

    def texts(self, name: str) -> list[str]:
        """The AV's texts of one condition; "" where a response holds no explanation.

        "rl" and "warm": after and before RL, at the configured temperature. "rl_temperature_1": sampled at temperature
        1. "no_injection": nothing is injected. "labels": the warm start's labels."""

    def column(self, name: str) -> list:
        """A column of the rows: doc_id, token, following, role, token_ids, detokenized_text_truncated, …"""

    def recon(self, name: str, pair: Pair | None = None) -> Float[np.ndarray, "n d"]:
        """What an AR (default: the pair's after RL) rebuilds from `texts(name)`."""
        return self._reading(tuple(self.texts(name)), pair or self.pair)

    def row_fve(self, texts: Sequence[str], pair: Pair | None = None) -> Float[np.ndarray, "n"]:
        """The score of each row when the AR (default: the pair's after RL) reads these texts: 1 - mse / variance."""
        return self._scores(tuple(texts), pair or self.pair)

    @functools.cached_property
    def _reading(self) -> Callable[[tuple[str, ...], Pair], Float[np.ndarray, "n d"]]:
        return functools.lru_cache(READINGS)(lambda texts, pair: pair.reconstruct(texts, batch=self.batch))

    @functools.cached_property
    def _scores(self) -> Callable[[tuple[str, ...], Pair], Float[np.ndarray, "n"]]:
        return functools.cache(lambda texts, pair: row_fve(self._reading(texts, pair), self.vectors))

    def keep(self, name: str, learned: Any) -> None:
        """Writes what a probe has learned of the pair (`learned.write(file)`) to a file of this name beside it."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """One measurement: `run(context) -> {name: [n]}`.

    `needs`: what the context must have, of `NEEDS`. `chart`: "bars" shows the means with their intervals, "curve" takes
    the names for numbers on the x axis (called `axis`), "histogram" shows the distribution of the rows. `labels`: what
    a name is called in tables and charts. `shared`: probes of one `title` share a chart."""

    name: str
    run: Callable[[Context], Mapping[str, np.ndarray]]
    title: str
    about: str
    needs: tuple[str, ...] = ("pair",)
    chart: str = "bars"
    unit: str = "FVE"
    axis: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, context: Context) -> Mapping[str, np.ndarray]:
        return self.run(context)


def probe(title: str, **facts) -> Callable[[Callable], Probe]:
    """A decorator that makes a function a `Probe`; its docstring is what the report says of it."""
    return lambda run: Probe(run.__name__, run, title, _plain(run.__doc__), **facts)


def load_probes(chosen: Sequence[str | Callable], what: str = "evaluate.probes") -> list[tuple[UserFunction, Probe]]:
    """The probes that a setting `what` names by import path, or that are given themselves. Raises `InputError` where one
    cannot be imported, and for a name used twice."""
    found = []
    for one in chosen:
        function = resolve(one, what) if isinstance(one, str) else UserFunction(what, _name(one), one)
        given, name = function.function, function.path.rpartition(":")[2]
        if not isinstance(given, Probe):
            given = Probe(name, given, name.replace("_", " ").capitalize(), _plain(given.__doc__))
        if given.chart not in CHARTS:
            raise InputError(f"{function} asks for a chart {given.chart!r}; there are {', '.join(CHARTS)}.")
        if any(given.name == other.name for _, other in found):
            raise InputError(f"{what} names {given.name!r} twice.")
        found.append((function, given))
    return found


def chosen_probes(c: Evaluate) -> tuple[str, ...]:
    """What a config measures: with a provider more than without one."""
    return tuple(dict.fromkeys(c.probes + (c.provider.probes if c.provider.kind else ())))


def there(c: Evaluate) -> tuple[str, ...]:
    """What probes of a run find, of `NEEDS`: a provider where the config names one."""
    return tuple(need for need in NEEDS if c.provider.kind or need not in ASKS)


def by_needs(
    probes: Sequence[tuple[UserFunction, Probe]], there: Sequence[str]
) -> tuple[list[tuple[UserFunction, Probe]], dict[str, str]]:
    """The probes whose needs are `there`; and of each of the others, by name, what it lacks."""
    lacks = {probe.name: ", ".join(sorted(set(probe.needs) - set(there))) for _, probe in probes}
    return [one for one in probes if not lacks[one[1].name]], {name: needs for name, needs in lacks.items() if needs}


def asks(probe: Probe) -> bool:
    """Whether a probe puts questions to a provider."""
    return bool(set(probe.needs) & set(ASKS))


def left_out(lacking: Mapping[str, str]) -> str:
    """A sentence about the probes that `by_needs` leaves out."""
    hint = "" if not any(ask in needs for needs in lacking.values() for ask in ASKS) else f" ({WHO_ASKS})"
    return f"Left out: {'; '.join(f'{name} needs {needs}' for name, needs in lacking.items())}{hint}."


def run_probe(function: UserFunction, probe: Probe, context: Context) -> dict[str, Float[np.ndarray, "n"]]:
    """The scores of a probe, checked. Raises `InputError` that names the probe's file and line where it is wrong."""
    with function.blamed():
        scores = probe.run(context)
    if not isinstance(scores, Mapping):
        raise InputError(f"{function} returns {type(scores).__name__}, expected a mapping of names to arrays.")
    checked = {}
    for name, values in scores.items():
        try:
            checked[str(name)] = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            raise InputError(f"{function} returns no numbers for {name!r}.") from None
        if name == "doc_id":
            raise InputError(f"{function} names a score 'doc_id', as the documents of its rows are called; rename it.")
        if probe.chart == "curve" and not _is_number(str(name)):
            raise InputError(
                f"{function} names a score {name!r}; a curve's are named by their place on the x axis, as '8'."
            )
        if checked[str(name)].shape != (len(context.vectors),):
            raise InputError(
                f"{function} returns {name!r} of shape {np.shape(values)}, expected a number for each of the "
                f"{len(context.vectors)} rows."
            )
    return checked


def measure(
    function: UserFunction, probe: Probe, context: Context
) -> tuple[dict[str, Float[np.ndarray, "n"]], dict, float]:
    """The scores of a probe, checked; their `figures`; and the seconds that the probe took.

    What several probes read (sampled texts, reconstructions) the first of them makes, and it counts as its time."""
    start = time.monotonic()
    rows = run_probe(function, probe, context)
    seconds = round(time.monotonic() - start, 2)
    return rows, figures(probe, rows, context.documents, told(probe, context)), seconds


def clustered_interval(
    scores: Float[np.ndarray, "n"],
    clusters: Sequence[str] | np.ndarray,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `scores`; whole clusters (documents) are redrawn.

    Positions of one document are not independent. The variance in the denominator of an FVE is held fixed. Rows whose
    score is NaN are left out."""
    scores, clusters = (np.asarray(values)[~np.isnan(scores)] for values in (scores, clusters))
    _, member = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(member, weights=scores), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def told(probe: Probe, context: Context) -> list[str]:
    """How many questions the provider has answered for a probe that was just run: a sentence for each kind."""
    return context.provider.told() if asks(probe) else []


def figures(
    probe: Probe, scores: Mapping[str, np.ndarray], documents: Sequence[str], answers: Sequence[str] = ()
) -> dict:
    """What the report draws of a probe: mean, interval and median of each score, and the rows where it shows them. A
    score that is NaN for every row is left out. `answers`: what `told` says."""
    listed = [
        {
            "name": name,
            "label": probe.labels.get(name, name.replace("_", " ")),
            "mean": float(np.nanmean(values)),
            "ci95": clustered_interval(values, documents),
            "median": float(np.nanmedian(values)),
        }
        | ({"rows": values.round(5).tolist()} if probe.chart == "histogram" else {})
        for name, values in scores.items()
        if not np.isnan(values).all()
    ]
    facts = {name: getattr(probe, name) for name in ("name", "title", "about", "chart", "unit", "axis")}
    if answers:
        facts |= {"about": " ".join([probe.about, *answers]), "answers": list(answers)}
    return facts | {"scores": listed}


def _name(given: Callable) -> str:
    return getattr(given, "name", None) or getattr(given, "__name__", type(given).__name__)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _plain(docstring: str | None) -> str:
    return " ".join((docstring or "").split())
