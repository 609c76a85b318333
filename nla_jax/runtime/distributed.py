"""Several hosts as one run: joining, agreeing on what to run, waiting for one another, and ending together.

Every host runs the same command. Arrays go from host to host inside XLA's programs only; everything else (who is there,
whether all run the same, what a host died of) goes through the key-value store of JAX's coordination service. A single
process is the first and only host of its run: nothing here waits or fails then.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import (
    distributed as runtime,  # the public module does not show the client of the store
)
from jax.experimental import multihost_utils

from nla_jax.runtime.environment import versions
from nla_jax.runtime.errors import InputError, first_line

JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 30  # without a sign of life for so long, a host counts as dead
WAIT_SECONDS = 24 * 3600  # for a host that is alive but busy; a dead one ends the wait by its heartbeats
FAILED = "nla/failed"

_turn = itertools.count()  # hosts run the same program, so they count alike


def host_index() -> int:
    """This host's number, from 0."""
    return runtime.global_state.process_id


def host_count() -> int:
    """How many hosts the run has."""
    return runtime.global_state.num_processes


def is_writer() -> bool:
    """Whether this host writes what the run writes once: logs, records, reports."""
    return host_index() == 0


def share(items: Sequence) -> Sequence:
    """This host's part of what the hosts divide among themselves."""
    return items[host_index() :: host_count()]


# Joining and agreeing


def join(coordinator: str | None, count: int | None, index: int | None, seconds: int = JOIN_SECONDS) -> None:
    """Makes this process one of the hosts of a run: host `index` of `count` at `coordinator` ("HOST:PORT" of host 0), or
    "auto" for what a TPU pod, Slurm, Open MPI or Kubernetes says. None: a run of one host.

    Raises `InputError` for flags that do not fit together. Where the others do not come within `seconds`, or where one is lost
    later, JAX's runtime aborts the process; what it says is then followed by one sentence, and the exit status is 1."""
    if coordinator is None and count is None and index is None:
        return
    given = {}
    if coordinator != "auto":
        host, _, port = (coordinator or "").rpartition(":")
        if not host or not port.isdigit() or count is None or index is None or not 0 <= index < count:
            raise InputError(
                f"--coordinator {coordinator}, --num_processes {count} and --process_id {index} do not name a host of a run: "
                f"give HOST:PORT of host 0, the number of hosts, and which of them (from 0) this one is; or --coordinator auto."
            )
        given = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
        given["cluster_detection_method"] = "deactivate"
    elif count is not None or index is not None:
        raise InputError("--coordinator auto finds --num_processes and --process_id itself; leave them out.")
    who = f"host {index} of {count}" if given else "this host"
    _at_abort(
        f"{who} could not join the run at {coordinator} within {seconds} s: not all hosts came. Start the same command on "
        f"each, with the same --coordinator and --num_processes and its own --process_id, and see that they reach that "
        f"address."
    )
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{who.capitalize()} cannot join the run at {coordinator} ({reason.rstrip('.')}); give --coordinator HOST:PORT of "
            f"host 0, --num_processes and --process_id."
        ) from None
    _at_abort(
        f"host {host_index()} of {host_count()} was stopped by JAX's runtime (see above), most likely because another host "
        f"was lost; the same command on every host continues from the last checkpoint."
    )


def agree(settings: dict, seconds: int = JOIN_SECONDS) -> None:
    """Raises `InputError` on every host where hosts differ in `settings` (by field), in their number of hosts or in package
    versions, naming the first host and field that differ from host 0. From here on a host that fails ends the others."""
    if host_count() == 1:
        return
    own = {"--num_processes": host_count(), "the source of nla_jax": source_hash()} | versions() | settings
    client, here = runtime.global_state.client, platform.node()
    client.key_value_set(f"nla/host/{host_index()}", json.dumps([here, own]))
    first = None
    for index in range(host_count()):
        try:
            name, found = json.loads(client.blocking_key_value_get(f"nla/host/{index}", 1000 * seconds))
        except jax.errors.JaxRuntimeError:
            raise InputError(f"Host {index} of {host_count()} joined, but did not say what it runs.") from None
        first = first or (name, found)
        for field in [f for f in first[1] | found if first[1].get(f) != found.get(f)]:
            raise InputError(
                f"Host {index} ({name}) runs with {field} = {found.get(field)!r}, but host 0 ({first[0]}) with "
                f"{first[1].get(field)!r}; give every host the same command, config and package versions."
            )
    threading.Thread(target=_watch, daemon=True).start()


def source_hash() -> str:
    """A hash of this package's source."""
    source = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        source.update(file.read_bytes())
    return source.hexdigest()


# Waiting


def barrier(name: str, seconds: float = WAIT_SECONDS) -> None:
    """Returns when every host has come here. Raises `InputError` where one has not within `seconds`."""
    if host_count() == 1:
        return
    try:
        runtime.global_state.client.wait_at_barrier(f"nla/{next(_turn)}/{name}", round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise _lost(f"Not all of the {host_count()} hosts came to {name!r} within {seconds:.0f} s", error) from None


@contextlib.contextmanager
def writer_first() -> Iterator[None]:
    """The first host runs the block before the others do: what it leaves on disk they find."""
    if not is_writer():
        barrier("writer first")
    yield
    if is_writer():
        barrier("writer first")


def from_writer(make: Callable[[], Any]) -> Any:
    """What `make` (a JSON value) is on the first host, on all hosts; only there it is called. Where a decision depends on
    the disk, hosts that looked for themselves could see it at different moments, decide differently and wait for ever."""
    if host_count() == 1:
        return make()
    client, key = runtime.global_state.client, f"nla/{next(_turn)}"
    if is_writer():
        value = make()
        client.key_value_set(key, json.dumps(value))
        return json.loads(json.dumps(value))
    try:
        return json.loads(client.blocking_key_value_get(key, 1000 * WAIT_SECONDS))
    except jax.errors.JaxRuntimeError as error:
        raise _lost("Host 0 did not answer", error) from None


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays on every host, whatever devices they lie on; every host must call this."""
    read = lambda x: multihost_utils.process_allgather(x, tiled=True) if _beyond(x) else jax.device_get(x)
    return jax.tree.map(read, tree)


def _beyond(x: Any) -> bool:
    """Whether part of an array lies on other hosts only."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


# Ending together


def leave() -> None:
    """Ends this process with status 0 where it is one host of a run that has succeeded, when all hosts have come here. Not by the
    way of `sys.exit`: a thread that Python's own end meets in the runtime's code would end the process by a signal."""
    if host_count() > 1:
        barrier("the end")
        jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def end(reason: str, status: int) -> None:
    """Says why this process ends; where it is one of several hosts, tells the others, who then end too, and ends it. Not by
    the way of `sys.exit`: the runtime would wait there for hosts that wait for this one."""
    if host_count() == 1:
        print(f"nla: {reason}", file=sys.stderr)
        return
    _reasons.append((reason, status))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        runtime.global_state.client.key_value_set(f"{FAILED}/{host_index()}", json.dumps([reason, status]))
    sys.stdout.flush()
    sys.stderr.flush()
    if is_writer():
        time.sleep(5)  # the store lives in this process: the others must have read it
    _exit(reason, status)


def failed_host(seconds: float) -> tuple[str, int] | None:
    """What to say of another host that has said that it ends, and its exit status; None where none says so within `seconds`."""
    limit, client = time.monotonic() + seconds, runtime.global_state.client
    while True:
        try:
            found = client.key_value_dir_get(FAILED)
        except jax.errors.JaxRuntimeError:  # host 0 is gone
            return None
        for key, value in found:
            if (index := key.rpartition("/")[2]) != str(host_index()):
                reason, status = json.loads(value)
                return f"host {host_index()} of {host_count()} stopped because host {index} did: {reason}", status
        if time.monotonic() > limit:
            return None
        time.sleep(1)


def _watch() -> None:
    if found := failed_host(float("inf")):
        _exit(*found)


def lost(error: RuntimeError) -> str:
    """What to say of a program that failed between hosts (`jax.errors.JaxRuntimeError` is a `RuntimeError`)."""
    return (
        f"host {host_index()} of {host_count()} stopped in a program that runs on all hosts ({first_line(error)}), most likely "
        f"because another host was lost; the same command on every host continues from the last checkpoint."
    )


def _lost(what: str, error: Exception) -> InputError:
    """The error of a wait that did not end well; another host's own words where it left some."""
    found = failed_host(3)
    return InputError(found[0] if found else f"{what} ({first_line(error)}); the same command on every host continues the run.")


_reasons: list[tuple[str, int]] = []  # why this process ends, and its exit status: the first is said
_speaking = threading.Lock()
_handler = None


def _exit(reason: str, status: int) -> None:
    """Ends the process with its one sentence, the last that it writes. Several threads may come here at once (its own failure, that
    of another host, the runtime's abort); one of them speaks, and none returns."""
    _reasons.append((reason, status))
    with _speaking:
        reason, status = _reasons[0]
        os.write(2, f"nla: {reason}\n".encode())
        os._exit(status)


def _at_abort(sentence: str) -> None:
    """What is said last where JAX's runtime aborts the process, as it does when hosts do not come or are lost: it raises
    nothing, and its callback cannot be a Python function (jaxlib 0.10), so this is a handler of C's for SIGABRT."""
    global _handler
    new = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _exit(sentence, 1))
    ctypes.CDLL(None).signal(signal.SIGABRT, new)
    _handler = new  # kept alive as long as C may call it
