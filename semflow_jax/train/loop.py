"""The run, on one page: build, restore, step, log, evaluate, save, stop when asked."""

import dataclasses
import logging
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from tqdm import tqdm

from semflow_jax import parallel
from semflow_jax.data.pipeline import TrainBatches, make_train_iterator
from semflow_jax.errors import UserError
from semflow_jax.models.build import abstract_unet, count_params
from semflow_jax.train.checkpoint import Checkpoints
from semflow_jax.train.guard import StopSignals, Watchdog, check_finite
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.setup import Setup, begin
from semflow_jax.train.step import TrainState, make_state, make_train_step
from semflow_jax.train.writer import Writer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Running:
    """A step that the devices may still be busy with."""

    step: int
    first: int  # position in the stream of its first example
    metrics: dict[str, jax.Array]


def train(s: Setup, workdir: pathlib.Path) -> TrainState:
    """Trains from the newest checkpoint, or from nothing, to `config.num_steps`; returns the state.

    A stop signal saves and exits with code 0; a killed run goes on from its last checkpoint. Either way the parameters
    end up bitwise as if nothing had happened.

    Raises:
        UserError: a loss that is no number; checkpoints that can't be read.
    """
    c = s.config
    main_process = jax.process_index() == 0

    # State first: its shapes tell what a checkpoint must hold.
    optimizer = make_optimizer(c.optim, c.num_steps)
    abstract = jax.eval_shape(lambda params: make_state(params, optimizer), abstract_unet(s.start.unet))
    layout = parallel.shardings(abstract, s.mesh)
    # It runs once: on a CPU, optimising it would take many times as long as running it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init_fn = jax.jit(
        lambda params: make_state(s.start.make_params() if params is None else params, optimizer),
        donate_argnums=0,
        out_shardings=layout,
        compiler_options=options,
    )
    batches = make_batches(s)
    # From here on the run has begun: every value has been checked.
    begin(s, workdir)
    checkpoints = Checkpoints(workdir)
    placed = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, layout)
    state = checkpoints.restore(placed, batches)
    if state is None:
        state = init_fn(None if s.start.drawn else parallel.place(s.start.make_params(), layout["params"]))
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

    frozen = parallel.everywhere(s.sampler.frozen, s.mesh)
    key = jax.random.key(c.seed)
    jitted = jax.jit(make_train_step(s.sampler, optimizer, c, s.mesh), donate_argnums=0)
    first, batch, _ = _take(batches, s)
    compile_start = time.perf_counter()
    step_fn = jitted.lower(state, frozen, batch, key).compile()
    log.info("compiled the training step in %.0f s", time.perf_counter() - compile_start)
    writer = Writer(workdir, start) if main_process else None
    parallel.wait_for_all("the training step is compiled")

    bar = tqdm(
        total=c.num_steps,
        initial=start,
        desc="train",
        unit="step",
        disable=not main_process,
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 15,
    )
    running: list[Running] = []
    window: list[dict[str, float]] = []
    window_start = time.perf_counter()
    waited = 0.0  # seconds of the window in which the loop had no batch to go on with
    with StopSignals() as signals, Watchdog(c.hang_seconds) as watchdog, bar, batches:
        for step in range(start + 1, c.num_steps + 1):
            state, metrics = step_fn(state, frozen, batch, key)
            running.append(Running(step, first, metrics))
            stopping = signals.asked(step)
            telling = step % c.log_every == 0 or step == c.num_steps
            pausing = stopping or step == c.num_steps or step % c.checkpoint_every == 0 or step % c.eval_every == 0
            # The next batch is taken while the devices compute, except where the position in the data is to be saved.
            if not pausing:
                first, batch, took = _take(batches, s)
                waited += took
            # The devices are one step ahead, no more; what is logged or saved has been looked at.
            while len(running) > (0 if telling or pausing else 1):
                done = running.pop(0)
                window.append({name: float(x) for name, x in done.metrics.items()})
                try:
                    check_finite(window[-1], done.step, batches, done.first, c.batch_size, workdir)
                except UserError:
                    checkpoints.close()  # what is being written is from before
                    raise
                watchdog.alive()
            bar.update()

            if telling:
                means = {name: float(np.mean([m[name] for m in window])) for name in metrics}
                seconds = time.perf_counter() - window_start
                rate = len(window) * c.batch_size / seconds
                if writer is not None:
                    speed = {"images_per_second": rate, "seconds": seconds, "data_wait": waited / seconds}
                    writer.scalars(step, means | speed)
                bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{rate:.1f}")
                window, window_start, waited = [], time.perf_counter(), 0.0

            if pausing:
                pause = time.perf_counter()
                found = None
                if step % c.eval_every == 0 or step == c.num_steps:
                    found = s.evaluator.segmentation(state["ema"], frozen, "val", c.eval.limit)
                    if writer is not None:
                        writer.scalars(step, {f"val/{name}": found[name] for name in ("miou", "pixel_accuracy")})
                checkpoints.save(state, batches, found and {"miou": found["miou"]})
                if stopping and step < c.num_steps:
                    checkpoints.close()
                    bar.close()  # so that the message begins a line
                    log.info("stopped by a signal, saved step %d: run the same command to go on", step)
                    sys.exit(0)
                window_start += time.perf_counter() - pause
                if step < c.num_steps:
                    first, batch, took = _take(batches, s)
                    waited += took
    checkpoints.close()
    if writer is not None:
        writer.close()
    return state


def make_batches(s: Setup) -> TrainBatches:
    """This process's part of the training data."""
    c = s.config
    part, num_parts = parallel.batch_share(s.mesh)
    return make_train_iterator(
        s.train_dir,
        parallel.local_batch_size(c.batch_size, s.mesh),
        seed=c.seed,
        balance=c.data.balance,
        flip=c.data.flip,
        crop_scale=c.data.crop_scale,
        crop_ratio=c.data.crop_ratio,
        jitter=c.data.jitter,
        share=c.reflow.share,
        max_corrupt=c.data.max_corrupt,
        num_workers=c.data.num_workers,
        process_index=part,
        process_count=num_parts,
    )


def _take(batches: TrainBatches, s: Setup) -> tuple[int, dict[str, jax.Array], float]:
    """The position of the next batch, the batch, and the seconds that it took."""
    start, first = time.perf_counter(), batches.seen
    return first, parallel.to_global(next(batches), s.mesh), time.perf_counter() - start


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
