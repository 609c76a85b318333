#!/usr/bin/env bash
# optax.inject_hyperparams puts an optimizer's numbers into its state, so that a training loop can log or change the learning
# rate. It casts them to the dtype of the parameters. With bfloat16 parameters Adam's b2 = 0.999 becomes 1.0: the bias
# correction 1 - b2^t is 0, and every update is NaN. Plain optax.adam on the same parameters makes the right step.
# Guess: wrapping an optimizer so that its numbers can be seen changes no number. (hyperparam_dtype=jnp.float32 mends it.)
# Seen 2026-11-28, optax 0.2.8, jax 0.10.2 on CPU:
#   adam: update -0.0009918 bfloat16
#   inject_hyperparams(adam): update nan bfloat16, b2 1.0
# Exits non-zero where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax.numpy as jnp, numpy as np, optax

params, grads = {"w": jnp.ones(4, jnp.bfloat16)}, {"w": jnp.full(4, 0.1, jnp.bfloat16)}
seen = {}
for name, make in (("adam", optax.adam), ("inject_hyperparams(adam)", optax.inject_hyperparams(optax.adam))):
    tx = make(learning_rate=1e-3)
    state = tx.init(params)
    for _ in range(3):
        update, state = tx.update(grads, state, params)
    seen[name] = float(update["w"][0])
    b2 = getattr(state, "hyperparams", {}).get("b2")
    print(f"{name}: update {seen[name]:.4g} {update['w'].dtype}" + ("" if b2 is None else f", b2 {float(b2)}"))
assert abs(seen["adam"] + 1e-3) < 2e-5 and np.isnan(seen["inject_hyperparams(adam)"])
PY
echo "as found"
