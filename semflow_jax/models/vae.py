"""Stable Diffusion's variational autoencoder (Rombach et al. 2022): images <-> latents an eighth as high and wide.

Parameter paths are those of diffusers' `AutoencoderKL`. An image becomes a normal distribution of latents; its mode, or
a sample of it, times `scaling_factor` is what the diffusion model sees.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from semflow_jax.errors import UserError
from semflow_jax.models.attention import attention
from semflow_jax.models.layers import Conv, GroupNorm, Linear, Types, check_size, upsample_nearest

EPS = 1e-6  # of every group norm
LOG_VARIANCE_BOUNDS = (-30.0, 20.0)
IGNORED = ("sample_size", "force_upcast")  # of diffusers' config: they say nothing about the network


@dataclasses.dataclass(frozen=True)
class VAEConfig(Types):
    """Shape of the network; the defaults are SD-1.5's.

    Attributes:
        latent_channels: channels of a latent.
        block_out_channels: width of each level; each level but the last halves height and width.
        layers_per_block: resnets per level of the encoder (one more in the decoder).
        num_groups: groups of every group norm.
        scaling_factor: gives latents about unit variance.
        dtype, param_dtype: names of the types that compute and store.
    """

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    num_groups: int = 32
    scaling_factor: float = 0.18215
    dtype: str = "float32"
    param_dtype: str = "float32"

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> "VAEConfig":
        """Reads the `config.json` of an `AutoencoderKL`; keys that it leaves out have diffusers' defaults.

        Raises:
            UserError: a key, or a value of it, that this network does not implement.
        """
        c = cls(
            latent_channels=config.get("latent_channels", 4),
            block_out_channels=tuple(config.get("block_out_channels", (64,))),
            layers_per_block=config.get("layers_per_block", 1),
            num_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
        )
        known = c.to_diffusers()
        for key, value in config.items():
            if not key.startswith("_") and key not in IGNORED and known.get(key) != value:
                raise UserError(
                    f"vae/config.json, {key}: must be {known.get(key, 'absent')}, found {value!r}: "
                    "only autoencoders built like Stable Diffusion 1 and 2's can be read"
                )
        return c

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of the `AutoencoderKL` with the same parameters and outputs."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "act_fn": "silu",
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.num_groups,
            "scaling_factor": self.scaling_factor,
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
        }

    @property
    def factor(self) -> int:
        """Pixels a latent covers, per side."""
        return 2 ** (len(self.block_out_channels) - 1)


def _make_norm(c: VAEConfig, channels: int, rngs: nnx.Rngs) -> GroupNorm:
    return GroupNorm(channels, c.num_groups, EPS, param_dtype=jnp.dtype(c.param_dtype), rngs=rngs)


class ResnetBlock(nnx.Module):
    """Two convolutions beside a skip."""

    def __init__(self, c: VAEConfig, in_channels: int, channels: int, *, rngs: nnx.Rngs):
        types = c.types()
        self.norm1 = _make_norm(c, in_channels, rngs)
        self.conv1 = Conv(in_channels, channels, rngs=rngs, **types)
        self.norm2 = _make_norm(c, channels, rngs)
        self.conv2 = Conv(channels, channels, rngs=rngs, **types)
        self.conv_shortcut = (
            Conv(in_channels, channels, kernel=1, rngs=rngs, **types) if in_channels != channels else None
        )

    def __call__(self, x: Float[Array, "b h w cin"]) -> Float[Array, "b h w c"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Self-attention of all places, one head of all channels, beside a skip."""

    def __init__(self, c: VAEConfig, channels: int, *, rngs: nnx.Rngs):
        self.group_norm = _make_norm(c, channels, rngs)
        self.to_q, self.to_k, self.to_v, to_out = (Linear(channels, channels, rngs=rngs, **c.types()) for _ in range(4))
        self.to_out = nnx.List([to_out])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, channels = x.shape
        y = self.group_norm(x).reshape(b, h * w, 1, channels)
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).reshape(x.shape)


class Resample(nnx.Module):
    """The convolution of a down-sampler (`stride` 2), or of an up-sampler, where it follows a doubling."""

    def __init__(self, c: VAEConfig, channels: int, stride: int, *, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1)) if stride == 2 else ((1, 1), (1, 1))  # the encoder pads bottom and right only
        self.conv = Conv(channels, channels, stride=stride, padding=padding, rngs=rngs, **c.types())

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x if self.conv.stride == 2 else upsample_nearest(x))


class Level(nnx.Module):
    """One resolution: resnets, and a resampler except at the end of the path."""

    def __init__(self, c: VAEConfig, widths: list[int], down: bool = False, up: bool = False, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(c, *pair, rngs=rngs) for pair in itertools.pairwise(widths)])
        self.downsamplers = nnx.List([Resample(c, widths[-1], 2, rngs=rngs)] if down else [])
        self.upsamplers = nnx.List([Resample(c, widths[-1], 1, rngs=rngs)] if up else [])

    def __call__(self, x: Float[Array, "b h w cin"]) -> Float[Array, "b h2 w2 c"]:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nnx.Module):
    def __init__(self, c: VAEConfig, channels: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(c, channels, channels, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(c, channels, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    def __init__(self, c: VAEConfig, *, rngs: nnx.Rngs):
        widths, last = c.block_out_channels, c.block_out_channels[-1]
        self.conv_in = Conv(3, widths[0], rngs=rngs, **c.types())
        self.down_blocks: nnx.List = nnx.List([])
        for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths))):
            down = i < len(widths) - 1
            self.down_blocks.append(Level(c, [before] + [width] * c.layers_per_block, down=down, rngs=rngs))
        self.mid_block = MidBlock(c, last, rngs=rngs)
        self.conv_norm_out = _make_norm(c, last, rngs)
        self.conv_out = Conv(last, 2 * c.latent_channels, rngs=rngs, **c.types())

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b hz wz c2"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, c: VAEConfig, *, rngs: nnx.Rngs):
        widths = c.block_out_channels[::-1]
        self.conv_in = Conv(c.latent_channels, widths[0], rngs=rngs, **c.types())
        self.mid_block = MidBlock(c, widths[0], rngs=rngs)
        self.up_blocks: nnx.List = nnx.List([])
        for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths))):
            up = i < len(widths) - 1
            self.up_blocks.append(Level(c, [before] + [width] * (c.layers_per_block + 1), up=up, rngs=rngs))
        self.conv_norm_out = _make_norm(c, widths[-1], rngs)
        self.conv_out = Conv(widths[-1], 3, rngs=rngs, **c.types())

    def __call__(self, z: Float[Array, "b hz wz c"]) -> Float[Array, "b h w 3"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images in [-1, 1] <-> latents, both float32."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(2 * channels, 2 * channels, kernel=1, rngs=rngs, **config.types())
        self.post_quant_conv = Conv(channels, channels, kernel=1, rngs=rngs, **config.types())

    def moments(self, image: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b hz wz c"], Float[Array, "b hz wz c"]]:
        """Returns mean and standard deviation of the scaled latents.

        Raises `UserError` where height or width is no multiple of `config.factor`.
        """
        check_size("AutoencoderKL", image, self.config.factor)
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image)).astype(jnp.float32), 2, axis=-1)
        std = jnp.exp(jnp.clip(log_variance, *LOG_VARIANCE_BOUNDS) / 2)
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, z: Float[Array, "b hz wz c"]) -> Float[Array, "b h w 3"]:
        """The image is not clipped: it overshoots [-1, 1] a little."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor)).astype(jnp.float32)
