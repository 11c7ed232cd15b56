"""A training step from pixels and from kept latents.

python benchmarks/latents.py --config=configs/camvid.py --workdir=DIR

Both take turns (A B A B ...), batches read from disk as in a run; medians, and the ratio of each pair.
"""

import json
import pathlib
import platform
import statistics
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from semflow_jax import parallel
from semflow_jax.train.loop import make_batches
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.setup import make_setup
from semflow_jax.train.step import make_state, make_train_step

CONFIG = config_flags.DEFINE_config_file("config", "configs/camvid.py", "What to train.")
WORKDIR = flags.DEFINE_string("workdir", "runs/latents", "Any folder.")
TURNS = flags.DEFINE_integer("turns", 5, "How often each is timed.")
STEPS = flags.DEFINE_integer("steps", 5, "Steps of a turn.")


def make_turn(latents: bool):
    """A function that trains for a turn and returns its seconds a step."""
    c = CONFIG.value.copy_and_resolve_references()
    with c.unlocked():
        c.data.latents = latents
    s = make_setup(c, pathlib.Path(WORKDIR.value))
    optimizer = make_optimizer(c.optim, c.num_steps)
    state = jax.jit(lambda: make_state(s.start.make_params(), optimizer))()
    step = jax.jit(make_train_step(s.sampler, optimizer, c, s.mesh), donate_argnums=0)
    batches = make_batches(s)
    key = jax.random.key(c.seed)

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(STEPS.value):
            state, metrics = step(state, s.sampler.frozen, parallel.to_global(next(batches), s.mesh), key)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / STEPS.value

    run()  # compiles
    return run


def main(_) -> None:
    parallel.use_cpu_devices(CONFIG.value.cpu_devices)
    pixels, latents = make_turn(False), make_turn(True)
    pairs = [(pixels(), latents()) for _ in range(TURNS.value)]
    result = {
        "seconds_from_pixels": statistics.median(a for a, _ in pairs),
        "seconds_from_latents": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "machine": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(main)
