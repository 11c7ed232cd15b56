"""Sums over the batches of a split that survive a kill: every minute they are kept, with the number of batches in them.

Counts are exact whatever the batches: integers are added up as int64, figures of single examples as float64.
"""

import io
import logging
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from semflow_jax.evaluate.output import write

log = logging.getLogger(__name__)
KEEP_SECONDS = 60
DONE = "num_batches"  # the key of a kept tally that tells how far it is
Counts = dict[str, np.ndarray]


def tally(
    batches_from: Callable[[int], Iterable[Any]],
    count: Callable[[Any], tuple[Counts, Counts]],
    path: pathlib.Path | None = None,
) -> Counts:
    """Adds up what `count` says of every batch, from where an earlier call was stopped.

    Args:
        batches_from: the batches, without so many first ones.
        count: (what is added up, what is kept of every example, one after the other) of a batch, with names apart.
        path: file of the sums so far; None keeps none.
    """
    sums: Counts = {}
    each: dict[str, list[np.ndarray]] = {}
    done = 0
    if path is not None and path.exists():
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                kept = dict(arrays)
            done = int(kept.pop(DONE))
            sums = {name[1:]: x for name, x in kept.items() if name[0] == "+"}
            each = {name[1:]: [x] for name, x in kept.items() if name[0] != "+"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s: can't be read, counting from the start (%s)", path, error)
    last = time.monotonic()
    for batch in batches_from(done):
        added, kept = count(batch)
        for name, x in added.items():
            x = np.asarray(x)
            wide = x.astype(np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64)
            sums[name] = np.asarray(sums.get(name, 0) + wide)
        for name, x in kept.items():
            each.setdefault(name, []).append(np.asarray(x))
        done += 1
        if path is not None and time.monotonic() - last > KEEP_SECONDS:
            _keep(path, sums, each, done)
            last = time.monotonic()
    if path is not None:
        _keep(path, sums, each, done)
    return sums | {name: np.concatenate(pieces) for name, pieces in each.items()}


def _keep(path: pathlib.Path, sums: Counts, each: dict[str, list[np.ndarray]], done: int) -> None:
    if jax.process_index():
        return
    arrays: dict[str, Any] = {f"+{name}": x for name, x in sums.items()}
    arrays |= {f"={name}": np.concatenate(pieces) for name, pieces in each.items()} | {DONE: np.int64(done)}
    data = io.BytesIO()
    np.savez(data, **arrays)
    write(path, data.getvalue())
