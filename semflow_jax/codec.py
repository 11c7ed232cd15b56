"""Pixels <-> latents. A codec is frozen: pictures in [-1, 1] go in, latents of one shape for images and masks come out.

`patch` moves each factor x factor square of pixels into channels and evens out their spread (see `whiten.py`):
lossless, nothing to download, for small pictures. `kl` is Stable Diffusion's autoencoder (see `models/vae.py`). The
others are pretrained tiny autoencoders (see `models/tiny_vae.py`); `taesd` lives in Stable Diffusion's latent
space too.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from semflow_jax import noise, whiten
from semflow_jax.errors import UserError
from semflow_jax.models.build import Params, make_fns
from semflow_jax.models.layers import AnyArray, from_patches, to_patches
from semflow_jax.models.tiny_vae import TINY_VAES, TinyVAE
from semflow_jax.models.unet_config import DTYPES
from semflow_jax.models.vae import AutoencoderKL, VAEConfig
from semflow_jax.weights.export import to_torch
from semflow_jax.weights.keys import TINY_VAE, Table
from semflow_jax.weights.load import fill, load_safetensors
from semflow_jax.weights.stable_diffusion import find_pretrained, load_vae

CODECS = ("patch", "kl", *TINY_VAES)
Moments = tuple[Array, Array | None]


@dataclasses.dataclass(frozen=True)
class Codec:
    """Attributes:
    name: for reports.
    factor: pixels per latent, in height and in width.
    channels: of the latent, noise included.
    params: the frozen weights; hand them to jitted functions as an argument.
    moments: (params, image [b h w 3] in [-1, 1]) -> mean and standard deviation of z [b h/factor w/factor channels];
        None for the latter, where the codec is no distribution.
    decode: (params, z) -> image, about [-1, 1].
    config: what `make_codec` builds it from, beside its tensors.
    noise_channels: the last channels of the latent, noise that is no part of the image: see `coupling.py`.
    """

    name: str
    factor: int
    channels: int
    params: Params
    moments: Callable[[Params, Array], Moments]
    decode: Callable[[Params, Array], Array]
    config: dict[str, Any]
    noise_channels: int = 0

    def encode(
        self, params: Params, image: Float[Array, "b h w 3"], key: Key[Array, "..."] | None = None
    ) -> Float[Array, "b hz wz c"]:
        """z of an image in [-1, 1]: a sample with a key, where the codec is a distribution, and the mode without."""
        return self.draw(*self.moments(params, image), key)

    def draw(
        self, mean: Float[Array, "b hz wz c"], std: Float[Array, "b hz wz c"] | None, key: Key[Array, "..."] | None
    ) -> Float[Array, "b hz wz d"]:
        """z of an image's moments; noise is zero without a key."""
        if not self.noise_channels:
            return sample(mean, std, key)
        key_image, key_noise = (None, None) if key is None else noise.split(key, 2)
        rest = jnp.zeros((*mean.shape[:-1], self.noise_channels))
        return jnp.concatenate([sample(mean, std, key_image), sample(rest, jnp.ones_like(rest), key_noise)], axis=-1)

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

    def pool(self, pixels: Float[Array, "b h w 1"]) -> Float[Array, "b hz wz 1"]:
        """Carries a map of pixels to the latent grid, as a weight of each place."""
        return to_patches(pixels, self.factor).mean(-1, keepdims=True)


def sample(
    mean: Float[Array, "*shape"], std: Float[Array, "*shape"] | None, key: Key[Array, "..."] | None
) -> Float[Array, "*shape"]:
    """A sample of a normal distribution; its mode without a key, and where it has no width."""
    return mean if std is None or key is None else mean + std * noise.normal(key, std.shape)


def fit_patch_codec(
    images: Iterable[UInt8[np.ndarray, "h w 3"]], factor: int, exponent: float
) -> dict[str, np.ndarray]:
    """The arrays of `make_patch_codec`, from training images."""
    chunks = (to_patches(image[None].astype(np.float32) / 127.5 - 1, factor) for image in images)
    return whiten.fit((x.reshape(-1, x.shape[-1]) for x in chunks), 3 * factor**2, exponent)


def make_patch_codec(factor: int, params: Params) -> Codec:
    """The lossless codec of factor x factor patches; without `params`, their pixels as they are."""

    def analyse(p: Params, patches: Array) -> Array:
        return whiten.analyse(p, patches) if p else patches

    return Codec(
        name=f"patch {factor} x {factor}, lossless",
        factor=factor,
        channels=3 * factor**2,
        params=params,
        moments=lambda p, image: (analyse(p, to_patches(image, factor)), None),
        decode=lambda p, z: from_patches(whiten.synthesise(p, z) if p else z, factor),
        config={"name": "patch", "factor": factor},
    )


def make_tiny_codec(name: str, params: Params) -> Codec:
    """A pretrained tiny autoencoder; `params` may be abstract."""
    vae = TINY_VAES[name]
    _, (encode, decode) = make_fns(lambda rngs: TinyVAE(vae, rngs=rngs), "encode", "decode")
    return Codec(
        name=name,
        factor=vae.factor,
        channels=vae.latent_channels,
        params=params,
        moments=lambda p, image: (encode(p, image), None),
        decode=decode,
        config={"name": name},
    )


def _load_tiny_codec(name: str, tensors: Mapping[str, AnyArray], table: Table = (), place: str = "tensors") -> Codec:
    abstract, _ = make_fns(lambda rngs: TinyVAE(TINY_VAES[name], rngs=rngs))
    return make_tiny_codec(name, fill(abstract, tensors, table, place, put=jnp.asarray))


def make_kl_codec(config: VAEConfig, params: Params) -> Codec:
    """Stable Diffusion's autoencoder; images are sampled where a key is given. What it returns is float32."""
    _, fns = make_fns(lambda rngs: AutoencoderKL(config, rngs=rngs), "moments", "decode")
    moments, decode = (lambda *args, fn=fn: jax.tree.map(lambda x: x.astype(jnp.float32), fn(*args)) for fn in fns)
    return Codec(
        name="AutoencoderKL",
        factor=config.factor,
        channels=config.latent_channels,
        params=params,
        moments=moments,
        decode=decode,
        config={"name": "kl", "vae": dataclasses.asdict(config)},
    )


def load_codec(c: ConfigDict, pretrained: pathlib.Path | None = None) -> Codec:
    """The codec of a training config, with the weights at `c.path` ($VARIABLES expand); `patch` is not fitted yet.

    Args: pretrained: where `kl` finds its weights instead.

    Raises:
        UserError: an unknown name; weights that are missing, broken or another network's.
    """
    if c.name not in CODECS:
        raise UserError(f"codec.name: one of {CODECS}, got {c.name!r}")
    if c.name == "patch":
        return make_patch_codec(c.factor, {})
    path = pathlib.Path(os.path.expandvars(c.path)).expanduser()
    if c.name == "kl":
        if c.dtype not in DTYPES:
            raise UserError(f"codec.dtype: one of {DTYPES}, got {c.dtype!r}")
        config, params = load_vae(pretrained or find_pretrained(str(path)), put=jnp.asarray)
        return make_kl_codec(dataclasses.replace(config, dtype=c.dtype), params)
    if not path.is_file():
        raise UserError(f"codec.path: the {c.name} weights, a safetensors file, found none at {path}; download them")
    return _load_tiny_codec(c.name, load_safetensors(path), TINY_VAE, str(path))


def make_codec(config: Mapping[str, Any], tensors: Mapping[str, AnyArray]) -> Codec:
    """The inverse of `Codec.config` and `stored`."""
    if config["name"] == "patch":
        return make_patch_codec(config["factor"], {name: jnp.asarray(x) for name, x in tensors.items()})
    if config["name"] == "kl":
        vae = vae_config(config)
        abstract, _ = make_fns(lambda rngs: AutoencoderKL(vae, rngs=rngs))
        return make_kl_codec(vae, fill(abstract, tensors, place="codec", put=jnp.asarray))
    return _load_tiny_codec(config["name"], tensors)


def vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """The autoencoder's shape in the config of a `kl` codec."""
    return VAEConfig(**config["vae"] | {"block_out_channels": tuple(config["vae"]["block_out_channels"])})


def stored(codec: Codec) -> dict[str, np.ndarray]:
    """The arrays as a file keeps them: networks in PyTorch's order of axes."""
    if codec.config["name"] == "patch":
        return {name: np.asarray(x) for name, x in codec.params.items()}
    return to_torch(codec.params, "float32")
