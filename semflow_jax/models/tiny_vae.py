"""The tiny autoencoders of Bohan (github.com/madebyollin/taesd): distilled stand-ins for a diffusion model's VAE.

Parameter paths are those of diffusers' `AutoencoderTiny`. Deterministic, and without a scale factor: the latents
already have the spread that the diffusion model expects.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from semflow_jax.models.layers import Conv, GroupNorm, Types, check_size, upsample_nearest

LATENT_BOUND = 3.0  # the decoder squashes latents softly into +-3


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig(Types):
    """Shape of the network; the defaults are TAESD's.

    Attributes:
        latent_channels: channels of a latent.
        pool: whether the blocks at the lowest resolution normalise over the whole map, in a branch of their own.
        num_channels: width of every hidden layer.
        num_blocks: residual blocks per resolution.
        stem: widths of strided convolutions that halve the image before the encoder's first block, ending in
            `num_channels`; without them one convolution at full resolution.
        head: widths of the decoder's stages before its last three, as many as the convolutions of `stem`.
        dtype, param_dtype: names of the types that compute and store.
    """

    latent_channels: int = 4
    pool: bool = False
    num_channels: int = 64
    num_blocks: int = 3
    stem: tuple[int, ...] = ()
    head: tuple[int, ...] = ()
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def factor(self) -> int:
        """Pixels a latent covers, per side."""
        return 8 * 2 ** len(self.stem)


TINY_VAES = {
    "taesd": TinyVAEConfig(),  # Stable Diffusion 1, 2
    "taesd3": TinyVAEConfig(latent_channels=16),  # Stable Diffusion 3
    "taef1": TinyVAEConfig(latent_channels=16),  # FLUX.1
    "taef2": TinyVAEConfig(latent_channels=32, pool=True),  # FLUX.2
    "taesana": TinyVAEConfig(latent_channels=32, stem=(32, 64), head=(256, 128)),  # SANA: DC-AE f32c32
}


def _run(layers: Iterable[Any], x: Array) -> Array:
    """Calls layers in turn. Functions among them keep the numbering of `torch.nn.Sequential`."""
    for layer in layers:
        x = layer(x)
    return x


class Block(nnx.Module):
    """Three convolutions beside a skip; with `pool`, a group norm of the whole map is mixed in first."""

    def __init__(self, n: int, c: TinyVAEConfig, pool: bool = False, *, rngs: nnx.Rngs):
        types, relu = c.types(), jax.nn.relu
        if pool:
            widen = Conv(n, 4 * n, kernel=1, bias=False, rngs=rngs, **types)
            norm = GroupNorm(4 * n, groups=4, eps=1e-5, param_dtype=types["param_dtype"], rngs=rngs)
            narrow = Conv(4 * n, n, kernel=1, bias=False, rngs=rngs, **types)
        self.pool = nnx.List([widen, norm, relu, narrow]) if pool else None
        first, second, third = (Conv(n, n, rngs=rngs, **types) for _ in range(3))
        self.conv = nnx.List([first, relu, second, relu, third])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.pool is not None:
            x = x + _run(self.pool, x)
        return jax.nn.relu(x + _run(self.conv, x))


class Encoder(nnx.Module):
    def __init__(self, c: TinyVAEConfig, *, rngs: nnx.Rngs):
        n, types = c.num_channels, c.types()
        layers: list[Any] = [] if c.stem else [Conv(3, n, rngs=rngs, **types)]
        for n_in, n_out in itertools.pairwise((3, *c.stem)):
            layers.extend([Conv(n_in, n_out, stride=2, rngs=rngs, **types), jax.nn.relu])
        layers.append(Block(n, c, rngs=rngs))
        for pool in (False, False, c.pool):
            layers.append(Conv(n, n, stride=2, bias=False, rngs=rngs, **types))
            layers.extend(Block(n, c, pool, rngs=rngs) for _ in range(c.num_blocks))
        layers.append(Conv(n, c.latent_channels, rngs=rngs, **types))
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b hz wz c"]:
        return _run(self.layers, x)


class Decoder(nnx.Module):
    def __init__(self, c: TinyVAEConfig, *, rngs: nnx.Rngs):
        n, types = c.num_channels, c.types()
        widths = (*c.head, n, n, n, n)  # of each stage, and of the block at full resolution
        layers: list[Any] = [Conv(c.latent_channels, widths[0], rngs=rngs, **types), jax.nn.relu]
        for stage, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            pool = c.pool and stage == 0
            layers.extend(Block(n_in, c, pool, rngs=rngs) for _ in range(c.num_blocks))
            layers.extend([upsample_nearest, Conv(n_in, n_out, bias=False, rngs=rngs, **types)])
        layers.extend([Block(n, c, rngs=rngs), Conv(n, 3, rngs=rngs, **types)])
        self.layers = nnx.List(layers)

    def __call__(self, z: Float[Array, "b hz wz c"]) -> Float[Array, "b h w 3"]:
        return _run(self.layers, LATENT_BOUND * jnp.tanh(z / LATENT_BOUND))


class TinyVAE(nnx.Module):
    """Images in [-1, 1] <-> latents, both float32."""

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b hz wz c"]:
        """Raises `UserError` where height or width is no multiple of `config.factor`."""
        check_size("TinyVAE", image, self.config.factor)
        return self.encoder((image + 1) / 2).astype(jnp.float32)

    def decode(self, z: Float[Array, "b hz wz c"]) -> Float[Array, "b h w 3"]:
        """The image is not clipped: strong latents overshoot [-1, 1] a little."""
        return self.decoder(z).astype(jnp.float32) * 2 - 1
