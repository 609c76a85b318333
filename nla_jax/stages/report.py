"""The `report` stage: all figures of a run in `summary.json`, and the page in `report.html`.

The page can be drawn at any time, also amid training: it then shows what there is by now."""

import datetime
import hashlib
import json
import shlex

from nla_jax.config import Config
from nla_jax.data.activations import after_blocks
from nla_jax.io.files import is_folder, path_to
from nla_jax.io.folders import read_config
from nla_jax.runtime.environment import VERSION
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import read_metrics, write_atomically
from nla_jax.runtime.run import Run
from nla_jax.tools.report.page import render
from nla_jax.tools.report.report import Report, warnings

LOSSES = ("subject_loss", "bigram_loss", "unigram_loss")
BEFORE_RL = {"pretrain": "The subject", "sft_av": "AV, warm start", "sft_ar": "AR, warm start"}  # training loops
OF_EVALUATION = ("sft", "rl", "evaluate")  # the stages that have finished where the page is complete


def report(run: Run) -> None:
    """Writes `{workdir}/summary.json` with every headline figure and `{workdir}/report.html`."""
    with run.stage("report") as result:
        if result is None:
            return
        _, trained, evaluated = map(run.require, OF_EVALUATION)
        page = gather(run, measured(run, evaluated.get("hash")), trained.get("ended", ""))
        scores = evaluated["summary"]
        write_atomically(run.workdir / "report.html", render(page))
        summary = scores | page.figures | {"seconds_by_stage": page.seconds}
        write_atomically(run.workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
        result["page"], result["warnings"] = "report.html", warnings(page)


def redraw(run: Run) -> list[str]:
    """Draws the page again, whatever it shows by now; returns its warnings. Before the evaluation has finished there is
    no `summary.json`, and the page says how far the run is.

    Neither needs the devices of the run, nor that no other process works on it. Raises `InputError` where the run was
    begun with other settings."""
    run.forget("report")
    if all(run.result(stage) for stage in OF_EVALUATION):
        report(run)
        return run.result("report")["warnings"]
    if not any(run.begun(stage) for stage in run.stages):
        raise InputError(f"{run.workdir} holds no run; name the working folder of one with --workdir.")
    page = gather(run, {"probes": [], "examples": [], "documents": []}, state(run))
    write_atomically(run.workdir / "report.html", render(page))
    return warnings(page)


def gather(run: Run, evaluated: dict, state: str = "") -> Report:
    """All that the page shows. `evaluated`: probes, examples and documents of the evaluation; `state`: how far a run is
    that has none, or why it ended early."""
    begun = {stage: made for stage in run.stages if stage != "report" and (made := run.begun(stage))}
    result = lambda stage: run.result(stage) or {}
    newest = list(begun.values())[-1]
    scores = result("evaluate").get("summary", {})
    return Report(
        title=run.config.report.title,
        subject=str(run.subject_folder),
        place=after_blocks(run.config.subject.layers),
        created=f"drawn {datetime.datetime.now():%Y-%m-%d %H:%M} with nla_jax {VERSION}",
        state=state,
        run={"seed": run.config.seed} | {k: v for k, v in newest.items() if k not in ("command", "date", "seconds")},
        sizes=sizes(run),
        config=json.dumps(run.config.to_dict(), indent=1),
        figures={name: scores.get(name) for name in ("heldout_documents", "heldout_rows")}
        | {
            "logprob_gap_max": result("rl").get("logprob_gap_max"),
            "skipped_steps": result("rl").get("skipped"),
            **{name: result("pretrain").get(name) for name in LOSSES},
            "injection_scale": result("sft").get("injection_scale"),
            "labels_too_long": result("sft").get("labels_too_long"),
        }
        | {name: result("rl")[name] for name in ("kept_step", "seconds_probes") if name in result("rl")},
        seconds={stage: made["seconds"] for stage, made in begun.items()},
        seconds_by_probe=result("evaluate").get("seconds_by_probe", {}),
        stages=begun,
        open_with=commands(run),
        **evaluated,
        history=read_metrics(run.workdir / "train/rl/metrics.jsonl"),
        losses={title: read_metrics(run.workdir / f"train/{name}/metrics.jsonl") for name, title in BEFORE_RL.items()},
    )


def measured(run: Run, hash: str | None) -> dict:
    """The probes, examples and documents that `evaluate` wrote. Raises `InputError` where the file is another one by
    now."""
    file = run.workdir / "evaluation.json"
    content = file.read_bytes() if file.exists() else b""
    if hashlib.blake2b(content, digest_size=8).hexdigest() != hash:
        raise InputError(f"{file} is not what `nla evaluate` wrote; delete it, and run `nla evaluate` again.")
    return {"documents": None} | json.loads(content)


def state(run: Run) -> str:
    """How far a run is that has not been evaluated."""
    steps = max((row["step"] for row in read_metrics(run.workdir / "train/rl/metrics.jsonl")), default=0)
    stages = [name for name in run.stages if name != "pretrain" or not run.config.subject.path]
    stage = next(name for name in stages if run.result(name) is None)
    done = f", of which {steps} of {run.config.rl.steps} steps are recorded" if stage == "rl" else ""
    verb = "has begun" if run.begun(stage) else "comes next"
    return (
        f"This run is not finished: the stage {stage} {verb}{done}. The page shows what there is by now; `nla report` draws "
        f"it again."
    )


def sizes(run: Run) -> dict[str, int | str]:
    """How large the models, the data and the training are, as far as that is known by now."""
    c, extracted = run.config, run.result("extract") or {}
    rows, documents = extracted.get("rows", {}), extracted.get("documents", {})
    data = {f"rows of {split}": f"{n} from {documents.get(split, '?')} texts" for split, n in rows.items()}
    return model_sizes(run) | data | training_sizes(c, (run.result("rl") or {}).get("steps", c.rl.steps))


def model_sizes(run: Run) -> dict[str, int]:
    """The subject's shape, from its folder; nothing where it is not there, or comes from the hub."""
    folder = path_to(run.subject_folder)
    if not is_folder(folder) or not (folder / "config.json").exists():
        return {}
    model = read_config(folder)
    return {"layers of the subject": model.layers, "width": model.width, "vocabulary": model.vocab_size}


def training_sizes(c: Config, steps: int) -> dict[str, int | str]:
    """How much the two models are trained; `steps`: those of RL."""
    return {
        "warm start of the AV": f"{c.sft.av.steps} steps of {c.sft.av.batch}",
        "warm start of the AR": f"{c.sft.ar.steps} steps of {c.sft.ar.batch}",
        "RL": f"{steps} steps of {c.rl.activations} activations, {c.rl.group} texts each",
        "tokens of an explanation, at most": c.prompts.max_new_tokens,
    }


def commands(run: Run) -> dict[str, str]:
    """The commands that open the newest pair there is, by what they show."""
    there = [name for name in ("pair", "pair_warm") if run.result({"pair": "rl", "pair_warm": "sft"}[name])]
    if not there:
        return {}
    name = lambda pair: f"--pair {shlex.quote(str(run.workdir / pair))}"
    found = {"The page": f"nla serve {name(there[0])} --open"}
    if len(there) > 1:
        found["Before and after RL, side by side"] = f"nla serve {name('pair_warm')} {name('pair')} --open"
    found["One text as a page that opens without a server"] = (
        f"nla serve {name(there[0])} --export text.txt --out text.html"
    )
    return found
