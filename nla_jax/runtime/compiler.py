"""How programs are compiled: XLA's options for training steps, and the cache of compiled programs."""

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from nla_jax.io.files import cache_folder
from nla_jax.models.sharding import shardings, state_shapes

# What XLA's compilers are told about training steps, by platform.
COMPILER_OPTIONS = {
    # On one device, in float32: matrix products by Eigen instead of YNNPACK, XLA's default. Eigen is faster where there
    # are many rows (and slower in the rollout). The option is experimental. In 16 bits YNNPACK is twice as fast: Eigen
    # casts to float32.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    # Dot merger off: it would concatenate prompt and response activations to share a weight. XLA's own
    # rematerialisation off: near the memory limit it recomputes slices and casts up to four times for almost no saving
    # (experiments/benchmark/LOG.md).
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0, "xla_disable_hlo_passes": "rematerialization"},
}


# Where programs are not to be optimized (`optimize`): a training step for CPUs then compiles in a tenth of the time. At
# level 1 it takes three times that tenth, and a step half the time: worth it from `OFTEN` steps on.
OFTEN = 20
UNOPTIMIZED = {
    "cpu": {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
}


def jit_step(
    step: Callable, mesh: Mesh, optimized: bool = True, runs: int = 1, dtype: DTypeLike = jnp.float32
) -> Callable:
    """The compiled training step for the devices of `mesh`, which computes in `dtype` and will run `runs` times; the
    state, its first argument, is consumed."""
    platform = mesh.devices.flat[0].platform
    by_default = platform == "cpu" and (mesh.size > 1 or jnp.dtype(dtype).itemsize == 2)
    options = None if by_default else COMPILER_OPTIONS.get(platform)
    if not optimized:
        options = dict(UNOPTIMIZED.get(platform, {}))
        options |= {"xla_backend_optimization_level": 1} if options and runs > OFTEN else {}
    program = jax.jit(step, donate_argnums=0, compiler_options=known(options or {}, mesh) or None)
    return OnCpu(program) if platform == "cpu" else program


@dataclasses.dataclass
class OnCpu:
    """A jitted training step whose arrays lie in the memory of this process: it begins with what others no longer use.

    C's allocator keeps what is freed: of a 135M model 0.7 GB after compiling the step, 0.5 GB after each rollout."""

    program: Callable
    compiled: bool = False

    def __call__(self, *arguments: Any) -> Any:
        if not self.compiled:  # the call below finds the program compiled
            self.program.lower(*arguments).compile()
            self.compiled = True
        give_memory_back()
        return self.program(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)


def give_memory_back() -> None:
    """Returns this process's free memory to the system, where its C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def first_state(step: Any, mesh: Mesh, abstract: Any, params: Any) -> Any:
    """The state before the first step of supervised training (`joint_step.SupervisedStep`), laid out on the mesh; the
    parameters are consumed. `abstract`: their shapes with logical axis names."""
    layout = shardings(mesh, state_shapes(step.init, abstract))
    there = jax.device_put(params, layout.models[step.name].params)
    return jax.jit(step.init, out_shardings=layout, donate_argnums=0)(there)


def known(options: dict, mesh: Mesh) -> dict:
    """Those of the options that the compiler accepts: releases rename them and drop them."""
    return {name: value for name, value in options.items() if compiler_knows({name: value}, mesh)}


def compiler_knows(options: dict, mesh: Mesh) -> bool:
    """Whether the compiler accepts the options. An unknown option makes compilation fail, so this tries an empty
    program."""
    try:
        place = NamedSharding(mesh, PartitionSpec())
        jax.jit(lambda: 0, out_shardings=place, compiler_options=options).lower().compile()
        return True
    except jax.errors.JaxRuntimeError:
        return False


def enable_compile_cache() -> None:
    """Keeps compiled programs between runs, so that a resumed run does not compile them again."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs take long too


def optimize(wanted: bool) -> None:
    """Whether XLA optimizes the programs that this process compiles from now on."""
    jax.config.update("jax_disable_most_optimizations", not wanted)


def take_gpus_whole() -> None:
    """Lets JAX take 95 % of a GPU's memory instead of three quarters, unless the user has set a share."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the second is the older name
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "0.95"


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds that XLA takes for each program compiled inside."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
