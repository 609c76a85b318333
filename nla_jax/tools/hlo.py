"""What a compiled program does, counted from its text: FLOPs, HBM bytes and collective bytes, loop bodies times trips.

XLA's own cost analysis counts the body of a loop once, so that a model whose layers are scanned shows one layer. Here
every computation is counted as often as it runs. All figures are those of one device: the text is that of the
partitioned program.

    FLOPs         2 · multiply-adds of dots, convolutions (the form of matrix products on TPUs), splash attention's
                  blocks and a GPU's matrix products; nothing else
    bytes         operands and results of each instruction or fusion, as laid out (padding to tiles included); for a
                  slice what is read, for an update in place what is written; on-chip memory costs nothing
    collectives   bytes that a device sends over its links in the ring algorithm, by kind: n devices send (n - 1)/n of
                  the whole array for all-gather, reduce-scatter and all-to-all, twice that for all-reduce
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

from nla_jax.tools.hlo_text import Instruction, computations

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_VIEWS = {"bitcast", "reshape"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one device does in a second: `flops`, `bytes` of HBM, and bytes sent over one `link`.

    A collective among n devices uses `links(n)` links, a permute one."""

    flops: float = math.inf
    bytes: float = math.inf
    link: float = math.inf
    links: Callable[[int], int] = lambda n: 1

    def transfer(self, sent: dict[tuple[str, int], float]) -> float:
        """Seconds that a collective takes."""
        links = lambda kind, n: 1 if kind == "collective-permute" else self.links(n)
        return sum(size / (self.link * links(kind, n)) for (kind, n), size in sent.items())


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one run of a computation costs on one device.

    `collectives`: `{(kind, devices in a group): bytes}`. `seconds`: for each instruction the longer of arithmetic and
    HBM, one after the other as scheduled. `waiting`: the part of them that waits for links. A collective costs no time
    while instructions run that the schedule places between its two halves; nothing else hides it."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    waiting: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        keys = self.collectives.keys() | other.collectives.keys()
        sums = {key: self.collectives.get(key, 0.0) + other.collectives.get(key, 0.0) for key in keys}
        pairs = ((getattr(c, name) for c in (self, other)) for name in ("flops", "bytes", "seconds", "waiting"))
        flops, bytes, seconds, waiting = map(sum, pairs)
        return Counts(flops, bytes, sums, seconds, waiting)

    def __mul__(self, times: int) -> "Counts":
        sums = {key: n * times for key, n in self.collectives.items()}
        return Counts(self.flops * times, self.bytes * times, sums, self.seconds * times, self.waiting * times)


@dataclasses.dataclass(frozen=True)
class Loop:
    """One `while`: the name that JAX gave it, how often its body runs when the loop runs once, and what one body
    costs."""

    name: str
    trips: int
    body: Counts


class Program:
    """The computations of a program's text (`compiled.as_text()`), and their costs on a machine."""

    def __init__(self, text: str, machine: Machine = Machine()):
        self.machine = machine
        self._cost = functools.cache(self._cost)
        self.computations, self.entry = computations(text)

    @functools.cached_property
    def counts(self) -> Counts:
        """What the whole program costs."""
        return self._cost(self.entry)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Every loop of the program."""
        whiles = [(c, i) for c, all in self.computations.items() for i in all.values() if i.opcode == "while"]
        name = lambda i: (re.search(r'op_name="([^"]*)"', i.text) or [i.name, i.name])[1]
        return [Loop(name(i), self.trips(c, i), self._cost(i.calls("body")[0])) for c, i in whiles]

    def trips(self, computation: str, loop: Instruction) -> int:
        """How often a loop's body runs, at most: as the compiler notes, else by bound, start and step of its count."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition, body = (self.computations[name] for name in loop.calls("condition", "body"))
        called = [self.computations[c] for i in condition.values() for c in i.calls("calls")]
        bounds = [_constant(i) for part in (condition, *called) for i in part.values() if _is_constant(i)]
        counters = [i for i in condition.values() if i.opcode == "get-tuple-element" and _is_counter(i)]
        if not bounds or len(counters) != 1:
            raise ValueError(f"The condition of loop {loop.name!r} does not say how often it runs.")
        index = int(counters[0].attribute("index"))
        start = _origin(self.computations[computation], loop.operands[0], index)
        root = next(i for i in body.values() if i.root)
        update = _origin(body, root.name, index)
        steps = [
            _constant(body[name]) for name in update.operands if update.opcode == "add" and _is_constant(body[name])
        ]
        first = _constant(start) if _is_constant(start) else 0
        return -(-(max(bounds) - first) // (steps[0] if steps else 1))

    def _cost(self, name: str) -> Counts:
        """One run of a computation. (What a fusion calls is counted by `_fused_flops` and `_bytes`.)"""
        total, scope, machine = Counts(), self.computations[name], self.machine
        clock, waiting, arrivals = 0.0, 0.0, {}
        for i in scope.values():
            inner, part, channel, sent = self._inside(i, name), *self._collective(i, scope)
            flops = self._fused_flops(i.calls("calls")[0]) if i.opcode == "fusion" else _flops(i, scope)
            own = Counts(flops, self._bytes(i, scope), sent)
            total += dataclasses.replace(inner + own, seconds=0, waiting=0)
            transfer = machine.transfer(sent)
            if part == "start":
                arrivals[channel] = clock + transfer
                continue
            if part == "done":
                transfer = max(0.0, arrivals.pop(channel, clock) - clock)
            clock += inner.seconds + max(transfer, own.flops / machine.flops, own.bytes / machine.bytes)
            waiting += inner.waiting + transfer
        return dataclasses.replace(total, seconds=clock, waiting=waiting)

    def _inside(self, i: Instruction, computation: str) -> Counts:
        """What the computations cost that an instruction calls, except for a fusion's."""
        if i.opcode == "while":
            condition, body = i.calls("condition", "body")
            return (self._cost(condition) + self._cost(body)) * self.trips(computation, i)
        if i.opcode == "conditional":
            branches = i.calls("branch_computations", "true_computation", "false_computation")
            return max((self._cost(b) for b in branches), key=lambda c: (c.flops, c.bytes))
        if i.opcode in ("call", "async-start"):
            return self._cost(i.calls("to_apply", "calls")[0])
        return Counts()

    def _fused_flops(self, name: str) -> float:
        """FLOPs of a fusion's computation, fusions in it included."""
        scope = self.computations[name]
        nested = sum(self._fused_flops(i.calls("calls")[0]) for i in scope.values() if i.opcode == "fusion")
        return nested + sum(_flops(i, scope) for i in scope.values())

    def _fused_collective(self, i: Instruction) -> Instruction | None:
        """The collective in a fusion, where there is one."""
        if i.opcode != "fusion":
            return None
        return next((c for c in self.computations[i.calls("calls")[0]].values() if c.opcode in COLLECTIVES), None)

    def _collective(self, i: Instruction, scope: dict[str, Instruction]) -> tuple[str, str, dict]:
        """An instruction's part in a collective: "start", "done", "all" or "" (none), with channel and bytes sent.

        The TPU compiler also writes collectives into fusions. A start, the products that run meanwhile and a done then
        hold the same collective, which counts once. An all-reduce and a dynamic-slice count as reduce-scatter."""
        fused = self._fused_collective(i)
        if fused is None:
            part = next((part for part in ("start", "done") if i.opcode.endswith(f"-{part}")), "all")
            return part, i.operands[0] if part == "done" else i.name, _sent(i, scope)
        inner = self.computations[i.calls("calls")[0]]
        sent, text = _sent(fused, inner), " ".join(x.text for x in inner.values() if x.opcode == "custom-call")
        channel = re.search(r"channel_id=(\d+)", fused.text)
        channel = channel[1] if channel else i.name
        if "AsyncCollectiveStart" in text:
            return "start", channel, sent
        if "AsyncCollectiveDone" in text:
            return "done", channel, {}
        if "async_collective_fusion_config" in fused.text:
            return "", channel, {}
        if fused.opcode == "all-reduce" and any(x.opcode == "dynamic-slice" for x in inner.values()):
            sent = {("reduce-scatter", n): size / 2 for (_, n), size in sent.items()}
        return "all", channel, sent

    def _bytes(self, i: Instruction, scope: dict[str, Instruction]) -> float:
        """HBM traffic of one instruction outside of fusions."""
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return 0
        operands = [scope[name].in_hbm for name in i.operands]
        if i.opcode in _SLICES:
            return min(i.in_hbm, operands[0]) + i.in_hbm + sum(operands[1:])
        if i.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if i.opcode == "scatter":
            return 2 * operands[-1] + sum(operands[1:-1])
        if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
            return i.in_hbm  # a tuple of operands and results
        if i.opcode == "fusion":
            reads = [self._read(i, n, whole) if whole else 0.0 for n, whole in enumerate(operands)]
            writes = zip(i.arrays, self._writes(i), strict=True)
            writes = [min(size, array.bytes) if array.space == 0 else 0.0 for array, size in writes]
            if self._fused_collective(i):  # the arrays that are being sent only pass through
                for result, operand in re.findall(r"\{(\d*)\}: \((\d+),", i.text):
                    writes[int(result or 0)] = reads[int(operand)] = 0.0
            return sum(reads) + sum(writes)
        return sum(operands) + i.in_hbm

    def _read(self, fusion: Instruction, index: int, whole: float) -> float:
        """HBM bytes that a fusion (in no other fusion) reads of an operand of `whole` bytes."""
        size, passed = self._reads(fusion, index)
        return whole if passed else min(whole, size)

    def _reads(self, fusion: Instruction, index: int) -> tuple[float, bool]:
        """Bytes that a fusion reads of its operand `index`; infinite where it reads more than slices of it.

        Also whether the fusion's result is that operand in another shape; then its users decide what is read."""
        inner = self.computations[fusion.calls("calls")[0]]
        parameter = next(p for p in inner.values() if p.opcode == "parameter" and p.text.startswith(f"({index})"))
        todo, total, passed = [parameter], 0.0, parameter.root
        while todo:
            name = todo.pop().name
            for user in (i for i in inner.values() if name in i.operands):
                if user.opcode in _VIEWS:
                    todo.append(user)
                elif user.opcode == "fusion":
                    for i in (i for i, operand in enumerate(user.operands) if operand == name):
                        size, through = self._reads(user, i)
                        total += size
                        todo += [user] * through
                elif user.opcode in _SLICES and user.operands[0] == name:
                    total += user.size
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:  # which updates in place
                    return math.inf, False
            passed |= any(i.root for i in todo)
        return total, passed

    def _writes(self, fusion: Instruction) -> list[float]:
        """Bytes that a fusion writes of each of its results; for an update in place, those of the update."""
        inner = self.computations[fusion.calls("calls")[0]]
        root = next(i for i in inner.values() if i.root)
        sizes = []
        for result in [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]:
            while result.opcode in _VIEWS:
                result = inner[result.operands[0]]
            if result.opcode == "fusion":
                sizes += self._writes(result)
            elif result.opcode == "dynamic-update-slice":
                sizes.append(inner[result.operands[1]].size)
            else:
                sizes += [array.bytes for array in result.arrays]
        return sizes


def _is_constant(i: Instruction) -> bool:
    return i.opcode == "constant" and _is_counter(i)


def _constant(i: Instruction) -> int:
    """The value of an integer constant."""
    return int(i.text[1:].split(")")[0])


def _origin(scope: dict[str, Instruction], name: str, index: int) -> Instruction:
    """The instruction that made entry `index` of a tuple, copies aside."""
    found = scope[scope[name].operands[index]] if scope[name].opcode == "tuple" else scope[name]
    while found.opcode in ("copy", "bitcast"):
        found = scope[found.operands[0]]
    return found


def _is_counter(i: Instruction) -> bool:
    """A scalar integer."""
    return len(i.arrays) == 1 and i.arrays[0].sizes == () and i.arrays[0].dtype in ("s32", "u32", "s64")


def _flops(i: Instruction, scope: dict[str, Instruction]) -> float:
    """FLOPs of one instruction that is no fusion."""
    if i.opcode == "dot":
        sizes = scope[i.operands[0]].arrays[0].sizes
        contracted = [sizes[int(n)] for n in re.findall(r"\d+", i.attribute("lhs_contracting_dims"))]
        return 2.0 * math.prod(i.arrays[0].sizes) * math.prod(contracted)
    if i.opcode == "custom-call" and "__cublas$" in i.text:  # results: the product, a workspace
        sizes = scope[i.operands[0]].arrays[0].sizes
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.text)[1]
        return 2.0 * math.prod(i.arrays[0].sizes) * math.prod(sizes[int(n)] for n in re.findall(r"\d+", contracted))
    if i.opcode == "custom-call" and (kernel := re.match(r"splash_m.a_(fwd|dq|dkv)", i.name)):
        products = {"fwd": 2, "dq": 3, "dkv": 4}[kernel[1]]
        _, rows, columns = scope[i.operands[0]].arrays[0].sizes  # blocks of the grid; those up to the diagonal run
        *heads, length, width = scope[i.operands[2]].arrays[0].sizes  # the queries
        blocks = min(rows * columns, rows * (rows + 1) // 2)
        return products * 2.0 * math.prod(heads) * width * blocks * (length / rows) ** 2
    if i.opcode == "convolution":
        return _convolution_flops(i, *(scope[name].arrays[0].sizes for name in i.operands))
    return 0.0


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Multiply-adds on real elements: positions in the padding or between dilated elements cost nothing."""
    left, right, out = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels")).groups()
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", i.attribute("window") or ""))
    size, rank = window.get("size", "").split("x"), len(left) - 2
    field = lambda name, default: [int(n) for n in window[name].split("x")] if name in window else [default] * rank
    strides, base, dilated = field("stride", 1), field("lhs_dilate", 1), field("rhs_dilate", 1)
    pads = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else [0] * rank
    total = 2.0 * lhs[left.index("b")] * rhs[right.index("i")] * rhs[right.index("o")]
    for n in range(rank):
        at = np.arange(i.arrays[0].sizes[out.index(str(n))])[:, None] * strides[n] - pads[n]
        at = at + np.arange(int(size[n])) * dilated[n]
        real = (at >= 0) & (at % base[n] == 0) & (at // base[n] < lhs[left.index(str(n))])
        total *= int(real.sum())
    return total / int(i.attribute("batch_group_count") or 1)


def _sent(i: Instruction, scope: dict[str, Instruction]) -> dict[tuple[str, int], float]:
    """What a device sends in a collective; the `-done` half of an asynchronous one sends nothing."""
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return {}
    n = _group_size(i.text)
    operands = sum(scope[name].size for name in i.operands)
    if kind == "collective-permute":
        return {(kind, 2): operands}
    if kind == "all-gather":
        return {(kind, n): operands * (n - 1)}
    return {(kind, n): operands * (n - 1) / n * (2 if kind == "all-reduce" else 1)}


def _group_size(text: str) -> int:
    """Devices in each of the groups that a collective joins, in any of the three ways in which HLO writes them."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    return 1
