"""Rare classes more often: examples by weight, in a stream whose positions stay plain numbers.

With f_c the share of the examples in which class c occurs, an example weighs

    w = max over its classes of f_c^-balance,                                                          (1)

with balance = 1/2 the repeat factor of LVIS (Gupta et al., CVPR 2019) whose threshold is 1. An epoch has as many
positions as there are examples, n, whatever they weigh. The weights, divided by their mean, lie side by side on a line
of length n, and position k of epoch e is the example found there at

    k + r_e,    r_e = 1/2 + (seed + e) / golden ratio  (mod 1):                                        (2)

systematic sampling. So each epoch has every example the floor or the ceiling of w / mean(w) times, and r_e, multiples
of the golden ratio, spread evenly: over the epochs fractions come to their due without luck.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from semflow_jax.data.chunks import Chunks, alone
from semflow_jax.data.records import Records, load_info, open_records
from semflow_jax.data.source import Item

GOLDEN = (5**0.5 - 1) / 2
FOLDER = "classes"  # inside of a prepared folder
EXAMPLES_PER_CHUNK = 2000  # seconds of work, for a worker takes some to start


def find_classes(data_dir: str | os.PathLike, split: str, progress: bool = True) -> list[list[int]]:
    """Ids of the classes in each example of a split; none of a corrupt one.

    Labels are read once, by a process for every core, and what is found is kept in FOLDER: a stopped call goes on,
    other processes wait, and other records are read anew.
    """
    records, folder = open_records(data_dir, split), pathlib.Path(data_dir, FOLDER)
    items = [Item(str(i), detail=i) for i in range(len(records))]
    key = f"{split} {load_info(data_dir).checksums}"
    with alone(folder), Chunks(folder, os.cpu_count() or 1, progress) as chunks:
        found = chunks.map(functools.partial(_read, records=records), items, EXAMPLES_PER_CHUNK, key, "classes")
    return [ids for result, _ in found for ids in result["classes"]]


def _read(items: Sequence[Item], path: pathlib.Path, records: Records) -> dict[str, Any]:
    return {"classes": [records.classes(item.detail) for item in items]}


def example_weights(classes: Sequence[Sequence[int]], balance: float) -> Float[np.ndarray, " n"]:
    """Equation (1); 1 for an example without classes."""
    counts = np.bincount(np.fromiter(itertools.chain.from_iterable(classes), np.int64))
    factors = (np.maximum(counts, 1) / len(classes)) ** -balance
    return np.array([max((factors[i] for i in ids), default=1.0) for ids in classes])


class Balanced(grain.MapDataset):
    """Equation (2): epochs of weighted examples, in the order of the examples; shuffle them next."""

    def __init__(self, parent: grain.MapDataset, weights: Float[np.ndarray, " n"], seed: int):
        super().__init__(parent)
        self._ends = np.cumsum(weights / weights.mean())
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, k = divmod(index, len(self))
        place = k + (0.5 + (self._seed + epoch) * GOLDEN) % 1
        found = int(np.searchsorted(self._ends, place, side="right"))
        return self._parent[min(found, len(self) - 1)]  # the last end may be rounded down
