"""models/unet.py, attention.py and build.py: shapes, symmetries, and that everything learns."""

import dataclasses
import functools
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from semflow_jax import parallel
from semflow_jax.errors import UserError
from semflow_jax.models import attention as attention_module
from semflow_jax.models import layers
from semflow_jax.models.attention import attention
from semflow_jax.models.build import Rngs, abstract_unet, count_params, init_unet, make_velocity_fn
from semflow_jax.models.unet import UNetConfig, time_features

TINY = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention=(False, True),
    num_heads=(2, 2),
    cross_attention_dim=5,
    num_groups=4,
)
PLAIN = dataclasses.replace(TINY, cross_attention_dim=None)
SMALL = dataclasses.replace(PLAIN, block_out_channels=(8,), attention=(True,), num_heads=(2,))


def make_random_params(config: UNetConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Every parameter drawn at random: the layers that begin at zero too."""
    rng = np.random.default_rng(seed)
    abstract = abstract_unet(config)
    scales = {path: 1 / math.sqrt(max(1, math.prod(x.shape[:-1]))) for path, x in abstract.items()}
    return {path: jnp.asarray(scales[path] * rng.normal(size=x.shape), x.dtype) for path, x in abstract.items()}


def make_inputs(size: tuple[int, int] = (4, 8), channels: int = 3):
    zt = jax.random.normal(jax.random.key(1), (2, *size, channels))
    return zt, jnp.array([0.2, 0.9])


def test_default_is_stable_diffusion():
    abstract = abstract_unet(UNetConfig())
    assert len(abstract) == 686
    assert sum(math.prod(x.shape) for x in abstract.values()) == 859_520_964
    assert abstract["down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight"].shape == (768, 320)
    assert abstract["up_blocks.3.resnets.2.conv_shortcut.weight"].shape == (1, 1, 640, 320)
    assert abstract["mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"].shape == (5120, 1280)
    assert "down_blocks.3.downsamplers.0.conv.weight" not in abstract


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_unet(SMALL, 3))()


def test_params_are_as_abstract_says(params):
    abstract = abstract_unet(SMALL)
    assert {path: (x.shape, x.dtype) for path, x in params.items()} == {
        path: (x.shape, x.dtype) for path, x in abstract.items()
    }
    assert list(params) == sorted(params)
    assert count_params(params) == sum(math.prod(x.shape) for x in abstract.values())


def test_keys_are_those_of_flax():
    ours, theirs = Rngs(3), nnx.Rngs(3)
    for _ in range(3):
        np.testing.assert_array_equal(*(jax.random.key_data(rngs.params()) for rngs in (ours, theirs)))


def test_weights_begin_at_random_by_seed_and_keep_the_scale(params):
    other = jax.jit(lambda: init_unet(SMALL, 4))()
    for path, x in params.items():
        if path.endswith("weight") and x.ndim > 1 and x.any():
            assert (x != other[path]).mean() > 0.99
            assert x.std() == pytest.approx(math.prod(x.shape[:-1]) ** -0.5, rel=0.3)
        else:
            np.testing.assert_array_equal(x, other[path])


def test_time_features():
    """Cosines first, of 1000 t times a geometric series from 1 to almost 1/10000."""
    t = np.array([0.0, 0.04, 0.5, 1.0])
    angles = 1000 * t[:, None] * 10000.0 ** -(np.arange(4) / 4)
    found = time_features(jnp.asarray(t, jnp.float32), 8)
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=1e-4)
    assert time_features(jnp.asarray(t, jnp.bfloat16), 8).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"num_groups": 3}, r"num_groups \(3\).*got 8 with 2 heads"), ({"num_heads": (2, 5)}, "got 16 with 5 heads")],
)
def test_widths_that_do_not_divide(changes, found):
    TINY.check()
    with pytest.raises(UserError, match=f"model.block_out_channels: .*{found}"):
        dataclasses.replace(TINY, **changes).check()


def test_attention_is_the_textbooks():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 7, 7))
    found = attention(q=jnp.asarray(q), k=jnp.asarray(k), v=jnp.asarray(v))
    for b in range(2):
        for head in range(3):
            scores = np.exp(q[b, :, head] @ k[b, :, head].T / 2)
            expected = scores / scores.sum(1, keepdims=True) @ v[b, :, head]
            np.testing.assert_allclose(found[b, :, head], expected, rtol=1e-4, atol=1e-5)


def reference_attention(q, k, v):
    """In float64, values and the gradients of sum(sin(values)) by hand."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.exp(np.einsum("bnkd,bmkd->bknm", q, k) / math.sqrt(q.shape[-1]))
    p = scores / scores.sum(-1, keepdims=True)
    out = np.einsum("bknm,bmkd->bnkd", p, v)
    g = np.cos(out)
    dp = np.einsum("bnkd,bmkd->bknm", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    grads = (np.einsum(f"bknm,{x}->{y}", w, z) for x, y, w, z in (
        ("bmkd", "bnkd", ds, k), ("bnkd", "bmkd", ds, q), ("bnkd", "bmkd", p, g),
    ))  # fmt: skip
    return out, tuple(grads)


FORMS = ("_plain", "_chunked", "_chunked_by_head", "attention")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num", [16, 18])  # whole chunks, and a padded one
def test_every_form_of_attention_is_attention(monkeypatch, form, num):
    monkeypatch.setattr(attention_module, "LONG", 8)
    monkeypatch.setattr(attention_module, "CHUNK", 4)
    monkeypatch.setattr(attention_module, "CPU_CHUNK", 4)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, 4)), jnp.float32) for n in (num, 9, 9))
    fn = getattr(attention_module, form)
    assert ("scan" in str(jax.make_jaxpr(fn)(q, k, v))) == (form != "_plain")
    found = jax.jit(fn)(q, k, v), jax.jit(jax.grad(lambda *x: jnp.sin(fn(*x)).sum(), (0, 1, 2)))(q, k, v)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    jax.tree.map(close, found, reference_attention(q, k, v))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_no_platform_holds_all_scores(platform):
    """Traced here, lowered for there, forward and backward."""
    q = jax.ShapeDtypeStruct((1, 2048, 2, 40), jnp.bfloat16)
    traced = jax.jit(jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1, 2))).trace(q, q, q)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f"{256 if platform == 'cpu' else 128}x2048x" in text
    assert "2048x2048x" not in text
    assert ("1x2x128x2048x" in text) == (platform != "cpu")


@pytest.mark.parametrize(
    ("dtype", "d", "fused"), [("bfloat16", 40, True), ("float16", 80, True), ("float32", 40, False)] + [
        ("bfloat16", 160, False), ("bfloat16", 12, False),
    ],
)  # fmt: skip
def test_cudnn_where_it_can(monkeypatch, dtype, d, fused):
    monkeypatch.setattr(attention_module.backend, "get_backend", lambda: types.SimpleNamespace(platform_version="cuda"))
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, implementation: asked.append(implementation))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda=None, **forms: cuda and cuda(*x))
    q = jnp.zeros((1, 1024, 1, d), dtype)
    attention_module.attention.__wrapped__(q, q, q)
    assert asked == (["cudnn"] if fused else [])


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (0, 1))])
def test_a_product_of_patches_is_a_convolution(monkeypatch, padding):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 6, 4, 5), (3, 3, 5, 7)))

    def run():
        convolve = jax.jit(lambda x, weight: layers._convolve(x, weight, 1, padding))
        gradients = jax.grad(lambda *args: jnp.sin(convolve(*args)).sum(), (0, 1))(x, weight)
        return "convolution" in convolve.lower(x, weight).as_text(), (convolve(x, weight), *gradients)

    native, expected = run()
    monkeypatch.setattr(layers, "WIDE", 1)
    still_native, found = run()
    assert native and not still_native
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_attention_does_not_know_order():
    q, k, v = (jax.random.normal(key, (1, 6, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    order = jnp.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(attention(q[:, order], k, v), attention(q, k, v)[:, order], atol=1e-6)
    np.testing.assert_allclose(attention(q, k[:, order], v[:, order]), attention(q, k, v), atol=1e-6)


def test_half_precision_attention_normalises_in_float32():
    """512 equal scores: probabilities that were summed up in bfloat16 would miss one by much."""
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    kv = jnp.ones((1, 512, 1, 4), jnp.bfloat16)
    assert attention(q, kv, kv).dtype == jnp.bfloat16
    np.testing.assert_allclose(attention(q, kv, kv).astype(jnp.float32), 1, rtol=1e-2)


def test_a_new_network_says_zero(params):
    """Its last layer begins at zero, so that training begins at the mean squared target."""
    zt, t = make_inputs()
    assert not jax.jit(make_velocity_fn(SMALL))(params, zt, t).any()
    skipping = jax.jit(make_velocity_fn(dataclasses.replace(SMALL, skip=True)))
    np.testing.assert_allclose(skipping(params, zt, t), (2 * t - 1)[:, None, None, None] * zt, rtol=1e-6)


@pytest.fixture(scope="module")
def velocity_fn():
    return jax.jit(make_velocity_fn(PLAIN))


def test_intervals_count_where_the_network_knows_of_them(velocity_fn):
    told = dataclasses.replace(PLAIN, intervals=True)
    params = make_random_params(told)
    assert set(params) - set(make_random_params(PLAIN)) == {
        f"interval_embedding.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")
    }
    first = jax.jit(lambda: init_unet(told))()
    assert not first["interval_embedding.linear_2.weight"].any()
    zt, t = make_inputs()[:2]
    fn = jax.jit(make_velocity_fn(told))
    v = [np.asarray(fn(params, zt, t, None, jnp.full_like(t, d))) for d in (0.0, 0.5, -0.5)]
    assert min(np.abs(v[0] - v[1]).max(), np.abs(v[1] - v[2]).max()) > 1e-4  # direction counts too
    np.testing.assert_array_equal(fn(params, zt, t), v[0])
    plain = {name: x for name, x in params.items() if not name.startswith("interval")}
    np.testing.assert_array_equal(velocity_fn(plain, zt, t, None, jnp.ones_like(t)), velocity_fn(plain, zt, t))


def test_samples_do_not_see_each_other(velocity_fn):
    params = make_random_params(PLAIN)
    zt, t = make_inputs()
    v = velocity_fn(params, zt, t)
    assert v.shape == zt.shape and v.dtype == jnp.float32
    np.testing.assert_allclose(velocity_fn(params, zt[::-1], t[::-1]), v[::-1], atol=1e-5)
    np.testing.assert_allclose(velocity_fn(params, zt.at[0].add(9.0), t.at[0].set(0.4))[1], v[1], atol=1e-5)


def test_time_and_place_matter(velocity_fn):
    params = make_random_params(PLAIN)
    zt, t = make_inputs()
    v = velocity_fn(params, zt, t)
    assert jnp.abs(velocity_fn(params, zt, t + 0.01) - v).max() > 1e-3
    far = velocity_fn(params, zt.at[:, 0, 0].add(1.0), t)  # through the attention, to the opposite corner
    assert jnp.abs(far - v)[:, -1, -1].max() > 1e-5


def test_mirrored_kernels_mirror_the_velocity():
    """True of one level: a convolution of stride 2 has no centre to mirror about."""
    params = make_random_params(SMALL)
    mirrored = {path: x[:, ::-1] if x.ndim == 4 else x for path, x in params.items()}
    velocity_fn = jax.jit(make_velocity_fn(SMALL))
    zt, t = make_inputs()
    v = velocity_fn(params, zt, t)
    np.testing.assert_allclose(velocity_fn(mirrored, zt[:, :, ::-1], t), v[:, :, ::-1], atol=1e-4)
    assert jnp.abs(velocity_fn(params, zt[:, :, ::-1], t) - v[:, :, ::-1]).max() > 0.01


def test_every_parameter_learns():
    params = make_random_params(TINY)
    zt, t = make_inputs()
    context = jax.random.normal(jax.random.key(2), (3, 5))
    velocity_fn = make_velocity_fn(TINY)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(velocity_fn(p, zt, t, context) - 1).mean()))(params)
    assert gradient.keys() == params.keys()
    still = [path for path, g in gradient.items() if not jnp.abs(g).max() > 1e-7]
    assert still == []


def test_bfloat16_computes_near_float32_and_answers_in_it(velocity_fn):
    half = dataclasses.replace(PLAIN, dtype="bfloat16")
    params = make_random_params(PLAIN)
    zt, t = make_inputs()
    v, expected = jax.jit(make_velocity_fn(half))(params, zt, t), velocity_fn(params, zt, t)
    assert v.dtype == jnp.float32
    error = jnp.abs(v - expected).mean() / jnp.abs(expected).mean()
    assert 1e-4 < error < 0.05
    assert {x.dtype for x in abstract_unet(dataclasses.replace(half, param_dtype="bfloat16")).values()} == {
        jnp.dtype("bfloat16")
    }


def test_unknown_remat():
    with pytest.raises(UserError, match=r"model.remat: one of .*got 'some'"):
        dataclasses.replace(TINY, remat="some").check()


def test_remat_saves_memory_and_changes_nothing_else():
    """Temporaries of a compiled gradient. XLA's CPU compiler would undo it all by a pass of its own."""
    params = make_random_params(PLAIN)
    inputs = jax.random.normal(jax.random.key(1), (8, 16, 16, 3)), jnp.linspace(0, 1, 8)
    sizes, gradients = [], []
    for remat in ("none", "blocks", "full"):
        config = dataclasses.replace(PLAIN, remat=remat)
        assert abstract_unet(config).keys() == params.keys()
        velocity_fn = make_velocity_fn(config)
        gradient = jax.jit(jax.grad(lambda *x, fn=velocity_fn: jnp.square(fn(*x) - 1).mean()))
        compiled = gradient.lower(params, *inputs).compile({"xla_disable_hlo_passes": "cse_barrier_expander"})
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
        gradients.append(compiled(params, *inputs))
    print("none, blocks, full:", *(f"{size / 1e6:.2f} MB" for size in sizes))
    assert sizes[1] < 0.7 * sizes[0]
    assert sizes[2] < 0.95 * sizes[1]
    for found in gradients[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, gradients[0])


SD2 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0",
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "dual_cross_attention": False,
    "layers_per_block": 2,
    "only_cross_attention": False,
    "sample_size": 96,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "upcast_attention": True,
    "use_linear_projection": True,
}


def test_config_of_diffusers():
    sd2 = UNetConfig(num_heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True)
    assert UNetConfig.from_diffusers(SD2) == sd2
    assert abstract_unet(sd2)["mid_block.attentions.0.proj_out.weight"].shape == (1280, 1280)
    assert UNetConfig.from_diffusers({"cross_attention_dim": 768}) == UNetConfig()


@pytest.mark.parametrize("config", [UNetConfig(), TINY, dataclasses.replace(TINY, linear_projection=True)])
def test_config_of_diffusers_and_back(config):
    assert UNetConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize(("key", "value"), [("skip", True), ("cross_attention_dim", None)])
def test_what_diffusers_can_not_express(key, value):
    with pytest.raises(UserError, match=f"model.{key}: must be .* for diffusers"):
        dataclasses.replace(TINY, **{key: value}).to_diffusers()


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "down_block_types": ["AttnDownBlock2D"] * 4,
        "up_block_types": ["UpBlock2D"] * 4,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "act_fn": "gelu",
        "addition_embed_type": "text_time",
        "dual_cross_attention": True,
        "transformer_layers_per_block": [1, 2, 10],
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "class_embed_type": "timestep",
        "attention_head_dim": [8, 8],
        "cross_attention_dim": [768, 768, 768, 1024],
        "norm_num_groups": None,
        "layers_per_block": [2, 2, 2, 1],
        "block_out_channels": 320,
        "something_new": 3,
        "_class_name": "UNet2DModel",
    }.items(),
)
def test_a_config_of_diffusers_that_is_another_network(key, value):
    with pytest.raises(UserError, match=rf"unet/config.json, {key}: must be .*, found {re.escape(repr(value))}: ") as e:
        UNetConfig.from_diffusers(SD2 | {key: value})
    assert "\n" not in str(e.value)


def test_the_tpu_kernel_is_attention():
    """Interpreted; forward and backward."""
    q, k, v = (jax.random.normal(key, (1, 128, 2, 40)) for key in jax.random.split(jax.random.key(0), 3))

    def both(form):
        return jax.value_and_grad(lambda *x: jnp.sin(form(*x)).sum(), (0, 1, 2))(q, k, v)

    found = both(functools.partial(attention_module.splash, interpret=True))
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(both(attention_module._plain)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_keys", "kernel"), [(1024, True), (77, False)])
def test_the_tpu_kernel_is_for_devices_that_run_alone(num_keys, kernel):
    """The partitioner would refuse it; few keys don't need it."""
    mesh = parallel.make_mesh()
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 40), jnp.bfloat16) for n in (1024, num_keys))

    def lower(fn):
        return jax.jit(fn).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()

    alone = jax.shard_map(attention, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    assert ("tpu_custom_call" in lower(alone)) == kernel
    assert "tpu_custom_call" not in lower(attention)
