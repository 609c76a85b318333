"""What a token of the rollout moves to and from an H200's memory, counted in the program that XLA compiles for one.

    pip install "jax-cuda12-plugin[with-cuda]==$(python -c 'import jax; print(jax.__version__)')"
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu python experiments/benchmark/gpu/decode_bytes.py

Needs the GPU's compiler (the plugin and NVIDIA's libraries, 5 GB), but no GPU. Nothing is timed: without a device XLA does not try
which of its matrix products are the fastest. Flags are those of `nla benchmark`.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from nla_jax.benchmark.settings import Settings, add_arguments
from nla_jax.flops import decode_bytes
from nla_jax.hlo import Program
from nla_jax.models.transformer import abstract_params
from nla_jax.plan import attached, placed, placed_batch
from nla_jax.sampling import rollout
from nla_jax.sharding import DECODE
from nla_jax.topology import mesh_over

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(preset="qwen2.5-7b")
    s = Settings.read(vars(parser.parse_args(["rollout", *sys.argv[1:]])))
    try:
        devices = topologies.get_topology_desc("H200", "cuda", target_config=H200, topology="1x1x1").devices
    except NotImplementedError:
        raise SystemExit("XLA's compiler for GPUs is not there; the first lines of this file say what to install.") from None
    mesh, model, dtype = mesh_over(tuple(devices), (1, 1, 1)), s.verbalizer(), jnp.dtype(s.dtype)
    params = placed(mesh, model.abstract_params(), DECODE, dtype)
    if model.lora:
        params = attached(placed(mesh, abstract_params(s.config), DECODE, dtype), params)
    vectors = placed_batch(mesh, jax.ShapeDtypeStruct((s.activations, s.width), jnp.float32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        lowered = rollout.lower(model, params, vectors, key, group=s.group, max_new_tokens=s.response)
        compiled = lowered.compile()
    loop = next(loop for loop in Program(compiled.as_text()).loops if loop.name.endswith("decode/while"))
    needed = decode_bytes(model, s.activations, s.group, s.response, 1)
    memory = compiled.memory_analysis()
    report = {
        "jax": jax.__version__,
        "rows": s.activations * s.group,
        "bytes_per_token": loop.body.bytes,
        "unavoidable_bytes_per_token": needed,
        "share": sum(needed.values()) / loop.body.bytes,
        "GiB": {"arguments": memory.argument_size_in_bytes / 2**30, "temporaries": memory.temp_size_in_bytes / 2**30},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
