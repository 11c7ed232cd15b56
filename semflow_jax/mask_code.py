"""Class ids <-> mask latents z_1, of the image latents' shape. Three codes, one interface.

`colour` is the paper's: class ids become the colours of a palette, perturbed, and pass through the image codec E.
Balanced (`minmax`), the latents of masks m are brought to the range that those of images have, channel by channel,

    z_1 = scale E(m) + shift,                                                                              (2)

and back again before they are decoded.

`linear` needs no colours. The one-hot vectors of a patch, factor^2 n numbers, pass through the principal components of
`whiten.py`, with weights w_c = f_c^(-1/4) that lift classes of small frequency f_c:

    z_1 = [ tint, components ] + noise,    label = argmax of the one-hot vector that the components stand for.      (1)

The three channels of tint carry what a mask does not say: a random colour per class of an image, averaged over the
patch, of amplitude `region`. The noise has amplitude `pixel`. Synthesis turns tint into the colours of the picture;
segmentation finds it there, and drops it.

`learned` is a pair of small networks, see `learned_code.py`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from semflow_jax import learned_code, noise, palette, whiten
from semflow_jax.codec import Codec
from semflow_jax.errors import UserError
from semflow_jax.models.build import Abstract, Params
from semflow_jax.models.layers import from_patches, to_patches

CODES = ("colour", "linear", "learned")
BALANCES = ("none", "minmax")
ENDS = (0.001, 0.999)  # quantiles that stand for the smallest and the largest value, which are a matter of chance
LEAST_SPREAD = 1e-3  # between the ends of a channel, for its scale not to be 1
NUM_TINT = 3  # channels
SHARPNESS = 8.0  # of (3) in palette.py for one-hot vectors: 1 / sigma^2, sigma a quarter of their distance, sqrt(2)
BALANCE = 0.25  # exponent of the class weights


@dataclasses.dataclass(frozen=True)
class MaskCode:
    """Attributes:
    name: for reports.
    colours: to draw masks with [n 3].
    params: the code's arrays; hand them to jitted functions as an argument.
    encode: (params, codec_params, label, key or None) -> z1, perturbed where a key is given.
    logits: (params, codec_params, z1) -> log-probabilities of the classes [b h w n], but for a constant.
    config: what `make_mask_code` builds it from, beside its arrays.
    embed: (codec_params, label, key or None) -> f, the codec's share of the work: without params, for f to be kept.
    finish: (params, f, label, key or None) -> z1, the rest.
    perturbs_before: whether `embed` draws the perturbation; where there is an `embed`, `finish` does otherwise.
    """

    name: str
    colours: UInt8[np.ndarray, "n 3"]
    params: Params
    encode: Callable[[Params, Params, Array, Key[Array, "..."] | None], Array]
    logits: Callable[[Params, Params, Array], Array]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    embed: Callable[[Params, Array, Key[Array, "..."] | None], Array] | None = None
    finish: Callable[[Params, Array, Array, Key[Array, "..."] | None], Array] | None = None
    perturbs_before: bool = False

    def decode(self, params: Params, codec_params: Params, z1: Array) -> UInt8[Array, "b h w 1"]:
        """z_1 -> the likeliest class ids."""
        return jnp.argmax(self.logits(params, codec_params, z1), axis=-1, keepdims=True).astype(jnp.uint8)


def check(c: ConfigDict) -> None:
    """Raises UserError for a name of the section `mask_code` that there is not."""
    if c.name not in CODES:
        raise UserError(f"mask_code.name: one of {CODES}, got {c.name!r}")
    if _balance(c) not in BALANCES:
        raise UserError(f"mask_code.balance: one of {BALANCES}, got {_balance(c)!r}")
    if _balance(c) != "none" and c.name != "colour":
        raise UserError(f"mask_code.balance: 'none' for the code {c.name!r}, got {_balance(c)!r}; it is for 'colour'")


def _balance(c: ConfigDict) -> str:
    return c.get("balance", "none")  # models that were saved without have none


def make_colour_code(
    codec: Codec, colours: UInt8[np.ndarray, "n 3"], pixel: float, region: float, params: Params | None = None
) -> MaskCode:
    """The paper's pseudo-mask; `pixel` and `region` are the amplitudes of `palette.perturb`.

    Args: params: `scale` and `shift` [c] of equation (2); None or nothing leaves the latents as they are.

    Raises:
        UserError: where the amplitudes could change a class.
    """
    palette.check_amplitudes(colours, pixel, region)

    def embed(codec_params, label, key=None):
        mask_rgb = palette.colourise(label, colours)
        if key is not None:
            mask_rgb = palette.perturb(key, mask_rgb, label, len(colours), pixel, region)
        return codec.encode(codec_params, mask_rgb, None)  # the mode: a mask is no photo

    def finish(params, f, label, key=None):
        return params["scale"] * f + params["shift"] if params else f

    def encode(params, codec_params, label, key=None):
        return finish(params, embed(codec_params, label, key), label)

    def logits(params, codec_params, z1):
        z1 = (z1 - params["shift"]) / params["scale"] if params else z1
        return palette.logits(codec.decode(codec_params, z1), colours)

    return MaskCode("colour", colours, params or {}, encode, logits, {}, embed, finish, perturbs_before=True)


def abstract_balance(c: ConfigDict, codec: Codec) -> Abstract:
    """Shapes and types of the arrays of a colour code."""
    names = () if _balance(c) == "none" else ("scale", "shift")
    return dict.fromkeys(names, jax.ShapeDtypeStruct((codec.channels,), jnp.float32))


def fit_balance(
    labels: Iterable[UInt8[np.ndarray, "h w 1"]],
    images: Iterable[UInt8[np.ndarray, "h w 3"]],
    num_classes: int,
    codec: Codec,
    c: ConfigDict,
    seed: int,
) -> dict[str, np.ndarray]:
    """The arrays of equation (2), from training masks and images; equal arguments give equal arrays.

    Both are taken as training sees them: masks are perturbed, and images sampled where the codec is a distribution. A
    channel that is flat in either has scale 1, and only the middles of its ends meet.

    Args: c: the config section `mask_code`.
    """
    code = make_colour_code(codec, palette.make_palette(c.palette, num_classes), c.pixel, c.region)
    key_mask, key_image = noise.split(jax.random.key(seed), 2)

    @jax.jit
    def encode_mask(params: Params, label: Array, i: Array) -> Array:
        return code.encode({}, params, label, jax.random.fold_in(key_mask, i))

    @jax.jit
    def encode_image(params: Params, image: Array, i: Array) -> Array:
        return codec.encode(params, image, jax.random.fold_in(key_image, i))

    masks = _ends(encode_mask(codec.params, x[None], np.int32(i)) for i, x in enumerate(labels))
    pictures = _ends(encode_image(codec.params, palette.scale(x[None]), np.int32(i)) for i, x in enumerate(images))
    spread = np.stack([masks[1] - masks[0], pictures[1] - pictures[0]])
    scale = np.divide(spread[1], spread[0], out=np.ones_like(spread[0]), where=spread.min(0) > LEAST_SPREAD)
    shift = pictures.mean(0) - scale * masks.mean(0)
    return {"scale": scale.astype(np.float32), "shift": shift.astype(np.float32)}


def _ends(latents: Iterable[Array]) -> Float[np.ndarray, "2 c"]:
    """ENDS by channel."""
    rows = np.concatenate([np.asarray(z, np.float64).reshape(-1, z.shape[-1]) for z in latents])
    return np.quantile(rows, ENDS, axis=0)


def fit_linear_code(
    labels: Iterable[UInt8[np.ndarray, "h w 1"]], num_classes: int, codec: Codec, exponent: float
) -> dict[str, np.ndarray]:
    """The arrays of `make_linear_code`, from training labels.

    Raises:
        UserError: a codec whose latents are too narrow to hold a mask.
    """
    num_components = codec.channels - NUM_TINT
    if num_components < num_classes - 1:
        raise UserError(
            f"mask_code.name: 'linear' needs a codec of at least {num_classes - 1 + NUM_TINT} channels for "
            f"{num_classes} classes, {codec.name} has {codec.channels}; use 'colour' or another codec"
        )
    one_hot = np.eye(256, num_classes, dtype=np.float32)
    chunks = (to_patches(one_hot[label[..., 0]][None], codec.factor) for label in labels)

    def weight(mean: np.ndarray) -> np.ndarray:
        frequency = mean.reshape(-1, num_classes).mean(0)
        return np.tile(np.maximum(frequency, 1e-6) ** -BALANCE, codec.factor**2)

    return whiten.fit((x.reshape(-1, x.shape[-1]) for x in chunks), num_components, exponent, weight)


def make_linear_code(
    codec: Codec, colours: UInt8[np.ndarray, "n 3"], params: Params, pixel: float, region: float
) -> MaskCode:
    """Equation (1) with the arrays of `fit_linear_code`."""
    num_classes = len(colours)

    def encode(params, codec_params, label, key=None):
        one_hot = to_patches(jax.nn.one_hot(label[..., 0], num_classes), codec.factor)
        components = whiten.analyse(params, one_hot)
        if key is None:
            return jnp.pad(components, ((0, 0), (0, 0), (0, 0), (NUM_TINT, 0)))
        key_tint, key_noise = noise.split(key, 2)
        tint = palette.region_tint(key_tint, label, num_classes)
        b, h, w, _ = components.shape
        tint = tint.reshape(b, h, codec.factor, w, codec.factor, NUM_TINT).mean((2, 4))
        z1 = jnp.concatenate([region * tint, components], axis=-1)
        return z1 + pixel * (noise.uniform(key_noise, z1.shape) - 0.5)

    def logits(params, codec_params, z1):
        return SHARPNESS * from_patches(whiten.synthesise(params, z1[..., NUM_TINT:]), codec.factor)

    return MaskCode("linear", colours, params, encode, logits)


def make_mask_code(
    c: ConfigDict, codec: Codec, num_classes: int, params: Params, colours: UInt8[np.ndarray, "n 3"] | None = None
) -> MaskCode:
    """The code of a config section.

    Args:
        params: the fitted arrays: of 'linear', of 'learned', and of 'colour' where it is balanced.
        colours: those a saved model was trained with; by default the palette that `c` names.

    Raises:
        ValueError: `params` that are another balance's or network's.
    """
    check(c)
    colours = palette.make_palette(c.palette, num_classes) if colours is None else colours
    if c.name == "colour":
        wanted = {name: x.shape for name, x in abstract_balance(c, codec).items()}
        if {name: x.shape for name, x in params.items()} != wanted:
            raise ValueError("arrays of a colour code that don't fit mask_code.balance or the codec")
        code = make_colour_code(codec, colours, c.pixel, c.region, params)
    elif c.name == "linear":
        code = make_linear_code(codec, colours, params, c.pixel, c.region)
    else:
        embed, finish, logits = learned_code.make_learned_fns(c, codec, colours, params)

        def encode(params, codec_params, label, key=None):
            return finish(params, embed(params, codec_params, label), label, key)

        code = MaskCode("learned", colours, params, encode, logits)
        if c.learned.encoder == "codec":
            by_codec = learned_code.make_embed_fn(codec, colours)
            code = dataclasses.replace(code, embed=by_codec, finish=finish)
    return dataclasses.replace(code, config=c.to_dict())
