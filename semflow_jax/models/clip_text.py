"""The text tower of CLIP (Radford et al. 2021), which makes the context of Stable Diffusion's cross-attention.

Parameter paths are those of transformers' `CLIPTextModel`. `CLIPTextConfig()` is the tower of SD-1.5
(clip-vit-large-patch14); that of SD-2.1, OpenCLIP's ViT-H without its last layer, differs by numbers alone. The flow
only ever asks for the empty prompt, so there is no tokenizer here: its token ids are known.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from semflow_jax.errors import UserError
from semflow_jax.models.layers import LayerNorm, Linear, Types

BOS_ID, EOS_ID = 49406, 49407
MAX_LENGTH = 77

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

# Our names of what transformers' config.json says.
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Types):
    """Shape of the network; the defaults are SD-1.5's.

    Attributes:
        vocab_size: number of tokens.
        max_length: tokens of the longest text.
        width, mlp_width: width of the residual stream, and of the hidden layer of each perceptron.
        num_layers, num_heads: transformer layers, and attention heads of each.
        activation: 'quick_gelu' or 'gelu' (exact).
        eps: of every layer norm.
        dtype, param_dtype: names of the types that compute and store.
    """

    vocab_size: int = 49408
    max_length: int = MAX_LENGTH
    width: int = 768
    mlp_width: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    activation: str = "quick_gelu"
    eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """Reads the config.json of transformers' `CLIPTextModel`; raises UserError where this network can't be it."""
        missing = [key for key in CONFIG_KEYS.values() if key not in config]
        if missing:
            raise UserError(
                f"text encoder config: keys of a CLIPTextModel expected, {', '.join(missing)} missing; "
                "take config.json from the text_encoder folder"
            )
        c = cls(**{name: config[key] for name, key in CONFIG_KEYS.items()})
        if c.activation not in ACTIVATIONS:
            raise UserError(
                f"text encoder config, hidden_act: one of {tuple(ACTIVATIONS)}, got {c.activation!r}; "
                "take the text encoder of a Stable Diffusion 1 or 2"
            )
        if c.width % c.num_heads:
            raise UserError(
                f"text encoder config, hidden_size: a multiple of num_attention_heads ({c.num_heads}), got {c.width}; "
                "change one of them"
            )
        return c


class Embedding(nnx.Module):
    """A vector per id, as `torch.nn.Embedding`."""

    def __init__(self, num: int, channels: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num, channels), param_dtype))

    def __call__(self, ids: Int[Array, "... n"]) -> Float[Array, "... n d"]:
        # An id without a vector becomes nan: indexing would quietly take the last vector instead.
        return jnp.take(self.weight[...], ids, axis=0, mode="fill").astype(self.dtype)


class Embeddings(nnx.Module):
    """Token plus learnt position."""

    def __init__(self, c: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = Embedding(c.vocab_size, c.width, rngs=rngs, **c.types())
        self.position_embedding = Embedding(c.max_length, c.width, rngs=rngs, **c.types())

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class SelfAttention(nnx.Module):
    """Causal attention: a token sees itself and those before it. The softmax is in float32."""

    def __init__(self, c: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.num_heads = c.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(c.width, c.width, rngs=rngs, **c.types()) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, _ = x.shape
        q, k, v = (proj(x).reshape(b, n, self.num_heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.tri(n, dtype=bool), scores, -jnp.inf)
        out = jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
        return self.out_proj(out.reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, c: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[c.activation]
        self.fc1 = Linear(c.width, c.mlp_width, rngs=rngs, **c.types())
        self.fc2 = Linear(c.mlp_width, c.width, rngs=rngs, **c.types())

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nnx.Module):
    def __init__(self, c: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = _norm(c, rngs)
        self.self_attn = SelfAttention(c, rngs=rngs)
        self.layer_norm2 = _norm(c, rngs)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, c: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(c, rngs=rngs) for _ in range(c.num_layers)])

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        for layer in self.layers:
            x = layer(x)
        return x


class TextModel(nnx.Module):
    def __init__(self, c: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(c, rngs=rngs)
        self.encoder = Encoder(c, rngs=rngs)
        self.final_layer_norm = _norm(c, rngs)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class CLIPText(nnx.Module):
    """Token ids -> the last hidden state after the final layer norm, float32."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.max_length = config.max_length
        self.text_model = TextModel(config, rngs=rngs)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Raises UserError where a text is too long; an id outside the vocabulary makes its text nan."""
        if ids.shape[1] > self.max_length:
            raise UserError(f"CLIPText: {self.max_length} tokens at most, got {ids.shape[1]}; cut the text")
        return self.text_model(ids).astype(jnp.float32)


def _norm(c: CLIPTextConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(c.width, c.eps, param_dtype=c.types()["param_dtype"], rngs=rngs)


def empty_prompt_ids(pad_id: int) -> Int[Array, "1 77"]:
    """The token ids of '': begin, end, then padding. SD-1.5 pads with the end token, SD-2.1 with 0."""
    return jnp.full((1, MAX_LENGTH), pad_id, jnp.int32).at[0, :2].set(jnp.array([BOS_ID, EOS_ID]))


def load_pad_id(tokenizer_dir: str | os.PathLike[str]) -> int:
    """Returns the padding id of a tokenizer that transformers saved, the end token's where there is no such folder.

    Raises:
        UserError: a broken file, or a padding token outside the vocabulary.
    """
    folder = pathlib.Path(tokenizer_dir)
    # Where the files differ, the first overrules the second, as in transformers.
    said = (_load_json(folder / name).get("pad_token") for name in ("special_tokens_map.json", "tokenizer_config.json"))
    token = next((token for token in said if token is not None), None)
    if token is None:
        return EOS_ID
    token = token["content"] if isinstance(token, dict) else token
    vocab = _load_json(folder / "vocab.json") or _load_json(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    if token not in vocab:
        raise UserError(
            f"{folder}: pad_token must be in vocab.json or tokenizer.json, found {token!r} in neither; "
            "download the tokenizer folder again"
        )
    return vocab[token]


def _load_json(path: pathlib.Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: must be JSON, found {error}; download it again") from error
