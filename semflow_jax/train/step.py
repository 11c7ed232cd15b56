"""One training step: a pure function of (state, frozen parameters, batch, key).

    pixels -> z_0, z_1 (frozen codec) -> z_t, v* (flow) -> v (network) -> loss -> AdamW -> EMA

All randomness comes from `fold_in(key, step)`, so that a resumed run is the same run.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from semflow_jax import flow
from semflow_jax.data.info import VOID
from semflow_jax.models.build import Params
from semflow_jax.sampling import Frozen, Sampler

TrainState = dict[str, Any]  # step, params, ema, opt_state: a plain dict of arrays
Batch = dict[str, Array]  # image [b h w 3] or its latents, label [b h w 1]: see `data/pipeline.py`


def make_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.array, params),
        "opt_state": optimizer.init(params),
    }


def make_train_step(
    sampler: Sampler,
    optimizer: optax.GradientTransformation,
    c: ConfigDict,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Builds step(state, frozen, batch, key) -> (state, metrics); see the module docstring."""

    def loss_fn(params: Params, frozen: Frozen, batch: Batch, key: PRNGKeyArray) -> Float[Array, ""]:
        key_encode, key_perturb, key_time = jax.random.split(key, 3)
        z0 = sampler.image_latent(frozen, batch, key_encode)
        z1 = sampler.encode_mask(frozen, batch["label"], key_perturb)
        t = flow.sample_time(key_time, z0.shape[0], c.loss.time_sampling)
        v = sampler.velocity(params, frozen, flow.interpolate(z0, z1, t), t)
        weight = None
        if c.loss.mask_void:
            weight = sampler.codec.pool((batch["label"] != VOID).astype(jnp.float32))
        return flow.loss(v, flow.velocity(z0, z1), weight)

    def gradient(params: Params, frozen: Frozen, batch: Batch, key: PRNGKeyArray):
        """Loss and gradient, averaged over `accum_steps` slices of the batch that pass one after the other."""
        slices = c.optim.accum_steps
        if slices == 1:
            return jax.value_and_grad(loss_fn)(params, frozen, batch, key)
        split = jax.tree.map(lambda x: x.reshape(slices, x.shape[0] // slices, *x.shape[1:]), batch)

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, frozen, *inputs)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, (split, jax.random.split(key, slices)))
        return jax.tree.map(lambda x: x / slices, total)

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: PRNGKeyArray):
        key = jax.random.fold_in(key, state["step"])
        loss, grads = gradient(state["params"], frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        count = state["step"] + 1
        decay = jnp.minimum(c.optim.ema, count / (count + 10.0))  # short memory while the weights still move fast
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return {"step": count, "params": params, "ema": ema, "opt_state": opt_state}, metrics

    return step
