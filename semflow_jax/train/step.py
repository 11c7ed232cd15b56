"""One training step: a pure function of (state, frozen parameters, batch, key).

    pixels -> z_0, z_1 (frozen codec) -> z_t, v* (flow) -> v (network) -> loss -> AdamW -> EMA

All randomness of an example comes from the key, the step and the example's place in the global batch, so that a
resumed run is the same run, and a run on other devices, or in other slices, is nearly the same: sums are in another
order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from semflow_jax import coupling, flow, noise, parallel, reflow, shortcut
from semflow_jax.data.info import VOID
from semflow_jax.models.build import Params
from semflow_jax.sampling import Frozen, Sampler
from semflow_jax.train.gradient import make_gradient_fn

TrainState = dict[str, Any]  # step, params, ema, opt_state: a plain dict of arrays
Batch = dict[str, Array]  # image [b h w 3] or its latents, label [b h w 1], index [b]: see `data/pipeline.py`


def make_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.array, params),
        "opt_state": optimizer.init(params),
    }


def make_train_step(
    sampler: Sampler, optimizer: optax.GradientTransformation, c: ConfigDict, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Builds step(state, frozen, batch, key) -> (state, metrics); see the module docstring."""
    error_fn = flow.make_error_fn(c.loss.kind, c.loss.huber_delta)

    def loss_fn(params: Params, frozen: Frozen, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        key_encode, key_perturb, key_time = noise.split(batch["key"], 3)
        every = c.loss.shortcut_every
        if "draw" in batch:  # the flow's own z_0 come with the perturbation that they were made from
            key_perturb = reflow.keys_of_pairs(batch["draw"], key_perturb)
        z0 = sampler.image_latent(frozen, batch, key_encode)
        z1 = sampler.mask_latent(frozen, batch, key_perturb)
        t = flow.sample_time(key_time, z0.shape[0], c.loss.time_sampling)
        v_true, d = flow.velocity(z0, z1), jnp.zeros_like(t)
        if every:
            t_jump, d_jump = shortcut.sample_jump(shortcut.take(every, key_time), len(t) // every)
            t, d = shortcut.put(every, t_jump, t), shortcut.put(every, d_jump, d)
        zt = flow.interpolate(z0, z1, t)
        if every:
            jumped = shortcut.target(
                lambda *args: sampler.velocity(params, frozen, *args), shortcut.take(every, zt), t_jump, d_jump
            )
            v_true = shortcut.put(every, jumped, v_true)
        v = sampler.velocity(params, frozen, zt, t, d)
        weight = coupling.channel_weight(c.objective, c.loss.image_weight, z0.shape[-1])
        if c.loss.mask_void:
            valid = sampler.codec.pool((batch["label"] != VOID).astype(jnp.float32))
            weight = valid if weight is None else weight * valid
        return flow.loss_terms(v, v_true, weight, error_fn)

    gradient_fn = make_gradient_fn(loss_fn, c, mesh)

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: PRNGKeyArray):
        keys = noise.example_keys(jax.random.fold_in(key, state["step"]), batch["index"])
        loss, grads = gradient_fn(state["params"], frozen, batch | {"key": keys})
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        count = state["step"] + 1
        decay = jnp.minimum(c.optim.ema, count / (count + 10.0))  # short memory while the weights still move fast
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        new = {"step": count, "params": params, "ema": ema, "opt_state": opt_state}
        return jax.lax.with_sharding_constraint(new, parallel.shardings(new, mesh)), metrics

    return step
