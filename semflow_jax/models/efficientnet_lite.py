"""EfficientNet-Lite0 (Tan and Le 2019; Lite: Liu 2020), up to its pool: a small network of ImageNet's classes.

Follows the package `efficientnet_lite_pytorch`, whose keys the parameter paths are. Lite has relu6 for swish and no
squeeze-and-excitation. Padding is TensorFlow's 'SAME': where it is odd, on strides, the right and bottom get more.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from semflow_jax.models.layers import BatchNorm, Conv, Padding

SIZE = (224, 224)
NUM_FEATURES = 1280
# Of each stage: blocks, side of the kernel, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _pad(kernel: int, stride: int) -> Padding:
    """TensorFlow's 'SAME' of maps whose sides the stride divides, as all are here."""
    before = (kernel - stride) // 2
    return ((before, kernel - stride - before),) * 2


class Block(nnx.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; beside a skip where the shape stays."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int, *, rngs: nnx.Rngs):
        n = n_in * expansion
        self.skip = stride == 1 and n_in == n_out
        self._expand_conv = Conv(n_in, n, kernel=1, bias=False, rngs=rngs) if expansion > 1 else None
        self._bn0 = BatchNorm(n, rngs=rngs) if expansion > 1 else None
        self._depthwise_conv = Conv(n, n, kernel, stride, _pad(kernel, stride), bias=False, groups=n, rngs=rngs)
        self._bn1 = BatchNorm(n, rngs=rngs)
        self._project_conv = Conv(n, n_out, kernel=1, bias=False, rngs=rngs)
        self._bn2 = BatchNorm(n_out, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ho wo n"]:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = jax.nn.relu6(self._bn0(self._expand_conv(y)))
        y = jax.nn.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


def resize_bicubic(image: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b H W c"]:
    """Bicubic (Keys, a = -0.5) with a filter against aliasing, as Pillow's; overshoots of 0..255 are clipped."""
    shape = (image.shape[0], *size, image.shape[3])
    return jnp.clip(jax.image.resize(image, shape, "cubic", antialias=True), 0, 255)


class EfficientNetLite0(nnx.Module):
    """Images, 0..255 and of any size -> what the pool after the last convolution holds."""

    def __init__(self, *, rngs: nnx.Rngs):
        self._conv_stem = Conv(3, 32, stride=2, padding=_pad(3, 2), bias=False, rngs=rngs)
        self._bn0 = BatchNorm(32, rngs=rngs)
        blocks = []
        n_in = 32
        for num, kernel, first_stride, expansion, n_out in STAGES:
            for i in range(num):
                blocks.append(Block(n_in, n_out, kernel, 1 if i else first_stride, expansion, rngs=rngs))
                n_in = n_out
        self._blocks = nnx.List(blocks)
        self._conv_head = Conv(n_in, NUM_FEATURES, kernel=1, bias=False, rngs=rngs)
        self._bn1 = BatchNorm(NUM_FEATURES, rngs=rngs)

    def __call__(self, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b 1280"]:
        x = (resize_bicubic(image.astype(jnp.float32), SIZE) - 127) / 128
        x = jax.nn.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return jax.nn.relu6(self._bn1(self._conv_head(x))).mean((1, 2))
