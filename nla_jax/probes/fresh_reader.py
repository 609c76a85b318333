"""Is what the AV writes there for anybody to read? An AR that has seen nothing of RL learns to read it.

AV and AR of a pair are trained together, and may agree on a code. A fresh AR begins as the warm start's did, with the
subject's blocks, and is trained as long, on the same activations; but in place of labels it gets what the AV says of them.
The AV stays as it is, and has never been trained on these activations. What the fresh AR cannot rebuild from texts of
held-out activations, although the AR after RL can, the two have agreed on.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from nla_jax.data.batches import text_batches
from nla_jax.models.sharding import place_batch
from nla_jax.pair import Pair
from nla_jax.probes.hidden_codes import READ_AS, scores
from nla_jax.probes.probe import Context, probe
from nla_jax.runtime.compiler import first_state, jit_step
from nla_jax.runtime.metrics import Progress
from nla_jax.study import Study

LABELS = {f"fve_{name}_fresh": f"{text}, fresh AR" for name, text in READ_AS.items()}


@probe(
    "A fresh reader",
    needs=("pair", "study"),
    labels={"fve_fresh_reader": "AV after RL, fresh AR", "gap_fresh_reader": "what only the AR after RL reads"}
    | LABELS,
)
def fresh_reader(context: Context) -> dict[str, np.ndarray]:
    """A new reconstructor, trained as the warm start's was but on the text after RL in place of labels, reads that text
    of the held-out rows, and its rewrites; and by how much the reconstructor after RL scores higher."""
    study, rows = context.study, context.reader_rows
    e = study.config.evaluate
    found = context.pair.explain(rows.vectors, context.max_new_tokens, e.temperature, context.seed, batch=e.batch)
    texts = [explanation.accepted or "" for explanation in found]
    params = trained(study, context.untrained(), texts, rows.vectors)
    fresh = dataclasses.replace(context.pair, reconstructor_params=params)
    as_it_is = context.row_fve(context.texts("rl"), fresh)
    told = {"fve_fresh_reader": as_it_is, "gap_fresh_reader": context.row_fve(context.texts("rl")) - as_it_is}
    return told | {f"fve_{name}_fresh": values for name, values in scores(context, fresh).items()}


def trained(study: Study, pair: Pair, texts: Sequence[str], vectors: Float[np.ndarray, "n D"]) -> dict:
    """The parameters of the pair's AR (which are consumed) after `sft.ar.steps` steps on these texts of activations: the
    program, batch and optimiser of the warm start."""
    mesh, step, c = study.mesh, study.sft_ar, study.config
    tokens, lengths = pair.prompts.reconstructor_batch(list(texts), study.text_width)
    batch_of_step = text_batches(tokens, lengths, vectors, np.arange(len(texts)), c.sft.ar.batch, c.seed, c.sft.widths)
    progress = Progress("fresh AR", c.sft.ar.steps)
    with jax.set_mesh(mesh):
        state = first_state(step, mesh, study.boxed[1], pair.reconstructor_params)
        train = jit_step(step, mesh, c.compute.optimize, c.sft.ar.steps, c.compute.dtype)
        for i in range(c.sft.ar.steps):
            state, _ = train(state, place_batch(mesh, batch_of_step(i)), pair.base)
            progress.update()
    progress.close()
    return state.models[step.name].params
