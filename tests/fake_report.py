"""A run of realistic shape, as the report stage hands it to the page."""

import math
import random
import re

import numpy as np


def fake_history(steps: int, rng: random.Random) -> list[dict]:
    """FVE grows with log(step), some lines are noisy, the first step compiles."""
    history = []
    for step in range(1, steps + 1):
        progress = math.log1p(step) / math.log1p(steps)
        fve = 0.34 + 0.28 * progress
        row = {
            "step": step,
            "reward": -0.9 + 0.42 * progress + rng.gauss(0, 0.03),
            "fve": fve + rng.gauss(0, 0.035),
            "kl": 0.35 * progress**2 + abs(rng.gauss(0, 0.01)),
            "entropy": 1.6 - 0.7 * progress + rng.gauss(0, 0.04),
            "length": 88 + 14 * progress + rng.gauss(0, 3),
            "extraction_rate": min(1, 0.96 + 0.04 * rng.random()),
            "truncated": 0.04 * rng.random(),
            "identical_texts": 0.1 * rng.random(),
            "groups_without_advantage": 0.0,
            "logprob_gap_mean": 0.004 + 0.002 * rng.random(),
            "logprob_gap_p99": 0.03 + 0.01 * rng.random(),
            "logprob_gap_max": 0.05 + rng.expovariate(30),
            "av_grad_norm": 0.6 + rng.expovariate(4),
            "ar_grad_norm": 1.4 - 0.5 * progress + rng.expovariate(8),
            "av_update_norm": 0.01,
            "ar_update_norm": 0.02,
            "av_lr": 4e-4,
            "ar_lr": 3e-4,
            "feature/overlap": 0.3 + 0.1 * rng.random(),
            "samples_per_second": 410 + rng.gauss(0, 12),
            "seconds_rollout": (31.7 if step == 1 else 1.3) + rng.random() / 10,
            "seconds_host": 0.09 + rng.random() / 50,
            "seconds_train": (18.2 if step == 1 else 0.6) + rng.random() / 20,
            "skipped": False,
            "av_skipped": False,
            "ar_skipped": False,
        }
        if step in (1, 3, 10, 30, 100, 200, steps):
            row["heldout_fve"] = fve - 0.015 + rng.gauss(0, 0.006)
        history.append(row)
    return history


def fake_score(name: str, label: str, mean: float, low: float, high: float, rows: list | None = None) -> dict:
    score = {"name": name, "label": label, "mean": mean, "ci95": [low, high], "median": mean + 0.03}
    return score | ({} if rows is None else {"rows": rows})


def fake_probe(name: str, scores: list[dict], **facts) -> dict:
    about = f"What the probe {name} says of itself."
    plain = {"title": name, "about": about, "chart": "bars", "unit": "FVE", "axis": ""}
    return {"name": name} | plain | facts | {"scores": scores}


def fake_probes(rng: random.Random) -> list[dict]:
    """Scores as the evaluation gives them; those of single rows are skewed."""
    headline = {"title": "Explanations and controls"}
    rows = {
        name: [1 - rng.lognormvariate(centre, width) for _ in range(2048)]
        for name, centre, width in (("shuffled", 0.5, 0.3), ("warm", -0.5, 0.45), ("rl", -1.05, 0.5))
    }
    lengths = [float(max(12, min(160, int(rng.gauss(101, 16))))) for _ in range(2048)]
    tokens = [0, 4, 8, 16, 32, 48, 64, 96, 128]
    curve = zip(tokens, [-0.03, 0.08, 0.17, 0.29, 0.42, 0.50, 0.55, 0.596, 0.603])
    return [
        fake_probe("after_rl", [fake_score("fve_rl", "AV after RL", 0.6038, 0.5811, 0.6252)], **headline),
        fake_probe("warm_start", [fake_score("fve_warm", "AV warm start", 0.3391, 0.31, 0.36)], **headline),
        fake_probe("gold", [fake_score("fve_gold_text", "Gold label text", 0.4127, 0.39, 0.43)], **headline),
        fake_probe("shuffled", [fake_score("fve_shuffled", "Shuffled pairs", -0.7215, -0.75, -0.7)], **headline),
        fake_probe("empty", [fake_score("fve_empty", "Empty text", -0.6312, -0.65, -0.61)], **headline),
        fake_probe("no_injection", [fake_score("fve_no_injection", "No injection", -0.5871, -0.6, -0.57)], **headline),
        fake_probe(
            "prefixes",
            [fake_score(str(n), str(n), fve, fve - 0.02, fve + 0.02) for n, fve in curve],
            title="FVE by length of the explanation’s prefix",
            chart="curve",
            axis="tokens of the explanation",
        ),
        fake_probe(
            "per_activation",
            [fake_score(name, name, float(np.mean(x)), -0.1, 0.7, x) for name, x in rows.items()],
            title="Score per activation",
            chart="histogram",
            unit="1 − mse of the row / variance",
        ),
        fake_probe(
            "length",
            [fake_score("mean_length", "after RL", float(np.mean(lengths)), 100.1, 102.4, lengths)],
            title="Explanation length",
            chart="histogram",
            unit="tokens",
        ),
        fake_probe(
            "similarity", [fake_score("cos_rl", "AV after RL", 0.8514, 0.84, 0.86)], title="Cosine", unit="cosine"
        ),
        fake_probe(
            "extraction",
            [fake_score("extraction_rate", "after RL", 0.99987, 0.9991, 1.0)],
            title="Responses that hold an explanation",
            unit="share",
        ),
    ]


def fake_examples(rng: random.Random) -> list[dict]:
    context = (
        "def dumps(obj, *, skipkeys=False, ensure_ascii=True,\n          allow_nan=True, indent=None):\n"
        '    """Serialize ``obj`` to a JSON formatted ``str``.\n\n    If ``skipkeys`` is true then ``dict`` '
        "keys that are not basic types\n    will be skipped instead of raising a ``Type"
    )
    text = (
        "A docstring of a Python serialisation function, listing what its keyword arguments do. The sentence "
        "names an exception that is not raised when the flag is set. The final token completes an exception name "
        "inside double backticks, so closing backticks and a full stop are expected next."
    )
    return [
        {
            "document": f"json/json.dumps.{i}",
            "context": context * (1 + i % 3),
            "token": ("Error", "\n", " the", "``")[i % 4],
            "after": "``.\n\n    If ``ensure_ascii`` is false, then the return value can contain non-ASCII characters",
            "labels": text,
            "warm": text[:150],
            "rl": text + " It may be a `TypeError`.",
            "fve_warm": rng.gauss(0.34, 0.2),
            "fve_rl": rng.gauss(0.6, 0.15),
            "cos_rl": rng.gauss(0.85, 0.04),
            "kinds": [("within a word", "punctuation or blank", "a word begins")[i % 3], "spoken by the user"][
                : 1 + i % 2
            ],
        }
        for i in range(30)
    ]


def fake_documents(rng: random.Random) -> list[dict]:
    """Two documents of which some tokens were evaluated; the last of each is a line's end, of FVE below 0."""
    found = []
    for name, text in (
        ("news/17", "Rain fell on the harbour.\nBoats stayed in."),
        ("json/dumps#2", "Returns a string.\n"),
    ):
        rows = []
        for at, token in enumerate(re.findall(r"\s?\w+|[^\w ]", text), 3):
            start = rows[-1]["end"] if rows else 0
            rows.append({"start": text.index(token, start), "end": text.index(token, start) + len(token), "place": at})
        rows = [row for i, row in enumerate(rows) if i % 3 == 1 or i == len(rows) - 1]
        for i, row in enumerate(rows):
            last = i == len(rows) - 1
            texts = {"labels": f"label {i} of {name}", "warm": f"before {i} of {name}", "rl": f"after {i} of {name}"}
            row |= texts | {
                "fve_warm": 0.25 * i,
                "fve_rl": -0.5 if last else rng.random(),
                "cos_rl": 0.9,
                "kinds": ["number"],
            }
        found.append({"document": name, "text": text + " And more.", "tokens": rows[-1]["place"], "rows": rows})
    return found


def fake_stages(steps: int) -> dict[str, dict]:
    """How the stages were made: the last one with another commit."""
    command = f"nla quickstart --config configs/quickstart.yaml --set rl.steps={steps} --set out=runs/quickstart"
    made = {
        "command": command,
        "date": "2026-11-22 15:00",
        "commit": "0123456789ab",
        "devices": "2 × cpu",
        "jax": "0.10.2",
    }
    return dict.fromkeys(("pretrain", "extract", "sft", "rl"), made) | {"evaluate": made | {"commit": "ba9876543210"}}


def fake_data(steps: int = 300, seed: int = 0) -> dict:
    """A run of realistic shape, as the report stage hands it over."""
    rng = random.Random(seed)
    return {
        "title": "quickstart",
        "subject": "byte-docs-6l",
        "place": "after block 3",
        "created": "drawn 2026-11-22 16:00 with nla_jax 0.2.0",
        "state": "",
        "run": {"seed": 3, "nla_jax": "0.2.0", "jax": "0.10.2", "commit": None, "devices": "2 × cpu"},
        "sizes": {"rows of heldout": "2048 from 212 texts", "RL": f"{steps} steps of 8 activations, 8 texts each"},
        "config": '{"seed": 3}',
        "stages": fake_stages(steps),
        "open_with": {"The page": "nla serve --pair runs/quickstart/pair --open"},
        "figures": {
            "heldout_documents": 212,
            "heldout_rows": 2048,
            "logprob_gap_max": 0.1934,
            "subject_loss": 1.213,
            "bigram_loss": 2.471,
            "unigram_loss": 3.114,
            "injection_scale": None,
        },
        "seconds": {"pretrain": 412.7, "extract": 11.2, "sft": 93.4, "rl": 633.1, "evaluate": 41.9},
        "seconds_by_probe": {"extraction": 0.01, "after_rl": 22.5, "warm_start": 12.3},
        "history": fake_history(steps, rng),
        "probes": fake_probes(rng),
        "examples": fake_examples(rng),
        "documents": fake_documents(rng),
        "losses": {"AV, warm start": [{"step": 20 * i, "loss": 2 / i, "seconds": 1.0} for i in range(1, 6)]},
    }
