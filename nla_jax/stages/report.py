"""The `report` stage: all figures of a run in `summary.json`, and the page in `report.html`."""

import datetime
import hashlib
import json

from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import read_metrics, write_atomically
from nla_jax.runtime.run import Run
from nla_jax.tools.report.page import Report, render, warnings

LOSSES = ("subject_loss", "bigram_loss", "unigram_loss")


def report(run: Run) -> None:
    """Writes `{workdir}/summary.json` with every headline figure and `{workdir}/report.html`."""
    with run.stage("report") as result:
        if result is None:
            return
        rl, sft, pretrained = run.require("rl"), run.require("sft"), run.result("pretrain") or {}
        evaluated = run.require("evaluate")
        scores, stages = evaluated["summary"], [name for name in run.stages if name != "report"]
        figures = (
            {name: scores[name] for name in ("heldout_documents", "heldout_rows")}
            | {
                "logprob_gap_max": rl["logprob_gap_max"],
                "skipped_steps": rl["skipped"],
                **{name: pretrained.get(name) for name in LOSSES},
                "injection_scale": sft["injection_scale"],
                "labels_too_long": sft["labels_too_long"],
            }
            | {name: rl[name] for name in ("kept_step", "seconds_probes") if name in rl}
        )
        seconds = {name: run.result(name)["seconds"] for name in stages if run.result(name)}
        page = Report(
            title=run.config.report.title,
            subject=str(run.subject_folder),
            layer=run.config.subject.layer,
            created=datetime.datetime.now().isoformat(" ", "minutes"),
            command=run.command,
            run={"seed": run.config.seed} | {k: v for k, v in run.made().items() if k not in ("command", "date")},
            config=json.dumps(run.config.to_dict(), indent=1),
            figures=figures,
            seconds=seconds,
            **measured(run, evaluated.get("hash")),
            history=read_metrics(run.workdir / "train/rl/metrics.jsonl"),
        )
        write_atomically(run.workdir / "report.html", render(page))
        summary = scores | figures | {"seconds_by_stage": seconds}
        write_atomically(run.workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
        result["page"], result["warnings"] = "report.html", warnings(page)


def measured(run: Run, hash: str | None) -> dict:
    """The probes and examples that `evaluate` wrote. Raises `InputError` where the file is another one by now."""
    file = run.workdir / "evaluation.json"
    content = file.read_bytes() if file.exists() else b""
    if hashlib.blake2b(content, digest_size=8).hexdigest() != hash:
        raise InputError(f"{file} is not what `nla evaluate` wrote; delete it, and run `nla evaluate` again.")
    return json.loads(content)
