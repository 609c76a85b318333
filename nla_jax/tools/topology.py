"""The devices that a plan is made for: chips and their published peaks, TPU slices by name, the devices present."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from nla_jax.models.sharding import AXES, device_mesh, host_mesh
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.tools.hlo import Machine

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    `flops`: bfloat16 FLOP/s. `memory`: bytes of HBM that a program may use (what the compiler refuses to exceed).
    `bandwidth`: HBM bytes/s. `link`: bytes/s of one interconnect link in one direction. `wrap`: an axis of a slice
    closes to a ring at multiples of this."""

    flops: float
    memory: float
    bandwidth: float
    link: float
    wrap: int = 1


# FLOP/s, HBM size and bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; of the HBM the runtime keeps a part
# back. Links: the same pages give 300, 200, 600, 400 GB/s a chip and direction over 6, 4, 6, 4 links; here a tenth
# less, what jax-ml.github.io/scaling-book/tpus uses for what is attainable.
CHIPS = {
    "v4": Chip(275e12, 31.75 * GiB, 1228e9, 45e9, 4),
    "v5e": Chip(197e12, 15.75 * GiB, 819e9, 45e9, 16),
    "v5p": Chip(459e12, 95.0 * GiB, 2765e9, 90e9, 4),
    "v6e": Chip(918e12, 31.25 * GiB, 1640e9, 90e9, 16),
}
TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
# Dense bfloat16, from NVIDIA's data sheets of the SXM parts; `link`: NVLink in one direction. For a device that is
# present, its own figure replaces `memory`.
GPUS = {
    "A100": Chip(312e12, 79 * GiB, 2039e9, 300e9),
    "H100": Chip(989e12, 79 * GiB, 3350e9, 450e9),
    "H200": Chip(989e12, 139 * GiB, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to plan for.

    `chip`: a device's share of its chip. `sizes`: of the grid in which the devices are linked; () where there is none,
    and each has one link to all others. `devices` need not exist."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: tuple[Any, ...]

    def links(self, n: int) -> int:
        """Links that a chip at the edge has in a collective among `n` chips.

        The chips are taken to fill the slice's longest axes first. An axis that closes to a ring has two links (in a
        slice of whole cubes all axes close), any other has one."""
        closes = [size % self.chip.wrap == 0 for size in self.sizes]
        if len(self.sizes) == 3:
            closes = [all(closes)] * 3
        links, filled = 0, 1
        for size, closed in sorted(zip(self.sizes, closes), reverse=True):
            if filled < n and size > 1:
                links, filled = links + 1 + closed, filled * size
        return max(links, 1)

    def host(self, mesh: Mesh) -> Mesh:
        """One host's devices of a mesh. For a TPU, a slice of that size: its compiler takes no part of a larger one."""
        first = min(device.process_index for device in mesh.devices.flat)
        own = host_mesh(mesh, first)
        if not self.sizes or own.size == mesh.size:
            return own
        sizes = [max(axis) - min(axis) + 1 for axis in zip(*(device.coords for device in own.devices.flat))]
        name = f"{self.name.partition(':')[0]}:{'x'.join(map(str, sizes[: len(self.sizes)]))}"
        return device_mesh((1, own.size, 1), slice_named(name).devices)

    @property
    def machine(self) -> Machine:
        """What one device does in a second."""
        return Machine(self.chip.flops, self.chip.bandwidth, self.chip.link, self.links)


def slice_named(name: str) -> Slice:
    """A TPU slice, such as `v5p:4x4x4`, whose programs the compiler of the `libtpu` wheel compiles without a TPU.

    Raises `InputError` for a topology that the compiler does not know, and where there is no compiler."""
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise InputError(f"{name!r} is no topology; write for example v5p:4x4x4 (chips: {', '.join(CHIPS)}).")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError('Planning needs the TPU compiler: pip install "jax[tpu]" (no TPU is needed).')
    # Nothing here uses a chip: no metadata server to ask, no host to find, no lock to hold against other processes.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:
        raise InputError(f"The TPU compiler has no topology {name!r} ({first_line(error)}).") from None
    sizes = tuple(int(n) for n in sizes.split("x"))
    cores = len(devices) // math.prod(sizes)  # devices a chip: two on v4
    shares = {field: getattr(CHIPS[kind], field) / cores for field in ("flops", "memory", "bandwidth")}
    return Slice(name, dataclasses.replace(CHIPS[kind], **shares), sizes, tuple(devices))


def libtpu_wanted() -> str | None:
    """Which libtpu the installed jax asks for, where another one is installed; None where they match."""
    from packaging.requirements import Requirement

    wanted = (Requirement(line) for line in importlib.metadata.requires("jax") or ())
    pins = [requirement.specifier for requirement in wanted if requirement.name == "libtpu"]
    fits = all(importlib.metadata.version("libtpu") in pin for pin in pins)
    return None if fits else str(pins[0])


def present(dtype: Any) -> Slice:
    """The devices of this process.

    For a kind that no table here has, the peaks are measured (a matrix product in `dtype`, an addition to a large
    array), and links are taken to be as fast as memory. CPU devices share all of these."""
    devices = tuple(jax.devices())
    first, stats = devices[0], devices[0].memory_stats() or {}
    known = [chip for name, chip in GPUS.items() if name in first.device_kind]
    if first.device_kind in TPU_KINDS:
        known = [CHIPS[TPU_KINDS[first.device_kind]]]
    if known:
        chip = known[0]
    else:
        parts = len(devices) if first.platform == "cpu" else 1
        memory, bandwidth = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), measured_bandwidth() / parts
        chip = Chip(measured_peak(dtype) / parts, memory / parts, bandwidth, bandwidth)
    chip = dataclasses.replace(chip, memory=stats.get("bytes_limit", chip.memory))
    return Slice(f"{len(devices)} × {first.device_kind}", chip, (), devices)


@jax.jit
def _squared(x: Float[jax.Array, "n n"]) -> Float[jax.Array, "n n"]:
    return x @ x


def measured_peak(dtype: Any) -> float:
    """FLOP/s of a large matrix product on the first device: the best of five."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)  # equal entries would save a GPU power, and flatter it
    return 2 * n**3 / _best(_squared, x, keep=True)


def measured_bandwidth() -> float:
    """Bytes/s of adding to a large array in place (read and write) on the first device: the best of five."""
    n = 1 << (26 if jax.default_backend() == "cpu" else 29)
    return 2 * 4 * n / _best(jax.jit(lambda x: x + 1, donate_argnums=0), jnp.ones(n, jnp.float32))


def _best(function: Callable, x: jax.Array, keep: bool = False) -> float:
    """The least seconds of five calls after a first one; each takes the last one's result, unless `keep`."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        y = jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - start)
        x = x if keep else y
    return min(seconds[1:])


def mesh_over(devices: Sequence, sizes: tuple[int, int, int]) -> Mesh:
    """A mesh of all devices. Raises `InputError` where the sizes (one may be -1) do not fit them."""
    sizes = list(sizes)
    if sizes.count(-1) == 1 and math.prod(sizes):
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise InputError(f"mesh {dict(zip(AXES, sizes))} does not fit the {len(devices)} devices of the topology.")
    return device_mesh(sizes, devices)


def factorisations(n: int) -> list[tuple[int, int, int]]:
    """Every mesh (data, fsdp, tensor) of `n` devices."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [(data, fsdp, n // data // fsdp) for data in divisors for fsdp in divisors if n // data % fsdp == 0]
