"""From a config to everything but the weights; whatever is wrong with it is said before anything long begins."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from semflow_jax import coupling, flow, learned_code, mask_code, parallel, reflow, solve
from semflow_jax.data.info import DataInfo
from semflow_jax.data.pipeline import check_only_flips
from semflow_jax.data.prepare import ensure
from semflow_jax.data.records import count_records, final_split, load_info
from semflow_jax.errors import UserError
from semflow_jax.evaluate.runner import Evaluator
from semflow_jax.latents import ensure_latents
from semflow_jax.models.build import make_velocity_fn
from semflow_jax.pipeline import EXPORT, make_config, save_frozen
from semflow_jax.sampling import Sampler
from semflow_jax.train.fit import fit_codes
from semflow_jax.train.optim import make_schedule
from semflow_jax.train.start import Start, find_start, resume_start

FREE_KEYS = (  # what such keys begin with may change when a run goes on
    "batch_size",
    "checkpoint_every",
    "cpu_devices",
    "data.dir",
    "data.max_corrupt",
    "data.num_workers",
    "data.source",
    "eval.",
    "eval_every",
    "hang_seconds",
    "log_every",
    "mesh.",
    "optim.accum_steps",
    "sampling.",
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config stands for: everything but the weights."""

    config: ConfigDict
    data_dir: str
    train_dir: str  # what training reads: the same, its latents, or pairs of `reflow.py`
    info: DataInfo
    final_split: str  # of the figures at the end
    mesh: Mesh
    start: Start
    sampler: Sampler
    evaluator: Evaluator
    model: dict[str, Any]  # the config.json of the model
    code_seconds: float  # of its mask code's steps, now or in an earlier run


def make_setup(c: ConfigDict, workdir: pathlib.Path) -> Setup:
    """Checks every value, prepares the data where they are not prepared yet, and builds what a run needs.

    Raises:
        UserError: for any config value that does not fit the others, the data or the devices.
    """
    check_unchanged(c, workdir)
    check_values(c)
    mesh = parallel.make_mesh(c.mesh)
    check_mesh(c, mesh)
    begun = (workdir / "config.json").exists()
    start = resume_start(workdir / EXPORT, c) if begun else find_start(c)
    if c.reflow.share and (start.drawn or start.code is None):
        raise UserError(f"init: reflow.share needs a trained flow to learn from, got {c.init!r}; name one there")
    codec, unet = start.codec, start.unet
    if c.data.dir is None and len(c.data.size) == 2:  # else `ensure` has the better word
        codec.latent_shape(tuple(c.data.size), unet.factor)
    data_dir = ensure(c.data)
    info = load_info(data_dir)
    splits = count_records(data_dir)
    missing = {"train", "val"} - set(splits)
    if missing:
        raise UserError(f"{data_dir}: splits train and val needed, {sorted(missing)} missing; prepare it again")
    codec.latent_shape(info.size, unet.factor)
    code, code_seconds = start.code, 0.0
    if code is None:
        codec, code, code_seconds = fit_codes(c, codec, data_dir, info)
        codec, code = coupling.couple(c.objective, codec, code)
    elif len(code.colours) != info.num_classes:
        raise UserError(
            f"init: {c.init} has {len(code.colours)} classes, {data_dir} {info.num_classes}; start from another"
        )
    sampler = Sampler(make_velocity_fn(unet), codec, code, start.context)
    evaluator = Evaluator(sampler, data_dir, info, mesh, c)
    model = make_config(c, unet, codec, code, info)
    train_dir = _train_dir(c, data_dir, start, sampler)
    return Setup(
        c, data_dir, train_dir, info, final_split(splits), mesh, start, sampler, evaluator, model, code_seconds
    )


def _train_dir(c: ConfigDict, data_dir: str, start: Start, sampler: Sampler) -> str:
    if c.reflow.share:
        return reflow.ensure_pairs(data_dir, sampler, start.unet, start.make_params(), c.reflow)
    if not c.data.latents:
        return data_dir
    return ensure_latents(data_dir, sampler.codec, code=sampler.code, draws=c.data.mask_draws)


def begin(s: Setup, workdir: pathlib.Path) -> None:
    """Writes what a run goes on with: the frozen parts and the shape of its model, then, once, its config."""
    path = workdir / "config.json"
    parallel.wait_for_all("every process knows whether the run had begun")
    if jax.process_index() == 0:
        if not path.exists():
            save_frozen(workdir / EXPORT, s.model, s.sampler.codec, s.sampler.code, s.sampler.context)
        path.write_text(json.dumps(_plain(s.config), indent=2))
    parallel.wait_for_all("the run has begun")


def _plain(c: ConfigDict) -> dict[str, Any]:
    """A config as JSON keeps it."""
    return json.loads(c.to_json_best_effort())


def check_unchanged(c: ConfigDict, workdir: pathlib.Path) -> None:
    """A run that goes on must have the config it began with.

    Raises:
        UserError: naming the keys that differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    ours, theirs = _plain(c), json.loads(path.read_text())
    changed = [key for key in _changed(ours, theirs) if not key.startswith(FREE_KEYS)]
    if changed:
        raise UserError(
            f"{path}: a run goes on with the config it began with, changed: {', '.join(changed)}; "
            "undo that, or choose another --workdir"
        )


def _changed(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys, with dots, that are not alike."""
    for key in ours | theirs:
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _changed(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def check_values(c: ConfigDict) -> None:
    """Raises UserError for values that fit nothing."""
    for key in ("num_steps", "log_every", "eval_every", "checkpoint_every"):
        if c[key] < 1:
            raise UserError(f"{key}: at least 1, got {c[key]}; raise it")
    if c.eval.num_samples < 2:
        raise UserError(f"eval.num_samples: at least 2, diversity is between two, got {c.eval.num_samples}; raise it")
    coupling.check(c.objective)
    if not 0 <= c.loss.image_weight <= 1:
        raise UserError(f"loss.image_weight: in [0, 1], got {c.loss.image_weight}; 0.7 is SymmFlow's")
    if c.loss.shortcut_every < 0 or (c.loss.shortcut_every and not c.model.intervals):
        found = f"got {c.loss.shortcut_every} with model.intervals {c.model.intervals}"
        raise UserError(f"loss.shortcut_every: 0, or above it with model.intervals; {found}; change one of them")
    make_schedule(c.optim, c.num_steps)
    solve.check(c.sampling.solver, c.sampling.steps)
    if c.loss.time_sampling not in flow.TIME_SAMPLINGS:
        raise UserError(f"loss.time_sampling: one of {flow.TIME_SAMPLINGS}, got {c.loss.time_sampling!r}")
    if c.loss.kind not in flow.ERRORS:
        raise UserError(f"loss.kind: one of {flow.ERRORS}, got {c.loss.kind!r}")
    if c.loss.huber_delta <= 0:
        raise UserError(f"loss.huber_delta: above 0, got {c.loss.huber_delta}; 1.0 is usual")
    mask_code.check(c.mask_code)
    if c.mask_code.name == "learned":
        learned_code.check(c.mask_code)
    masks_kept = c.data.latents and c.mask_code.name == "colour" and not c.reflow.share
    if c.data.mask_draws < 0 or (c.data.mask_draws and not masks_kept):
        others = f"data.latents {c.data.latents}, mask_code.name {c.mask_code.name!r}, reflow.share {c.reflow.share}"
        raise UserError(
            f"data.mask_draws: 0, or above it with data.latents, 'colour' and no reflow, got {c.data.mask_draws} with "
            f"{others}; change one of them"
        )
    reflow.check(c.reflow)
    if c.reflow.share and c.objective != "semflow":
        raise UserError(f"reflow.share: 0 with objective {c.objective!r}, got {c.reflow.share}; change one of them")
    for key, needed in (("data.latents", c.data.latents), ("reflow.share", c.reflow.share)):
        if needed:
            check_only_flips(key, c.data.crop_scale, c.data.jitter)


def check_mesh(c: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for values that don't fit the devices."""
    parallel.local_batch_size(c.batch_size, mesh)
    parallel.local_batch_size(c.eval.batch_size, mesh, "eval.batch_size")
    shards = parallel.num_batch_shards(mesh)
    if c.optim.accum_steps < 1 or c.batch_size % (c.optim.accum_steps * shards):
        raise UserError(
            f"optim.accum_steps: batch_size {c.batch_size} must be a multiple of accum_steps x devices, "
            f"got {c.optim.accum_steps} x {shards}; change one of them"
        )
    if c.loss.shortcut_every and c.batch_size // (c.optim.accum_steps * shards) % c.loss.shortcut_every:
        raise UserError(
            f"loss.shortcut_every: must divide the batch of a device and slice, "
            f"{c.batch_size} / ({c.optim.accum_steps} x {shards}), got {c.loss.shortcut_every}; change one of them"
        )
    if c.optim.flatten and mesh.shape["data"] != mesh.size:
        raise UserError(
            "optim.flatten: one vector of moments can't be sharded; set it to False, or mesh.fsdp and tensor to 1"
        )
    if c.mesh.explicit and mesh.shape["tensor"] > 1:
        raise UserError(
            f"mesh.explicit: layers can't be split in it, got mesh.tensor {mesh.shape['tensor']}; set one of them back"
        )
