"""LPIPS v0.1 (Zhang et al. 2018): how different two images look, by the features of AlexNet or VGG16.

Follows the package `lpips` of the paper's authors. Parameter paths are torchvision's for the classifier
(`features.0.weight`) and the package's for the weights of its channels (`lin0.model.1.weight`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from semflow_jax.errors import UserError
from semflow_jax.models.layers import Conv
from semflow_jax.models.unet import Slot

# ImageNet's mean and standard deviation, of images in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPS = 1e-10

# Layers after whose relu the images are compared, by their number in torchvision's `features`.
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
MIN_SIDE = {"alex": 31, "vgg": 16}  # smaller images leave nothing of the last map


def _alex_layers(rngs: nnx.Rngs) -> list[Any]:
    def pool(x):
        return nnx.max_pool(x, (3, 3), (2, 2))

    relu = jax.nn.relu
    layers = [Conv(3, 64, 11, stride=4, padding=((2, 2), (2, 2)), rngs=rngs), relu, pool]
    layers += [Conv(64, 192, 5, rngs=rngs), relu, pool]
    return layers + [layer for n, m in ((192, 384), (384, 256), (256, 256)) for layer in (Conv(n, m, rngs=rngs), relu)]


def _vgg_layers(rngs: nnx.Rngs) -> list[Any]:
    def pool(x):
        return nnx.max_pool(x, (2, 2), (2, 2))

    layers: list[Any] = []
    n = 3
    for width, depth in zip(WIDTHS["vgg"], (2, 2, 3, 3, 3), strict=True):
        for _ in range(depth):
            layers += [Conv(n, width, rngs=rngs), jax.nn.relu]
            n = width
        layers.append(pool)
    return layers[:-1]


class Head(nnx.Module):
    """Weights of a map's channels, after a place for the package's dropout."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.model = nnx.List([Slot(), Conv(channels, 1, kernel=1, bias=False, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        return self.model[1](x)


def _normalise(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Every place's channels become a unit vector."""
    return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)) + EPS)


class LPIPS(nnx.Module):
    """Distance of pairs of images in [-1, 1]. Args: net: 'alex', the usual one for evaluation, or 'vgg'."""

    def __init__(self, net: str, *, rngs: nnx.Rngs):
        self.net = net
        self.features = nnx.List({"alex": _alex_layers, "vgg": _vgg_layers}[net](rngs))
        self.lin0, self.lin1, self.lin2, self.lin3, self.lin4 = (Head(n, rngs=rngs) for n in WIDTHS[net])

    def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Raises `UserError` where the images are too small for the network."""
        if min(a.shape[1:3]) < MIN_SIDE[self.net]:
            raise UserError(
                f"LPIPS: images for {self.net!r} must have at least {MIN_SIDE[self.net]} pixels a side, "
                f"found {a.shape[1]} x {a.shape[2]}: enlarge them"
            )
        heads = iter((self.lin0, self.lin1, self.lin2, self.lin3, self.lin4))
        x = (jnp.concatenate([a, b]) - SHIFT) / SCALE
        distance = jnp.zeros(len(a), x.dtype)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS[self.net]:
                unit = _normalise(x)
                distance += next(heads)(jnp.square(unit[: len(a)] - unit[len(a) :])).mean((1, 2, 3))
        return distance
