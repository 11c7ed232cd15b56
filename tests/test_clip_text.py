"""models/clip_text.py: equal to transformers' text tower and tokenizer, from the files that those save on."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax.errors import UserError
from semflow_jax.models.build import make_fns
from semflow_jax.models.clip_text import CLIPText, CLIPTextConfig, empty_prompt_ids, load_pad_id
from semflow_jax.weights.keys import CLIP_TEXT
from semflow_jax.weights.load import fill, load_safetensors

SD15 = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
SD21 = SD15 | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
NUM_TOKENS = 50
SMALL = SD15 | {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make_tower(config):
    """transformers' tower, its biases and norms drawn at random too: they begin at 0 and 1."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    last = config["vocab_size"] - 1
    config = transformers.CLIPTextConfig(**config, bos_token_id=last - 1, eos_token_id=last)
    tower = transformers.CLIPTextModel(config).eval().requires_grad_(False)
    for parameter in tower.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def call_tower(tower, ids):
    import torch

    return tower(torch.from_numpy(np.array(ids, np.int64))).last_hidden_state.numpy()


def get_tensors(tower, prefix=""):
    return {prefix + key: tensor.numpy() for key, tensor in tower.state_dict().items()}


@functools.cache  # most of the tests' time is compilation
def compile_tower(config):
    abstract, (text_fn,) = make_fns(lambda rngs: CLIPText(config, rngs=rngs), "__call__")
    return abstract, jax.jit(text_fn)


def make_text_fn(config):
    return compile_tower(CLIPTextConfig.from_dict(config))


def make_random_params(abstract):
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for path, x in abstract.items()}


def make_ids(shape=(2, 77)):
    return jax.random.randint(jax.random.key(0), shape, 0, NUM_TOKENS)


def relative_rms(x, reference):
    return np.sqrt(np.mean((np.asarray(x) - reference) ** 2) / np.mean(reference**2))


def check_equals_transformers(config, ids):
    tower = make_tower(config)
    abstract, text_fn = make_text_fn(config)
    hidden = text_fn(fill(abstract, get_tensors(tower), CLIP_TEXT), ids)
    single = call_tower(tower, ids)
    reference = call_tower(tower.double(), ids)
    error, torch_error = relative_rms(hidden, reference), relative_rms(single, reference)
    print(f"relative rms against torch float64: {error:.2e}, torch float32's {torch_error:.2e}")
    assert reference.dtype == np.float64
    assert error < 2e-6


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers(activation):
    check_equals_transformers(SMALL | {"hidden_act": activation}, make_ids())


@pytest.mark.slow
def test_equals_transformers_at_the_size_of_sd15():
    check_equals_transformers(SD15, empty_prompt_ids(49407))


@pytest.mark.parametrize(("config", "num_tensors", "num_params"), [(SD15, 196, 123_060_480), (SD21, 372, 340_387_840)])
def test_true_sizes(config, num_tensors, num_params):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = list(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).parameters())
    abstract, _ = make_text_fn(config)
    assert len(abstract) == len(theirs) == num_tensors
    assert sum(math.prod(x.shape) for x in abstract.values()) == sum(x.numel() for x in theirs) == num_params


def test_default_is_stable_diffusion_1():
    assert CLIPTextConfig.from_dict(SD15) == CLIPTextConfig()


def test_loads_what_transformers_saves(tmp_path):
    tower = make_tower(SMALL)
    tower.save_pretrained(tmp_path)
    abstract, text_fn = make_text_fn(json.loads((tmp_path / "config.json").read_text()))
    params = fill(abstract, load_safetensors(tmp_path / "model.safetensors"), CLIP_TEXT)
    assert relative_rms(text_fn(params, make_ids()), call_tower(tower, make_ids())) < 2e-6


def test_keys_of_every_age_fill_the_same_parameters():
    abstract, _ = make_text_fn(SMALL)
    rng = np.random.default_rng(0)
    shapes = {path: x.shape if path.endswith("embedding.weight") else x.shape[::-1] for path, x in abstract.items()}
    tensors = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    new = {path.removeprefix("text_model."): tensor for path, tensor in tensors.items()}
    old = tensors | {"text_model.embeddings.position_ids": np.arange(77)[None]}
    both = new | {"embeddings.position_ids": np.arange(77)[None]}
    expected = fill(abstract, tensors)
    for found in (new, old, both):
        jax.tree.map(np.testing.assert_array_equal, fill(abstract, found, CLIP_TEXT), expected)
    with pytest.raises(UserError, match=r"1 keys without a parameter \(text_projection.weight\)"):
        fill(abstract, new | {"text_projection.weight": np.zeros((2, 2))}, CLIP_TEXT)


@pytest.fixture(scope="module")
def small():
    abstract, text_fn = make_text_fn(SMALL)
    return make_random_params(abstract), text_fn


def test_a_token_does_not_see_later_ones_nor_other_texts(small):
    params, text_fn = small
    ids = make_ids()
    hidden = text_fn(params, ids)
    changed = text_fn(params, ids.at[0, 5].set((ids[0, 5] + 1) % NUM_TOKENS))
    np.testing.assert_array_equal(changed[0, :5], hidden[0, :5])
    np.testing.assert_array_equal(changed[1], hidden[1])
    assert jnp.abs(changed[0, 5:] - hidden[0, 5:]).max(axis=-1).min() > 1e-4


def test_a_short_text_is_the_start_of_a_long_one(small):
    params, text_fn = small
    ids = make_ids()
    np.testing.assert_allclose(text_fn(params, ids[:, :7]), text_fn(params, ids)[:, :7], atol=1e-5)


def test_every_parameter_matters_but_one():
    """The softmax does not see the bias of the keys, which adds the same to all of a query's scores."""
    abstract, text_fn = make_text_fn(SMALL | {"num_hidden_layers": 1})
    ids = make_ids((1, 12))
    gradient = jax.jit(jax.grad(lambda params: jnp.square(text_fn(params, ids) - 1).mean()))(
        make_random_params(abstract)
    )
    still = [path for path, g in gradient.items() if not jnp.abs(g).max() > 1e-6]
    assert still == ["text_model.encoder.layers.0.self_attn.k_proj.bias"]


def test_too_long_a_text_and_unknown_tokens(small):
    params, text_fn = small
    with pytest.raises(UserError, match="CLIPText: 77 tokens at most, got 78"):
        text_fn(params, make_ids((1, 78)))
    ids = make_ids()
    hidden = text_fn(params, ids.at[1, 4].set(NUM_TOKENS))
    assert jnp.isnan(hidden).any(axis=(1, 2)).tolist() == [False, True]


def test_computes_in_bfloat16_and_answers_in_float32(small):
    config = dataclasses.replace(CLIPTextConfig.from_dict(SMALL), dtype="bfloat16", param_dtype="bfloat16")
    abstract, text_fn = compile_tower(config)
    assert {x.dtype.name for x in abstract.values()} == {"bfloat16"}
    params, float_fn = small
    hidden = text_fn({path: x.astype(jnp.bfloat16) for path, x in params.items()}, make_ids())
    assert hidden.dtype == jnp.float32
    assert 1e-4 < relative_rms(hidden, np.asarray(float_fn(params, make_ids()))) < 0.05


def test_configs_of_other_networks():
    with pytest.raises(UserError, match=r"hidden_act: one of \('quick_gelu', 'gelu'\), got 'relu'"):
        CLIPTextConfig.from_dict(SD15 | {"hidden_act": "relu"})
    with pytest.raises(UserError, match=r"hidden_size: a multiple of num_attention_heads \(12\), got 770"):
        CLIPTextConfig.from_dict(SD15 | {"hidden_size": 770})
    with pytest.raises(UserError, match="hidden_size, num_hidden_layers missing"):
        CLIPTextConfig.from_dict({key: SD15[key] for key in SD15 if key not in ("hidden_size", "num_hidden_layers")})


VOCAB = {"!": 0, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
ADDED_TOKEN = {"content": "!", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def write_tokenizer(folder, special_tokens_map=None, tokenizer_config=None):
    """The files of a tokenizer as transformers 3 and 4 wrote them, the vocabulary cut down."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | (tokenizer_config or {})))
    if special_tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))


@pytest.mark.parametrize(
    ("special_tokens_map", "tokenizer_config", "expected"),
    [
        ({"pad_token": "<|endoftext|>"}, {"pad_token": "<|endoftext|>"}, 49407),
        ({"pad_token": "!"}, {"pad_token": "<|endoftext|>"}, 0),
        ({"pad_token": ADDED_TOKEN}, {}, 0),
        (None, {"pad_token": "!"}, 0),
        (None, {"pad_token": ADDED_TOKEN | {"__type": "AddedToken"}}, 0),
        (None, {}, 49407),
    ],
)
def test_empty_prompt_is_the_tokenizers(tmp_path, special_tokens_map, tokenizer_config, expected):
    """Of a tokenizer in the old layout, and of the same one saved in the new layout, without a vocab.json."""
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, special_tokens_map, tokenizer_config)
    assert load_pad_id(tmp_path) == expected
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ids = empty_prompt_ids(expected)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, [tokenizer("", padding="max_length")["input_ids"]])
    tokenizer.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    assert load_pad_id(tmp_path / "new") == expected


def test_pad_id_without_a_tokenizer(tmp_path):
    assert load_pad_id(tmp_path / "absent") == 49407


def test_broken_tokenizers(tmp_path):
    write_tokenizer(tmp_path, {"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"pad_token must be in vocab.json or .*, found '\[PAD\]' in neither"):
        load_pad_id(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": ')
    with pytest.raises(UserError, match="special_tokens_map.json: must be JSON, found .*download it again"):
        load_pad_id(tmp_path)
