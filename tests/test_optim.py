"""train/optim.py: learning rates by step, and AdamW as the paper of AdamW has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from semflow_jax.errors import UserError
from semflow_jax.train.optim import SCHEDULES, make_optimizer, make_schedule


def make_config(**changes) -> ConfigDict:
    c = {"lr": 0.1, "schedule": "constant", "warmup": 10, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
    return ConfigDict(c | {"clip": 1.0, "flatten": False} | changes)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_in_closed_form(name):
    schedule = make_schedule(make_config(schedule=name), 110)
    after = {
        "constant": lambda share: 1.0,
        "linear": lambda share: 1 - share,
        "cosine": lambda share: (1 + np.cos(np.pi * share)) / 2,
    }[name]
    for step in (0, 1, 5, 10, 35, 60, 110):
        expected = 0.1 * (step / 10 if step < 10 else after((step - 10) / 100))
        assert schedule(step) == pytest.approx(expected, abs=1e-7)


def test_no_warmup_begins_at_the_full_rate():
    assert make_schedule(make_config(warmup=0), 100)(0) == pytest.approx(0.1)


def test_unknown_schedule():
    with pytest.raises(UserError, match="optim.schedule: one of .*, got 'zigzag'"):
        make_schedule(make_config(schedule="zigzag"), 100)


@pytest.mark.parametrize("flatten", [False, True])
def test_clipped_adamw_by_hand(flatten):
    """Gradients of norm 5, clipped to 1; three steps of the textbook's recurrences, decay decoupled."""
    c = make_config(warmup=0, flatten=flatten)
    optimizer = make_optimizer(c, 100)
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    state = optimizer.init(params)
    x, g, m, v = np.array([1.0, -2.0, 0.5]), np.array([0.6, 0.0, 0.8]), np.zeros(3), np.zeros(3)
    for step in range(1, 4):
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        adam = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
        x = x - 0.1 * (adam + 0.01 * x)
    np.testing.assert_allclose(np.concatenate([params["a"], params["b"][0]]), x, rtol=1e-5)
