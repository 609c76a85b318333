"""What a program of a config moves to and from an H200's memory, and what memory it needs, from the program that XLA
compiles for one.

    pip install "jax-cuda12-plugin[with-cuda]==$(python -c 'import jax; print(jax.__version__)')"
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu python experiments/benchmark/gpu/compiled.py rollout \
        --config configs/qwen2_5_7b.py --config.rl.activations=64

Programs are those of `nla plan` (rollout, joint_step, sft_av, ...), on one device. Needs the GPU's compiler (the plugin
and NVIDIA's libraries, 5 GB), but no GPU. Nothing is timed: without a device XLA does not try which of its matrix
products are the fastest.
"""

import argparse
import json
import os
import sys

from nla_jax.cli import load_config
from nla_jax.runtime.errors import InputError
from nla_jax.tools.flops import decode_bytes
from nla_jax.tools.plan import plan_program, programs_of
from nla_jax.tools.topology import GPUS, Slice, mesh_over

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
    parser.add_argument("program")
    parser.add_argument("--config", required=True, help="FILE.py[:VARIANT], and --config.FIELD=VALUE for single fields")
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    if arguments.program != "rollout":
        # Untuned, XLA's first guess at Triton's products of a training step needs more shared memory than there is.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"

    from jax.experimental import topologies

    try:
        devices = tuple(topologies.get_topology_desc("H200", "cuda", target_config=H200, topology="1x1x1").devices)
    except NotImplementedError:
        sys.exit("XLA's compiler for GPUs is not there; the first lines of this file say what to install.")
    mesh = mesh_over(devices, (1, 1, 1))
    programs = programs_of(config, mesh, mesh)
    if arguments.program not in programs:
        sys.exit(f"There is no program {arguments.program!r}; there are {', '.join(programs)}.")
    program, work = programs[arguments.program]
    report = plan_program(program, work, Slice("H200", GPUS["H200"], (), devices))
    if arguments.program == "rollout":
        verbalizer, _, vectors, *_ = program.arguments
        group, length = (program.options[name] for name in ("group", "max_new_tokens"))
        needed = sum(decode_bytes(verbalizer, len(vectors), group, length, 1).values())
        report["decode_loop"] |= {"unavoidable": needed, "share": needed / report["decode_loop"]["bytes_per_token"]}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
