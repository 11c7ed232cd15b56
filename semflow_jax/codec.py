"""Pixels <-> latents. A codec is frozen: pictures in [-1, 1] go in, latents of one shape for images and masks come out.

`patch` moves each factor x factor square of pixels into channels: lossless, no weights, for small pictures. The others
are pretrained tiny autoencoders (see `models/tiny_vae.py`); `taesd` lives in Stable Diffusion 1.5's own latent space.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from semflow_jax.errors import UserError
from semflow_jax.models.build import Params, make_tiny_vae_fns
from semflow_jax.models.tiny_vae import FACTOR, TINY_VAES
from semflow_jax.weights.keys import TINY_VAE
from semflow_jax.weights.load import fill, load_safetensors

CODECS = ("patch", *TINY_VAES)


@dataclasses.dataclass(frozen=True)
class Codec:
    """Attributes:
    name: for reports.
    factor: pixels per latent, in height and in width.
    channels: of the latent.
    params: the frozen weights; hand them to jitted functions as an argument.
    encode: (params, image [b h w 3] in [-1, 1]) -> z [b h/factor w/factor channels].
    decode: (params, z) -> image, about [-1, 1].
    pool: carries a map of pixels [b h w 1] to the latent grid, as a weight of each place (and channel).
    """

    name: str
    factor: int
    channels: int
    params: Params
    encode: Callable[[Params, Array], Array]
    decode: Callable[[Params, Array], Array]
    pool: Callable[[Array], Array]

    def latent_shape(self, size: tuple[int, int], multiple: int = 1) -> tuple[int, int, int]:
        """Shape of the latent of a picture of `size` (h, w).

        Args: multiple: what the network needs latent heights and widths to be multiples of.

        Raises:
            UserError: where `size` is no multiple of `factor * multiple`.
        """
        unit = self.factor * multiple
        if size[0] % unit or size[1] % unit or min(size) < unit:
            near = tuple(max(unit, round(n / unit) * unit) for n in size)
            raise UserError(
                f"size: height and width must be multiples of {unit} (codec {self.factor} x network {multiple}), "
                f"got {size[0]} x {size[1]}; use {near[0]} x {near[1]} or fewer levels in model.block_out_channels"
            )
        return size[0] // self.factor, size[1] // self.factor, self.channels


def to_patches(image: Float[Array, "b h w c"], factor: int) -> Float[Array, "b hz wz d"]:
    """Space to depth: [b h w c] -> [b h/f w/f f*f*c]."""
    b, h, w, c = image.shape
    x = image.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor * factor * c)


def from_patches(z: Float[Array, "b hz wz d"], factor: int) -> Float[Array, "b h w c"]:
    """Depth to space, the inverse of `to_patches`."""
    b, h, w, d = z.shape
    x = z.reshape(b, h, w, factor, factor, d // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, d // factor**2)


def make_patch_codec(factor: int) -> Codec:
    """The lossless codec of factor x factor patches."""
    return Codec(
        name=f"patch {factor} x {factor}, lossless",
        factor=factor,
        channels=3 * factor**2,
        params={},
        encode=lambda params, image: to_patches(image, factor),
        decode=lambda params, z: from_patches(z, factor),
        pool=lambda pixels: to_patches(jnp.repeat(pixels, 3, axis=-1), factor),
    )


def load_tiny_codec(name: str, path: str | os.PathLike) -> Codec:
    """A tiny autoencoder with the weights of a safetensors file, as float32.

    Raises:
        UserError: the file is missing, broken or another network's.
    """
    encode, decode, abstract = make_tiny_vae_fns(name)
    params = fill(abstract, load_safetensors(path), TINY_VAE, str(path))
    return Codec(
        name=name,
        factor=FACTOR,
        channels=TINY_VAES[name].latent_channels,
        params=jax.tree.map(jnp.asarray, params),
        encode=encode,
        decode=decode,
        pool=lambda pixels: to_patches(pixels, FACTOR).mean(-1, keepdims=True),
    )


def make_codec(c: ConfigDict) -> Codec:
    """The codec of a config section: `name`, `factor` (patch) and `path` (weights of the others; $VARIABLES expand)."""
    if c.name not in CODECS:
        raise UserError(f"codec.name: one of {CODECS}, got {c.name!r}")
    if c.name == "patch":
        return make_patch_codec(c.factor)
    path = pathlib.Path(os.path.expandvars(c.path)).expanduser()
    if not path.is_file():
        raise UserError(f"codec.path: the {c.name} weights, a safetensors file, found none at {path}; download them")
    return load_tiny_codec(c.name, path)
