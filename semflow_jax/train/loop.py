"""The run, on one page: build, restore, step, log, evaluate, save, stop when asked."""

import contextlib
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
from tqdm import tqdm

from semflow_jax import parallel
from semflow_jax.data.pipeline import make_train_iterator
from semflow_jax.models.build import abstract_unet, count_params
from semflow_jax.train.checkpoint import Checkpoints
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.setup import Setup, begin
from semflow_jax.train.step import TrainState, make_state, make_train_step
from semflow_jax.train.writer import Writer

log = logging.getLogger(__name__)


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
        lambda params: make_state(s.start.make_params() if params is None else params, optimizer),
        donate_argnums=0,
        out_shardings=everywhere,
        compiler_options=options,
    )
    batches = make_train_iterator(
        s.train_dir,
        parallel.local_batch_size(c.batch_size, s.mesh),
        seed=c.seed,
        flip=c.data.flip,
        crop_scale=c.data.crop_scale,
        crop_ratio=c.data.crop_ratio,
        jitter=c.data.jitter,
        max_corrupt=c.data.max_corrupt,
        num_workers=c.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    # From here on the run has begun: every value has been checked.
    begin(s, workdir)
    checkpoints = Checkpoints(workdir)
    shapes = jax.eval_shape(init_fn, None if s.start.drawn else abstract_unet(s.start.unet))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    restored = checkpoints.restore(abstract, batches)
    state = restored
    if state is None:
        state = init_fn(None if s.start.drawn else s.start.make_params())
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
    batch = parallel.to_global(next(batches), s.mesh)
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
    waited = 0.0  # seconds of the window in which the loop had no batch to go on with
    with stop_signals() as received, bar, batches:
        for step in range(start + 1, c.num_steps + 1):
            state, metrics = step_fn(state, frozen, batch, key)
            stopping = bool(received)  # read once: a signal that comes later is the next step's
            pausing = stopping or step == c.num_steps or step % c.checkpoint_every == 0 or step % c.eval_every == 0
            # The next batch is taken while the devices compute, except where the position in the data is to be saved.
            if not pausing:
                batch, took = _take(batches, s.mesh)
                waited += took
            if window:
                jax.block_until_ready(window[-1])  # one step ahead of the devices, no more
            window.append(metrics)
            bar.update()

            if step % c.log_every == 0 or step == c.num_steps:
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
                    log.info("stopped by signal %d, saved step %d: run the same command to go on", received[0], step)
                    sys.exit(0)
                window_start += time.perf_counter() - pause
                if step < c.num_steps:
                    batch, took = _take(batches, s.mesh)
                    waited += took
    checkpoints.close()
    if writer is not None:
        writer.close()
    return state


def _take(batches: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> tuple[dict[str, jax.Array], float]:
    """The next batch, and the seconds that it took."""
    start = time.perf_counter()
    return parallel.to_global(next(batches), mesh), time.perf_counter() - start


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
