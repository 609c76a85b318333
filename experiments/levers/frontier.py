"""The table of README.md, from the working folders of finished runs.

python experiments/levers/frontier.py runs/quickstart runs/short runs/front
"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "FVE": "fve_rl",
    "10 tokens": "fve_first_10",
    "16 tokens": "fve_first_16",
    "AR before RL": "fve_rl_frozen",
    "gold": "fve_gold_text",
    "tokens": "mean_length",
    "last word": "last_word_true_after_rl",
    "last words": "last_words_true_after_rl",
    "passage": "passage_true_after_rl",
    "position": "position_true_after_rl",
    "say the last words": "last_words_claimed_after_rl",
    "copied": "copied_rl",
}


def main(folders: list[str]) -> None:
    """Prints a row for each working folder, which `nla evaluate` has measured with the probes that README.md lists."""
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for folder in map(Path, folders):
        probes = json.loads((folder / "evaluation.json").read_text())["probes"]
        scores = {score["name"]: score for probe in probes if probe["chart"] != "curve" for score in probe["scores"]}
        cells = [f"{scores[name]['mean']:.3f}" if name in scores else "" for name in COLUMNS.values()]
        cells[list(COLUMNS).index("tokens")] = f"{scores['mean_length']['mean']:.1f}"
        low, high = scores["fve_rl"]["ci95"]
        cells[0] += f" ({low:.3f} to {high:.3f})"
        print(f"| {folder.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
