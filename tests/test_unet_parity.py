"""models/unet.py against diffusers' UNet2DConditionModel with random weights: outputs, time, gradients, bfloat16."""

import dataclasses
import functools
import gc
import math
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax import solve
from semflow_jax.codec import make_kl_codec
from semflow_jax.models.build import abstract_unet, make_fns, make_velocity_fn
from semflow_jax.models.unet import UNetConfig
from semflow_jax.models.vae import AutoencoderKL, VAEConfig
from semflow_jax.weights.keys import axes
from semflow_jax.weights.load import fill

SD1 = UNetConfig(
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    attention=(True, True, False),
    num_heads=(4, 4, 4),
    cross_attention_dim=12,
    num_groups=8,
)
SD2 = dataclasses.replace(SD1, num_heads=(1, 2, 4), cross_attention_dim=20, linear_projection=True)
SMALL = dataclasses.replace(SD1, block_out_channels=(16, 32), attention=(True, False), num_heads=(4, 4))


def make_torch_unet(config: UNetConfig, seed: int = 0):
    """Every parameter random, those of norms too."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel.from_config(config.to_diffusers()).eval()
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return unet


def to_params(config: UNetConfig, unet) -> dict[str, np.ndarray]:
    return fill(abstract_unet(config), {key: x.numpy() for key, x in unet.state_dict().items()})


def make_inputs(config: UNetConfig, size: tuple[int, int], batch: int, tokens: int = 7):
    rng = np.random.default_rng(0)
    context = rng.normal(size=(tokens, config.cross_attention_dim)).astype(np.float32)
    t = np.linspace(0.3137, 0.8214, batch, dtype=np.float32)
    return rng.normal(size=(batch, *size, config.in_channels)).astype(np.float32), t, context


def run_torch(unet, zt, t, context, dtype="float64"):
    """Velocity in our layout."""
    import torch

    def convert(x):
        return torch.from_numpy(x).to(getattr(torch, dtype))

    zt = convert(zt).movedim(-1, 1)
    context = convert(context).expand(zt.shape[0], -1, -1)
    return unet(zt, convert(t) * 1000, encoder_hidden_states=context).sample.movedim(1, -1)


def rel_rms(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return math.sqrt(np.square(found - expected).mean() / np.square(expected).mean())


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_velocity_is_diffusers(config):
    torch = pytest.importorskip("torch")
    unet = make_torch_unet(config)
    params = to_params(config, unet)
    inputs = make_inputs(config, (8, 12), 2)
    found = jax.jit(make_velocity_fn(config))(params, *inputs)
    half = dataclasses.replace(config, dtype="bfloat16")
    coarse = jax.jit(make_velocity_fn(half))(params, *inputs)
    with torch.no_grad():
        theirs = run_torch(unet, *inputs, dtype="float32")
        expected = run_torch(unet.double(), *inputs)
        late = run_torch(unet, inputs[0], inputs[1] + np.float32(0.0004), inputs[2])  # less than one step of 1000
    error, error_half = rel_rms(found, expected), rel_rms(coarse, expected)
    print(f"ours {error:.2e}, torch {rel_rms(theirs, expected):.2e}, ours in bfloat16 {error_half:.2e}")
    assert error < 3e-6
    assert rel_rms(late, expected) > 30 * error
    assert np.isfinite(coarse).all()
    assert 1e-4 < error_half < 3e-2


def test_gradients_are_torchs():
    """Of the training loss, every tensor of them."""
    torch = pytest.importorskip("torch")
    unet = make_torch_unet(SMALL)
    params = to_params(SMALL, unet)
    inputs = make_inputs(SMALL, (8, 8), 2)
    target = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    velocity_fn = make_velocity_fn(SMALL)
    found = jax.jit(jax.grad(lambda p, *x: jnp.square(velocity_fn(p, *x) - target).mean()))(params, *inputs)
    (run_torch(unet.double(), *inputs) - torch.from_numpy(target)).square().mean().backward()
    expected = {path: p.grad.permute(axes(path, p.ndim)).numpy() for path, p in unet.named_parameters()}
    assert found.keys() == expected.keys()
    errors = {path: rel_rms(found[path], expected[path]) for path in found}
    print(f"{len(errors)} tensors, worst {max(errors.values()):.1e} in {max(errors, key=errors.__getitem__)}")
    assert max(errors.values()) < 1e-5


def test_bfloat16_normalises_in_float32():
    """The square roots of all norms, and the exponentials of self- and cross-attention: [b heads queries keys]."""
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    inputs = [jnp.asarray(x) for x in make_inputs(half, (8, 8), 1)]
    text = jax.jit(make_velocity_fn(half)).lower(abstract_unet(half), *inputs).as_text()
    operations = re.findall(r"stablehlo\.(rsqrt|exponential) .*tensor<(\w+)x(f32|bf16)>", text)
    assert {dtype for name, _, dtype in operations if name == "rsqrt"} == {"f32"}
    for scores in ("1x4x64x64", "1x4x64x7"):
        assert {dtype for name, shape, dtype in operations if name == "exponential" and shape == scores} == {"f32"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), pytest.param((64, 64), marks=pytest.mark.long)])
def test_stable_diffusion_is_diffusers(size):
    """All of its parameters, against float64; 10 GB of memory."""
    torch = pytest.importorskip("torch")
    config = UNetConfig()
    unet = make_torch_unet(config)
    params = to_params(config, unet)
    inputs = make_inputs(config, size, 1, tokens=77)
    with torch.no_grad():
        theirs = run_torch(unet, *inputs, dtype="float32").numpy()
    found = np.asarray(jax.jit(make_velocity_fn(config))(params, *inputs))
    del params
    gc.collect()
    with torch.no_grad():
        expected = run_torch(unet.double(), *inputs).numpy()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    error = rel_rms(found, expected)
    print(f"ours {error:.2e}, torch {rel_rms(theirs, expected):.2e}, peak {peak:.1f} GiB")
    assert error < 3e-6
    assert peak < 14


@pytest.mark.long
@pytest.mark.slow
def test_the_official_loop_at_full_size():
    """SD-1.5's UNet and autoencoder, random: an image to its mask picture and a mask picture to its image, 25 steps."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    steps, size, config, vae_config = 25, (64, 64), UNetConfig(), VAEConfig()
    unet = make_torch_unet(config).requires_grad_(False)
    vae = diffusers.AutoencoderKL.from_config(vae_config.to_diffusers()).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    picture = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    context = rng.normal(size=(77, 768)).astype(np.float32)

    def official(unet, to_mask: bool) -> tuple[np.ndarray, np.ndarray]:
        z = vae.encode(torch.from_numpy(picture).movedim(-1, 1)).latent_dist.mode() * vae_config.scaling_factor
        for i in range(steps):
            t = i / steps if to_mask else 1 - i / steps
            v = unet(z, t * 1000, encoder_hidden_states=torch.from_numpy(context)[None]).sample
            z = z + (v if to_mask else -v) / steps
        return z.movedim(1, -1).numpy(), vae.decode(z / vae_config.scaling_factor).sample.movedim(1, -1).numpy()

    expected = [official(unet, to_mask) for to_mask in (True, False)]
    abstract, _ = make_fns(lambda rngs: AutoencoderKL(vae_config, rngs=rngs))
    codec = make_kl_codec(vae_config, fill(abstract, {key: x.numpy() for key, x in vae.state_dict().items()}))
    params, velocity = to_params(config, unet), make_velocity_fn(config)
    del unet
    gc.collect()

    @functools.partial(jax.jit, static_argnames="to_mask")
    def run(params, codec_params, to_mask):
        z = codec.encode(codec_params, jnp.asarray(picture), None)
        integrate = solve.image_to_mask if to_mask else solve.mask_to_image
        z = integrate(lambda zt, t: velocity(params, zt, t, jnp.asarray(context)), z, steps)
        return z, codec.decode(codec_params, z)

    for to_mask, theirs in zip((True, False), expected, strict=True):
        errors = [rel_rms(*pair) for pair in zip(run(params, codec.params, to_mask), theirs, strict=True)]
        print(
            f"to {'mask' if to_mask else 'image'}: latents {errors[0]:.2e}, pixels {errors[1]:.2e} from torch float32"
        )
        assert max(errors) < 1e-4
