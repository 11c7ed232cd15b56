"""Bytes that an instruction of a compiled program reads from HBM and writes to it.

An instruction reads its operands and writes its result, where they lie in HBM. A fusion reads no more of an operand
than the slices that it takes of it, and of an operand that it changes in place it writes the change. Views and tuples
move nothing. What is asynchronous moves when it starts.
"""

import functools
import re

from semflow_jax.plan.hlo import Instruction, Leaf, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
VIEWS = ("bitcast", "reshape")
SLICES = ("dynamic-slice", "slice", "gather")
UPDATE = "dynamic-update-slice"
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"}
FREE |= {"partition-id", "replica-id", "add-dependency", "while", "conditional", "call"}
FREE_TARGETS = ("ConcatBitcast", "Sharding", "AllocateBuffer")


def in_hbm(leaf: Leaf) -> int:
    """The array's bytes, if it lies there."""
    return leaf.num_bytes * leaf.in_hbm


class Traffic:
    """Answers for the instructions of one module."""

    def __init__(self, module: Module):
        self.module = module
        self.users = functools.cache(self._users)

    def moved(self, place: str, x: Instruction) -> int:
        """Bytes read and written by an instruction of the computation `place`; the computations of loops, conditionals
        and calls are not its own.
        """
        called = re.search(r'custom_call_target="(\w+)"', x.text)
        if x.op in FREE or x.op.endswith(("-done", "-update")) or (called and called[1] in FREE_TARGETS):
            return 0
        operands = [self.module.computations[place][name].shape for name in x.operands]
        name = x.op.removesuffix("-start")
        if name in COLLECTIVES:
            result = x.shape if name == x.op else x.shape[1:2]  # of a start: (operand, result, ...)
            return sum(in_hbm(leaf) for shape in (*operands, result) for leaf in shape)
        if name != x.op:  # a copy or slice: (destination, source, ...) or ((operands), destination, ...)
            target, source = x.shape[0 if name == "copy" else sum(map(len, operands))], operands[0][0]
            return min(source.num_bytes, target.num_bytes) * source.in_hbm + in_hbm(target)
        if x.op == UPDATE:
            return in_hbm(operands[1][0]) + operands[1][0].num_bytes * x.shape[0].in_hbm
        if x.op in SLICES:
            return min(in_hbm(operands[0][0]), x.shape[0].num_bytes) + in_hbm(x.shape[0])
        if x.op == "fusion":
            inside = x.called["calls"]
            read = sum(
                self._read(inside, i, shape[0]) if len(shape) == 1 else sum(map(in_hbm, shape))
                for i, shape in enumerate(operands)
            )
            return read + self._written(inside, x.shape)
        return sum(in_hbm(leaf) for shape in (*operands, x.shape) for leaf in shape)

    def _users(self, place: str) -> dict[str, list[Instruction]]:
        """The instructions that have a name among their operands."""
        found: dict[str, list[Instruction]] = {}
        for x in self.module.computations[place].values():
            for name in dict.fromkeys(x.operands):
                found.setdefault(name, []).append(x)
        return found

    def _read(self, place: str, parameter: int, leaf: Leaf) -> int:
        """Bytes of a fusion's operand that the fusion reads."""
        names = (x.name for x in self.module.computations[place].values() if x.parameter == parameter)
        return self._used(place, next(names), leaf) if leaf.in_hbm else 0

    def _used(self, place: str, name: str, leaf: Leaf) -> int:
        total = 0
        for x in self.users(place).get(name, []):
            first = x.operands[0] == name
            if x.op in VIEWS:
                total += self._used(place, x.name, leaf)
            elif x.op in SLICES and first:
                total += x.shape[0].num_bytes
            elif x.op == "fusion":
                places = (i for i, operand in enumerate(x.operands) if operand == name)
                total += sum(self._read(x.called["calls"], i, leaf) for i in places)
            elif x.op != UPDATE or not first or name in x.operands[1:]:
                return leaf.num_bytes
        return min(total, leaf.num_bytes)

    def _written(self, place: str, shape: tuple[Leaf, ...]) -> int:
        inside = self.module.computations[place]
        root = next(x for x in inside.values() if x.root)
        results = [inside[name] for name in root.operands] if root.op == "tuple" else [root]
        if len(results) != len(shape):
            return sum(map(in_hbm, shape))
        return sum(self._changed(place, x, leaf) for x, leaf in zip(results, shape, strict=True))

    def _changed(self, place: str, x: Instruction, leaf: Leaf) -> int:
        inside = self.module.computations[place]
        while x.op in VIEWS:
            x = inside[x.operands[0]]
        if x.op == "parameter" or not leaf.in_hbm:  # the former is handed through
            return 0
        if x.op == "fusion" and len(x.shape) == 1:
            return self._written(x.called["calls"], (leaf,))
        return inside[x.operands[1]].shape[0].num_bytes if x.op == UPDATE else leaf.num_bytes
