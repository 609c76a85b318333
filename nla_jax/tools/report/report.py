"""What the page shows of a run, and what makes its figures worth little."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Number, known
from .pieces import written

CONTROLS = ("fve_shuffled", "fve_empty", "fve_no_injection")  # these should score far below the headline
TOKENS = ("fve_token_mean", "fve_token_means", "fve_token_ridge")  # baselines that read no text
COLLAPSED = 0.9  # a share of identical texts in a group from which nothing can be learned


@dataclass(frozen=True)
class Report:
    """All that the page shows. A number that is None or not finite is written as "–" and not drawn."""

    title: str
    subject: str
    place: str  # of the activations: "after block 2"
    created: str  # when and with which version the page was drawn
    state: str  # of a run that is not evaluated yet: how far it is; of one that ended early: why; else ""
    run: Mapping[str, Any]  # seed, versions, devices
    sizes: Mapping[str, Any]  # of models, data and training
    config: str  # every setting
    figures: Mapping[str, Any]  # those that are no scores; of them heldout_rows and heldout_documents
    seconds: Mapping[str, Number]  # of each stage
    seconds_by_probe: Mapping[str, Number]  # of each probe of the evaluation; a text that several read counts once
    stages: Mapping[str, Mapping]  # of each stage: how it was made, with its command, date, versions, commit, devices
    open_with: Mapping[str, str]  # commands that open the pair, by what they show
    probes: Sequence[Mapping]  # what `probes.probe.figures` gives
    # document, context, token, after, kinds; the TEXTS; of the TAGS those that were measured
    examples: Sequence[Mapping]
    # document, text, tokens, rows (start, end, place, and as above), and perhaps a note on these; None: not kept
    documents: Sequence[Mapping] | None
    history: Sequence[Mapping]  # of each RL step: `step`, from 1, and its metrics; figures of probes begin at step 0
    losses: Mapping[str, Sequence[Mapping]]  # the same of each training loop before RL
    whole: str = ""  # how the document was chosen that stands first and whole, or why there is none

    @property
    def scores(self) -> dict[str, Mapping]:
        """Scores by name, with their unit; not those of curves, which are named by their place."""
        drawn = [probe for probe in self.probes if probe["chart"] != "curve"]
        return {score["name"]: {**score, "unit": probe["unit"]} for probe in drawn for score in probe["scores"]}

    def mean(self, name: str) -> Number:
        """The mean of a score; NaN where it was not measured."""
        value = self.scores[name]["mean"] if name in self.scores else None
        return value if known(value) else math.nan


def warnings(report: Report) -> list[str]:
    """What makes the figures of a run worth little, in sentences: said above them on the page and in the terminal.

    Before the evaluation they are those that the metrics of training tell."""
    lead, warm, steps = report.mean("fve_rl"), report.mean("fve_warm"), len(steps_of(report))
    rate = report.mean("extraction_rate")
    rate = rate if known(rate) else lately(report, "extraction_rate")
    controls = [report.mean(name) for name in CONTROLS if name in report.scores]
    as_good = [value > lead - 0.005 for value in controls]
    tokens = report.mean(best_of_tokens(report))
    skipped = sum(bool(row.get("skipped")) for row in report.history)
    alike, dropped = lately(report, "identical_texts"), report.figures.get("labels_too_long") or 0.0
    sentences = {
        f"Only {written(rate, 'share')} of the responses hold an explanation; others are scored as empty.": rate < 0.5,
        f"The AV has collapsed: at the end of RL {written(alike, 'share')} of its texts equal another sample of the same "
        f"activation.": alike > COLLAPSED,
        f"A table of the last tokens scores {written(tokens)}, without any text: the explanations say no more than that.": (
            tokens >= lead
        ),
        "No control scores lower than the headline: the score does not come from the explanations.": as_good
        and all(as_good),
        "The text of another activation scores as high as the right one: the explanations do not tell activations apart.": (
            report.mean("fve_shuffled") > lead - 0.005 and not all(as_good)
        ),
        f"The headline is {written(lead)}: always guessing the mean activation would be closer.": lead < 0,
        f"RL made the explanations worse: {written(warm)} before, {written(lead)} after.": lead < warm,
        f"{skipped} of {steps} training steps were skipped: they were not finite.": skipped > 0.1 * steps,
        f"{written(dropped, 'share')} of the labels are longer than prompts.max_new_tokens: the AV was not trained on "
        f"them.": dropped > 0.1,
    }
    return [sentence for sentence, true in sentences.items() if true]


def steps_of(report: Report) -> Sequence[Mapping]:
    """The history without what was measured before the first step."""
    return [row for row in report.history if row["step"] > 0]


def lately(report: Report, metric: str) -> Number:
    """The mean of a metric over those of the last 20 steps of RL that have it; NaN where none has."""
    tail = list(filter(known, (row.get(metric) for row in report.history[-20:])))
    return sum(tail) / len(tail) if tail else math.nan


def best_of_tokens(report: Report) -> str:
    """The name of the best baseline of the last tokens; "" where none was measured."""
    return max((name for name in TOKENS if name in report.scores), key=report.mean, default="")
