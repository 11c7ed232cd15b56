"""TPU chips and slices of them, named as "v5e:8x8": chips along each dimension. No TPU is needed.

Peak FLOP/s (bf16), HBM bandwidth and the links between chips are Google's:
https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e. A link's rate is the chip's published one, in one
direction, divided by its links: 1600 Gbit/s over 4 for v5e, 1200 and 800 GB/s of both directions over 6 and 4 for v5p
and v6e, 50 GB/s for v4 (Jouppi et al. 2023, https://arxiv.org/abs/2304.01433). HBM is what libtpu's compiler lets a
program have, found by asking for more: "exceeds available HBM (15.75G)".

A dimension closes to a ring where it is a whole side of a pod of v5e or v6e, 16, and in slices of v4 and v5p whose
dimensions are multiples of 4. Elsewhere a chip at a corner has one link for each dimension, and bounds what a
collective of all chips can do; so usable links are

    L = sum over dimensions of size > 1 of (2 if it is a ring, else 1).                                   (1)
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from semflow_jax.errors import UserError

GIB = 2**30
# libtpu would look for the TPU that this machine belongs to, complain at length that there is none, and lock it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Attributes:
    flops: peak bf16 FLOP/s.
    hbm: bytes that a program may use.
    hbm_rate: bytes/s.
    link_rate: bytes/s of one link between chips, in one direction.
    dims: of the slices.
    ring: chips along a dimension that close to a ring: multiples of it.
    options: what the topology of a slice needs besides.
    """

    flops: float
    hbm: int
    hbm_rate: float
    link_rate: float
    dims: int
    ring: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    # One device per chip, as all later ones have it; by default each of its two cores would be one.
    "v4": Chip(275e12, int(30.75 * GIB), 1200e9, 50e9, 3, 4, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, int(15.75 * GIB), 819e9, 50e9, 2, 16),
    "v5p": Chip(459e12, int(95.74 * GIB), 2765e9, 100e9, 3, 4),
    "v6e": Chip(918e12, int(31.25 * GIB), 1600e9, 100e9, 2, 16),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are linked to each other.

    Attributes:
        name: as in "v5e:8x8".
        chip: of one kind.
        shape: chips along each dimension.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each dimension closes to a ring."""
        closes = [n % self.chip.ring == 0 for n in self.shape]
        return tuple(closes) if self.chip.dims == 2 else (all(closes),) * self.chip.dims

    @property
    def ici_rate(self) -> float:
        """Bytes/s that a chip can send, over all its usable links, equation (1)."""
        links = sum(1 + ring for n, ring in zip(self.shape, self.rings, strict=True) if n > 1)
        return links * self.chip.link_rate


def parse_slice(name: str) -> Slice:
    """The slice of a name such as "v5e:8x8" or "v5p:4x4x4".

    Raises:
        UserError: no such chip, or another number of dimensions than it has.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    examples = "v4:2x2x1, v5e:8x8, v5p:4x4x4, v6e:16x16"
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UserError(
            f"--topology: a chip of {', '.join(CHIPS)} and the slice's shape, got {name!r}; such as {examples}"
        )
    sizes = tuple(int(n) for n in shape.split("x"))
    if len(sizes) != chip.dims:
        raise UserError(f"--topology: {kind} has slices of {chip.dims} dimensions, got {name!r}; such as {examples}")
    return Slice(name, chip, sizes)


def make_devices(part: Slice) -> list[jax.Device]:
    """Devices that programs can be compiled for, and can't run on.

    Raises:
        UserError: libtpu is not installed, or does not know such a slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: libtpu, the compiler of TPUs, needed, found none; run pip install 'semflow_jax[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = part.chip.options | {"wrap": (*part.rings, False)[:3]}
    if part.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(part.name, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology: a slice that libtpu knows, got {part.name}; choose another ({reason})") from None
