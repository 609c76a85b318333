#!/usr/bin/env bash
# On a CPU jax multiplies one row by a bfloat16 matrix more slowly than two rows: for one it first writes the whole matrix in
# float32, for two it reads the matrix as it is.
# Guess: a batch of one, whose decoding is bound by reading the weights, is the cheapest batch there is. (A language model that
# decodes one text holds a float32 copy of its weights meanwhile; a second row that nobody reads saves it.)
# Seen 2026-11-29, jax 0.12.0.1 (Python 3.13) on two cores of an AMD EPYC with AVX512_BF16, x [rows, 2048] times weights
# [2048, 8192], result in float32:
#   1 rows: temporaries 67.1 MB, 9.01 times as long as 2 rows
#   2 rows: temporaries 0.0 MB, 1.00 times as long as 2 rows
#   8 rows: temporaries 0.0 MB, 1.12 times as long as 2 rows
# Exits non-zero where the copy, or the order of the times, is another. Needs Python 3.12 or newer.
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
import statistics, time
import jax, jax.numpy as jnp

product = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
w, copied, seconds = jnp.ones((2048, 8192), jnp.bfloat16), {}, {}
for rows in (1, 2, 8):
    x = jnp.ones((rows, 2048), jnp.bfloat16)
    program, taken = product.lower(x, w).compile(), []
    copied[rows] = program.memory_analysis().temp_size_in_bytes / 1e6
    for _ in range(60):
        start = time.perf_counter()
        program(x, w).block_until_ready()
        taken.append(time.perf_counter() - start)
    seconds[rows] = statistics.median(taken)
for rows in copied:
    print(f"{rows} rows: temporaries {copied[rows]:.1f} MB, {seconds[rows] / seconds[2]:.2f} times as long as 2 rows")
assert copied[1] >= 4 * 2048 * 8192 / 1e6 and copied[2] < 1 and copied[8] < 1
assert seconds[1] > 1.2 * seconds[2]
PY
echo "as found"
