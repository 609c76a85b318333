"""Checkpoints, metric logs, and a training loop that is interrupted."""

import contextlib
import gc
import json
import logging
import re
import resource
import shutil
import signal
import sys
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import flip, one_sentence, supervised_loop
from flax import struct

from nla_jax.config import Config, completed, is_free
from nla_jax.joint_step import JointStep, SupervisedStep
from nla_jax.models.sharding import make_mesh, shardings, state_shapes
from nla_jax.objective import muon
from nla_jax.runtime.checkpoint import Checkpoints, _weighted, differences
from nla_jax.runtime.errors import InputError, Stopped, handle_unraisable
from nla_jax.runtime.metrics import MetricLog, read_metrics, write_atomically
from nla_jax.runtime.run import free_until_finished
from nla_jax.stages import sft
from nla_jax.stages.sft import fit


@struct.dataclass
class State:
    step: jax.Array
    rng: jax.Array
    weights: dict
    opt: tuple


def make_state(seed: int) -> State:
    draw = lambda *shape: jax.random.normal(jax.random.key(seed), shape)
    weights = {"a": draw(8, 4), "b": draw(3).astype(jnp.bfloat16)}
    return State(jnp.int32(seed), jax.random.key(seed), weights, optax.adam(1e-3).init(weights))


def shapes(state) -> State:
    """A state as `restore` wants it: what its arrays are and where they lie, without them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(state) -> list:
    """Every array of a state as bytes, PRNG keys included."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [(str(x.dtype), np.asarray(raw(x)).tobytes()) for x in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints after steps 2, 4, 6, written by a loop that saves every second step."""
    folder = tmp_path_factory.mktemp("written")
    checkpoints = Checkpoints(folder, every=2)
    for step in range(2, 8):
        checkpoints.save(step, make_state(step))
    checkpoints.save(6, make_state(6), force=True)  # again, at the end: already there
    checkpoints.close()
    return folder


def test_newest_checkpoint_returns_bit_for_bit(written, tmp_path):
    step, state = Checkpoints(written, every=2).restore(shapes(make_state(0)), 9)
    assert step == 6 and bits(state) == bits(make_state(6))
    assert isinstance(state, State) and jnp.issubdtype(state.rng.dtype, jax.dtypes.prng_key)
    initial = make_state(1)
    assert Checkpoints(tmp_path, every=2).restore(shapes(initial), 9, discard=initial) is None
    assert bits(initial) == bits(make_state(1))  # kept, as the loop now starts from it


def test_only_the_newest_two_are_kept(written):
    assert sorted(path.name for path in written.iterdir()) == ["4", "6"]


def test_more_are_kept_where_asked_for_and_where_they_are_the_last_good_ones(tmp_path):
    def kept(folder, goods, **settings):
        with Checkpoints(tmp_path / folder, every=1, **settings) as checkpoints:
            for step, good in enumerate(goods, 1):
                checkpoints.mark_good(good)
                checkpoints.save(step, {"a": jnp.zeros(2)})
        return sorted(int(path.name) for path in (tmp_path / folder).iterdir())

    assert kept("every", [0] * 9, keep=1, keep_every=4) == [4, 8, 9]
    assert kept("healthy", range(9), keep=2) == [8, 9]
    assert kept("trouble", [0, 1, 2, 3, 3, 3, 3, 3], keep=1) == [3, 8]


def test_restored_onto_another_mesh(tmp_path, pair):
    """The whole training state, written on 1x8x1, comes back equal on every other mesh, each array in its place; that of
    optimizers too whose state is not shaped like the parameters."""
    factored = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    step = JointStep(pair.verbalizer, pair.reconstructor, muon(1, 1e-3), factored)

    def state_on(sizes, fill):
        boxed = pair.verbalizer.abstract_params(), pair.reconstructor.abstract_params()
        abstract = state_shapes(step.init, *boxed)
        layout, rng = shardings(make_mesh(*sizes), abstract), np.random.default_rng(0)
        draw = lambda x: rng.normal(size=x.shape).astype(x.dtype) if fill else np.zeros(x.shape, x.dtype)
        return jax.device_put(jax.tree.map(draw, nn.unbox(abstract)), layout)

    made = state_on((1, 8, 1), True)
    assert not made.models["verbalizer"].params["blocks"]["q"]["kernel"].is_fully_replicated
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, made)
    for sizes in (8, 1, 1), (2, 2, 2), (1, 1, 1):
        target = shapes(state_on(sizes, False))
        _, restored = Checkpoints(tmp_path, every=1).restore(target, 1)
        assert bits(restored) == bits(made)
        places = lambda state: [x.sharding for x in jax.tree.leaves(state)]
        assert places(restored) == places(target)


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1)
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"{tmp_path}/2 cannot be restored") as error:
        Checkpoints(tmp_path, every=1).restore(shapes(make_state(0)), 9)
    one_sentence(error)
    assert "damaged (move that folder aside" in str(error.value)
    (tmp_path / "2").rename(tmp_path / "2.damaged")  # as the message says
    step, state = Checkpoints(tmp_path, every=1).restore(shapes(make_state(0)), 9)
    assert step == 1 and bits(state) == bits(make_state(1))


def test_another_structure_is_refused(written):
    state = shapes(make_state(0))
    with pytest.raises(InputError, match="cannot be restored") as error:
        Checkpoints(written, every=2).restore(state.replace(weights={"a": state.weights["a"]}, opt=()), 9)
    assert "damaged" not in str(error.value)


def test_other_settings_are_refused_with_all_that_differ(tmp_path):
    old = {"seed": 0, "mesh": {"data": 1}, "rl": {"lr": 0.1, "steps": 5, "keys": (1, 2), "checkpoint_every": 1}}
    new = {
        "seed": 0,
        "mesh": {"data": 8},
        "rl": {"lr": 0.2, "steps": 9, "keys": [1, 2], "checkpoint_every": 7, "kl": None},
    }
    free = free_until_finished
    with Checkpoints(tmp_path, every=1, settings=old, free=free) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(2)})
    with pytest.raises(
        InputError, match=re.escape("(old -> new): rl.kl = (not there) -> None; rl.lr = 0.1 -> 0.2. Go")
    ) as error:
        Checkpoints(tmp_path, every=1, settings=new, free=free).restore(shapes({"a": jnp.ones(2)}), 9)
    one_sentence(error)
    shutil.rmtree(tmp_path / "1/settings")  # as the message says
    assert Checkpoints(tmp_path, every=1, settings=new, free=free).restore(shapes({"a": jnp.ones(2)}), 9)[0] == 1
    del new["rl"]["kl"]
    assert differences(old, new | {"rl": new["rl"] | {"lr": 0.1}}, is_free) == ["rl.steps = 5 -> 9"]


def test_a_setting_that_is_newer_than_a_run_had_its_default_there():
    """Else every run of an earlier version would be refused."""
    now = Config().to_dict()
    old = json.loads(json.dumps(now))
    del old["rl"]["probe_every"], old["label"]["splits"], old["evaluate"]["provider"]["rows"]
    assert not differences(old, now)
    assert differences(old, now | {"rl": now["rl"] | {"probe_every": 7}}) == ["rl.probe_every = 0 -> 7"]
    del old["rl"]["reward"]
    assert not differences(old, now)
    assert completed({"base": {"warm": "1"}, "seed": 3}) == {"base": {"warm": "1"}, "seed": 3}


@contextlib.contextmanager
def full_disk(room: int):
    """A limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_nothing_else(tmp_path, monkeypatch):
    """Of the arrays that are still being written Python would print a trace each."""
    traces, state = [], {str(i): jnp.asarray(np.random.default_rng(i).normal(size=(64, 64))) for i in range(60)}
    monkeypatch.setattr(sys, "__unraisablehook__", traces.append)
    monkeypatch.setattr(sys, "unraisablehook", traces.append)
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.ERROR)
    handle_unraisable()
    for _ in range(5):
        checkpoints = Checkpoints(tmp_path, every=1)
        with pytest.raises(InputError, match="File too large") as error, full_disk(8000), checkpoints:
            checkpoints.save(1, state)
        one_sentence(error)
        assert "the one before it is intact. Make room" in str(error.value)
    gc.collect()
    assert not traces and not logging.getLogger("asyncio").isEnabledFor(logging.ERROR)

    class Foreign:
        def __del__(self):
            raise ValueError("of somebody else")

    Foreign()
    assert [str(event.exc_value) for event in traces] == ["of somebody else"]


@pytest.mark.parametrize(
    "wrong",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        MemoryError("Unable to allocate 9 GiB"),
        ValueError("a bug of a user"),
        KeyError("settings"),
    ],
)
def test_what_is_no_matter_of_files_keeps_its_own_words(written, tmp_path, monkeypatch, wrong):
    """In a save (where a failed asynchronous step may be noticed first) and in a restore."""

    def fail(*args, **kwargs):
        raise wrong

    checkpoints = Checkpoints(tmp_path, every=1)
    with pytest.raises(type(wrong)) as error:
        checkpoints.save(1, make_state(1), before=fail)
    assert error.value is wrong
    monkeypatch.setattr(checkpoints.manager, "save", fail)
    with pytest.raises(type(wrong)) as error:
        checkpoints.save(1, make_state(1))
    assert error.value is wrong
    checkpoints = Checkpoints(written, every=2)
    monkeypatch.setattr(checkpoints.manager, "restore", fail)
    with pytest.raises(type(wrong) if not isinstance(wrong, ValueError) else InputError) as error:
        checkpoints.restore(shapes(make_state(0)), 9)
    assert str(wrong) in str(error.value) and "damaged" not in str(error.value)


@pytest.mark.parametrize("size", [4, 512])
def test_each_damaged_file_is_called_damaged(tmp_path, size):
    """Cut short, missing, or altered; some are not needed. Large arrays lie in files of their own."""
    state = {str(i): jax.random.normal(jax.random.key(i), (size, size)) for i in range(2)}
    with Checkpoints(tmp_path / "whole", every=1) as checkpoints:
        checkpoints.save(1, state)
    changes = {
        "short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "missing": lambda file: file.unlink(),
        "altered": lambda file: file.write_bytes(bytes(byte ^ 90 for byte in file.read_bytes())),
    }
    refused = set()
    files = [file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*") if file.is_file()]
    for i, file in enumerate(files):
        for name, change in changes.items():
            copy = shutil.copytree(tmp_path / "whole", tmp_path / f"{i}-{name}")
            change(copy / file)
            try:
                with Checkpoints(copy, every=1) as checkpoints:
                    assert bits(checkpoints.restore(shapes(state), 1)[1]) == bits(state)
            except InputError as error:
                assert "damaged (move that folder aside" in str(error), (file, name)
                refused.add(name)
    assert refused == changes.keys()


def test_no_flipped_bit_of_a_checkpoint_changes_what_is_restored(tmp_path):
    """Orbax alone restores another array from most bits of the file that holds them."""
    state = make_state(3)
    with Checkpoints(tmp_path, every=1, settings={"s": 1}) as checkpoints:
        checkpoints.save(1, state)
    files, refused, rng = [file for file in tmp_path.rglob("*") if file.is_file()], 0, np.random.default_rng(0)
    for file in [file for file in files if file.stat().st_size]:
        whole = file.read_bytes()
        for at in rng.integers(0, len(whole), 5):
            flip(file, at, at % 8)
            try:
                with Checkpoints(tmp_path, every=1, settings={"s": 1}) as checkpoints:
                    assert bits(checkpoints.restore(shapes(state), 1)[1]) == bits(state), (file, at)
            except InputError as error:
                refused += 1
                assert re.search("cannot be restored|with other settings", str(error)) and f"{tmp_path}/1" in str(error)
            file.write_bytes(whole)
    assert refused > len(files)


def test_checksums_do_not_depend_on_where_they_are_computed():
    state = jax.tree.map(lambda x: x, make_state(3))
    raw = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    for x in [*raw, jnp.zeros((0, 3)), jnp.array([True, False])]:
        assert int(_weighted(np.asarray(x), np)) == int(jax.jit(_weighted, static_argnums=1)(x, jnp))
    x = np.arange(6, dtype=np.uint32).reshape(2, 3)
    assert int(_weighted(x, np)) == sum(i * (2 * i + 1) for i in range(6))


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_saves_the_step_under_way_and_a_second_one_stops_at_once(tmp_path, again, capfd):
    def interrupted(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            if again:
                signal.raise_signal(signal.SIGINT)
        return batch_of_step(step)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt if again else Stopped) as stopped:
        train(tmp_path, 9, optax.sgd(0.1), interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    assert "press Ctrl-C again to stop at once" in capfd.readouterr().err
    if not again:
        assert stopped.value.status == 130
        assert "stopped by Ctrl-C; step 4 is saved under" in str(stopped.value)
    assert [path.name for path in (tmp_path / "train/test/checkpoints").iterdir()] == ["4"] * (not again)


# Metrics


def test_a_resumed_log_reads_as_if_it_had_never_stopped(tmp_path):
    log = MetricLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"loss": np.float32(step), "skipped": np.bool_(False), "worst": float("nan")})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "lo')  # a kill in the midst of a line
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]

    log = MetricLog(tmp_path, 3)
    log.write(4, {"loss": jnp.float32(40), "skipped": jnp.bool_(True), "worst": jnp.float32(jnp.inf)})
    log.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (
        records
        == log.records
        == [
            {"step": 1, "loss": 1.0, "skipped": False, "worst": None},
            {"step": 2, "loss": 2.0, "skipped": False, "worst": None},
            {"step": 3, "loss": 3.0, "skipped": False, "worst": None},
            {"step": 4, "loss": 40.0, "skipped": True, "worst": None},
        ]
    )


def test_atomic_writes_leave_no_part(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"


# The supervised loop

ABSTRACT = {"w": jax.ShapeDtypeStruct((5, 3), np.float32)}


def regression(params, batch, base=None):
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2), {"size": jnp.abs(params["w"]).max()}


def batch_of_step(step):
    rng = np.random.default_rng(step)
    return rng.normal(size=(8, 5)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)


def train(folder, steps, tx, batches=batch_of_step, **settings) -> dict:
    """The parameters of the regression after `steps` steps from ones."""
    step = SupervisedStep("regression", regression, tx)
    with supervised_loop(folder, steps, **settings) as loop:
        return fit(loop, step, {"w": np.ones((5, 3), np.float32)}, ABSTRACT, batches)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "LOG_EVERY", 2)

    def trained(folder, batches=batch_of_step):
        tx = optax.adam(optax.linear_schedule(0.1, 0.0, 9))
        return train(tmp_path / folder, 9, tx, batches, every=3, sizes=(2, 1, 1))

    def interrupted(step):
        if step == 7:
            while not (tmp_path / "cut/train/test/checkpoints/6").exists():  # saves are asynchronous
                pass
            raise KeyboardInterrupt
        return batch_of_step(step)

    def resumed(step):
        assert step >= 6, "steps before the checkpoint must not be repeated"
        return batch_of_step(step)

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", interrupted)
    assert bits(trained("cut", resumed)) == bits(whole)
    records = lambda folder: read_metrics(tmp_path / folder / "train/test/metrics.jsonl")
    values = lambda folder: [{k: v for k, v in record.items() if "seconds" not in k} for record in records(folder)]
    assert values("cut") == values("whole") and [record["step"] for record in values("whole")] == [2, 4, 6, 8, 9]
    assert bits(trained("whole", lambda step: pytest.fail("a finished loop runs no step"))) == bits(whole)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1)])
def test_resuming_holds_one_state(tmp_path, sizes):
    """Neither the new state nor the parameters that it would be made from are in memory beside the restored one."""
    mesh, width, names = make_mesh(*sizes), 256, [str(i) for i in range(20)]
    one = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((width, width), np.float32), ("embed", "mlp"))
    abstract = dict.fromkeys(names, one)
    loss = lambda params, batch, base=None: (sum(jnp.mean(x**2) for x in params.values()), {})
    step_fn = SupervisedStep("squares", loss, optax.adam(0.1))
    peak, over = 0, threading.Event()

    def live() -> int:
        """Bytes of all buffers on devices, each counted once, whichever arrays share it."""
        buffers = {}
        for x in jax.live_arrays():
            with contextlib.suppress(RuntimeError):  # deleted in the meantime
                for shard in x.addressable_shards:
                    buffers[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        return sum(buffers.values())

    def watch():
        nonlocal peak
        while not over.wait(0.001):
            peak = max(peak, live() - before)

    def resumed(step):
        nonlocal peak
        if step:
            peak = max(peak, live() - before)
            raise EOFError

    def trained(steps):
        zeros = lambda: {name: jnp.zeros((width, width)) for name in names}
        params = jax.jit(zeros, out_shardings=shardings(mesh, abstract))()
        with supervised_loop(tmp_path, steps, every=1, sizes=sizes) as loop:
            fit(loop, step_fn, params, abstract, resumed)

    trained(1)
    gc.collect()  # else what is garbage already would count as there before
    before, thread = live(), threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.raises(EOFError):
            trained(2)
    finally:
        over.set()
        thread.join()
    state = 3 * 4 * width**2 * len(names) * sizes[0]  # parameters and two moments
    assert state <= peak < 1.1 * state


def test_a_nan_step_is_skipped_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "LOG_EVERY", 1)

    def trained(steps):
        broken = lambda step: [np.where(step == 1, np.float32(np.nan), x) for x in batch_of_step(step)]
        return train(tmp_path / str(steps), steps, optax.sgd(0.1), broken)

    assert bits(trained(2)) == bits(trained(1))
    first, second = read_metrics(tmp_path / "2/train/test/metrics.jsonl")
    assert (first["skipped"], second["skipped"], second["loss"]) == (False, True, None)
