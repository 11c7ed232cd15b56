"""Inception v3 (Szegedy et al. 2016) as the FID measures with it: TensorFlow's network of 2015-12-05, up to its pool.

Follows torch-fidelity's `FeatureExtractorInceptionV3` (Obukhov et al. 2020), which runs the port of pytorch-fid
(Seitzer 2020); parameter paths are the keys of that port's file. It differs from torchvision's Inception v3 in its
weights, in average pools that leave the border's zeros out of the mean, and in a last block that takes a maximum where
the paper has a mean. Batch norms have the statistics they were trained with, which are parameters like the others here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from semflow_jax.models.layers import BatchNorm, Conv

SIZE = (299, 299)
NUM_FEATURES = 2048
VALID = ((0, 0), (0, 0))  # no padding


class BasicConv(nnx.Module):
    """Convolution, batch norm, relu. Where `same`, the map keeps its size, which wants stride 1 and odd kernels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        same: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        padding = None if same else VALID
        self.conv = Conv(in_channels, out_channels, kernel, stride, padding, bias=False, rngs=rngs)
        self.bn = BatchNorm(out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w cin"]) -> Float[Array, "b ho wo cout"]:
        return jax.nn.relu(self.bn(self.conv(x)))


def _average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mean of the 3 x 3 neighbours that there are."""
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nnx.max_pool(x, (3, 3), (1, 1), "SAME")


def _halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nnx.Module):
    def __init__(self, n: int, pool_features: int, *, rngs: nnx.Rngs):
        self.branch1x1 = BasicConv(n, 64, rngs=rngs)
        self.branch5x5_1 = BasicConv(n, 48, rngs=rngs)
        self.branch5x5_2 = BasicConv(48, 64, 5, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv(n, 64, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, rngs=rngs)
        self.branch_pool = BasicConv(n, pool_features, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w n"]:
        return _join(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average_pool(x)),
        )


class InceptionB(nnx.Module):
    def __init__(self, n: int, *, rngs: nnx.Rngs):
        self.branch3x3 = BasicConv(n, 384, 3, stride=2, same=False, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv(n, 64, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, stride=2, same=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 n"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _join(self.branch3x3(x), double, _halve(x))


class InceptionC(nnx.Module):
    def __init__(self, n: int, c7: int, *, rngs: nnx.Rngs):
        across, along = (1, 7), (7, 1)
        self.branch1x1 = BasicConv(n, 192, rngs=rngs)
        self.branch7x7_1 = BasicConv(n, c7, rngs=rngs)
        self.branch7x7_2 = BasicConv(c7, c7, across, rngs=rngs)
        self.branch7x7_3 = BasicConv(c7, 192, along, rngs=rngs)
        self.branch7x7dbl_1 = BasicConv(n, c7, rngs=rngs)
        self.branch7x7dbl_2 = BasicConv(c7, c7, along, rngs=rngs)
        self.branch7x7dbl_3 = BasicConv(c7, c7, across, rngs=rngs)
        self.branch7x7dbl_4 = BasicConv(c7, c7, along, rngs=rngs)
        self.branch7x7dbl_5 = BasicConv(c7, 192, across, rngs=rngs)
        self.branch_pool = BasicConv(n, 192, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w n"]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return _join(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(x)),
        )


class InceptionD(nnx.Module):
    def __init__(self, n: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = BasicConv(n, 192, rngs=rngs)
        self.branch3x3_2 = BasicConv(192, 320, 3, stride=2, same=False, rngs=rngs)
        self.branch7x7x3_1 = BasicConv(n, 192, rngs=rngs)
        self.branch7x7x3_2 = BasicConv(192, 192, (1, 7), rngs=rngs)
        self.branch7x7x3_3 = BasicConv(192, 192, (7, 1), rngs=rngs)
        self.branch7x7x3_4 = BasicConv(192, 192, 3, stride=2, same=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 n"]:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return _join(self.branch3x3_2(self.branch3x3_1(x)), long, _halve(x))


class InceptionE(nnx.Module):
    """Args: pool: of the last branch, a mean in the first of the two blocks and a maximum in the second."""

    def __init__(self, n: int, pool: Any, *, rngs: nnx.Rngs):
        across, along = (1, 3), (3, 1)
        self.pool = pool
        self.branch1x1 = BasicConv(n, 320, rngs=rngs)
        self.branch3x3_1 = BasicConv(n, 384, rngs=rngs)
        self.branch3x3_2a = BasicConv(384, 384, across, rngs=rngs)
        self.branch3x3_2b = BasicConv(384, 384, along, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv(n, 448, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv(448, 384, 3, rngs=rngs)
        self.branch3x3dbl_3a = BasicConv(384, 384, across, rngs=rngs)
        self.branch3x3dbl_3b = BasicConv(384, 384, along, rngs=rngs)
        self.branch_pool = BasicConv(n, 192, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w n"]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _join(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )


def _interpolate(x: Float[Array, "b h w c"], axis: int, num: int) -> Float[Array, "b H W c"]:
    """One axis of `resize_like_tf1`."""
    place = np.arange(num, dtype=np.float32) * np.float32(x.shape[axis] / num)
    low = place.astype(np.int32)
    fraction = np.expand_dims(place - low, tuple(i for i in range(4) if i != axis))
    below, above = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, x.shape[axis] - 1)))
    return below + (above - below) * fraction


def resize_like_tf1(image: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b H W c"]:
    """Bilinear, as TensorFlow 1's `resize_bilinear(align_corners=False)` and torch-fidelity's copy of it: pixel i of n
    samples the image at i * old / n, without half a pixel's shift and, when it shrinks, without antialiasing.
    """
    return _interpolate(_interpolate(image, 2, size[1]), 1, size[0])


class InceptionV3(nnx.Module):
    """Images, 0..255 and of any size -> what the last pool holds."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = BasicConv(3, 32, 3, stride=2, same=False, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv(32, 32, 3, same=False, rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv(32, 64, 3, rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv(64, 80, rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv(80, 192, 3, same=False, rngs=rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs=rngs)
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, _average_pool, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, _max_pool, rngs=rngs)

    def __call__(self, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        x = (resize_like_tf1(image.astype(jnp.float32), SIZE) - 128) / 128
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((1, 2))
