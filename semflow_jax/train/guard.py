"""What ends a run before its last step: a signal, a loss that is no number, a hang."""

import faulthandler
import json
import logging
import math
import os
import pathlib
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

from semflow_jax.data.pipeline import TrainBatches
from semflow_jax.errors import UserError

log = logging.getLogger(__name__)
NONFINITE = "nonfinite.json"


class StopSignals:
    """Collects SIGTERM and SIGINT instead of dying of them; the loop asks between two steps.

    Where there are several processes, a signal to one of them stops all, after the same step: JAX's preemption service
    hears SIGTERM itself and agrees on the step.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if jax.process_count() == 1:
            self._old = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        else:
            self._old = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received.append(number)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; the same in all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(self.received)


class Watchdog:
    """Ends the process with every thread's stack where `seconds` pass without `alive`; 0 never does.

    A collective that waits for a lost machine can't be interrupted from Python; a launcher starts the run again.
    """

    def __init__(self, seconds: int | float):
        self.seconds = seconds

    def __enter__(self) -> "Watchdog":
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or 2)


def check_finite(
    metrics: dict[str, float], step: int, batches: TrainBatches, first: int, num: int, workdir: pathlib.Path
) -> None:
    """Stops a run whose loss or gradient is no longer a number.

    Args:
        first: position in the stream of the step's first example.
        num: its examples.

    Raises:
        UserError: after the ids of the step's examples are in `workdir/nonfinite.json`.
    """
    if all(map(math.isfinite, metrics.values())):
        return
    path = workdir / NONFINITE
    if jax.process_index() == 0:
        found = {name: str(x) for name, x in metrics.items()}
        path.write_text(json.dumps({"step": step, **found, "ids": batches.ids(first, num)}, indent=2))
    values = ", ".join(f"{name} {x}" for name, x in metrics.items())
    raise UserError(
        f"step {step}: loss and gradient must be finite, found {values}; {path} names the examples, the last "
        "checkpoint is from before: lower optim.lr, or leave those examples out"
    )
