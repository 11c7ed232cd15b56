"""What a run starts from: nothing, a trained flow, or Stable Diffusion."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from semflow_jax import coupling
from semflow_jax.codec import Codec, load_codec
from semflow_jax.errors import UserError
from semflow_jax.mask_code import MaskCode
from semflow_jax.models.build import Params, init_unet
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.pipeline import SemFlow, check_parts, find_model, is_saved, load_frozen, make_unet_config
from semflow_jax.weights.stable_diffusion import load_context, open_unet

FREE = ("remat", "dtype", "param_dtype")  # keys of `model` that count when the network is given


@dataclasses.dataclass(frozen=True)
class Start:
    """Attributes:
    unet: the network's shape.
    codec: of images; `patch` is not fitted yet, unless it comes with a trained flow.
    code: of masks, where it comes with a trained flow.
    context: [n d] that the network attends to, or None.
    make_params: the network's first weights; call it inside jit where `drawn`.
    drawn: whether they are random.
    """

    unet: UNetConfig
    codec: Codec
    code: MaskCode | None
    context: jax.Array | None
    make_params: Callable[[], Params]
    drawn: bool


def find_start(c: ConfigDict) -> Start:
    """Opens what `c.init` names; weights are read when `make_params` is called.

    Raises:
        UserError: `c.init` is nothing of the kind, or `c.model` can't be a network.
    """
    if not c.init:
        codec = load_codec(c.codec)
        unet = _make_unet_config(c, codec)
        if unet.cross_attention_dim is not None:
            raise UserError(
                "model.cross_attention_dim: a context comes with `init`, without it the key must be None, "
                f"got {unet.cross_attention_dim}; set init to Stable Diffusion's weights"
            )
        return Start(unet, codec, None, None, lambda: init_unet(unet, c.seed), drawn=True)
    path = find_model(c.init)
    if is_saved(path):
        config, codec, code, context = load_frozen(path)
        if config["objective"] != c.objective:
            raise UserError(f"objective: init has {config['objective']!r}, got {c.objective!r}; change one of them")
        unet = _given(make_unet_config(config), c.model)

        def make_params() -> Params:
            return {name: x.astype(unet.param_dtype) for name, x in SemFlow.from_pretrained(path).params.items()}

        return Start(unet, codec, code, context, make_params, drawn=False)
    if c.objective != "semflow" or c.model.intervals:
        others = f"objective {c.objective!r} and model.intervals {c.model.intervals}"
        raise UserError(f"init: Stable Diffusion's weights fit objective 'semflow' without intervals, got {others}")
    found, read = open_unet(path)
    unet = _given(found, c.model)
    dtype = jnp.dtype(unet.param_dtype)
    codec = load_codec(c.codec, path)
    context = jnp.asarray(load_context(path))
    check_parts(unet, codec, context)
    return Start(unet, codec, None, context, lambda: read(lambda x: np.asarray(x, dtype)), drawn=False)


def resume_start(export: pathlib.Path, c: ConfigDict) -> Start:
    """What a run that has begun started from, by its own files; it needs `c.init` only before its first checkpoint."""
    config, codec, code, context = load_frozen(export)
    unet = make_unet_config(config)
    make_params = (lambda: find_start(c).make_params()) if c.init else (lambda: init_unet(unet, c.seed))
    return Start(unet, codec, code, context, make_params, drawn=not c.init)


def _given(unet: UNetConfig, c: ConfigDict) -> UNetConfig:
    unet = dataclasses.replace(unet, **{key: c[key] for key in FREE})
    unet.check()
    return unet


def _make_unet_config(c: ConfigDict, codec: Codec) -> UNetConfig:
    m = c.model.to_dict()
    if len({len(m["block_out_channels"]), len(m["attention"]), len(m["num_heads"])}) > 1:
        raise UserError(
            "model: block_out_channels, attention and num_heads need one entry per level each, "
            f"got {m['block_out_channels']}, {m['attention']}, {m['num_heads']}; make them equally long"
        )
    channels = coupling.num_channels(c.objective, codec)
    unet = UNetConfig(in_channels=channels, out_channels=channels, **m)
    unet.check()
    return unet
