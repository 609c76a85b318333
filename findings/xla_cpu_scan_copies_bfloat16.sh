#!/usr/bin/env bash
# A model's layers, stacked as [layers, in, out], are read by lax.scan. On a CPU with the newest jax for Python 3.11, a stack in
# bfloat16 costs a copy of the whole stack in float32 inside the program: three times the memory of the weights, where float16
# and float32 stacks cost one layer. jax 0.12.0.1 (Python 3.12 and newer) does not do it.
# Guess: weights in bfloat16 need half the memory of float32 ones. (Layers given one by one, as arrays of their own, spare it.)
# Seen 2026-11-28, jax 0.10.2 on CPU, a stack of 30 x 576 x 1536 numbers:
#   bfloat16: weights 53.1 MB, temporaries 109.7 MB
#   float16: weights 53.1 MB, temporaries 3.6 MB
#   float32: weights 106.2 MB, temporaries 3.5 MB
# Exits non-zero where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax, jax.numpy as jnp

SHAPE = (30, 576, 1536)
temporaries = {}


def model(x, stack):
    return jax.lax.scan(lambda x, layer: (x + (x @ layer).sum(-1, keepdims=True), None), x, stack)[0]


for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    x, stack = jax.ShapeDtypeStruct((4, SHAPE[1]), dtype), jax.ShapeDtypeStruct(SHAPE, dtype)
    memory = jax.jit(model).lower(x, stack).compile().memory_analysis()
    name, weights = jnp.dtype(dtype).name, stack.size * jnp.dtype(dtype).itemsize
    temporaries[name] = memory.temp_size_in_bytes
    print(f"{name}: weights {weights / 1e6:.1f} MB, temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB")
whole = 4 * 30 * 576 * 1536
assert temporaries["bfloat16"] > whole and max(temporaries["float16"], temporaries["float32"]) < whole / 10
PY
echo "as found"
