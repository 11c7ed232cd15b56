"""The velocity network: the UNet of Stable Diffusion (Rombach et al. 2022), every width and depth a config value.

Parameter paths are those of diffusers' `UNet2DConditionModel`, so `UNetConfig()` is SD-1.5, and SD-2.1 or a laptop's
net differ from it by numbers alone. The network knows t in [0, 1]; Stable Diffusion's time embedding wants t * 1000,
continuous.

A small network that starts from nothing should not have to pass its own input through narrow layers. With `skip`,

    v = F(z_t, t) + (2t - 1) z_t,                                                       (1)

so that F need only say where the flow leads: F = z_1 at t = 0 and F = -z_0 at t = 1.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from semflow_jax.models.attention import attention
from semflow_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear, fan_in_init, upsample_nearest, zeros_init
from semflow_jax.models.unet_config import UNetConfig

TIME_SCALE = 1000.0


def time_features(t: Float[Array, " b"], num_features: int) -> Float[Array, "b c"]:
    """Sinusoids of t * 1000, cosines first, wavelengths from 2 pi to 20000 pi (Vaswani et al. 2017)."""
    half = num_features // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = TIME_SCALE * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    def __init__(self, in_features: int, features: int, *, weight_init=fan_in_init, rngs: nnx.Rngs, **types):
        self.linear_1 = Linear(in_features, features, rngs=rngs, **types)
        self.linear_2 = Linear(features, features, weight_init=weight_init, rngs=rngs, **types)

    def __call__(self, x):
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    def __init__(self, c: UNetConfig, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        types = c.types()
        norm = {"param_dtype": types["param_dtype"], "rngs": rngs}
        self.norm1 = GroupNorm(in_channels, c.num_groups, 1e-5, **norm)
        self.conv1 = Conv(in_channels, out_channels, rngs=rngs, **types)
        self.time_emb_proj = Linear(4 * c.block_out_channels[0], out_channels, rngs=rngs, **types)
        self.norm2 = GroupNorm(out_channels, c.num_groups, 1e-5, **norm)
        self.conv2 = Conv(out_channels, out_channels, weight_init=zeros_init, rngs=rngs, **types)
        self.conv_shortcut = (
            Conv(in_channels, out_channels, kernel=1, rngs=rngs, **types) if in_channels != out_channels else None
        )

    def __call__(self, x, temb):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = h + self.time_emb_proj(temb)[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Self-attention, or cross-attention where a context is given."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, *, rngs: nnx.Rngs, **types):
        self.num_heads = num_heads
        self.to_q = Linear(channels, channels, bias=False, rngs=rngs, **types)
        self.to_k = Linear(context_dim, channels, bias=False, rngs=rngs, **types)
        self.to_v = Linear(context_dim, channels, bias=False, rngs=rngs, **types)
        self.to_out = nnx.List([Linear(channels, channels, weight_init=zeros_init, rngs=rngs, **types)])

    def __call__(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            y.reshape(*y.shape[:2], self.num_heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attention(q, k, v).reshape(x.shape))


class GEGLU(nnx.Module):
    """Gated linear unit with the exact gelu (Shazeer 2020)."""

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs, **types):
        self.proj = Linear(channels, 2 * features, rngs=rngs, **types)

    def __call__(self, x):
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class Slot(nnx.Module):
    """Holds the place of a parameterless PyTorch layer, so that its successors keep their index."""


class FeedForward(nnx.Module):
    def __init__(self, channels: int, *, rngs: nnx.Rngs, **types):
        out = Linear(4 * channels, channels, weight_init=zeros_init, rngs=rngs, **types)
        self.net = nnx.List([GEGLU(channels, 4 * channels, rngs=rngs, **types), Slot(), out])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    def __init__(self, c: UNetConfig, channels: int, num_heads: int, *, rngs: nnx.Rngs):
        types = c.types()
        norm = {"param_dtype": types["param_dtype"], "rngs": rngs}
        self.norm1 = LayerNorm(channels, **norm)
        self.attn1 = Attention(channels, channels, num_heads, rngs=rngs, **types)
        cross = c.cross_attention_dim
        self.norm2 = None if cross is None else LayerNorm(channels, **norm)
        self.attn2 = None if cross is None else Attention(channels, cross, num_heads, rngs=rngs, **types)
        self.norm3 = LayerNorm(channels, **norm)
        self.ff = FeedForward(channels, rngs=rngs, **types)

    def __call__(self, x, context):
        x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    def __init__(self, c: UNetConfig, channels: int, num_heads: int, *, rngs: nnx.Rngs):
        types = c.types()
        self.norm = GroupNorm(channels, c.num_groups, 1e-6, param_dtype=types["param_dtype"], rngs=rngs)
        project = Linear if c.linear_projection else functools.partial(Conv, kernel=1)
        self.proj_in = project(channels, channels, rngs=rngs, **types)
        self.transformer_blocks = nnx.List([TransformerBlock(c, channels, num_heads, rngs=rngs)])
        self.proj_out = project(channels, channels, rngs=rngs, **types)

    def __call__(self, x, context):
        b, h, w, channels = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, channels)
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y.reshape(x.shape))


class Resample(nnx.Module):
    """The convolution of a down- or up-sampler; `stride` 2 halves, `stride` 1 follows a doubling."""

    def __init__(self, c: UNetConfig, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=stride, rngs=rngs, **c.types())

    def __call__(self, x):
        return self.conv(x if self.conv.stride == 2 else upsample_nearest(x))


def _run(remat: bool, block: Callable[..., Any], *args):
    """block(*args); with `remat` the backward pass keeps the arguments alone and computes the rest again."""
    return jax.checkpoint(lambda *inputs: block(*inputs))(*args) if remat else block(*args)


class Level(nnx.Module):
    """One resolution of either path: resnets, their transformers, and a resampler except at the end of the path."""

    def __init__(self, c: UNetConfig, level: int, in_channels: list[int], resample: str | None, *, rngs: nnx.Rngs):
        channels = c.block_out_channels[level]
        self.remat = c.remat != "none"
        self.resnets = nnx.List([ResnetBlock(c, n, channels, rngs=rngs) for n in in_channels])
        self.attentions = nnx.List(
            [SpatialTransformer(c, channels, c.num_heads[level], rngs=rngs) for _ in in_channels if c.attention[level]]
        )
        if resample == "down":
            self.downsamplers = nnx.List([Resample(c, channels, 2, rngs=rngs)])
        elif resample == "up":
            self.upsamplers = nnx.List([Resample(c, channels, 1, rngs=rngs)])

    def layer(self, index: int, x, temb, context, *skip):
        x = _run(self.remat, lambda temb, *parts: self.resnets[index](jnp.concatenate(parts, -1), temb), temb, x, *skip)
        return _run(self.remat, self.attentions[index], x, context) if self.attentions else x

    def down(self, x, temb, context):
        """Returns what the way up will want: every layer's output, and the halved one."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, context)
            outputs.append(x)
        return [*outputs, self.downsamplers[0](x)] if hasattr(self, "downsamplers") else outputs

    def up(self, x, skips, temb, context):
        for i, skip in enumerate(skips):
            x = self.layer(i, x, temb, context, skip)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class MidBlock(nnx.Module):
    def __init__(self, c: UNetConfig, *, rngs: nnx.Rngs):
        channels = c.block_out_channels[-1]
        self.remat = c.remat != "none"
        self.resnets = nnx.List([ResnetBlock(c, channels, channels, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([SpatialTransformer(c, channels, c.num_heads[-1], rngs=rngs)])

    def __call__(self, x, temb, context):
        x = _run(self.remat, self.resnets[0], x, temb)
        x = _run(self.remat, self.attentions[0], x, context)
        return _run(self.remat, self.resnets[1], x, temb)


class UNet(nnx.Module):
    """v = UNet(zt, t, context): the velocity of the flow at z_t."""

    def __init__(self, c: UNetConfig, *, rngs: nnx.Rngs):
        types = c.types()
        widths = c.block_out_channels
        last = len(widths) - 1
        self.config = c
        self.conv_in = Conv(c.in_channels, widths[0], rngs=rngs, **types)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], rngs=rngs, **types)
        if c.intervals:  # at first it says nothing
            self.interval_embedding = TimeEmbedding(
                widths[0], 4 * widths[0], weight_init=zeros_init, rngs=rngs, **types
            )
        self.down_blocks: nnx.List = nnx.List([])
        skips = [widths[0]]
        for i, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (c.layers_per_block - 1)
            self.down_blocks.append(Level(c, i, inputs, "down" if i < last else None, rngs=rngs))
            skips += [width] * (c.layers_per_block + (i < last))
        self.mid_block = MidBlock(c, rngs=rngs)
        self.up_blocks: nnx.List = nnx.List([])
        below = widths[-1]
        for i in reversed(range(len(widths))):
            inputs = []
            for _ in range(c.layers_per_block + 1):
                inputs.append(below + skips.pop())
                below = widths[i]
            self.up_blocks.append(Level(c, i, inputs, "up" if i > 0 else None, rngs=rngs))
        self.conv_norm_out = GroupNorm(widths[0], c.num_groups, 1e-5, param_dtype=types["param_dtype"], rngs=rngs)
        self.conv_out = Conv(widths[0], c.out_channels, weight_init=zeros_init, rngs=rngs, **types)

    def __call__(
        self,
        zt: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "n d"] | None = None,
        d: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c_out"]:
        """Args: zt latents, t in [0, 1], context shared by the whole batch, d in [-1, 1] the interval that the velocity
        will be followed for (0 by default; without `intervals` it counts for nothing). Returns float32 velocities.
        """
        num_features = self.config.block_out_channels[0]
        temb = self.time_embedding(time_features(t, num_features))
        if self.config.intervals:
            temb = temb + self.interval_embedding(time_features(jnp.zeros_like(t) if d is None else d, num_features))
        temb = jax.nn.silu(temb)
        if context is not None:
            context = jnp.broadcast_to(context, (zt.shape[0], *context.shape))
        remat = self.config.remat == "full"
        skips = [self.conv_in(zt)]
        for level in self.down_blocks:
            skips += _run(remat, level.down, skips[-1], temb, context)
        x = _run(remat, self.mid_block, skips[-1], temb, context)
        for level in self.up_blocks:
            x = _run(remat, level.up, x, [skips.pop() for _ in level.resnets], temb, context)
        v = self.conv_out(jax.nn.silu(self.conv_norm_out(x))).astype(jnp.float32)
        return v + (2 * t - 1)[:, None, None, None] * zt if self.config.skip else v
