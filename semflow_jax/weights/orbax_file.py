"""Parameters in Orbax's format: a folder of their own, or the averaged weights inside a run's checkpoints."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from semflow_jax.errors import UserError
from semflow_jax.models.build import Abstract, Params


def save_orbax(path: pathlib.Path, params: Params) -> None:
    """Writes parameters as a folder, which appears when it is whole."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params, force=True)


def load_orbax(path: pathlib.Path, abstract: Abstract) -> Params:
    """The inverse of `save_orbax`.

    Raises:
        UserError: broken, or of other shapes.
    """
    return _restore(path, abstract)


def load_averaged(checkpoints: pathlib.Path, abstract: Abstract) -> tuple[int, Params]:
    """Step and averaged parameters of the newest checkpoint of a run, which may go on meanwhile.

    Raises:
        UserError: there is none, or it can't be read.
    """
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    if not steps:
        raise UserError(f"{checkpoints}: a checkpoint expected, found none yet; wait for the first")
    step = max(steps)
    return step, _restore(checkpoints / str(step) / "state", {"ema": abstract})["ema"]


def _restore(path: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                path.absolute(), ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
            )
    except Exception as error:  # Orbax raises many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path}: a whole checkpoint of this config expected, found {reason}; use another") from error
