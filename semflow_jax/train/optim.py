"""AdamW with warm-up and gradient clipping, as the official recipe; every constant a config value."""

import optax
from ml_collections import ConfigDict

from semflow_jax.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(c: ConfigDict, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `c.lr`, then constant, or linear or cosine decay to zero."""
    if c.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule: one of {SCHEDULES}, got {c.schedule!r}")
    rest = max(num_steps - c.warmup, 1)
    after = {
        "constant": optax.constant_schedule(c.lr),
        "linear": optax.linear_schedule(c.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(c.lr, rest),
    }[c.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, c.lr, c.warmup), after], [c.warmup])


def make_optimizer(c: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW.

    `c.flatten` keeps all moments in one vector: half the compile time for small networks, but nothing to shard.
    """
    adamw = optax.adamw(make_schedule(c, num_steps), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay)
    chain = optax.chain(optax.clip_by_global_norm(c.clip), adamw)
    return optax.flatten(chain) if c.flatten else chain
