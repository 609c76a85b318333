"""The `evaluate` and `report` stages: held-out FVE with its controls, the figures of a run, and the page."""

import datetime
import functools
import hashlib
import json
from collections.abc import Callable

import jax
import numpy as np
import pyarrow as pa

from nla_jax.data.corpus import document_of
from nla_jax.data.dataset import load_rows, spread
from nla_jax.data.extraction import read_table, write_table
from nla_jax.fve import clustered_interval, fve, row_fve
from nla_jax.io.hub import fingerprint
from nla_jax.pair import Pair, cosine, load_pair
from nla_jax.runtime.distributed import barrier, from_writer, is_writer
from nla_jax.runtime.metrics import Progress, read_metrics, write_atomically
from nla_jax.runtime.run import Run, injection
from nla_jax.tools.report.page import render


def evaluate(run: Run) -> None:
    """Scores the pairs of a run on held-out documents and writes `{workdir}/evaluation.json`.

    Texts: the AV's before and after RL (sampled as configured), the labels ("gold text"), the AV's texts dealt to other
    activations ("shuffled"), no text ("empty"), and the AV's texts with nothing injected. Each goes through the AR of the pair
    after RL, the warm texts through the warm AR. A response without an explanation counts as an empty text."""
    c = run.config.evaluate
    with run.stage("evaluate") as result, jax.set_mesh(run.mesh):
        if result is None:
            return
        run.require("rl")
        rows = spread(load_rows(run.workdir, "heldout"), c.rows)
        doc_ids, labels = rows.column("doc_id"), rows.column("api_explanation")
        documents = [document_of(id) for id in doc_ids]
        contexts, tokens, following = map(rows.column, ("detokenized_text_truncated", "token", "following"))
        warm, pair = (
            load_pair(run.workdir / name, **run.config.compute, injection=injection(run.config), mesh=run.mesh)
            for name in ("pair_warm", "pair")
        )
        warm_weights, weights = (fingerprint(run.workdir / name / "av") for name in ("pair_warm", "pair"))
        curve = list(range(0, run.config.prompts.max_new_tokens, max(1, run.config.prompts.max_new_tokens // 8)))
        progress = Progress("evaluate", 10 + len(curve))

        def texts(
            name: str, pair: Pair, weights: str, sampler: Callable[[], dict], temperature: float = c.temperature,
            inject: bool = True,
        ) -> list[str]:  # fmt: skip
            """The texts of one condition, a file on disk for each batch of rows: a restart samples those that are missing, or
            were made from something else (`weights`: the AV's hash)."""
            files, prompts, seed = [], run.config.prompts, run.config.seed
            for start in range(0, len(rows), c.batch):
                vectors = rows.vectors[start : start + c.batch]
                made_from = repr((weights, prompts.to_json_best_effort(), temperature, inject, seed, start))
                key = hashlib.blake2b(made_from.encode() + vectors.tobytes(), digest_size=6).hexdigest()
                path = run.workdir / "evaluation" / f"{name}-{start:07d}-{key}.parquet"
                if not from_writer(path.exists):
                    written = pair.verbalize(
                        vectors, prompts.max_new_tokens, temperature, seed,
                        inject=inject, batch=c.batch, first=start, sampler=sampler(),
                    )  # fmt: skip
                    if is_writer():
                        write_table(pa.table({"explanation": pa.array(written, pa.string())}), path)
                files.append(path)
            barrier(f"the texts {name}")
            progress.update()
            return [text for file in files for text in read_table(file, ["explanation"]).column(0).to_pylist()]

        warm_texts = texts("warm", warm, warm_weights, functools.cache(warm.sampler))
        sampler = functools.cache(pair.sampler)  # one copy for all conditions, and none where no text is missing
        rl_texts = texts("rl", pair, weights, sampler)
        drawn_texts = texts("rl_temperature_1", pair, weights, sampler, temperature=1.0)
        silent_texts = texts("no_injection", pair, weights, sampler, inject=False)
        del sampler

        def scores(texts: list[str], pair: Pair = pair) -> np.ndarray:
            recon = pair.reconstruct(texts, batch=c.batch)
            progress.update()
            return row_fve(recon, rows.vectors)

        recon = pair.reconstruct(rl_texts, batch=c.batch)
        rl_scores, warm_scores = row_fve(recon, rows.vectors), scores(warm_texts, warm)
        gold_scores = scores(labels)
        shuffled_scores = scores([rl_texts[i] for i in derangement(documents, run.config.seed)])
        silent_scores = scores(silent_texts)
        empty = float(row_fve(pair.reconstruct([""] * 2)[[0] * len(rows)], rows.vectors).mean())
        prefixes = [float(scores(cut(pair, rl_texts, n)).mean()) for n in curve]
        progress.close()

        lengths = [len(ids) for ids in pair.prompts.tokenizer(rl_texts, add_special_tokens=False).input_ids]
        similarity = cosine(recon, rows.vectors)
        interval = lambda s: list(clustered_interval(s, documents))
        result["summary"] = {
            "fve_warm": float(warm_scores.mean()),
            "fve_warm_ci95": interval(warm_scores),
            "fve_rl": float(rl_scores.mean()),
            "fve_rl_ci95": interval(rl_scores),
            "fve_rl_median": float(np.median(rl_scores)),
            "fve_rl_temperature_1": float(scores(drawn_texts).mean()),
            "fve_rl_meannorm": fve(recon, rows.vectors, "meannorm"),
            "fve_gold_text": float(gold_scores.mean()),
            "fve_gold_text_warm": float(scores(labels, warm).mean()),
            "fve_shuffled": float(shuffled_scores.mean()),
            "fve_empty": empty,
            "fve_no_injection": float(silent_scores.mean()),
            "cos_rl": float(similarity.mean()),
            "extraction_rate": float(np.mean([text != "" for text in rl_texts])),
            "extraction_rate_warm": float(np.mean([text != "" for text in warm_texts])),
            "mean_length": float(np.mean(lengths)),
            "heldout_documents": len(set(documents)),
            "heldout_rows": len(rows),
        }
        picked = example_rows(documents, c.examples)
        page = {
            "prefix_curve": {"tokens": curve, "fve": prefixes},
            "row_fve": {"warm": warm_scores.tolist(), "rl": rl_scores.tolist(), "shuffled": shuffled_scores.tolist()},
            "lengths": lengths,
            "examples": [
                {
                    "document": doc_ids[i],
                    "context": contexts[i].removesuffix(tokens[i]),
                    "token": tokens[i],
                    "after": following[i],
                    "label": labels[i],
                    "warm": warm_texts[i],
                    "rl": rl_texts[i],
                    "fve_warm": float(warm_scores[i]),
                    "fve_rl": float(rl_scores[i]),
                    "cos_rl": float(similarity[i]),
                }
                for i in picked
            ],
        }
        write_atomically(run.workdir / "evaluation.json", json.dumps(page))


def derangement(documents: list[str], seed: int) -> np.ndarray:
    """A permutation that gives every row another row's place, and wherever it can, another document's."""
    order = np.random.default_rng(seed).permutation(len(documents))
    order = order[np.argsort(np.asarray(documents)[order], kind="stable")]  # documents in blocks
    most = np.unique(np.asarray(documents), return_counts=True)[1].max()
    target = np.empty(len(order), int)
    target[order] = np.roll(order, most if most < len(order) else 1)  # a shift by the largest block leaves every block
    return target


def cut(pair: Pair, texts: list[str], tokens: int) -> list[str]:
    """Each text's first `tokens` tokens."""
    tokenizer = pair.prompts.tokenizer
    return [tokenizer.decode(ids[:tokens]) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def example_rows(documents: list[str], count: int) -> list[int]:
    """Rows to show: one a document, documents evenly spaced, without a look at any score."""
    first = sorted({id: i for i, id in reversed(list(enumerate(documents)))}.values())
    return [first[i] for i in np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]


def report(run: Run) -> None:
    """Writes `{workdir}/summary.json` with every headline figure and `{workdir}/report.html`."""
    with run.stage("report") as result:
        if result is None:
            return
        summary = dict(run.require("evaluate")["summary"])
        rl = run.require("rl")
        summary |= {"logprob_gap_max": rl["logprob_gap_max"], "skipped_steps": rl["skipped"]}
        if pretrained := run.result("pretrain"):
            summary |= {name: pretrained[name] for name in ("subject_loss", "bigram_loss", "unigram_loss")}
        else:
            summary |= dict.fromkeys(("subject_loss", "bigram_loss", "unigram_loss"))
        summary["injection_scale"] = run.require("sft")["injection_scale"]
        summary["seconds_by_stage"] = {
            stage: run.result(stage)["seconds"]
            for stage in ("pretrain", "extract", "label", "sft", "rl", "evaluate")
            if run.result(stage)
        }
        data = json.loads((run.workdir / "evaluation.json").read_text()) | {
            "title": run.config.report.title,
            "subject": str(run.subject_folder),
            "layer": run.config.subject.layer,
            "created": datetime.datetime.now().isoformat(" ", "minutes"),
            "command": run.command,
            "run": {"seed": run.config.seed} | {name: x for name, x in run.made().items() if name not in ("command", "date")},
            "config": run.config.to_json_best_effort(indent=1),
            "summary": summary,
            "history": read_metrics(run.workdir / "train/rl/metrics.jsonl"),
        }
        write_atomically(run.workdir / "report.html", render(data))
        write_atomically(run.workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
        result["page"] = "report.html"
