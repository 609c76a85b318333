#!/usr/bin/env bash
# jax.device_put of a transposed NumPy view lays a matrix out anew, and does so several times as fast as NumPy's own copy, and
# faster than a compiled transpose of the matrix once it is on the (CPU) device.
# Guess: device_put copies bytes as they lie, so turn the matrix first (np.ascontiguousarray), or put it there as it is and let
# XLA turn it. (Checkpoints store [out, in], Flax kernels are [in, out]: every matrix of every model is turned when it is read.)
# Seen 2026-11-29, jax 0.12.0.1, numpy 2.4.6 (Python 3.13) on two cores of an AMD EPYC, 40 matrices [1536, 576] of bfloat16,
# medians of 15:
#   NumPy turns, device_put: 1.1 GB/s
#   device_put, XLA turns: 1.5 GB/s
#   device_put of the turned view: 2.8 GB/s
# Exits non-zero where the order is another. Needs Python 3.12 or newer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in "${PYTHON:-python3}" python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  "$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2> /dev/null && break
  python=
done
[ -n "$python" ] || { echo "This needs Python 3.12 or newer; name one in PYTHON."; exit 2; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import statistics, time
import jax, ml_dtypes, numpy as np

stored = [np.arange(1536 * 576, dtype=np.float32).reshape(1536, 576).astype(ml_dtypes.bfloat16) for _ in range(40)]
turned = jax.jit(lambda x: x.T)
ways = {
    "NumPy turns, device_put": lambda x: jax.device_put(np.ascontiguousarray(x.T)),
    "device_put, XLA turns": lambda x: turned(jax.device_put(x)),
    "device_put of the turned view": lambda x: jax.device_put(x.T),
}
assert all((np.asarray(way(stored[0])) == stored[0].T).all() for way in ways.values())
seconds = {way: [] for way in ways}
for _ in range(16):  # in turn: others may use the machine
    for way, put in ways.items():
        start = time.perf_counter()
        jax.block_until_ready([put(x) for x in stored])
        seconds[way].append(time.perf_counter() - start)
seconds = {way: statistics.median(taken[1:]) for way, taken in seconds.items()}
size = sum(x.nbytes for x in stored) / 1e9
for way, taken in seconds.items():
    print(f"  {way}: {size / taken:.1f} GB/s")
numpy, xla, view = seconds.values()
assert view < 0.6 * numpy and view < 0.8 * xla
PY
echo "as found"
