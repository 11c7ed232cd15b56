"""Class ids <-> mask latents z_1, of the image latents' shape. Two codes, one interface.

`colour` is the paper's: class ids become the colours of a palette, perturbed, and pass through the image codec.

`linear` needs no colours. Let p be the one-hot vector of a patch, factor^2 n numbers, and w_c = f_c^(-1/4) a weight
that lifts rare classes (frequency f_c). With the leading eigenvectors U and eigenvalues L of the covariance of w p,

    z_1 = [ g L^(-e/2) U^T (w p - mean),  tint ],    g such that the RMS is 1,          (1)
    label = argmax_c ( w^-1 (U L^(e/2) / g z_1 + mean) )_c,                             (2)

where e = `whiten`: 1 makes all directions alike, 0 leaves the spread of nature. The last three channels carry what a
mask does not say: a random colour per class of an image, averaged over the patch, of amplitude `region`. All channels
get noise of amplitude `pixel`. Synthesis turns tint into the colours of the picture; segmentation finds it there, and
drops it.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from semflow_jax import palette
from semflow_jax.codec import Codec, from_patches, to_patches
from semflow_jax.errors import UserError
from semflow_jax.models.build import Params

CODES = ("colour", "linear")
NUM_TINT = 3  # channels
BALANCE = 0.25  # exponent of w


@dataclasses.dataclass(frozen=True)
class MaskCode:
    """Attributes:
    name: for reports.
    colours: to draw masks with [n 3].
    params: the code's arrays; hand them to jitted functions as an argument.
    encode: (params, codec_params, label, key or None) -> z1, perturbed where a key is given.
    decode: (params, codec_params, z1) -> label.
    """

    name: str
    colours: UInt8[np.ndarray, "n 3"]
    params: Params
    encode: Callable[[Params, Params, Array, PRNGKeyArray | None], Array]
    decode: Callable[[Params, Params, Array], Array]


def make_colour_code(codec: Codec, colours: UInt8[np.ndarray, "n 3"], pixel: float, region: float) -> MaskCode:
    """The paper's pseudo-mask; `pixel` and `region` are the amplitudes of `palette.perturb`.

    Raises:
        UserError: where the amplitudes could change a class.
    """
    palette.check_amplitudes(colours, pixel, region)

    def encode(params, codec_params, label, key=None):
        mask_rgb = palette.colourise(label, colours)
        if key is not None:
            mask_rgb = palette.perturb(key, mask_rgb, label, len(colours), pixel, region)
        return codec.encode(codec_params, mask_rgb)

    def decode(params, codec_params, z1):
        return palette.decode(codec.decode(codec_params, z1), colours)

    return MaskCode("colour", colours, {}, encode, decode)


def fit_linear_code(
    labels: Iterable[UInt8[np.ndarray, "h w 1"]], num_classes: int, codec: Codec, whiten: float
) -> dict[str, np.ndarray]:
    """Equation (1) from training labels, in float64; the same labels give the same code.

    Raises:
        UserError: a codec whose latents are too narrow to hold a mask.
    """
    dims = codec.channels - NUM_TINT
    if dims < num_classes - 1:
        raise UserError(
            f"mask_code.name: 'linear' needs a codec of at least {num_classes - 1 + NUM_TINT} channels for "
            f"{num_classes} classes, {codec.name} has {codec.channels}; use 'colour' or another codec"
        )
    size = codec.factor**2 * num_classes
    count, total, outer = 0, np.zeros(size), np.zeros((size, size))
    for label in labels:
        p = np.asarray(to_patches(np.eye(256, num_classes, dtype=np.float32)[label[..., 0]][None], codec.factor))
        p = p.reshape(-1, size).astype(np.float64)
        count, total, outer = count + len(p), total + p.sum(0), outer + p.T @ p
    mean = total / count
    frequency = mean.reshape(-1, num_classes).mean(0)
    weight = np.tile(np.maximum(frequency, 1e-6) ** -BALANCE, codec.factor**2)
    covariance = weight[:, None] * (outer / count - np.outer(mean, mean)) * weight
    values, vectors = np.linalg.eigh(covariance)
    keep = np.argsort(values)[::-1][:dims]
    values, vectors = np.maximum(values[keep], 1e-9), vectors[:, keep]
    scale = values ** (-whiten / 2)
    scale /= np.sqrt(np.mean(scale**2 * values))
    arrays = {
        "analysis": weight[:, None] * vectors * scale,  # p -> z, less the mean
        "synthesis": (vectors / scale).T / weight,  # z -> p
        "mean": mean,
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def make_linear_code(
    codec: Codec, colours: UInt8[np.ndarray, "n 3"], params: Params, pixel: float, region: float
) -> MaskCode:
    """Equations (1) and (2) with the arrays of `fit_linear_code`; `region` is the amplitude of the tint."""
    num_classes = len(colours)

    def encode(params, codec_params, label, key=None):
        p = to_patches(jax.nn.one_hot(label[..., 0], num_classes), codec.factor)
        z = (p - params["mean"]) @ params["analysis"]
        if key is None:
            return jnp.pad(z, ((0, 0), (0, 0), (0, 0), (0, NUM_TINT)))
        key_tint, key_noise = jax.random.split(key)
        tint = palette.region_tint(key_tint, label, num_classes)
        b, h, w, _ = z.shape
        tint = tint.reshape(b, h, codec.factor, w, codec.factor, NUM_TINT).mean((2, 4))
        z = jnp.concatenate([z, region * tint], axis=-1)
        return z + pixel * (jax.random.uniform(key_noise, z.shape) - 0.5)

    def decode(params, codec_params, z1):
        p = z1[..., :-NUM_TINT] @ params["synthesis"] + params["mean"]
        return jnp.argmax(from_patches(p, codec.factor), axis=-1, keepdims=True).astype(jnp.uint8)

    return MaskCode("linear", colours, params, encode, decode)


def make_mask_code(c: ConfigDict, codec: Codec, num_classes: int, params: Params | None) -> MaskCode:
    """The code of a config section; `params` are the fitted arrays of 'linear'."""
    if c.name not in CODES:
        raise UserError(f"mask_code.name: one of {CODES}, got {c.name!r}")
    colours = palette.make_palette(c.palette, num_classes)
    if c.name == "colour":
        return make_colour_code(codec, colours, c.pixel, c.region)
    return make_linear_code(codec, colours, params or {}, c.pixel, c.region)
