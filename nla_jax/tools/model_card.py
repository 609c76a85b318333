"""The model card of a pair: `README.md` for the hub, with the figures of its run where there is one."""

import json

from nla_jax.data.activations import after_blocks
from nla_jax.io.files import AnyPath, path_to
from nla_jax.runtime.environment import versions
from nla_jax.runtime.notes import note
from nla_jax.sidecar import Sidecar

FIGURES = {  # of summary.json
    "fve_rl": "FVE after RL",
    "fve_warm": "FVE after the warm start",
    "fve_gold_text": "the AR reads the label instead",
    "fve_rl_temperature_1": "texts sampled at temperature 1",
    "fve_shuffled": "control: the text of another activation",
    "fve_no_injection": "control: the AV sees no activation",
    "fve_empty": "control: the empty text",
    "extraction_rate": "responses that hold an explanation",
}


def model_card(name: str, sidecar: Sidecar, workdir: AnyPath | None = None) -> str:
    """The card of the pair `name` (its hub id), with the figures and examples of the run in `workdir`. A note says where
    that run is not evaluated."""
    subject = sidecar.base_checkpoint
    on_hub = subject.count("/") == 1 and not subject.startswith((".", "/")) and not path_to(subject).is_dir()
    subject = (
        subject if on_hub else subject.rstrip("/").rpartition("/")[2]
    )  # a path on this machine says nothing to others
    facts = ["library_name: nla_jax", *[f"base_model: {subject}"] * on_hub, "tags:", "- nla", "- interpretability"]
    made = ", ".join(f"{package} {version}" for package, version in versions().items())
    earlier = f", earlier={sidecar.earlier_layers}" if sidecar.earlier_layers else ""
    parts = [
        "\n".join(["---", *facts, "---"]),
        f"# {name}",
        f"A natural language autoencoder for the residual stream of `{subject}` {after_blocks(sidecar.layers)} (width "
        f"{sidecar.d_model}). The verbalizer in `av` writes what an activation says, and the reconstructor in `ar` turns "
        f"the text back into the activation.",
        f'```python\nimport nla_jax as nla\n\npair = nla.load_pair("{name}")\nsubject = nla.load_subject("{subject}", '
        f'{sidecar.layer}{earlier})\nacts = nla.extract(subject, "Some text", "last")\nprint(pair.verbalize(acts, '
        f"temperature=0.0))\n```",
        f'or `nla explain --pair {name} --subject {subject} --text "Some text"`. `nla_meta.yaml` in each folder records '
        f"prompts, marker, injection and scale.",
        *(_measured(workdir) if workdir else []),
        "An explanation is what the verbalizer says, which may be wrong. FVE tells how much of the activation the text "
        "carries, not whether the text is true.",
        f"Written by {made}.",
    ]
    return "\n\n".join(parts) + "\n"


def _measured(workdir: AnyPath) -> list[str]:
    """The figures and some examples of a run."""
    files = [workdir / name for name in ("summary.json", "evaluation.json")]
    if missing := [file.name for file in files if not file.is_file()]:
        note(f"{workdir} has no {missing[0]}: the model card has no figures. `nla report` makes them.")
        return []
    summary, evaluation = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    rows = [
        f"| {words} | {summary[figure]:.3f} | {' to '.join(f'{x:.3f}' for x in summary[f'{figure}_ci95'])} |"
        for figure, words in FIGURES.items()
        if summary.get(figure) is not None
    ]
    about = (
        f"On {summary['heldout_rows']} activations of {summary['heldout_documents']} held-out documents, greedy texts, "
        f"intervals by document:"
    )
    table = "\n".join(["| | | 95 % interval |", "|---|---|---|", *rows])
    scored = [example for example in evaluation["examples"] if "fve_rl" in example]
    ranked = sorted(scored, key=lambda example: -example["fve_rl"])
    chosen = {example["context"]: example for example in (ranked[:1] + ranked[len(ranked) // 2 :][:1] + ranked[-1:])}
    examples = [
        f"- FVE {example['fve_rl']:.2f}, the last token of `{_one_line(example['context'][-120:])}`: {_one_line(example['rl'])}"
        for example in chosen.values()
    ]
    shown = ["The best, the middle and the worst of the examples:", "\n".join(examples)] if examples else []
    return ["## Measured", about, table, *shown]


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").replace("<", "&lt;").split())
