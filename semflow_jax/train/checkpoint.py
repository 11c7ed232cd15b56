"""Checkpoints: Orbax, written in the background, the position in the training data inside.

A step's folder appears when it is whole. Kept are the newest two and the best by validation mIoU. Where the newest
can't be read, the one before is taken, with a warning, and the newest is moved to `workdir/unreadable`.
"""

import logging
import os
import pathlib
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from semflow_jax.data.pipeline import TrainBatches
from semflow_jax.errors import UserError

log = logging.getLogger(__name__)
BEST = "miou"  # the metric, larger is better, that marks a checkpoint as best


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`."""

    def __init__(self, workdir: pathlib.Path, keep: int = 2):
        best = policies.BestN(get_metric_fn=lambda m: m[BEST], n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            # With `max_to_keep` and `best_fn` the newest would be deleted whenever it is not among the best.
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )
        self.manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def save(self, state: dict[str, Any], batches: TrainBatches, metrics: dict[str, float] | None = None) -> None:
        """Saves state and position in the data under the state's step; returns before the bytes are on disk."""
        step = int(state["step"])
        if step == self.manager.latest_step():
            return
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave({"seen": batches.seen})}
        self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, state: dict[str, Any], batches: TrainBatches | None = None) -> dict[str, Any] | None:
        """The newest readable state, shaped, typed and sharded as `state`; None where there is no checkpoint.

        Args:
            state: arrays, or ShapeDtypeStructs with shardings.
            batches: set to the position they had then.

        Raises:
            UserError: there are checkpoints and none can be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        steps = sorted(self.manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            items: dict[str, Any] = {"state": ocp.args.StandardRestore(abstract)}
            if batches is not None:
                items["data"] = ocp.args.JsonRestore()
            try:
                restored = self.manager.restore(step, args=ocp.args.Composite(**items))
                if batches is not None:
                    batches.seek(restored["data"]["seen"])
            except Exception as error:  # Orbax raises many kinds for a truncated or flipped file
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                log.warning("checkpoint %s of %s can't be read (%s)", step, self.manager.directory, reason)
            else:
                self._set_aside(steps[:i])
                return restored["state"]
        if steps:
            raise UserError(
                f"{self.manager.directory}: a checkpoint must be whole and of this config's shapes, none of steps "
                f"{steps} is; restore the config it was trained with, or choose another --workdir"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints that can't be read out of the way of the next ones; a disk that recovers may want them."""
        if not steps:
            return
        if jax.process_index() == 0:
            aside = pathlib.Path(self.manager.directory).with_name("unreadable")
            aside.mkdir(exist_ok=True)
            for step in steps:
                log.warning("moved checkpoint %s to %s", step, aside)
                os.replace(pathlib.Path(self.manager.directory, str(step)), aside / f"{step}-{time.time_ns()}")
        multihost_utils.sync_global_devices("unreadable checkpoints are out of the way")
        self.manager.reload()

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()
