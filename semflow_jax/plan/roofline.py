"""How long a program takes at least, from what the compiler says that it does. An estimate, not a timing.

With f FLOPs, h bytes from and to HBM and s bytes sent between chips, of one chip, and the chip's peak rates F, H, I
(`chips`), a step takes no less than

    T = max(f / F, h / H, s / I),                                                                         (1)

for the three may go on at the same time; what bounds it is the largest. f is at least the model's FLOPs m divided by
the chips n, which it exceeds by what is computed again. Utilisation, with model FLOPs:

    MFU = m / (n F T).                                                                                    (2)

A collective of k chips, on an array of S bytes, has each of them send, along a ring,

    all-gather, reduce-scatter, all-to-all    s = S (k - 1) / k                                           (3)
    all-reduce                                s = 2 S (k - 1) / k                                         (4)
    collective-permute                        s = S                                                       (5)

where S is what a gather makes and a reduction takes, and what a chip gives of an all-to-all or a permutation. I is the
sum over a chip's usable links, each in one direction: what a collective of all chips can reach. One along a part of the
mesh may have fewer links, and s counts no hops. Bytes of HBM needed are

    arguments + results - results written over arguments + temporaries + the program.                     (6)
"""

import collections
import dataclasses
from typing import Any

from semflow_jax.plan.chips import Slice
from semflow_jax.plan.costs import Collective, Costs


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Attributes:
    part: the slice.
    num_images: of a step.
    model_flops: of a step, on all chips, nothing computed twice: m.
    hbm_needed: bytes of a chip, equation (6).
    costs: of a step on a chip; None where the compiler refused the program for want of HBM.
    """

    part: Slice
    num_images: int
    model_flops: int
    hbm_needed: int
    costs: Costs | None

    @property
    def fits(self) -> bool:
        return self.costs is not None and self.hbm_needed <= self.part.chip.hbm

    @property
    def chip_flops(self) -> float:
        """f of equation (1)."""
        executed = self.costs.flops if self.costs else 0
        return max(float(executed), self.model_flops / self.part.num_chips)

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step by what bounds it: the terms of equation (1)."""
        chip, found = self.part.chip, self.costs or Costs()
        exchanged = sum(map(sent_bytes, found.collectives))
        return {
            "compute": self.chip_flops / chip.flops,
            "hbm": found.hbm_bytes / chip.hbm_rate,
            "ici": exchanged / self.part.ici_rate if exchanged else 0.0,
        }

    @property
    def bound(self) -> str:
        return max(self.times, key=lambda name: self.times[name])

    @property
    def seconds(self) -> float:
        """T of equation (1)."""
        return max(self.times.values())

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.part.num_chips * self.part.chip.flops * self.seconds)

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        result = {
            "topology": self.part.name,
            "num_chips": self.part.num_chips,
            "fits": self.fits,
            "hbm_needed_bytes": self.hbm_needed,
            "hbm_limit_bytes": self.part.chip.hbm,
            "model_flops": self.model_flops,
            "images": self.num_images,
        }
        if self.costs is None:
            return result
        return result | {
            "chip_flops": self.chip_flops,
            "hbm_bytes_moved": self.costs.hbm_bytes,
            "collectives": summarize(self.costs.collectives),
            "unknown_loops": self.costs.unknown_loops,
            "kernels": self.costs.kernels,
            "seconds_by_bound": self.times,
            "bound": self.bound,
            "seconds": self.seconds,
            "mfu": self.mfu,
            "images_per_second": self.images_per_second,
        }


def sent_bytes(c: Collective) -> float:
    """Bytes that a chip sends in all runs of a collective, equations (3) to (5)."""
    if c.kind == "collective-permute":
        return float(c.count * c.num_bytes)
    return c.count * c.num_bytes * (c.group - 1) / c.group * (2 if c.kind == "all-reduce" else 1)


def summarize(found: tuple[Collective, ...]) -> list[dict[str, Any]]:
    """Collectives of one kind, group and place together: how often they run, the bytes of their arrays and sent."""
    groups: dict[tuple[str, int, bool], list[Collective]] = collections.defaultdict(list)
    for c in found:
        groups[c.kind, c.group, c.in_loop].append(c)
    return [
        {
            "kind": kind,
            "group": group,
            "in_loop": in_loop,
            "count": sum(c.count for c in members),
            "bytes": sum(c.count * c.num_bytes for c in members),
            "largest_bytes": max(c.num_bytes for c in members),
            "sent_bytes": sum(map(sent_bytes, members)),
        }
        for (kind, group, in_loop), members in sorted(groups.items())
    ]
