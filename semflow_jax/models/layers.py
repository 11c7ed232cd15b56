"""Layers whose parameter names are a PyTorch checkpoint's: `weight` and `bias`.

Arrays are channels-last. Weights are stored as XLA likes them (convolutions HWIO, linear maps [in, out]); only the
order of axes differs from PyTorch's. `param_dtype` stores, `dtype` computes; norms compute in float32 whatever `dtype`
is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semflow_jax.errors import UserError

AnyArray = Any  # numpy in, numpy out; jax in, jax out
Padding = tuple[tuple[int, int], tuple[int, int]]

WIDE, SMALL = 2**20, 2**8  # weights per tap, and places of a map

fan_in_init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
zeros_init = nnx.initializers.zeros_init()


class Types:
    """What the networks' configs share: the names of the types that compute and store."""

    dtype: str
    param_dtype: str

    def types(self) -> dict[str, Any]:
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}


def check_size(network: str, image: Float[Array, "b h w c"], factor: int) -> None:
    """Raises UserError where height or width is no multiple of `factor`."""
    height, width = image.shape[1:3]
    if height % factor or width % factor:
        raise UserError(
            f"{network}.encode: height and width must be multiples of {factor}, "
            f"found {height} x {width}: crop or resize the image"
        )


def _convolve(
    x: Float[Array, "b h w cin"], weight: Float[Array, "kh kw cgroup cout"], stride: int, padding: Padding
) -> Float[Array, "b ho wo cout"]:
    groups = x.shape[-1] // weight.shape[2]

    def native(x, weight):
        return jax.lax.conv_general_dilated(
            x,
            weight,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def by_patches(x, weight):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        kh, kw, _, cout = weight.shape
        h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
        patches = [x[:, i : i + h, j : j + w] for i in range(kh) for j in range(kw)]
        return jnp.concatenate(patches, axis=-1) @ weight.reshape(-1, cout)

    # On a CPU, one matrix product of all patches takes half the time of XLA's convolution where the weights outweigh
    # the map: 1280 channels at 8 x 8.
    wide = groups == 1 and weight.shape[2] * weight.shape[3] >= WIDE
    if stride == 1 and wide and x.shape[1] * x.shape[2] <= SMALL:
        return jax.lax.platform_dependent(x, weight, cpu=by_patches, default=native)
    return native(x, weight)


class Conv(nnx.Module):
    """2-D convolution, as `torch.nn.Conv2d`; `padding` is ((top, bottom), (left, right)), else half the kernel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        padding: Padding | None = None,
        bias: bool = True,
        groups: int = 1,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        weight_init=fan_in_init,
        rngs: nnx.Rngs,
    ):
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride = stride
        self.padding = ((kh // 2, kh // 2), (kw // 2, kw // 2)) if padding is None else padding
        self.dtype = dtype
        shape = (kh, kw, in_channels // groups, out_channels)
        self.weight = nnx.Param(weight_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype)) if bias else None

    def __call__(self, x: Float[Array, "b h w cin"]) -> Float[Array, "b ho wo cout"]:
        weight = self.weight[...].astype(self.dtype)
        if weight.shape[:3] == (1, 1, x.shape[-1]) and self.stride == 1:
            x = x.astype(self.dtype) @ weight[0, 0]
        else:
            x = _convolve(x.astype(self.dtype), weight, self.stride, self.padding)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class Linear(nnx.Module):
    """Affine map of the last axis, as `torch.nn.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        weight_init=fan_in_init,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.weight = nnx.Param(weight_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None

    def __call__(self, x: Float[Array, "... cin"]) -> Float[Array, "... cout"]:
        x = x.astype(self.dtype) @ self.weight[...].astype(self.dtype)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class BatchNorm(nnx.Module):
    """Normalisation by fixed statistics, as `torch.nn.BatchNorm2d` in evaluation."""

    def __init__(self, channels: int, eps: float = 1e-3, *, rngs: nnx.Rngs):
        del rngs  # constant initialisation; taken so that all layers are built alike
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.running_mean = nnx.Param(jnp.zeros((channels,)))
        self.running_var = nnx.Param(jnp.ones((channels,)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + self.eps)
        return x * scale + (self.bias[...] - self.running_mean[...] * scale)


class GroupNorm(nnx.Module):
    """Group normalisation over space and the channels of a group, as `torch.nn.GroupNorm`; returns `x.dtype`."""

    def __init__(self, channels: int, groups: int, eps: float, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        del rngs  # constant initialisation; taken so that all layers are built alike
        self.groups = groups
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x.astype(jnp.float32)
        y = y - self._group_mean(y)
        scale = self.weight[...] * jax.lax.rsqrt(self._group_mean(jnp.square(y)) + self.eps)
        return (y * scale + self.bias[...]).astype(x.dtype)

    def _group_mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        """Every channel's mean over its group. Space first: whole rows of channels add up faster than slices."""
        means = x.mean((1, 2)).reshape(x.shape[0], self.groups, -1)
        return jnp.repeat(means.mean(-1), means.shape[-1], axis=-1)[:, None, None, :]


class LayerNorm(nnx.Module):
    """Normalisation of the last axis, as `torch.nn.LayerNorm`; returns `x.dtype`."""

    def __init__(self, channels: int, eps: float = 1e-5, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        del rngs
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Doubles height and width, each pixel becoming a 2 x 2 square."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def to_patches(image: Float[AnyArray, "b h w c"], factor: int) -> Float[AnyArray, "b hz wz d"]:
    """Space to depth: [b h w c] -> [b h/f w/f f*f*c]."""
    b, h, w, c = image.shape
    x = image.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor * factor * c)


def from_patches(z: Float[AnyArray, "b hz wz d"], factor: int) -> Float[AnyArray, "b h w c"]:
    """Depth to space, the inverse of `to_patches`."""
    b, h, w, d = z.shape
    x = z.reshape(b, h, w, factor, factor, d // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, d // factor**2)
