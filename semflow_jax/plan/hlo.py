"""Reads the text of optimised HLO, as `compiled.as_text()` returns it: computations, instructions, shapes, loops.

Bytes are as the chip stores an array: on TPUs, its innermost two dimensions are padded to the tile of its layout, as in
bf16[8,40]{1,0:T(8,128)(2,1)}: 8 x 128 numbers of 2 bytes.
"""

import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
LEAF = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\) -> .* \{$")
LINE = re.compile(r"^\s*(ROOT )?%?([\w.$-]+) = (.*)$")
OPERAND = re.compile(r"%([\w.$-]+)")
CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.$-]+)")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a shape: its type, dimensions, and layout as text."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the main memory; other spaces, S(1) and so on, are on the chip."""
        return re.search(r"S\(\d+\)", self.layout) is None

    @functools.cached_property
    def num_bytes(self) -> int:
        order, _, rest = self.layout.partition(":")
        dims = [self.dims[int(i)] for i in reversed(order.split(",")) if i] or list(self.dims)  # innermost last
        tile = re.match(r"T\(([\d,]+)\)", rest)
        for k, size in enumerate(reversed(tile[1].split(",")) if tile else (), start=1):
            if k <= len(dims):
                dims[-k] = math.ceil(dims[-k] / int(size)) * int(size)
        bits = BITS.get(self.dtype, 8)  # the many kinds of float8
        return math.ceil(math.prod(dims) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Attributes:
    name, op: as in `%name = shape op(operands), attributes`.
    shape: the arrays of the result, those of a tuple in order.
    operands: names.
    text: of operands and attributes.
    root: whether it is its computation's result.
    """

    name: str
    op: str
    shape: tuple[Leaf, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """The computations that it names, by role: calls, body, condition..."""
        return dict(CALLED.findall(self.text))

    @functools.cached_property
    def parameter(self) -> int | None:
        """Which parameter of its computation it is."""
        return int(self.text.split(")")[0]) if self.op == "parameter" else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        return OPERAND.findall(listed[1]) if listed else [c for role, c in self.called.items() if "_comp" in role]


@dataclasses.dataclass(frozen=True)
class Module:
    """Attributes:
    computations: by name; the instructions of each by name, in order.
    entry: name of the one that runs first.
    num_devices: that the program is for.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_devices: int

    def num_turns(self, place: str, loop: Instruction) -> int | None:
        """How often a while loop of the computation `place` runs: as XLA notes it, or from a condition i < N whose
        both sides begin as constants, i growing by 1. None: neither tells.
        """
        noted = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.called["condition"]]
        root = next(x for x in condition.values() if x.root)
        sides = [condition[name] for name in root.operands]
        compare: Instruction | None = root
        if root.op == "fusion":  # around the comparison, whose operands are then parameters
            inside = self.computations[root.called["calls"]]
            compare = next((x for x in inside.values() if x.root), None)
            order = [inside[name].parameter for name in compare.operands] if compare is not None else []
            sides = [sides[i] for i in order if i is not None]
        if compare is None or compare.op != "compare" or "direction=LT" not in compare.text or len(sides) != 2:
            return None
        outside = self.computations[place]
        first = _behind_views(outside.get(loop.operands[0]), outside)
        start, end = (_first_value(side, condition, outside, first) for side in sides)
        return None if start is None or end is None else max(end - start, 0)


Names = dict[str, Instruction]


def _first_value(x: Instruction, condition: Names, outside: Names, first: Instruction | None) -> int | None:
    """The constant that `x`, of a loop's condition, stands for when the loop begins with `first`, if it is one."""
    value = _behind_views(x, condition)
    if value is not None and value.op == "get-tuple-element":
        index = re.search(r"index=(\d+)", value.text)
        if first is None or first.op != "tuple" or index is None:
            return None
        value = _behind_views(outside.get(first.operands[int(index[1])]), outside)
    if value is None or value.op != "constant" or value.shape[0].dtype[0] not in "su":  # time may be counted in floats
        return None
    return int(value.text.split(")")[0])


def _behind_views(x: Instruction | None, inside: Names) -> Instruction | None:
    """What a name is a copy or another view of."""
    while x is not None and x.op in ("copy", "bitcast", "convert"):
        x = inside.get(x.operands[0])
    return x


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        ValueError: no computation is marked as the first.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in re.sub(r"/\*[^*]*\*/", "", text).splitlines():
        header = HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            found = LINE.match(line)
            if found:
                instruction = _parse_line(found[2], found[3], bool(found[1]))
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("HLO: a computation marked ENTRY expected, found none")
    found = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(found[1]) if found else 1)


def _parse_line(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape = tuple(
        Leaf(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in LEAF.findall(rest[:end])
    )
    op, _, text = rest[end:].strip().partition("(")
    inside = text[: _closing(f"({text}", 0) - 1]
    return Instruction(name, op, shape, tuple(OPERAND.findall(inside)), text, root)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)
