"""models/vae.py against diffusers, and what is easily wrong in it."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semflow_jax.codec import make_kl_codec
from semflow_jax.errors import UserError
from semflow_jax.models.build import flatten, make_fns
from semflow_jax.models.vae import AutoencoderKL, Resample, VAEConfig
from semflow_jax.weights.keys import VAE
from semflow_jax.weights.load import fill

DEEP = VAEConfig(block_out_channels=(8, 8, 16, 16), num_groups=4, latent_channels=3, scaling_factor=0.3)
FLAT = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, num_groups=2)


def make_vae_fns(config, *methods):
    return make_fns(lambda rngs: AutoencoderKL(config, rngs=rngs), *methods)


def make_torch_vae(config, device="cpu"):
    """diffusers' network, float64; constants at the start are moved, so that swapped ones show."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = len(config.block_out_channels)
    with torch.device(device):
        vae = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.num_groups,
            scaling_factor=config.scaling_factor,
        )
        with torch.no_grad():
            for parameter in vae.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return vae.requires_grad_(False).eval().double()


def run_torch(vae, config, image, z):
    """Scaled modes and images, in the network's type."""
    import torch

    def to_torch(x):
        return torch.from_numpy(x).permute(0, 3, 1, 2).to(vae.dtype)

    def to_numpy(x):
        return x.permute(0, 2, 3, 1).numpy()

    with torch.inference_mode():
        mode = to_numpy(vae.encode(to_torch(image)).latent_dist.mode()) * config.scaling_factor
        return mode, to_numpy(vae.decode(to_torch(z) / config.scaling_factor).sample)


def relative_rms(x, reference):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64) - reference)) / np.mean(np.square(reference))))


def check_parity(config, size, batch=1):
    """Prints relative errors against float64 of our float32, and of torch's beside it."""
    vae = make_torch_vae(config)
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (batch, *size, 3)).astype(np.float32)
    latent = (batch, size[0] // config.factor, size[1] // config.factor, config.latent_channels)
    z = rng.normal(size=latent).astype(np.float32)

    abstract, (moments, decode) = make_vae_fns(config, "moments", "decode")
    params = fill(abstract, {key: x.numpy() for key, x in vae.state_dict().items()}, VAE)
    start = time.perf_counter()
    found = jax.block_until_ready((jax.jit(moments)(params, image)[0], jax.jit(decode)(params, z)))
    seconds = time.perf_counter() - start
    expected = run_torch(vae, config, image, z)
    for name, ours, reference, theirs in zip(
        ("encode", "decode"), found, expected, run_torch(vae.float(), config, image, z), strict=True
    ):
        error, torch_error = relative_rms(ours, reference), relative_rms(theirs, reference)
        print(f"{name} {size}: relative rms {error:.2e}, torch float32 {torch_error:.2e}; both in {seconds:.1f} s")
        assert ours.shape == reference.shape
        assert error < 5e-6


@pytest.mark.parametrize(("config", "size"), [(DEEP, (48, 32)), (FLAT, (72, 64))])
def test_equals_diffusers(config, size):
    check_parity(config, size, batch=2)


@pytest.mark.long
@pytest.mark.slow
def test_equals_diffusers_at_true_size():
    check_parity(VAEConfig(), (256, 256))


def test_long_sequences_attend_in_chunks():
    """36 x 32 latents, as in the parity above."""
    abstract, (moments,) = make_vae_fns(FLAT, "moments")
    assert "scan" in str(jax.make_jaxpr(moments)(abstract, jnp.zeros((1, 72, 64, 3))))


def test_default_is_stable_diffusion():
    abstract = make_vae_fns(VAEConfig())[0]
    assert len(abstract) == 248
    assert sum(math.prod(x.shape) for x in abstract.values()) == 83_653_863
    assert VAEConfig().factor == 8
    theirs = make_torch_vae(VAEConfig(), "meta").state_dict()
    assert {path: math.prod(x.shape) for path, x in abstract.items()} == {key: x.numel() for key, x in theirs.items()}


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 1), (1, 2), (2, 2)])
def test_halving_pads_bottom_and_right(row, column):
    """A kernel of a single one reads the pixel at (2 i + row, 2 j + column), zero beyond the end."""
    down = Resample(dataclasses.replace(FLAT, num_groups=1), 1, stride=2, rngs=nnx.Rngs(0))
    down.conv.weight[...] = jnp.zeros((3, 3, 1, 1)).at[row, column].set(1.0)
    x = jnp.arange(1.0, 25).reshape(1, 4, 6, 1)
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    np.testing.assert_array_equal(down(x), padded[:, row : row + 4 : 2, column : column + 6 : 2])


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    abstract = make_vae_fns(FLAT)[0]
    return {path: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype) for path, x in abstract.items()}


@pytest.fixture(scope="module")
def fns():
    codec = make_kl_codec(FLAT, {})
    return [jax.jit(fn) for fn in (codec.moments, codec.encode)]


def test_samples_follow_the_moments(params, fns):
    moments, encode = fns
    image = jnp.broadcast_to(jax.random.uniform(jax.random.key(1), (1, 32, 48, 3), minval=-1), (4, 32, 48, 3))
    params = params | {"quant_conv.bias": jnp.array([0, 0, 0, 0, 1.0, -1, 2, -2])}
    mean, std = moments(params, image)
    assert std.mean() > 0.1 * 0.18215
    np.testing.assert_array_equal(encode(params, image), mean)

    z = encode(params, image, jax.random.key(0))
    noise = np.asarray((z - mean) / std)  # 6144 numbers, standard normal
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert noise.std() == pytest.approx(1, abs=4 / math.sqrt(2 * noise.size))
    assert (noise**4).mean() == pytest.approx(3, abs=0.5)
    assert abs(np.corrcoef(noise.reshape(4, -1)) - np.eye(4)).max() < 4 / math.sqrt(noise[0].size)
    np.testing.assert_array_equal(encode(params, image, jax.random.key(0)), z)
    assert (encode(params, image, jax.random.key(1)) != z).mean() > 0.99


@pytest.mark.parametrize(("bias", "log_variance"), [(1e4, 20), (-1e4, -30)])
def test_variance_is_bounded(params, fns, bias, log_variance):
    image = jnp.zeros((4, 32, 48, 3))
    _, std = fns[0](params | {"quant_conv.bias": jnp.array([0.0] * 4 + [bias] * 4)}, image)
    np.testing.assert_allclose(std, 0.18215 * math.exp(log_variance / 2), rtol=1e-5)


@pytest.mark.parametrize("size", [(12, 16), (16, 20)])
def test_encode_wants_multiples_of_the_factor(size):
    vae = nnx.eval_shape(lambda: AutoencoderKL(DEEP, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=f"multiples of 8, found {size[0]} x {size[1]}"):
        vae.moments(jnp.zeros((1, *size, 3)))


def test_computes_in_bfloat16_and_answers_in_float32():
    config = dataclasses.replace(FLAT, dtype="bfloat16", param_dtype="bfloat16")

    def round_trip(image):
        vae = AutoencoderKL(config, rngs=nnx.Rngs(0))
        z = vae.moments(image)[0]
        return flatten(vae), z, vae.decode(z)

    image = jax.ShapeDtypeStruct((1, 16, 24, 3), np.float32)
    params, z, decoded = jax.eval_shape(round_trip, image)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert (z.shape, z.dtype.name) == ((1, 8, 12, 4), "float32")
    assert (decoded.shape, decoded.dtype.name) == (image.shape, "float32")
