"""What a compiled program does on one chip: FLOPs, bytes from and to HBM, and collectives, loops counted as they run.

XLA's own `cost_analysis` counts the body of a loop once. Here the program is walked from its entry: what a loop holds
counts times its turns, and of a conditional the dearest branch counts.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from semflow_jax.plan.hlo import Instruction, Leaf, Module, parse
from semflow_jax.plan.traffic import COLLECTIVES, Traffic


@dataclasses.dataclass(frozen=True)
class Collective:
    """Attributes:
    kind: one of COLLECTIVES.
    num_bytes: of the whole array: what a gather makes, and a reduction takes; else what a chip gives.
    group: chips that take part together.
    count: how often it runs.
    in_loop: whether a loop runs it.
    name: of the instruction.
    """

    kind: str
    num_bytes: int
    group: int
    count: int
    in_loop: bool
    name: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """Attributes:
    flops: of matrix products and convolutions.
    hbm_bytes: read and written.
    collectives: in the order of the program.
    unknown_loops: loops whose number of turns only a run would tell.
    kernels: custom calls whose FLOPs are not counted.
    """

    flops: int = 0
    hbm_bytes: int = 0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0
    kernels: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def looped(self, turns: int, unknown: bool = False) -> "Costs":
        """The costs of a loop with this body."""
        inside = tuple(dataclasses.replace(c, count=c.count * turns, in_loop=True) for c in self.collectives)
        flops, moved = self.flops * turns, self.hbm_bytes * turns
        return Costs(flops, moved, inside, self.unknown_loops + unknown, self.kernels)

    def inside_loops(self, min_bytes: int = 0) -> list[Collective]:
        """The collectives of arrays of at least `min_bytes` that loops run."""
        return [c for c in self.collectives if c.in_loop and c.num_bytes >= min_bytes]


def read_costs(text: str, turns: int = 1) -> Costs:
    """Costs of an optimised module on one chip.

    Args: turns: of the loops whose number of turns the text does not tell.
    """
    module = parse(text)
    return _Walk(module, turns).computation(module.entry)


class _Walk:
    def __init__(self, module: Module, turns: int):
        self.module = module
        self.turns = turns
        self.traffic = Traffic(module)
        self.computation = functools.cache(self._computation)

    def _computation(self, name: str) -> Costs:
        return sum((self._instruction(name, x) for x in self.module.computations[name].values()), Costs())

    def _instruction(self, place: str, x: Instruction) -> Costs:
        if x.op == "while":
            body, turns = self.computation(x.called["body"]), self.module.num_turns(place, x)
            return body.looped(self.turns, unknown=True) if turns is None else body.looped(turns)
        if x.op == "conditional":
            return max((self.computation(name) for name in x.branches), key=lambda c: (c.hbm_bytes, c.flops))
        if x.op in ("call", "async-start"):
            return self.computation(x.called["calls" if "calls" in x.called else "to_apply"])
        own = Costs(hbm_bytes=self.traffic.moved(place, x))
        return own + (self._fused(x.called["calls"]) if x.op == "fusion" else self._computed(place, x))

    def _fused(self, place: str) -> Costs:
        """FLOPs and collectives inside of a fusion. Of a collective spread over several, the first one counts."""
        total = Costs()
        inside = self.module.computations[place].values()
        starts = any("AsyncCollectiveStart" in x.text for x in inside)
        for x in inside:
            if x.op == "fusion":
                total += self._fused(x.called["calls"])
            elif starts or "async_collective_fusion_config" not in x.text:
                total += self._computed(place, x)
        return total

    def _computed(self, place: str, x: Instruction) -> Costs:
        operands = [self.module.computations[place][name].shape for name in x.operands]
        kind = x.op.removesuffix("-start")
        if x.op == "dot":
            return Costs(flops=_dot_flops(x, operands[0][0]))
        if x.op == "convolution":
            return Costs(flops=_convolution_flops(x, operands[0][0], operands[1][0]))
        if x.op == "custom-call":
            return Costs(kernels=int('"tpu_custom_call"' in x.text))
        if kind not in COLLECTIVES:
            return Costs()
        group = _group(x.text) or self.module.num_devices
        num_bytes = sum(leaf.num_bytes for shape in operands for leaf in shape)
        if kind == "all-gather":
            num_bytes *= group
        if place.startswith("all-reduce-scatter"):  # a fusion of an all-reduce and the slice that a chip keeps
            kind = "reduce-scatter"
        return Costs(collectives=(Collective(kind, num_bytes, group, 1, False, x.name),))


def _group(text: str) -> int:
    """Chips that take part in one run of a collective, in one of HLO's notations; 0: all.

    Raises:
        ValueError: another notation.
    """
    if "source_target_pairs" in text:
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if iota:
        return int(iota[1])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)? ?\{([^}]*)\}", text)
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"HLO: replica_groups in a known notation expected, found {text[:200]}")
    return 0


def _dot_flops(x: Instruction, left: Leaf) -> int:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.text)
    contracted = [left.dims[int(i)] for i in found[1].split(",") if i] if found else []
    return 2 * math.prod(x.shape[0].dims) * math.prod(contracted)


def _convolution_flops(x: Instruction, left: Leaf, right: Leaf) -> int:
    """Twice the products of an input place and a tap; places of padding and dilation are no work."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.text)
    if labels is None:
        raise ValueError(f"HLO: dim_labels of a convolution expected, found {x.text[:100]}")
    shapes = zip(labels.groups(), (left, right, x.shape[0]), strict=True)
    image, taps, out = (dict(zip(names, leaf.dims, strict=True)) for names, leaf in shapes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", x.text) or [""])[0]))

    def read(key: str, axis: int) -> int:
        return int(window[key].split("x")[axis].split("_")[0]) if key in window else key != "pad"

    pairs = 1
    for axis in range(sum(name.isdigit() for name in image)):
        spread, name = read("lhs_dilate", axis), str(axis)
        place = np.arange(out[name])[:, None] * read("stride", axis) - read("pad", axis)
        place = place + np.arange(taps[name]) * read("rhs_dilate", axis)
        extent = (image[name] - 1) * spread + 1
        pairs *= int(((place >= 0) & (place < extent) & (place % spread == 0)).sum())
    features, examples = (
        image[name] // int(found[1] if (found := re.search(rf"{key}_group_count=(\d+)", x.text)) else 1)
        for name, key in (("f", "feature"), ("b", "batch"))
    )
    return 2 * pairs * features * taps["o"] * examples
