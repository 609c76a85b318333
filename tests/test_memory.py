"""The memory that a pair needs: what is held while it is loaded, explains, and is exported."""

import contextlib
import dataclasses
import threading
import tracemalloc
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SENTENCES, TINY, random_params

from nla_jax.cli import main
from nla_jax.io.folders import save_model, stored_dtype
from nla_jax.io.safetensors import stored_tensors
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import make_mesh
from nla_jax.pair import Pair, load_pair, new_pair
from nla_jax.runtime.compiler import known
from nla_jax.sampling import rollout
from nla_jax.tools.explain import Sampling, explain_rows, of_texts, subject_of

CONFIG = dataclasses.replace(TINY, width=256, layers=6, heads=4, kv_heads=2, head_dim=64, mlp_width=1024)
LAYER = 3
LORA = Lora(4)


AS_USERS_COMPILE = {  # where tests compile otherwise, for speed
    "xla_backend_optimization_level": 3,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_multi_thread_eigen": True,
}
ADAPTERS = {"whole": (None, None), "LoRA": (LORA, LORA), "LoRA AV": (LORA, None)}
QUICK = (("whole", "bfloat16"),)
CASES = [
    pytest.param((kind, dtype), id=f"{kind}-{dtype}", marks=[] if (kind, dtype) in QUICK else pytest.mark.slow)
    for kind in ADAPTERS
    for dtype in ("bfloat16", "float32")
]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Which parts of a pair are adapters, and the dtype of the stored weights."""
    return request.param


@pytest.fixture(scope="module")
def subject(case, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "subject"
    save_model(folder, random_params(CONFIG), CONFIG, tokenizer, dtype=case[1])
    return folder


@pytest.fixture(scope="module")
def saved(case, subject, sidecar, tmp_path_factory):
    """The folder of a pair of the subject's size, stored in the subject's dtype."""
    folder = tmp_path_factory.mktemp("memory") / "pair"
    facts = {"base_checkpoint": str(subject), "d_model": CONFIG.width, "layer": LAYER, "reading": "whole"}
    ours = dataclasses.replace(sidecar, **facts)
    new_pair(ours, subject, adapters=ADAPTERS[case[0]]).save(folder, stored_dtype(subject))
    return folder


def held() -> int:
    """Bytes of all arrays on the device and of all NumPy arrays; memory that several arrays share counts once."""
    places = []
    for x in jax.live_arrays():
        with contextlib.suppress(RuntimeError):  # deleted in the meantime
            places += [(shard.data.unsafe_buffer_pointer(), shard.data.nbytes) for shard in x.addressable_shards]
    total = end = 0
    for start, size in sorted(places):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total + tracemalloc.get_traced_memory()[0]


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes held at a time inside, above those before; filled in at the end."""
    tracemalloc.start()
    before, found, over = held(), [0], threading.Event()

    def watch():
        while not over.wait(0.001):
            found[0] = max(found[0], held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
        found[0] = max(found[0], held() - before)
    finally:
        over.set()
        watcher.join()
        tracemalloc.stop()


def stored_bytes(*folders) -> int:
    """Bytes of all tensors in some folders."""
    files = {file for folder in folders for file in folder.glob("*.safetensors")}
    return sum(file.stat().st_size for file in files)


def needed(saved, subject) -> int:
    """The bytes of what one `explain` computes with: AV and AR, and the subject's first blocks. The base of adapters is
    the subject: it counts once."""
    whole = sum(np.prod(t.shape) * np.dtype(t.typed().dtype).itemsize for t in stored_tensors(subject).values())
    blocks = [t for name, t in stored_tensors(subject).items() if name.startswith("model.layers.")]
    per_block = sum(np.prod(t.shape) * np.dtype(t.typed().dtype).itemsize for t in blocks) // CONFIG.layers
    pair = stored_bytes(saved / "av", saved / "ar")
    adapted = (saved / "av" / "adapter_config.json").is_file()
    return pair + (whole if adapted else whole - (CONFIG.layers - LAYER - 1) * per_block)


def test_explaining_needs_hardly_more_than_the_weights(saved, subject):
    """Each weight is in memory once, in the dtype in which it is stored, while models are loaded and afterwards."""
    explain(saved)  # so that what JAX and the tokenizer remember is there before
    with peak() as found:
        explain(saved)
    assert found[0] <= 1.15 * needed(saved, subject) + (1 << 20), (found[0], needed(saved, subject))


def explain(saved) -> None:
    pair = load_pair(saved)
    found = of_texts(subject_of(pair, saved), [("a", SENTENCES[0])], "last", 64)
    (rows,) = explain_rows(pair, found, Sampling(4))
    assert len(rows) == 1


def test_the_sampler_copies_no_weights(saved):
    """Neither beside the pair nor inside its program, on one device with a mesh or without. Tied embeddings in 16 bits are
    the exception: their transpose is the head."""
    for mesh in (None, make_mesh(1, 1, 1)):
        pair = load_pair(saved, mesh=mesh)
        assert pair.sampler is pair.weights[0]
    pair = load_pair(saved)
    shapes = jax.ShapeDtypeStruct((2, CONFIG.width), jnp.float32)
    program = rollout.lower(
        pair.verbalizer, pair.sampler, shapes, jax.random.key(0), group=1, max_new_tokens=4, temperature=0.0
    )
    blocks = sum(x.nbytes for x in jax.tree.leaves(pair.weights[0]["blocks"]))
    head = pair.weights[0]["embedding"].nbytes if pair.weights[0]["embedding"].dtype.itemsize == 2 else 0
    temp = program.compile(known(AS_USERS_COMPILE, make_mesh(1, 1, 1))).memory_analysis().temp_size_in_bytes
    assert temp < 1.5 * head + blocks / 4, (temp, head, blocks)


def test_export_and_import_hold_one_tensor_at_a_time(saved, subject, tmp_path):
    """And they keep the dtype. Adapters are merged tensor by tensor."""
    largest = max(np.prod(t.shape) for t in stored_tensors(subject).values()) * 4  # merged in float32
    for i in range(2):
        with peak() as exporting:
            assert main(["export", "--pair", str(saved), "--out", str(tmp_path / f"out{i}")]) == 0
        roles = [f"--{role}={tmp_path / f'out{i}' / role}" for role in ("av", "ar")]
        with peak() as importing:
            assert main(["import", *roles, "--out", str(tmp_path / f"again{i}")]) == 0
    adapters = stored_bytes(saved / "av", saved / "ar") if load_pair(saved).base else 0
    assert exporting[0] < 6 * largest + adapters, (exporting, largest)
    assert importing[0] < 6 * largest, (importing, largest)
    for role in ("av", "ar"):
        assert stored_dtype(tmp_path / "again1" / role) == stored_dtype(subject)
    assert same(load_pair(tmp_path / "again1"), load_pair(saved).merged())


def same(a: Pair, b: Pair) -> bool:
    """Whether two pairs of whole models have the same parameters, within what merging tensor by tensor changes."""
    params = [(x.verbalizer_params, x.reconstructor_params) for x in (a, b)]
    near = lambda x, y: np.allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), 1e-2, 1e-5)
    return all(jax.tree.leaves(jax.tree.map(near, *params)))
