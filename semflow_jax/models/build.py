"""The only place where NNX meets the training loop: a module becomes a flat dict of arrays, merged inside jit."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, traverse_util
from jaxtyping import Array

from semflow_jax.models.unet import UNet, UNetConfig

Params = dict[str, Any]  # {'down_blocks.0.resnets.0.conv1.weight': array}: the paths are the checkpoint's keys
Abstract = dict[str, jax.ShapeDtypeStruct]  # the same without values


def flatten(module: nnx.Module) -> dict[str, Any]:
    """The arrays of a module by '.'-joined path, sorted."""
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(module)))
    return dict(sorted((".".join(str(part) for part in path), leaf) for path, leaf in flat.items()))


def _unflatten(params: Params) -> dict[str, Any]:
    """The nested dict that NNX wants: numbers are places in a list."""
    return traverse_util.unflatten_dict(
        {
            tuple(int(part) if part.isdigit() else part for part in path.split(".")): leaf
            for path, leaf in params.items()
        }
    )


class Rngs(nnx.Rngs):
    """Flax's, for parameters only, with the same keys; it counts them by itself.

    The counter of `nnx.Rngs` is an array, which inside a trace is asked for its sharding at every draw: an error that
    NNX catches, whose message goes through all of the trace. With 686 tensors that is three quarters of the time.
    """

    def __init__(self, seed: int):
        super().__init__(seed)
        self.drawn = 0

    def params(self) -> Array:
        key = jax.random.fold_in(self.default.key[...], self.drawn)
        self.drawn += 1
        return key


def make_fns(make_module: Callable[[nnx.Rngs], nnx.Module], *methods: str) -> tuple[Abstract, list[Callable[..., Any]]]:
    """Returns the abstract parameters of a module, and each method as a pure function of (params, *arguments).

    Nothing is allocated, and no weight initialised. A function is traced once for all calls with equal shapes: a
    solver alone traces its field three times. Inside another trace it is inlined, and leaves nothing of its own.
    """
    module = nnx.eval_shape(lambda: make_module(Rngs(0)))
    graphdef = nnx.split(module)[0]

    def make_fn(method: str) -> Callable[..., Array]:
        return jax.jit(
            lambda params, *args: getattr(nnx.merge(graphdef, _unflatten(params)), method)(*args), inline=True
        )

    return flatten(module), [make_fn(method) for method in methods]


def init_unet(config: UNetConfig, seed: int = 0) -> Params:
    """Initial parameters of the velocity network; call it inside jit."""
    return flatten(UNet(config, rngs=Rngs(seed)))


def abstract_unet(config: UNetConfig) -> Abstract:
    """Shapes and types of the parameters."""
    return make_fns(lambda rngs: UNet(config, rngs=rngs))[0]


@functools.cache
def make_velocity_fn(config: UNetConfig) -> Callable[..., Array]:
    """Returns velocity(params, zt, t, context=None) -> v, a pure function."""
    return make_fns(lambda rngs: UNet(config, rngs=rngs), "__call__")[1][0]


def count_params(params: Params) -> int:
    return sum(leaf.size for leaf in params.values())
