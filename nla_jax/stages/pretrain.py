"""`nla pretrain`: a tokenizer and a small Llama-shaped subject from scratch, written as an ordinary HF folder."""

import flax.linen as nn
import jax
import numpy as np

from nla_jax.data.batches import TextBatch, text_windows
from nla_jax.io.folders import load_params, load_tokenizer, read_config, save_model
from nla_jax.io.hub import locate
from nla_jax.joint_step import SupervisedStep
from nla_jax.losses import language_model_loss
from nla_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    abstract_params,
    init_params,
)
from nla_jax.quickstart.tokenizer import train_tokenizer
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.run import Run
from nla_jax.stages.check import documents_of_splits
from nla_jax.stages.loop import Loop
from nla_jax.stages.sft import fit
from nla_jax.study import make_optimizer
from nla_jax.subject import SHIPPED


def pretrain(run: Run) -> None:
    """Trains (or continues from `pretrain.init_from`, for `pretrain.steps` steps) the subject of a run and writes
    `{workdir}/subject`. Documents of the held-out split are never trained on; the loss on them is reported beside those
    of a unigram and a bigram model of the same tokens."""
    c = run.config.pretrain
    with run.stage("pretrain") as result:
        if result is None:
            return
        documents = run.documents()
        documents_of_splits(run.config, documents)
        texts = {True: [], False: []}
        for document in documents:
            texts[run.split(document) == "heldout"].append(document.text)
        if c.init_from:
            folder = SHIPPED if c.init_from == "shipped" else locate(c.init_from)
            tokenizer, config = load_tokenizer(folder), read_config(folder)
            params = load_params(folder, config)
            model = Transformer(config)
        else:
            tokenizer = train_tokenizer(texts[False], c.vocab_size)
            model = Transformer(TransformerConfig(vocab_size=len(tokenizer), **c.model))
            params = init_params(model, jax.random.key(run.config.seed))
            params = nn.unbox(params)
        train, heldout = (token_stream(tokenizer, texts[held]) for held in (False, True))
        step = SupervisedStep(
            "subject", language_model_loss(model), make_optimizer(c.optimizer, c.steps, "pretrain.optimizer")
        )
        windows = lambda i: text_windows(train, i, c.batch, c.length, run.config.seed)
        with Loop(run, "pretrain", "pretrain", c.steps, {}) as loop:
            params = fit(loop, step, params, abstract_params(model.config), windows)

        result["subject_loss"] = heldout_loss(model, params, heldout, c.length)
        result["unigram_loss"], result["bigram_loss"] = ngram_losses(train, heldout, model.config.vocab_size)
        result["parameters"] = sum(x.size for x in jax.tree.leaves(params))
        result["train_tokens"], result["heldout_tokens"] = len(train), len(heldout)
        with jax.set_mesh(run.mesh):
            save_model(run.workdir / "subject", params, model.config, tokenizer, dtype=c.dtype)


def token_stream(tokenizer, texts: list[str]) -> np.ndarray:
    """All documents' ids (with the tokenizer's special tokens) one after the other."""
    return np.concatenate([np.array(ids, np.int32) for ids in tokenizer(texts, verbose=False).input_ids])


def heldout_loss(model: Transformer, params: dict, tokens: np.ndarray, length: int, batch: int = 32) -> float:
    """Mean cross-entropy (nats per token) over consecutive windows of `length` tokens, the first token of each
    unscored."""
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    if not len(windows):
        raise InputError(f"The held-out documents have {len(tokens)} tokens, fewer than one window of {length}.")
    loss = jax.jit(language_model_loss(model))
    total = 0.0
    for i in range(0, len(windows), batch):
        rows = windows[i : i + batch]
        lengths = np.full(batch, length, np.int32)
        lengths[len(rows) :] = 0
        rows = np.pad(rows, ((0, batch - len(rows)), (0, 0)))
        total += float(loss(params, TextBatch(rows, lengths))[0]) * (lengths > 0).sum()
    return total / len(windows)


def ngram_losses(train: np.ndarray, test: np.ndarray, vocab: int) -> tuple[float, float]:
    """Cross-entropy (nats per token) on `test` of a unigram model (add-one) and of a bigram model with Witten-Bell
    interpolation, both counted on `train`: what a model that has learnt something must beat."""
    unigram = np.bincount(train, minlength=vocab) + 1.0
    unigram /= unigram.sum()
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocab + train[1:], return_counts=True)
    seen = np.bincount(train[:-1], minlength=vocab)
    kinds = np.bincount(pairs // vocab, minlength=vocab)
    key = test[:-1].astype(np.int64) * vocab + test[1:]
    place = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
    count = np.where(pairs[place] == key, counts[place], 0)
    first = test[:-1]
    bigram = (count + kinds[first] * unigram[test[1:]]) / np.maximum(seen[first] + kinds[first], 1)
    bigram = np.where(seen[first] > 0, bigram, unigram[test[1:]])
    return float(-np.log(unigram[test[1:]]).mean()), float(-np.log(bigram).mean())
