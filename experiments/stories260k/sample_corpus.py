"""Samples a corpus from a small language model, so that its own text can serve as its data.

    python experiments/stories260k/sample_corpus.py --model path/to/stories260k --out runs/stories.jsonl

The sampler is the package's own rollout: the "prompt" is BOS and a first token, and nothing is injected.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.autoencoder import Injection, Verbalizer, keep
from nla_jax.io.folders import load_params, load_tokenizer, read_config
from nla_jax.io.hub import locate
from nla_jax.models.transformer import Transformer
from nla_jax.runtime.metrics import Progress, write_atomically
from nla_jax.sampling import rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()

    folder = locate(arguments.model)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    params, model = load_params(folder, config), Transformer(config)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    # First tokens as often as the model itself would write them; each kind is one program with its own prompt.
    logits = model.apply({"params": params}, jnp.array([[bos]]), method="next_token_logits")[0, 0]
    shares = np.asarray(jax.nn.softmax(logits))
    counts = {int(t): round(arguments.documents * shares[t]) for t in np.argsort(-shares)[:8]}
    progress, stories = Progress("sample", sum(counts.values())), set()
    for first, count in counts.items():
        source = Verbalizer(model, (bos,), (first,), eos, 1.0, Injection(keep))
        for start in range(0, count, 100):
            n = min(100, count - start)
            drawn = rollout(
                source,
                params,
                np.zeros((100, config.width), np.float32),
                jax.random.key(first),
                start,
                group=1,
                max_new_tokens=arguments.tokens,
            )
            rows = [[first, *row[mask].tolist()] for row, mask in zip(np.asarray(drawn.tokens), np.asarray(drawn.mask))]
            stories |= {tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows[:n]}
            progress.update(n)
    lines = [json.dumps({"id": f"story-{i:05d}", "text": text}) for i, text in enumerate(sorted(stories))]
    write_atomically(Path(arguments.out), "\n".join(lines) + "\n")
    print(f"{len(lines)} stories in {arguments.out}")


if __name__ == "__main__":
    main()
