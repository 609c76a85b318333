"""What the `label` stage will ask for and what that costs, before it asks."""

from nla_jax.io.folders import load_tokenizer
from nla_jax.io.hub import locate
from nla_jax.io.parquet import row_count
from nla_jax.labels.cost import Cost, Tokens, counter, price
from nla_jax.labels.labeller import rows_of
from nla_jax.runtime.run import Run
from nla_jax.stages.label import cache_of, existing_labels, labeller_of, shards

SAMPLES = 500  # prompts that are tokenised; the others are counted by their characters


def cost(run: Run) -> Cost:
    """Counts the texts without an answer, and the tokens of what would be sent for them. Asks nobody, writes nothing."""
    run.require("extract")
    labeller, answers, files = labeller_of(run), cache_of(run).answers, shards(run)
    total = sum(map(row_count, files))
    count, counted_by = counter(lambda: load_tokenizer(locate(run.subject_folder)))
    tokens, asked = Tokens(count, max(1, total // SAMPLES)), set()
    for file in files:
        if (run.workdir / "labels" / file.name).exists() or existing_labels(file) is not None:
            continue
        for row in rows_of(file):
            if (key := labeller.key(row)) not in answers and key not in asked:
                tokens.add(labeller.prompt(row))
                asked.add(key)
    most = None if labeller.max_tokens is None else labeller.max_tokens * len(asked)
    c = run.config.label
    rest = f"of {total:,} rows: the others have a label, or share one with another row"
    costs = price(tokens.total, most, c.price_in, c.price_out)
    return Cost("texts", len(asked), rest, tokens.total, most, counted_by, costs, "label")
