"""What the figures of probes in training decide: which step's pair is kept, and when training stops."""

import math
from collections.abc import Callable, Mapping, Sequence

from nla_jax.config import Config
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import resolve
from nla_jax.runtime.watchdog import Tripwires

PREFIX = "probe/"  # of the names of figures among the metrics
SCORE = f"{PREFIX}keep_best"  # what `rl.keep_best` makes of them

Scorer = Callable[[Mapping[str, float], int], float]  # (figures, step) -> score


def scorer(settings: Mapping) -> Scorer | None:
    """What `rl.keep_best` makes of the figures of a step, NaN where one of them is missing; None where it is empty.

    `settings`: weights by the names of figures, whose weighted sum is the score; or `function`, called with the figures
    and all other settings. Raises `InputError`, as the scorer does where step 0 has no figure of a name, and where the
    function gives no number."""
    if not settings:
        return None
    if "function" in settings:
        others = dict(settings)
        function = resolve(others.pop("function"), "rl.keep_best.function")

        def called(figures: Mapping[str, float], step: int) -> float:
            value = function(dict(figures), **others)
            try:
                return float(value)
            except (TypeError, ValueError):
                raise InputError(f"{function} returns {value!r:.50}, expected a number.") from None

        return called

    def weighted(figures: Mapping[str, float], step: int) -> float:
        absent = sorted(settings.keys() - figures.keys())
        if absent and step == 0:
            there = ", ".join(sorted(figures)) or "nothing"
            raise InputError(f"rl.keep_best names {absent[0]!r}, which rl.probes do not give; they give {there}.")
        return math.nan if absent else float(sum(weight * figures[name] for name, weight in settings.items()))

    _check_numbers("rl.keep_best", settings)
    return weighted


def best_step(records: Sequence[Mapping], there: Callable[[int], bool]) -> int | None:
    """The step with the highest score among the records of a run, the first one of equal ones; None where there is none.

    `there(step)` says whether its pair is still there: a user may have moved checkpoints away."""
    scores = {r["step"]: r[SCORE] for r in records if r.get(SCORE) is not None and there(r["step"])}
    return max(scores, key=scores.__getitem__, default=None)


def tripwires(config: Config) -> Tripwires:
    """Those of the config. Raises `InputError` for a limit that is no number of at least 0."""
    c = config.watchdog
    _check_numbers("watchdog.max_fall", c.max_fall, least=0)
    _check_numbers("watchdog.max_rise", c.max_rise, least=0)
    fall, rise = ({f"{PREFIX}{name}": limit for name, limit in limits.items()} for limits in (c.max_fall, c.max_rise))
    return Tripwires(fall, rise, c.probe_rounds)


def check_decisions(config: Config) -> None:
    """Raises `InputError` where settings are wrong, and where they need probes in training and there are none."""
    scorer(config.rl.keep_best)
    given = {"rl.keep_best": config.rl.keep_best, "a tripwire under watchdog": tripwires(config).names}
    for name, needed in given.items():
        if needed and not config.rl.probe_every:
            raise InputError(f"{name} needs the figures of probes in training; set rl.probe_every above 0.")


def _check_numbers(what: str, numbers: Mapping, least: float = -math.inf) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
            expected = "a number" if least == -math.inf else f"a number of at least {least:g}"
            raise InputError(f"{what}.{name} is {value!r}, expected {expected}.")
