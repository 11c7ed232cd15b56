"""The run, on one page: build, restore, step, log, evaluate, save, stop when asked."""

import contextlib
import dataclasses
import json
import logging
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from semflow_jax import flow, parallel, solve
from semflow_jax.codec import Codec, fit_patch_codec, make_codec
from semflow_jax.data.info import DataInfo
from semflow_jax.data.pipeline import make_train_iterator
from semflow_jax.data.records import count_records, load_info, open_records, spread_indices
from semflow_jax.errors import UserError
from semflow_jax.evaluate.runner import Evaluator
from semflow_jax.mask_code import fit_linear_code, make_mask_code
from semflow_jax.models.build import Params, count_params, init_unet, make_velocity_fn
from semflow_jax.models.unet import UNetConfig
from semflow_jax.sampling import Sampler
from semflow_jax.train.checkpoint import Checkpoints
from semflow_jax.train.optim import make_optimizer, make_schedule
from semflow_jax.train.step import TrainState, make_state, make_train_step
from semflow_jax.train.writer import Writer
from semflow_jax.weights.load import load_safetensors, prefixed, save_safetensors, split_prefixed

log = logging.getLogger(__name__)

NUM_FITTED = 2000  # training examples that codec and mask code are fitted to
FREE_KEYS = ("log_every", "eval_every", "checkpoint_every", "eval", "sampling")  # may change when a run goes on


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config stands for: everything but the weights."""

    config: ConfigDict
    data_dir: str
    info: DataInfo
    mesh: Mesh
    unet: UNetConfig
    fitted: dict[str, Params]
    sampler: Sampler
    evaluator: Evaluator


def make_setup(c: ConfigDict, data_dir: str, workdir: pathlib.Path) -> Setup:
    """Builds and checks everything that can be wrong before the first step.

    Raises:
        UserError: for any config value that does not fit the others, the data or the devices.
    """
    check_config(c, workdir)
    info = load_info(data_dir)
    missing = {"train", "val", "test"} - set(count_records(data_dir))
    if missing:
        raise UserError(f"{data_dir}: splits train, val and test needed, {sorted(missing)} missing; prepare it again")
    for key in ("num_steps", "log_every", "eval_every", "checkpoint_every"):
        if c[key] < 1:
            raise UserError(f"{key}: at least 1, got {c[key]}; raise it")
    if c.eval.num_samples < 2:
        raise UserError(f"eval.num_samples: at least 2, diversity is between two, got {c.eval.num_samples}; raise it")
    make_schedule(c.optim, c.num_steps)
    solve.check(c.sampling.solver, c.sampling.steps)
    if c.loss.time_sampling not in flow.TIME_SAMPLINGS:
        raise UserError(f"loss.time_sampling: one of {flow.TIME_SAMPLINGS}, got {c.loss.time_sampling!r}")
    mesh = parallel.make_mesh()
    parallel.local_batch_size(c.batch_size, mesh)
    parallel.local_batch_size(c.eval.batch_size, mesh, "eval.batch_size")
    if c.batch_size % (c.optim.accum_steps * mesh.size):
        raise UserError(
            f"optim.accum_steps: batch_size {c.batch_size} must be a multiple of accum_steps x devices, "
            f"got {c.optim.accum_steps} x {mesh.size}; change one of them"
        )
    codec = make_codec(c.codec, {})
    m = c.model.to_dict()
    if len({len(m["block_out_channels"]), len(m["attention"]), len(m["num_heads"])}) > 1:
        raise UserError(
            "model: block_out_channels, attention and num_heads need one entry per level each, "
            f"got {m['block_out_channels']}, {m['attention']}, {m['num_heads']}; make them equally long"
        )
    unet = UNetConfig(in_channels=codec.channels, out_channels=codec.channels, **m)
    unet.check()
    codec.latent_shape(info.size, unet.factor)
    fitted = _fitted(c, codec, data_dir, info, workdir)
    codec = make_codec(c.codec, fitted["codec"])
    code = make_mask_code(c.mask_code, codec, info.num_classes, fitted["code"])
    sampler = Sampler(make_velocity_fn(unet), codec, code)
    return Setup(c, data_dir, info, mesh, unet, fitted, sampler, Evaluator(sampler, data_dir, info, mesh, c))


def _fitted(c: ConfigDict, codec: Codec, data_dir: str, info: DataInfo, workdir: pathlib.Path) -> dict[str, Params]:
    """The arrays of codec and mask code that are fitted to training data: the run's own where it has begun."""
    file = workdir / "fitted.safetensors"
    if not (file.exists() and (workdir / "config.json").exists()):
        records = open_records(data_dir, "train")

        def chosen(kind: str) -> Iterator[np.ndarray]:
            return (records[i][kind] for i in spread_indices(len(records), NUM_FITTED))

        codec_params: Params = {}
        if c.codec.name == "patch" and c.codec.whiten:
            codec_params = fit_patch_codec(chosen("image"), c.codec.factor, c.codec.whiten)
        code: Params = {}
        if c.mask_code.name == "linear":
            code = fit_linear_code(chosen("label"), info.num_classes, codec, c.mask_code.whiten)
        save_safetensors(file, prefixed({"codec": codec_params, "code": code}))
    return split_prefixed(load_safetensors(file), ("codec", "code"))


def _plain(c: ConfigDict) -> dict[str, Any]:
    return json.loads(c.to_json_best_effort())


def check_config(c: ConfigDict, workdir: pathlib.Path) -> None:
    """A run that goes on must have the config it began with.

    Raises:
        UserError: naming the keys that differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    ours, theirs = _plain(c), json.loads(path.read_text())
    changed = [key for key in ours if key not in FREE_KEYS and ours[key] != theirs.get(key)]
    if changed:
        raise UserError(
            f"{path}: a run goes on with the config it began with, changed: {', '.join(changed)}; "
            "undo that, or choose another --workdir"
        )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; the loop looks between two steps."""
    received: list[int] = []
    old = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(s: Setup, workdir: pathlib.Path) -> TrainState:
    """Trains from the newest checkpoint, or from nothing, to `config.num_steps`; returns the state.

    A stop signal saves and exits with code 0; a killed run goes on from its last checkpoint. Either way the parameters
    end up bitwise as if nothing had happened.
    """
    c = s.config
    main_process = jax.process_index() == 0

    # State first: its shapes tell what a checkpoint must hold.
    optimizer = make_optimizer(c.optim, c.num_steps)
    everywhere = parallel.replicated(s.mesh)
    # It runs once: on a CPU, optimising it would take many times as long as running it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init_fn = jax.jit(
        lambda: make_state(init_unet(s.unet, c.seed), optimizer), out_shardings=everywhere, compiler_options=options
    )
    iterator = make_train_iterator(
        s.data_dir,
        parallel.local_batch_size(c.batch_size, s.mesh),
        seed=c.seed,
        flip=c.data.flip,
        crop_scale=c.data.crop_scale,
        num_workers=c.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    # From here on the run has begun: every value has been checked.
    (workdir / "config.json").write_text(json.dumps(_plain(c), indent=2))
    checkpoints = Checkpoints(workdir)
    shapes = jax.eval_shape(init_fn)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    restored = checkpoints.restore(abstract, iterator)
    state = init_fn() if restored is None else restored
    start = int(state["step"])
    if main_process:
        if start:
            log.info("resumed at step %d of %d", start, c.num_steps)
        else:
            overview = parameter_overview.get_parameter_overview(state["params"], include_stats=False)
            (workdir / "parameters.txt").write_text(overview)
        log.info("%s parameters", f"{count_params(state['params']):,}")
    if start >= c.num_steps:
        checkpoints.close()
        return state

    frozen = jax.device_put(s.sampler.frozen, everywhere)
    key = jax.random.key(c.seed)
    jitted = jax.jit(make_train_step(s.sampler, optimizer, c), donate_argnums=0)
    batch = parallel.to_global(next(iterator), s.mesh)
    compile_start = time.perf_counter()
    step_fn = jitted.lower(state, frozen, batch, key).compile()
    log.info("compiled the training step in %.0f s", time.perf_counter() - compile_start)

    writer = Writer(workdir, start) if main_process else None
    bar = tqdm(
        total=c.num_steps,
        initial=start,
        desc="train",
        unit="step",
        disable=not main_process,
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 15,
    )
    window: list[dict[str, jax.Array]] = []
    window_start = time.perf_counter()
    with stop_signals() as received, bar:
        for step in range(start + 1, c.num_steps + 1):
            state, metrics = step_fn(state, frozen, batch, key)
            stopping = bool(received)  # read once: a signal that comes later is the next step's
            pausing = stopping or step == c.num_steps or step % c.checkpoint_every == 0 or step % c.eval_every == 0
            # The next batch is read while the devices compute, except where the iterator's position is to be saved.
            if not pausing:
                batch = parallel.to_global(next(iterator), s.mesh)
            if window:
                jax.block_until_ready(window[-1])  # one step ahead of the devices, no more
            window.append(metrics)
            bar.update()

            if step % c.log_every == 0 or step == c.num_steps:
                means = {name: float(np.mean([m[name] for m in window])) for name in metrics}
                seconds = time.perf_counter() - window_start
                rate = len(window) * c.batch_size / seconds
                if writer is not None:
                    writer.scalars(step, means | {"images_per_second": rate, "seconds": seconds})
                bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{rate:.1f}")
                window, window_start = [], time.perf_counter()

            if pausing:
                pause = time.perf_counter()
                found = None
                if step % c.eval_every == 0 or step == c.num_steps:
                    found = s.evaluator.segmentation(state["ema"], frozen, "val", c.eval.limit)
                    if writer is not None:
                        writer.scalars(step, {f"val/{name}": found[name] for name in ("miou", "pixel_accuracy")})
                checkpoints.save(state, iterator, found and {"miou": found["miou"]})
                if stopping and step < c.num_steps:
                    checkpoints.close()
                    bar.close()  # so that the message begins a line
                    log.info("stopped by signal %d, saved step %d: run the same command to go on", received[0], step)
                    sys.exit(0)
                if step < c.num_steps:
                    batch = parallel.to_global(next(iterator), s.mesh)
                window_start += time.perf_counter() - pause
    checkpoints.close()
    if writer is not None:
        writer.close()
    return state


def summarize(rows: list[dict[str, Any]]) -> dict[str, int | float]:
    """Steps, seconds and images per second of a run, however often it was resumed, from its metrics."""
    logged = [row for row in rows if "seconds" in row]
    seconds = sum(row["seconds"] for row in logged)
    images = sum(row["seconds"] * row["images_per_second"] for row in logged)
    return {
        "steps": max((row["step"] for row in logged), default=0),
        "seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
    }
