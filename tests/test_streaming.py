"""Checkpoints of several gigabytes: the memory that loading and saving take, and their rates beside a plain read's.

    python -m pytest -m slow -s tests/test_streaming.py     # prints the figures of docs/models.md

Each measurement is a process of its own, without the fast-compile flags of conftest.py. Memory is what the kernel
cannot reclaim (`RssAnon`), above what the process held before.
"""

import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nla_jax.io.folders import _hf_shape, load_params, read_config, save_model
from nla_jax.io.safetensors import save_tensors
from nla_jax.models.families import tensors_of, to_hf
from nla_jax.models.sharding import make_mesh, shardings
from nla_jax.models.transformer import TransformerConfig, abstract_params
from nla_jax.quickstart.tokenizer import train_tokenizer

CONFIG = TransformerConfig(
    vocab_size=128_256, width=2048, layers=28, heads=32, kv_heads=8, head_dim=64, mlp_width=8192, tied_head=False
)  # 4.5 GB in bfloat16
TENSOR = CONFIG.vocab_size * CONFIG.width * 2  # bytes of the largest
SLACK = 300 << 20  # compiled programs, the allocator, stacks of threads


def generate(folder: Path) -> None:
    """A checkpoint of `CONFIG` in bfloat16 files of at most 2 GiB, written tensor by tensor."""
    shapes = nn.unbox(abstract_params(CONFIG))
    noise = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16)

    def tensors():
        for name, tensor, layer in tensors_of(CONFIG):
            whole = functools.reduce(dict.get, tensor.path, shapes).shape
            shape = _hf_shape(tensor, CONFIG, whole[layer is not None :])
            form = jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16)
            yield name, form, functools.partial(np.resize, noise, shape)

    save_tensors(folder, tensors())
    (folder / "config.json").write_text(json.dumps(to_hf(CONFIG)))


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def measured(work) -> tuple[float, int, object]:
    """Seconds, peak of the memory above the present one, and result of `work()`."""
    base = peak = anonymous_bytes()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return seconds, peak - base, result


def plain_read(folder: Path, keep: bool) -> list[bytearray]:
    """Reads the files in pieces of 32 MB: into one buffer, or into new memory that is kept, as a loader must."""
    pieces = [bytearray(32 << 20)]
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(pieces[-1]):
                if keep:
                    pieces.append(bytearray(32 << 20))
    return pieces


def forget_files() -> str:
    """Drops the page cache where that is allowed; says in which state the files are."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return "cold"
    except OSError:
        return "warm"


def work(task: str, folder: Path, devices: int) -> dict:
    """One measurement, in a process with `devices` CPU devices."""
    config = read_config(folder)
    layout = shardings(make_mesh(1, devices, 1), abstract_params(config)) if devices > 1 else None
    load = lambda: load_params(folder, config, dtype=jnp.bfloat16, layout=layout)
    figures = {"task": task, "devices": devices, "files": forget_files()}
    if task == "load":
        seconds, memory, params = measured(load)
        if devices > 1:
            assert all(x.sharding.num_devices == devices for x in jax.tree.leaves(params))
    else:
        params = load()
        tokenizer = train_tokenizer(["a text"], 300)
        seconds, memory, _ = measured(
            lambda: save_model(folder.with_name("saved"), params, config, tokenizer, dtype=jnp.bfloat16)
        )
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    return figures | {"bytes": size, "memory": memory, "GB/s": size / seconds / 1e9}


def run(*arguments, **options) -> subprocess.CompletedProcess:
    """This file as a program, without the flags that conftest.py sets for compiling fast."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={arguments[-1]}"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    environment.pop("NPROC", None)
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming") / "model"
    folder.mkdir()
    generate(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_plain_read(folder, keep):
    """Not a test: the rates beside which those of loading are printed."""
    state = forget_files()
    seconds, _, _ = measured(lambda: plain_read(folder, keep))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"\nplain read of {state} files{', bytes kept' * keep}: {size / seconds / 1e9:.2f} GB/s")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_loading_holds_one_tensor_beside_the_model(folder, devices):
    figures = json.loads(run("load", folder, devices).stdout)
    print("\n", figures)
    assert figures["memory"] < figures["bytes"] + TENSOR + SLACK


@pytest.mark.slow
def test_saving_holds_one_tensor_beside_the_model(folder):
    figures = json.loads(run("save", folder, 1).stdout)
    print("\n", figures)
    assert figures["memory"] < 2 * TENSOR + SLACK  # the transposed one on the device, and its copy on the host
    saved = folder.with_name("saved")
    written = {file.name: file.stat().st_size for file in saved.glob("*.safetensors")}
    assert len(written) > 2 and max(written.values()) < (2 << 30) + (1 << 20)
    for name in written:
        assert (saved / name).read_bytes() == (folder / name).read_bytes()


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
