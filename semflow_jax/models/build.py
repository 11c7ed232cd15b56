"""The only place where NNX meets the training loop: a module becomes a flat dict of arrays, merged inside jit."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, traverse_util
from jaxtyping import Array

from semflow_jax.models.tiny_vae import TINY_VAES, TinyVAE
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


def _make_abstract(make_fn: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Abstract]:
    module = nnx.eval_shape(make_fn)
    return nnx.split(module)[0], flatten(module)


def init_unet(config: UNetConfig, seed: int = 0) -> Params:
    """Initial parameters of the velocity network; call it inside jit."""
    return flatten(UNet(config, rngs=nnx.Rngs(seed)))


def abstract_unet(config: UNetConfig) -> Abstract:
    """Shapes and types of the parameters; nothing is allocated."""
    return _make_abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))[1]


def make_velocity_fn(config: UNetConfig) -> Callable[..., Array]:
    """Returns velocity(params, zt, t, context=None) -> v, a pure function."""
    graphdef, _ = _make_abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))

    def velocity(params: Params, zt, t, context=None):
        return nnx.merge(graphdef, _unflatten(params))(zt, t, context)

    return velocity


def make_tiny_vae_fns(name: str) -> tuple[Callable[..., Array], Callable[..., Array], Abstract]:
    """Returns encode(params, image), decode(params, z), and the abstract parameters, of a tiny autoencoder."""
    graphdef, abstract = _make_abstract(lambda: TinyVAE(TINY_VAES[name], rngs=nnx.Rngs(0)))

    def encode(params: Params, image):
        return nnx.merge(graphdef, _unflatten(params)).encode(image)

    def decode(params: Params, z):
        return nnx.merge(graphdef, _unflatten(params)).decode(z)

    return encode, decode, abstract


def count_params(params: Params) -> int:
    return sum(leaf.size for leaf in params.values())
