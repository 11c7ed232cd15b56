"""Two small networks without norms, whose outputs at a place depend on its surroundings only: masks of any size.

    analyse      class ids -> a vector per pixel -> one per factor x factor patch -> residual blocks -> latent
    synthesise   latent -> residual blocks -> a vector per pixel -> residual block -> logits of the classes

Only the pixels' vectors are not on the latent grid. Void is no class: zeros, as what lies beyond the border.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from semflow_jax.models.layers import Conv, Linear, from_patches, to_patches, zeros_init


@dataclasses.dataclass(frozen=True)
class MaskNetConfig:
    """Attributes:
    num_classes: void not among them.
    factor: pixels per latent, in height and in width.
    channels: of the latent.
    width: channels on the latent grid.
    pixel_width: channels of a pixel.
    num_blocks: residual blocks on the latent grid, in each direction.
    bound: latents are in (-bound, bound).
    encodes: whether there is a way from class ids to latents.
    """

    num_classes: int
    factor: int
    channels: int
    width: int = 64
    pixel_width: int = 16
    num_blocks: int = 2
    bound: float = 3.0
    encodes: bool = True


class Block(nnx.Module):
    """Two convolutions beside a skip; at first it does nothing."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv(width, width, rngs=rngs)
        self.conv2 = Conv(width, width, weight_init=zeros_init, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x + self.conv2(jax.nn.silu(self.conv1(jax.nn.silu(x))))


class MaskNet(nnx.Module):
    """Class ids -> latents without unit -> logits."""

    def __init__(self, c: MaskNetConfig, *, rngs: nnx.Rngs):
        patch = c.factor**2 * c.pixel_width
        self.config = c
        if c.encodes:
            self.classes = Linear(c.num_classes, c.pixel_width, bias=False, rngs=rngs)
            self.from_pixels = Linear(patch, c.width, rngs=rngs)
            self.encoder = nnx.List([Block(c.width, rngs=rngs) for _ in range(c.num_blocks)])
            self.to_latent = Conv(c.width, c.channels, rngs=rngs)
        self.from_latent = Conv(c.channels, c.width, rngs=rngs)
        self.decoder = nnx.List([Block(c.width, rngs=rngs) for _ in range(c.num_blocks)])
        self.to_pixels = Linear(c.width, patch, rngs=rngs)
        self.pixels = Block(c.pixel_width, rngs=rngs)
        self.to_classes = Linear(c.pixel_width, c.num_classes, rngs=rngs)

    def analyse(self, label: Int[Array, "b h w 1"] | UInt8[Array, "b h w 1"]) -> Float[Array, "b hz wz c"]:
        """Ids that are no class count as void."""
        x = self.classes(jax.nn.one_hot(label[..., 0], self.config.num_classes))
        x = self.from_pixels(to_patches(x, self.config.factor))
        for block in self.encoder:
            x = block(x)
        return self.config.bound * jnp.tanh(self.to_latent(jax.nn.silu(x)) / self.config.bound)

    def synthesise(self, u: Float[Array, "b hz wz c"]) -> Float[Array, "b h w n"]:
        """Logits; latents are taken as they are, bounded or not."""
        x = self.from_latent(u)
        for block in self.decoder:
            x = block(x)
        x = from_patches(self.to_pixels(jax.nn.silu(x)), self.config.factor)
        return self.to_classes(jax.nn.silu(self.pixels(x)))
