"""ESPNet (Mehta et al., ECCV 2018), p = 2 and q = 8: a small segmenter of street scenes, as a judge from outside.

Follows the authors' `train/Model.py`, whose last convolution also sees the small image: their CamVid weights are this
network's, those for Cityscapes are not. Parameter paths are the keys of their checkpoints. Batch norms have the
statistics they were trained with.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from semflow_jax.models.inception import BatchNorm
from semflow_jax.models.layers import Conv, check_size, fan_in_init

MEAN, STD = (110.331, 108.409, 105.033), (72.126, 72.691, 69.904)  # of channels in the order blue, green, red
DILATIONS = (1, 2, 4, 8, 16)
FACTOR = 8  # height and width must be multiples of it


class PlainConv(nnx.Module):
    """A convolution without bias that stands alone."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 1, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv = Conv(n_in, n_out, kernel, stride, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ho wo n"]:
        return self.conv(x)


class Dilated(nnx.Module):
    """The weights of a 3 x 3 convolution without bias."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(fan_in_init(rngs.params(), (3, 3, n_in, n_out), jnp.float32))


class DilatedConv(nnx.Module):
    """A 3 x 3 convolution whose taps lie `dilation` pixels apart; the map keeps its size."""

    def __init__(self, n_in: int, n_out: int, dilation: int, *, rngs: nnx.Rngs):
        self.dilation = dilation
        self.conv = Dilated(n_in, n_out, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w n"]:
        return jax.lax.conv_general_dilated(
            x,
            self.conv.weight[...],
            (1, 1),
            2 * ((self.dilation, self.dilation),),
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class PReLU(nnx.Module):
    """max(x, 0) + weight min(x, 0), a weight for every channel."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        del rngs  # constant initialisation; taken so that all layers are built alike
        self.weight = nnx.Param(jnp.full((channels,), 0.25))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jnp.where(x >= 0, x, self.weight[...] * x)


class NormAct(nnx.Module):
    """Batch norm, then PReLU."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.bn = BatchNorm(channels, rngs=rngs)
        self.act = PReLU(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.act(self.bn(x))


class ConvNormAct(NormAct):
    """A convolution before it."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, *, rngs: nnx.Rngs):
        super().__init__(n_out, rngs=rngs)
        self.conv = Conv(n_in, n_out, kernel, stride, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ho wo n"]:
        return super().__call__(self.conv(x))


class Pyramid(nnx.Module):
    """Narrow, filter at five dilations side by side, add up the wide ones one after the other against grids."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 1, stride: int = 1, *, rngs: nnx.Rngs):
        n = n_out // 5
        self.c1 = PlainConv(n_in, n, kernel, stride, rngs=rngs)
        self.d1 = DilatedConv(n, n_out - 4 * n, 1, rngs=rngs)
        self.d2, self.d4, self.d8, self.d16 = (DilatedConv(n, n, d, rngs=rngs) for d in DILATIONS[1:])

    def merge(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ho wo n"]:
        x = self.c1(x)
        parts = [self.d1(x), self.d2(x)]
        for conv in (self.d4, self.d8, self.d16):
            parts.append(parts[-1] + conv(x))
        return jnp.concatenate(parts, axis=-1)


class Down(Pyramid):
    """A pyramid at half the size."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        super().__init__(n_in, n_out, 3, 2, rngs=rngs)
        self.bn = BatchNorm(n_out, rngs=rngs)
        self.act = PReLU(n_out, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ho wo n"]:
        return self.act(self.bn(self.merge(x)))


class Block(Pyramid):
    """A pyramid, beside a skip where the number of channels stays."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        super().__init__(n_in, n_out, rngs=rngs)
        self.bn = NormAct(n_out, rngs=rngs)
        self.skip = n_in == n_out

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w n"]:
        y = self.merge(x)
        return self.bn(x + y if self.skip else y)


class Double(nnx.Module):
    """PyTorch's transposed convolution with a 2 x 2 kernel and stride 2: each place becomes a square of four."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(fan_in_init(rngs.params(), (2, 2, channels, channels), jnp.float32))  # [.. out in]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        return jnp.einsum("bhwi,kloi->bhkwlo", x, self.weight[...]).reshape(b, 2 * h, 2 * w, c)


def half(image: Float[Array, "b h w c"]) -> Float[Array, "b ho wo c"]:
    """Means of 3 x 3 pixels at every other place; beyond the border are zeros, which count."""
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(image, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), border) / 9


class Encoder(nnx.Module):
    """Maps at a half, a quarter and an eighth of the size; the last has a channel for every class."""

    def __init__(self, num_classes: int, p: int, q: int, *, rngs: nnx.Rngs):
        self.level1 = ConvNormAct(3, 16, 3, 2, rngs=rngs)
        self.b1 = NormAct(16 + 3, rngs=rngs)
        self.level2_0 = Down(16 + 3, 64, rngs=rngs)
        self.level2 = nnx.List([Block(64, 64, rngs=rngs) for _ in range(p)])
        self.b2 = NormAct(128 + 3, rngs=rngs)
        self.level3_0 = Down(128 + 3, 128, rngs=rngs)
        self.level3 = nnx.List([Block(128, 128, rngs=rngs) for _ in range(q)])
        self.b3 = NormAct(256, rngs=rngs)
        self.classifier = PlainConv(256, num_classes, rngs=rngs)

    def __call__(self, image: Float[Array, "b h w 3"]) -> tuple[Array, Array, Array]:
        small = half(image)
        x1 = self.b1(jnp.concatenate([self.level1(image), small], -1))
        x = first = self.level2_0(x1)
        for block in self.level2:
            x = block(x)
        x2 = self.b2(jnp.concatenate([x, first, half(small)], -1))
        x = first = self.level3_0(x2)
        for block in self.level3:
            x = block(x)
        return x1, x2, self.classifier(self.b3(jnp.concatenate([first, x], -1)))


class ESPNet(nnx.Module):
    """Images, 0..255 -> logits of the classes, at the same size."""

    def __init__(self, num_classes: int, p: int = 2, q: int = 8, *, rngs: nnx.Rngs):
        n = num_classes
        self.encoder = Encoder(n, p, q, rngs=rngs)
        self.level3_C = PlainConv(128 + 3, n, rngs=rngs)
        self.br = BatchNorm(n, rngs=rngs)
        self.conv = ConvNormAct(19 + n, n, 3, rngs=rngs)
        self.up_l3 = nnx.List([Double(n, rngs=rngs)])
        self.combine_l2_l3 = nnx.List([NormAct(2 * n, rngs=rngs), Block(2 * n, n, rngs=rngs)])
        self.up_l2 = nnx.List([Double(n, rngs=rngs), NormAct(n, rngs=rngs)])
        self.classifier = Double(n, rngs=rngs)

    def __call__(self, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w n"]:
        x = image[..., ::-1].astype(jnp.float32)
        check_size("ESPNet", x, FACTOR)
        x1, x2, x3 = self.encoder((x - np.array(MEAN, np.float32)) / np.array(STD, np.float32) / 255)
        x = jnp.concatenate([self.level3_C(x2), self.up_l3[0](self.br(x3))], -1)
        for layer in (*self.combine_l2_l3, *self.up_l2):
            x = layer(x)
        return self.classifier(self.conv(jnp.concatenate([x, x1], -1)))
