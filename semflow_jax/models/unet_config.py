"""The shape of the velocity network, and its translation from and to the `config.json` of diffusers' UNets."""

import dataclasses
from typing import Any

from semflow_jax.errors import UserError
from semflow_jax.models.layers import Types

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "blocks", "full")

DOWN_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")  # without and with attention
UP_TYPES = ("UpBlock2D", "CrossAttnUpBlock2D")

# Keys of diffusers that have one meaning here: their default in diffusers first, then other spellings of the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dropout": (0.0,),
    "transformer_layers_per_block": (1,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "projection_class_embeddings_input_dim": (None,),
    "class_embeddings_concat": (False,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
}
# The score product accumulates in float32 anyway; the rest says nothing about the network.
IGNORED = ("upcast_attention", "sample_size", "addition_embed_type_num_heads", "num_attention_heads")
COUNTS = {  # attribute here: key there
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "layers_per_block": "layers_per_block",
    "num_groups": "norm_num_groups",
}
# What diffusers assumes where a config says nothing. Its size of a head has always been the number of heads.
DEFAULTS: dict[str, Any] = {key: values[0] for key, values in FIXED.items()} | {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [DOWN_TYPES[1]] * 3 + [DOWN_TYPES[0]],
    "up_block_types": [UP_TYPES[0]] + [UP_TYPES[1]] * 3,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
}


def _are_counts(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(type(x) is int and x > 0 for x in values)


def _as_list(value: Any, times: int = 1) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * times


@dataclasses.dataclass(frozen=True)
class UNetConfig(Types):
    """Shape of the network; the defaults are SD-1.5's.

    Attributes:
        in_channels, out_channels: latent channels.
        block_out_channels: width of each level; each level but the last halves height and width.
        layers_per_block: resnets per level on the way down (one more on the way up).
        attention: per level, whether a transformer follows each resnet.
        num_heads: attention heads, per level.
        cross_attention_dim: width of the context, None for a network without cross-attention.
        linear_projection: whether transformers begin and end in a linear map, as SD-2's, or in a 1 x 1 convolution.
        num_groups: groups of every group norm.
        skip: whether equation (1) of `unet` holds; Stable Diffusion's weights have none.
        intervals: whether the network is told how far its velocity will be followed; Stable Diffusion's is not.
        remat: what the backward pass computes again instead of keeping it: none, blocks (the inside of each resnet
            and transformer), full (levels, and inside them blocks: up to two more forward passes instead of one).
            Accelerators save memory by it; XLA's CPU compiler merges the second computation with the first.
        dtype, param_dtype: names of the types that compute and store.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int | None = 768
    linear_projection: bool = False
    num_groups: int = 32
    skip: bool = False
    intervals: bool = False
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def factor(self) -> int:
        """Latent height and width must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check(self) -> None:
        """Raises UserError where a width can't be divided into groups or heads, or a name is unknown."""
        for key, names in (("dtype", DTYPES), ("param_dtype", DTYPES), ("remat", REMAT)):
            if getattr(self, key) not in names:
                raise UserError(f"model.{key}: one of {names}, got {getattr(self, key)!r}")
        for width, heads in zip(self.block_out_channels, self.num_heads, strict=True):
            if width % self.num_groups or width % heads:
                raise UserError(
                    f"model.block_out_channels: each must be a multiple of num_groups ({self.num_groups}) and of its "
                    f"num_heads, got {width} with {heads} heads; change one of them"
                )

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> "UNetConfig":
        """Reads the `config.json` of a `UNet2DConditionModel`; keys that it leaves out have diffusers' defaults.

        Raises:
            UserError: a key, or a value of it, that this network does not implement.
        """
        found = DEFAULTS | {key: value for key, value in config.items() if key in FIXED or key[0] != "_"}
        found["attention_head_dim"] = found["num_attention_heads"] or found["attention_head_dim"]
        widths, down, up = (
            _as_list(found[key]) for key in ("block_out_channels", "down_block_types", "up_block_types")
        )
        levels = len(widths)
        attention = tuple(name == DOWN_TYPES[1] for name in down)
        up_expected = [UP_TYPES[attends] for attends in reversed(attention)]
        heads = _as_list(found["attention_head_dim"], levels)
        cross = _as_list(found["cross_attention_dim"], levels)
        rules = {
            key: (all(x in values for x in _as_list(found[key])), f"{values[0]}") for key, values in FIXED.items()
        } | {
            "block_out_channels": (_are_counts(found["block_out_channels"]), "a list of numbers"),
            "down_block_types": (set(down) <= set(DOWN_TYPES) and len(down) == levels, f"{levels} of {DOWN_TYPES}"),
            "up_block_types": (up == up_expected, f"{up_expected}, as down_block_types in reverse"),
            "attention_head_dim": (_are_counts(heads) and len(heads) == levels, f"1 or {levels} numbers"),
            "cross_attention_dim": (_are_counts(cross) and cross == cross[:1] * levels, "one number"),
            "use_linear_projection": (found["use_linear_projection"] in (True, False), "a bool"),
        }
        rules |= {key: (_are_counts([found[key]]), "a number") for key in COUNTS.values()}
        for key, value in found.items():
            if key not in IGNORED:
                holds, rule = rules.get(key, (value is None, "absent, for its meaning is unknown"))
                if not holds:
                    remedy = "only UNets built like Stable Diffusion 1 and 2 can be read"
                    raise UserError(f"unet/config.json, {key}: must be {rule}, found {value!r}: {remedy}")
        result = cls(
            block_out_channels=tuple(widths),
            attention=attention,
            num_heads=tuple(heads),
            cross_attention_dim=cross[0],
            linear_projection=found["use_linear_projection"],
            **{name: found[key] for name, key in COUNTS.items()},
        )
        result.check()
        return result

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of the `UNet2DConditionModel` with the same parameters and outputs.

        Raises:
            UserError: `skip`, `intervals`, or no cross-attention, which diffusers has no words for.
        """
        for key, what in (("skip", "add z_t to the output"), ("intervals", "embed an interval")):
            if getattr(self, key):
                raise UserError(f"model.{key}: must be false for diffusers, which can't {what}, found true")
        if self.cross_attention_dim is None:
            raise UserError(
                "model.cross_attention_dim: must be a width for diffusers, found none: train with a context"
            )
        fixed = {key: values[0] for key, values in FIXED.items()}
        counts = {key: getattr(self, name) for name, key in COUNTS.items()}
        return {
            "down_block_types": [DOWN_TYPES[attends] for attends in self.attention],
            "up_block_types": [UP_TYPES[attends] for attends in reversed(self.attention)],
            "block_out_channels": list(self.block_out_channels),
            "attention_head_dim": list(self.num_heads),
            "cross_attention_dim": self.cross_attention_dim,
            "use_linear_projection": self.linear_projection,
        } | (counts | fixed)
