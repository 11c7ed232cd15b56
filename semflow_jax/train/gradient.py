"""The gradient of a batch: in slices, on many devices.

The loss is a quotient of sums, L = sum_i e_i / sum_i w_i over slices and devices i, and w does not depend on the
parameters:

    grad L = sum_i grad e_i / sum_i w_i.                                                                         (1)

Parameters are stored in shards. Once a step they are cast to the type that computes and gathered (ZeRO, stage 2); the
slices that follow gather nothing. The gradient of a parameter goes back to where its shard is. Two forms:

    jit        the compiler divides the work, by the shardings of arguments and results; any mesh
    explicit   each device runs the program of `jax.shard_map` on its own examples, and what it exchanges stands
               in the code: as with pmap, and nothing crosses between slices. No `tensor` axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from semflow_jax import parallel
from semflow_jax.models.build import Params

LossFn = Callable[..., tuple[Float[Array, ""], Float[Array, ""]]]  # (params, frozen, batch) -> terms of the loss
P = PartitionSpec


def make_gradient_fn(loss_fn: LossFn, c: ConfigDict, mesh: Mesh) -> Callable[..., tuple[Float[Array, ""], Params]]:
    """Builds gradient(params, frozen, batch) -> (loss, gradient), the latter sharded as the parameters."""
    dtype = jnp.dtype(c.model.dtype)

    def cast(x: Array) -> Array:
        return x.astype(dtype) if x.ndim > 1 else x  # norms and biases are small, and compute in their own type

    def sums(weights: Params, frozen: Any, batch: Any, settle: Callable[[Params], Params]):
        """The sums of (1) over slices; `settle` says where a partial sum lives."""
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def of_slice(inputs):
            terms, grads = grad_fn(weights, frozen, inputs)
            return terms, settle(jax.tree.map(lambda x: x.astype(jnp.float32), grads))

        if c.optim.accum_steps == 1:
            return of_slice(batch)
        slices = jax.tree.map(functools.partial(_slice, num=c.optim.accum_steps), batch)
        zero = settle(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), weights))
        start = ((jnp.zeros(()), jnp.zeros(())), zero)
        return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, of_slice(x)), None), start, slices)[0]

    def by_jit(params: Params, frozen: Any, batch: Any):
        constrain = jax.lax.with_sharding_constraint
        weights = constrain(jax.tree.map(cast, params), parallel.shardings(params, mesh, fsdp=False))
        return sums(weights, frozen, batch, lambda grads: constrain(grads, parallel.shardings(params, mesh)))

    def explicit(params: Params, frozen: Any, batch: Any):
        specs = {path: parallel.param_spec(path, x.shape, mesh) for path, x in params.items()}
        axes = {path: list(spec).index("fsdp") if "fsdp" in spec else None for path, spec in specs.items()}

        def gather(x: Array, axis: int | None) -> Array:
            return x if axis is None else jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)

        def scatter(x: Array, axis: int | None) -> Array:
            if axis is None:
                return jax.lax.psum(x, parallel.EXAMPLES)
            return jax.lax.psum(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True), "data")

        def of_device(params: Params, frozen: Any, batch: Any):
            weights = {path: gather(cast(x), axes[path]) for path, x in params.items()}
            terms, grads = sums(weights, frozen, batch, lambda grads: grads)
            return jax.lax.psum(terms, parallel.EXAMPLES), {path: scatter(x, axes[path]) for path, x in grads.items()}

        program = jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(specs, P(), P(parallel.EXAMPLES)),
            out_specs=(P(), specs),
            check_vma=False,  # the kernels of attention don't say over which axes their results vary
        )
        return program(params, frozen, batch)

    def gradient(params: Params, frozen: Any, batch: Any):
        (error, weight), grads = (explicit if c.mesh.explicit else by_jit)(params, frozen, batch)
        weight = jnp.maximum(weight, 1e-6)
        return error / weight, jax.tree.map(lambda x: x / weight, grads)

    return gradient


def _slice(x: Array, num: int) -> Array:
    """[b ...] -> [num b/num ...]; slice i takes every num-th example from i on, so that no example changes device."""
    return jnp.swapaxes(x.reshape(x.shape[0] // num, num, *x.shape[1:]), 0, 1)
