"""What an instruct model in a folder writes as a labeller, on held-out rows of a run: how much of it ends, and examples.

python experiments/smollm2/local_labels.py --workdir runs/smollm2/study --model runs/smollm2/model --rows 192
"""

import argparse
import collections
import time
from pathlib import Path

import numpy as np

from nla_jax.labels.labeller import NoLabel, make_labeller, rows_of


def main(workdir: Path, model: str, count: int, shown: int) -> None:
    """Prints why rows have no label, how long the others are, and every `shown`-th."""
    shards = sorted((workdir / "activations").glob("heldout-*.parquet"))
    rows = [row for shard in shards for row in rows_of(shard)]
    rows = rows[:: max(1, len(rows) // count)][:count]
    labeller = make_labeller(
        "nla_jax.labels.local:Local", {"model": model, "max_tokens": 160, "temperature": 0.0}
    ).labeller
    start = time.monotonic()
    labels = labeller.label(rows)
    print(f"{len(rows)} rows, {time.monotonic() - start:.0f} seconds")
    print(collections.Counter(label.why if isinstance(label, NoLabel) else "label" for label in labels))
    words = [len(label.split()) for label in labels if not isinstance(label, NoLabel)]
    if words:
        print("words of a label, 5 %, 50 % and 95 %:", np.percentile(words, [5, 50, 95]))
    for row, label in list(zip(rows, labels))[::shown]:
        print(f"{row.text[-90:]!r} {row.role}\n    {label if isinstance(label, str) else f'no label: {label.why}'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--shown", type=int, default=6, help="each n-th label is printed")
    arguments = parser.parse_args()
    main(arguments.workdir, arguments.model, arguments.rows, arguments.shown)
