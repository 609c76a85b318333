"""Which dtype a run computes in, where its config leaves that to the devices (`compute.dtype=auto`)."""

import dataclasses
import json

import jax

from nla_jax.config import Config
from nla_jax.io.files import AnyPath
from nla_jax.runtime.distributed import from_writer
from nla_jax.runtime.notes import note
from nla_jax.tools.topology import measured_peak

GAIN = 1.3  # how many times faster bfloat16 must multiply than float32
ROUNDS = 3  # in which both are measured: others may be at work on the same machine, now and then


def settled(config: Config, folder: AnyPath | None = None) -> Config:
    """The config with a dtype in the place of "auto"; what was chosen is said once.

    A run in `folder` keeps the dtype that it began with, on whatever machine it goes on. A new one computes in bfloat16 on
    accelerators; on a CPU in the faster of bfloat16 and float32, by a product of matrices in both. Some CPUs have no
    units for bfloat16, and jax before 0.12 does not use those that there are."""
    if config.compute.dtype != "auto":
        return config
    dtype = from_writer(lambda: _of_run(folder) or fastest())
    note(
        f"compute.dtype is auto: this run computes in {dtype} ({jax.devices()[0].device_kind}, jax {jax.__version__})."
    )
    return in_dtype(config, dtype)


def in_dtype(config: Config, dtype: str) -> Config:
    """The config with `dtype` in the place of "auto"."""
    dtype = dtype if config.compute.dtype == "auto" else config.compute.dtype
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype=dtype))


def fastest() -> str:
    """The dtype in which this machine's devices multiply fastest: "bfloat16" or "float32"."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    halves = wholes = 0.0
    for _ in range(ROUNDS):
        halves, wholes = max(halves, measured_peak("bfloat16")), max(wholes, measured_peak("float32"))
        if halves < wholes / 2:  # without units for bfloat16, where a round takes seconds
            break
    return "bfloat16" if halves > GAIN * wholes else "float32"


def _of_run(folder: AnyPath | None) -> str | None:
    """The dtype of the run in a folder; None where none has begun there."""
    file = folder / "config.json" if folder is not None else None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["compute"]["dtype"] if file else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one, which the run refuses by itself
        found = None
    return found if found in ("float32", "bfloat16", "float16") else None
