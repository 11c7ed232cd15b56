"""A rectified flow again, on its own pairs: reflow (Liu, Gong and Liu 2022, "Flow straight and fast").

Paths of a flow bend where the straight ones of its training pairs cross. A trained flow, the teacher, joins every z_1
to one z_0 of its own,

    z_0' = z_1 + integral of v(z_t, t) dt from t = 1 to 0,                                                      (1)

and straight paths between such pairs hardly cross: a flow that learns these is nearly straight, and few steps do. A
pair is z_0' and the number of its draw, from which the key of z_1's perturbation is made again: masks are encoded by
the training step, as ever. Of each mask and its mirror image there are `draws` pairs, beside the image's moments.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from semflow_jax import latents, noise, parallel
from semflow_jax.data.records import load_info
from semflow_jax.data.transforms import mirrored_ids
from semflow_jax.errors import UserError
from semflow_jax.models.build import Params
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.sampling import Frozen, Sampler

SEED = 2022  # of the perturbations of all pairs
SOLVER = "euler"


def check(c: ConfigDict) -> None:
    """Raises UserError for values of the section `reflow` that fit nothing."""
    if not 0 <= c.share <= 1:
        raise UserError(f"reflow.share: must be a probability in [0, 1], got {c.share}; 0 leaves reflow out")
    for key in ("steps", "draws"):
        if c[key] < 1:
            raise UserError(f"reflow.{key}: at least 1, got {c[key]}; raise it")


def keys_of_pairs(draw: Int[Array, " b"], key: Key[Array, " b"]) -> Key[Array, " b"]:
    """Keys of the perturbations of pairs, by number; where that is negative, there is no pair, `key`'s."""
    return jnp.where(draw >= 0, noise.example_keys(jax.random.key(SEED), draw), key)


def ensure_pairs(
    data_dir: str, sampler: Sampler, unet: UNetConfig, params: Params, c: ConfigDict, progress: bool = True
) -> str:
    """The pairs of a prepared folder's training masks, made where they are missing; where they are, see `latents.keep`.

    Args:
        sampler: of the teacher.
        unet: the teacher's shape.
        params: its weights.
        c: the section `reflow`.
    """
    recipe = _digest(sampler, unet, params, c)
    ids = mirrored_ids(256, load_info(data_dir).flip_pairs)
    encode = functools.partial(jax.jit(functools.partial(_encode, sampler, ids, c)), params, sampler.frozen)
    return latents.keep(data_dir, f"reflow-{recipe[:12]}", f"reflow {recipe}", encode, progress)


def _encode(
    sampler: Sampler, ids: np.ndarray, c: ConfigDict, params: Params, frozen: Frozen, batch: dict[str, Any]
) -> dict[str, Array]:
    """Of images and masks, and of their mirror images: moments, the teacher's own z_0, and the numbers of their draws.

    Args:
        ids: the class that each is in the mirror.
    """

    def integrate(label: Array, keys: Key[Array, " n"]) -> Array:
        z1 = sampler.encode_mask(frozen, label, keys)
        return sampler.to_image(params, frozen, z1, c.steps, SOLVER)

    own, draw = latents.of_draws(integrate, batch, ids, SEED, c.draws)
    moments = latents.image_moments(sampler.codec, frozen["codec"], batch["image"])
    return moments | {"own": own, "draw": draw.astype(jnp.int32)}


def _digest(sampler: Sampler, unet: UNetConfig, params: Params, c: ConfigDict) -> str:
    """Of everything that pairs depend on besides the data."""
    arrays = {"params": params, "colours": sampler.code.colours} | sampler.frozen
    shape = dataclasses.asdict(dataclasses.replace(unet, remat="none"))  # which changes nothing
    config = [shape, sampler.codec.config, sampler.code.config, c.steps, c.draws]
    found = f"{json.dumps(config)} {parallel.digest(traverse_util.flatten_dict(arrays, sep='/'))}"
    return hashlib.sha256(found.encode()).hexdigest()
