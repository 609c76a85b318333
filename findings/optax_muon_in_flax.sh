#!/usr/bin/env bash
# optax.contrib.muon orthogonalises every parameter of two axes and gives all others to Adam. In Flax the two do not mean matrix and vector:
# the kernels of nn.MultiHeadDotProductAttention have three axes (in, heads, head size), their biases two. So a Flax transformer trained
# with muon(lr) has Adam on all its attention matrices and Muon on the biases of q, k and v. With nn.scan over the layers, where everything
# has one more axis, no matrix of a block gets Muon, but the scales of its layer norms and the biases of its dense layers do.
# Guess: Muon takes the weight matrices, Adam the rest, whatever the model is written in. No warning says where that is not so.
# (muon_weight_dimension_numbers names the axes of each matrix.)
# Seen 2026-11-29, optax 0.2.8, flax 0.12.12, jax 0.12.0.1 (Python 3.13) on CPU:
#   a loop over blocks: Muon on 12 arrays, 6 of them biases or scales; Adam on 8 matrices
#   nn.scan over blocks: Muon on 9 arrays, 7 of them biases or scales; Adam on 6 matrices
# Exits non-zero where that changes. Needs Python 3.12 or newer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in "${PYTHON:-python3}" python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  "$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2> /dev/null && break
  python=
done
[ -n "$python" ] || { echo "This needs Python 3.12 or newer; name one in PYTHON."; exit 2; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 flax==0.12.12 jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax.contrib


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))), None


class Model(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(512, 64)(ids)
        if self.scanned:
            x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)
        else:
            for _ in range(2):
                x, _ = Block()(x, None)
        return nn.Dense(512)(nn.LayerNorm()(x))


found = {}
for scanned in (False, True):
    params = Model(scanned).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    state = optax.contrib.muon(1e-2).init(params)
    of = {
        who: [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.inner_states[who].inner_state[0].mu)]
        for who in ("muon", "adam")
    }
    small = [name for name in of["muon"] if name.endswith(("['bias']", "['scale']"))]
    matrices = [name for name in of["adam"] if name.endswith("['kernel']")]
    print("nn.scan over blocks:" if scanned else "a loop over blocks:", end=" ")
    print(f"Muon on {len(of['muon'])} arrays, {len(small)} of them biases or scales; Adam on {len(matrices)} matrices")
    found[scanned] = len(of["muon"]), len(small), len(matrices)
    assert all("Block" in name for name in matrices)
assert found == {False: (12, 6, 8), True: (9, 7, 6)}, found
PY
echo "as found"
