"""Several hosts as one run: joining, agreeing on what to run, waiting for one another, and ending together.

Every host runs the same command. Arrays travel between hosts only inside XLA's programs. Everything else goes through
the key-value store of JAX's coordination service, which lives in host 0. A single process is the only host of its run:
nothing here waits or fails then.

How a run of several hosts ends:
1. A host that fails prints its reason, and every other host ends with that reason and the same exit status.
2. When a host dies without a word, JAX notices (by a closed connection or missing heartbeats) and aborts the others,
   each of which still ends with one sentence and status 1.
3. No signal handler runs Python code, so an aborted process is gone within six seconds even if Python hangs.
"""

import contextlib
import ctypes
import faulthandler
import functools
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
from jax._src import distributed as runtime  # the public module does not show the client of the store
from jax.experimental import multihost_utils

from nla_jax.runtime.environment import versions
from nla_jax.runtime.errors import InputError, first_line

JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 30  # a host that gives no sign of life for so long counts as dead
WAIT_SECONDS = 24 * 3600  # for a host that is alive but busy; a dead one ends the wait by its missing heartbeats
FAILED = "nla/failed"  # the key under which the first host that fails says why

# Each wait needs a key of its own in the store. All hosts run the same program, so they count alike.
_turn = itertools.count()
# Several threads may want to end the process; the one that holds this lock does.
_ending = threading.Lock()


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
    """Makes this process one of the hosts of a run.

    With `coordinator` "HOST:PORT" (where host 0 listens) it becomes host `index` of `count`. With "auto" JAX asks the
    TPU pod, Slurm, Open MPI or Kubernetes for all three. With None the run has one host.

    Raises `InputError` if the flags do not fit together or JAX cannot start. If the other hosts do not come within
    `seconds`, the process ends with a sentence and status 1."""
    if coordinator is None and count is None and index is None:
        return
    named = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    flags = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
    given, who = {}, "this host"  # "auto": JAX finds out
    if coordinator != "auto":
        host, _, port = (coordinator or "").rpartition(":")
        if not host or not port.isdigit() or count is None or index is None or not 0 <= index < count:
            raise InputError(
                f"The flags {flags} do not name a host of a run: give HOST:PORT of host 0, the number of hosts, and which of "
                f"them (from 0) this one is; or --coordinator auto."
            )
        given = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
        given["cluster_detection_method"], who = "deactivate", f"host {index} of {count}"
    elif count is not None or index is not None:
        raise InputError("--coordinator auto finds --num_processes and --process_id itself; leave them out.")
    late = (
        f"{who} could not join the run at {coordinator} within {seconds} s: not all hosts came. Start the same command "
        f"on each, with the same --coordinator and --num_processes and its own --process_id, and check that they reach "
        f"that address."
    )
    _speak_when_aborted()
    timer = threading.Timer(seconds, _exit, [late, 1])  # JAX's own timeout would abort the process
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=2 * seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"JAX cannot join a run with {flags} ({first_line(error)}); give HOST:PORT of host 0, the number of hosts, "
            f"and which of them (from 0) this one is."
        ) from None
    finally:
        timer.cancel()
    threading.Thread(target=_end_with_others, daemon=True).start()


def agree(settings: dict, seconds: int = JOIN_SECONDS) -> None:
    """Checks that all hosts run the same: `settings` (by field), the number of hosts and package versions.

    Raises `InputError` on a host that differs from host 0, naming the first field that does; the others end with it."""
    if host_count() == 1:
        return
    own = {"--num_processes": host_count()} | versions() | settings
    own, here = json.loads(json.dumps(own)), platform.node()
    first, there = from_writer(lambda: [own, here])
    for field in [f for f in first | own if first.get(f) != own.get(f)]:
        raise InputError(
            f"Host {host_index()} ({here}) runs with {field} = {own.get(field)!r}, but host 0 ({there}) with "
            f"{first.get(field)!r}; give every host the same command, config and package versions."
        )
    barrier("agreement", seconds)


@functools.cache  # the code that runs is that of the beginning
def source_hash() -> str:
    """A hash of this package's source, as it is when this is first called."""
    source = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        source.update(file.read_bytes())
    return source.hexdigest()


# Waiting. An error of the store reaches the caller as a `JaxRuntimeError`, like one of a program that all hosts run.


def barrier(name: str, seconds: float = WAIT_SECONDS) -> None:
    """Returns when every host has called it; fails if one has not within `seconds`."""
    if host_count() > 1:
        runtime.global_state.client.wait_at_barrier(f"nla/{next(_turn)}/{name}", round(1000 * seconds))


@contextlib.contextmanager
def writer_first() -> Iterator[None]:
    """Host 0 runs the block before the others do, so that they find the files that it wrote."""
    if not is_writer():
        barrier("writer first")
    yield
    if is_writer():
        barrier("writer first")


def from_writer(make: Callable[[], Any]) -> Any:
    """Calls `make` on host 0 only, and returns its result (a JSON value) on every host.

    Use it where a decision depends on the disk: hosts that looked for themselves might see different things, decide
    differently, and wait for each other for ever."""
    if host_count() == 1:
        return make()
    client, key = runtime.global_state.client, f"nla/{next(_turn)}"
    if is_writer():
        client.key_value_set(key, json.dumps(make()))
    return json.loads(client.blocking_key_value_get(key, 1000 * WAIT_SECONDS))


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays on every host, whatever devices they lie on; every host must call this."""

    def read(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return jax.device_get(x) if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(read, tree)


# Ending together


def leave() -> None:
    """Ends this process with status 0 if it is one of several hosts, when all of them have called it.

    Uses `os._exit`: Python's own shutdown can crash a thread of JAX's runtime, which would turn success into a
    signal."""
    if host_count() > 1:
        barrier("the end")
        jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def end(reason: str, status: int) -> None:
    """Prints why this process ends. If it is one of several hosts, also tells the others, which then end too, and ends
    it."""
    if host_count() == 1:
        print(f"nla: {reason}", file=sys.stderr)
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was first, or host 0 is lost
        runtime.global_state.client.key_value_set(FAILED, json.dumps([host_index(), reason, status]))
    _exit(reason, status)


def lost(what: str) -> str:
    """What to say when another host was probably lost; `what` tells how this one stopped."""
    return (
        f"host {host_index()} of {host_count()} {what}, most likely because another host was lost; the same command on "
        f"every host continues from the last checkpoint."
    )


def _exit(reason: str, status: int) -> None:
    """Ends the process at once; `reason` is the last line that it writes. Uses `os._exit`, because Python's own
    shutdown would wait for hosts that wait for this one."""
    _ending.acquire()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(2)  # the others must read the reason before this host is gone (and the store, if it is host 0)
    os.write(2, f"nla: {reason}\n".encode())
    os._exit(status)


def _end_with_others() -> None:
    """Runs in a thread: waits until another host fails, and ends this one with the same reason."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is closed: this host ends anyway
        failure = runtime.global_state.client.blocking_key_value_get(FAILED, 1000 * 10 * 365 * WAIT_SECONDS)
        index, reason, status = json.loads(failure)
        if index != host_index():
            _exit(f"host {host_index()} of {host_count()} stopped because host {index} did: {reason}", status)


def _speak_when_aborted() -> None:
    """Lets this process end with a sentence and status 1 when JAX's runtime aborts it, as it does when a host is lost.

    The runtime offers no callback that could be a Python function (jaxlib 0.10), and a Python function must not be a
    handler of SIGABRT: waiting for Python's lock there could hang for ever. So two C functions handle the signal.
    Python's fault handler writes to a pipe, which wakes a thread that speaks; then libc's `sleep` gives that thread six
    seconds (`sleep` takes the signal's number for the time), after which the abort goes on."""

    def speak() -> None:
        os.read(heard, 1)
        _exit(lost("was stopped by JAX's runtime (see above)"), 1)

    heard, told = os.pipe()
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    faulthandler.disable()  # an earlier `enable` would keep `sleep` from being the next handler
    faulthandler.enable(told, all_threads=False)
    threading.Thread(target=speak, daemon=True).start()
