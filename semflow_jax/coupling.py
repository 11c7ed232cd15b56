"""What the flow joins: the states at both of its ends, made of latents and of noise.

`semflow`, the paper's, joins the image latent z_0 and the mask latent z_1 as they are. `symmflow` (SymmFlow, Caetano et
al. 2025) lets both flow at once, in opposite directions between data and noise, in a state of twice the channels:

    at t = 0: [z_0, e_1],    at t = 1: [e_0, z_1],    e_0, e_1 ~ N(0, 1).                              (1)

(Their clock runs the other way.) Segmentation goes from (image, noise) to a mask, synthesis from (noise, mask) to an
image; e is zero where no key is given, so that an image has one mask. One network predicts both velocities, and its
loss weighs those of the image half and of the mask half,

    L = w L_image + (1 - w) L_mask.                                                                    (2)

Codec and mask code are all that know of it: they add the noise to what they encode and take it off what they decode.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from semflow_jax import noise
from semflow_jax.codec import Codec, sample
from semflow_jax.errors import UserError
from semflow_jax.mask_code import MaskCode

OBJECTIVES = ("semflow", "symmflow")


def check(objective: str) -> None:
    """Raises UserError for an unknown objective."""
    if objective not in OBJECTIVES:
        raise UserError(f"objective: one of {OBJECTIVES}, got {objective!r}")


def num_channels(objective: str, codec: Codec) -> int:
    """Of the state, with a codec that is not coupled yet."""
    return 2 * codec.channels if objective == "symmflow" else codec.channels


def couple(objective: str, codec: Codec, code: MaskCode) -> tuple[Codec, MaskCode]:
    """Codec and code whose latents are states of the flow: equation (1).

    Raises:
        UserError: unknown objective.
    """
    check(objective)
    if objective == "semflow":
        return codec, code
    num = codec.channels

    def beside_noise(z1_fn):
        def state_fn(*args):
            *rest, key = args
            key_noise, key_code = (None, None) if key is None else noise.split(key, 2)
            z1 = z1_fn(*rest, key_code)
            e0 = sample(jnp.zeros(z1.shape), jnp.ones(z1.shape), key_noise)
            return jnp.concatenate([e0, z1], axis=-1)

        return state_fn

    wide = dataclasses.replace(
        codec,
        channels=2 * num,
        noise_channels=num,
        decode=lambda params, z: codec.decode(params, z[..., :num]),
    )
    return wide, dataclasses.replace(
        code,
        encode=beside_noise(code.encode),
        finish=code.finish and beside_noise(code.finish),
        logits=lambda params, codec_params, z: code.logits(params, codec_params, z[..., num:]),
    )


def channel_weight(objective: str, image_weight: float, channels: int) -> Float[Array, "1 1 1 c"] | None:
    """The weights of (2) by channel of the state, 1 on average; None where all count alike."""
    if objective == "semflow":
        return None
    halves = jnp.array([2 * image_weight, 2 - 2 * image_weight])
    return jnp.repeat(halves, channels // 2)[None, None, None]
