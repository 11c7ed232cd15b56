"""The tiny autoencoders of Bohan (github.com/madebyollin/taesd): distilled stand-ins for a diffusion model's VAE.

Parameter paths are those of diffusers' `AutoencoderTiny`. Deterministic, and without a scale factor: the latents
already have the spread that the diffusion model expects.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from semflow_jax.errors import UserError
from semflow_jax.models.layers import Conv, GroupNorm, upsample_nearest

FACTOR = 8  # pixels a latent covers, per side
LATENT_BOUND = 3.0  # the decoder squashes latents softly into +-3


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """Shape of the network; the defaults are TAESD's.

    Attributes:
        latent_channels: channels of a latent.
        pool: whether the blocks at the lowest resolution normalise over the whole map, in a branch of their own.
        num_channels: width of every hidden layer.
        num_blocks: residual blocks per resolution.
        dtype, param_dtype: names of the types that compute and store.
    """

    latent_channels: int = 4
    pool: bool = False
    num_channels: int = 64
    num_blocks: int = 3
    dtype: str = "float32"
    param_dtype: str = "float32"

    def types(self) -> dict[str, Any]:
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}


TINY_VAES = {
    "taesd": TinyVAEConfig(),  # Stable Diffusion 1, 2
    "taesd3": TinyVAEConfig(latent_channels=16),  # Stable Diffusion 3
    "taef1": TinyVAEConfig(latent_channels=16),  # FLUX.1
    "taef2": TinyVAEConfig(latent_channels=32, pool=True),  # FLUX.2
}


def _run(layers: Iterable[Any], x: Array) -> Array:
    """Calls layers in turn. Functions among them keep the numbering of `torch.nn.Sequential`."""
    for layer in layers:
        x = layer(x)
    return x


class Block(nnx.Module):
    """Three convolutions beside a skip; with `pool`, a group norm of the whole map is mixed in first."""

    def __init__(self, c: TinyVAEConfig, pool: bool = False, *, rngs: nnx.Rngs):
        n, types, relu = c.num_channels, c.types(), jax.nn.relu
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
        layers = [Conv(3, n, rngs=rngs, **types), Block(c, rngs=rngs)]
        for pool in (False, False, c.pool):
            layers.append(Conv(n, n, stride=2, bias=False, rngs=rngs, **types))
            layers.extend(Block(c, pool, rngs=rngs) for _ in range(c.num_blocks))
        layers.append(Conv(n, c.latent_channels, rngs=rngs, **types))
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h//8 w//8 c"]:
        return _run(self.layers, x)


class Decoder(nnx.Module):
    def __init__(self, c: TinyVAEConfig, *, rngs: nnx.Rngs):
        n, types = c.num_channels, c.types()
        layers = [Conv(c.latent_channels, n, rngs=rngs, **types), jax.nn.relu]
        for pool in (c.pool, False, False):
            layers.extend(Block(c, pool, rngs=rngs) for _ in range(c.num_blocks))
            layers.extend([upsample_nearest, Conv(n, n, bias=False, rngs=rngs, **types)])
        layers.extend([Block(c, rngs=rngs), Conv(n, 3, rngs=rngs, **types)])
        self.layers = nnx.List(layers)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b 8*h 8*w 3"]:
        return _run(self.layers, LATENT_BOUND * jnp.tanh(z / LATENT_BOUND))


class TinyVAE(nnx.Module):
    """Images in [-1, 1] <-> latents, both float32."""

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h//8 w//8 c"]:
        """Raises `UserError` where height or width is no multiple of 8."""
        height, width = image.shape[1:3]
        if height % FACTOR or width % FACTOR:
            raise UserError(
                f"TinyVAE.encode: height and width must be multiples of {FACTOR}, "
                f"found {height} x {width}: crop or resize the image"
            )
        return self.encoder((image + 1) / 2).astype(jnp.float32)

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b 8*h 8*w 3"]:
        """The image is not clipped: strong latents overshoot [-1, 1] a little."""
        return self.decoder(z).astype(jnp.float32) * 2 - 1
