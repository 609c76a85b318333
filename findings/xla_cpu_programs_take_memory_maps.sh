#!/usr/bin/env bash
# Each program that XLA compiles for a CPU takes some twenty memory maps of the process for as long as JAX remembers it, one for
# every few of its kernels; with --xla_backend_optimization_level=0, which tests like to set, five times as many. Linux allows a
# process 65,530 maps (vm.max_map_count), and says so nowhere: a long test session of a few thousand small programs reaches them
# with most of the memory free. jax.clear_caches() gives them back.
# Guess: compiled programs cost memory, which one can watch, and nothing else that runs out.
# Seen 2026-11-28, a program of 8 products, tanh, softmax and sums on 16 x 16 numbers, maps per program:
#   jax 0.10.2: 20.5, after jax.clear_caches() none
#   jax 0.10.2, --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false: 117.6, after jax.clear_caches() none
# Exits non-zero where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$folder/maps.py" <<'PY'
import gc
import sys

import jax, jax.numpy as jnp

COUNT = 40
maps = lambda: open("/proc/self/maps").read().count("\n")


def program(k):
    def function(x):
        for _ in range(8):
            x = jnp.tanh(x @ x.T + k)
            x = jax.nn.softmax(x, -1) * jnp.cos(x).sum(0)
        return x

    return jax.jit(function)


x = jnp.ones((16, 16))
program(0.5)(x)  # what is compiled once
before = maps()
programs = [program(float(k)) for k in range(COUNT)]
for one in programs:
    one(x).block_until_ready()
each = (maps() - before) / COUNT
del programs, one
jax.clear_caches()
gc.collect()
left = max(0, maps() - before)
print(f"{each:.1f} maps per program, {left} left after jax.clear_caches()")
low, high = map(float, sys.argv[1:])
assert low < each < high and left == 0
PY
export JAX_PLATFORMS=cpu
XLA_FLAGS="" "$folder/venv/bin/python" "$folder/maps.py" 15 30
XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" "$folder/venv/bin/python" "$folder/maps.py" 80 160
echo "as seen"
