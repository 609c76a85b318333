"""The text of a compiled program (`compiled.as_text()`), read into computations and their instructions."""

import dataclasses
import math
import re

_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result: its element type, its sizes, and its layout in memory."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def space(self) -> int:
        """The memory space; 0 is the device's main memory (HBM)."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else 0

    @property
    def bytes(self) -> float:
        """Bytes as laid out: the most minor sizes are rounded up to the tile."""
        bits = 8 if self.dtype == "pred" else int(_BITS.match(self.dtype)[1]) if _BITS.match(self.dtype) else 0
        sizes = list(self.sizes)
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if tile and sizes:
            order = [int(i) for i in re.match(r"[\d,]*", self.layout)[0].split(",")]  # minor to major
            for i, size in zip(order, reversed([int(t) for t in tile[1].split(",")])):
                sizes[i] = -(-sizes[i] // size) * size
        return math.prod(sizes) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result, tuples flattened
    operands: tuple[str, ...]
    text: str  # what follows the opcode: operands and attributes
    root: bool  # its result is the computation's

    def attribute(self, name: str) -> str | None:
        """The value of `name=value`, which ends at the next blank or comma outside of braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.text)
        return found[1] if found else None

    def calls(self, *names: str) -> list[str]:
        """The computations that these attributes name."""
        return [c for name in names for c in re.findall(r"[\w.\-]+", self.attribute(name) or "")]

    @property
    def size(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def in_hbm(self) -> float:
        """Bytes of those arrays of the result that lie in HBM."""
        return sum(array.bytes for array in self.arrays if array.space == 0)


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Every computation of a program's text, `{name: {instruction's name: instruction}}`, and the entry's name."""
    found, entry_name = {}, ""
    # A line that begins with "}}" ends the metadata of a kernel, which may have several lines.
    for head, body in re.findall(r"^(\S[^\n]*) \{\n(.*?)^\}(?!\})", text, re.M | re.S):
        entry, name = re.match(r"(ENTRY )?%?([\w.\-]+)", head).groups()
        instructions = [_instruction(line) for line in body.splitlines() if " = " in line]
        found[name] = {i.name: i for i in instructions}
        entry_name = name if entry else entry_name
    return found, entry_name


def _instruction(line: str) -> Instruction:
    """One line of a computation."""
    left, right = re.sub(r"/\*.*?\*/", "", line).split(" = ", 1)
    shape, rest = _split(right) if right.startswith("(") else right.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    inside, attributes = _split("(" + rest)
    arrays = re.findall(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape)
    return Instruction(
        name=left.split()[-1].lstrip("%"),
        opcode=opcode,
        arrays=tuple(
            Array(kind, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), layout)
            for kind, sizes, layout in arrays
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)) if opcode != "constant" else (),
        text=inside + attributes,
        root=left.split()[0] == "ROOT",
    )


def _split(text: str) -> tuple[str, str]:
    """`(…)rest` at the bracket that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"Unbalanced brackets in {text[:80]!r}.")
