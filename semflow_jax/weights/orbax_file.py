"""Parameters in Orbax's format: a folder of their own, or the averaged weights inside a run's checkpoints."""

import pathlib

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
        UserError: broken, or of other names or shapes.
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
    return step, _restore(checkpoints / str(step) / "state", abstract, "ema")


def _restore(path: pathlib.Path, abstract: Abstract, part: str | None = None) -> Params:
    """All that the folder holds, or a part of it, which alone is read."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    item = params if part is None else {part: params}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(path.absolute()).item_metadata.tree
            saved = saved if part is None else saved[part]
            if other := sorted(saved.keys() ^ params.keys()):  # a partial restore lets them pass
                raise ValueError(f"{len(other)} names on one side only, {other[0]} the first")
            restored = checkpointer.restore(path.absolute(), args)
    except Exception as error:  # Orbax raises many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path}: a whole checkpoint of this config expected, found {reason}; use another") from error
    return restored if part is None else restored[part]
