#!/usr/bin/env bash
# jax 0.12 on a CPU multiplies bfloat16 matrices as they are: forward pass and input gradient of a linear map need no temporaries.
# The gradient of its weights does not: summed over the rows of both operands, the product is computed from copies of x and
# of the incoming gradient in float32, at the speed of float32.
# Guess: in bfloat16 all three products of a layer take half the memory and time. (A transposed copy of x, which barriers keep
# out of the product, spares the float32 copies.)
# Seen 2026-11-29, jax 0.12.0.1 (Python 3.13) on CPU, x [4096, 576], weights [576, 1536]:
#   forward: temporaries 0.0 MB
#   input gradient: temporaries 0.0 MB
#   weight gradient: temporaries 38.1 MB
#   weight gradient from a transposed copy: temporaries 4.7 MB
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
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax, jax.numpy as jnp

barrier = jax.lax.optimization_barrier
turned = lambda x: barrier(jnp.moveaxis(barrier(x)[None], 2, 0).reshape(x.shape[::-1]))
products = {
    "forward": lambda x, w, dy: x @ w,
    "input gradient": lambda x, w, dy: jax.vjp(lambda x: x @ w, x)[1](dy),
    "weight gradient": lambda x, w, dy: jax.vjp(lambda w: x @ w, w)[1](dy),
    "weight gradient from a transposed copy": lambda x, w, dy: turned(x) @ dy,
}
shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 576), (576, 1536), (4096, 1536))]
found = {}
for name, function in products.items():
    found[name] = jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 1e6
    print(f"{name}: temporaries {found[name]:.1f} MB")
in_float32 = 4 * 4096 * 1536 / 1e6
assert max(found["forward"], found["input gradient"]) < 1
assert found["weight gradient"] > in_float32 > 4 * found["weight gradient from a transposed copy"]
PY
echo "as found"
