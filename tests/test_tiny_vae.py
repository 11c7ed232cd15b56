import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from semflow_jax.errors import UserError
from semflow_jax.models.build import flatten, make_fns
from semflow_jax.models.tiny_vae import TINY_VAES, TinyVAE, TinyVAEConfig
from semflow_jax.weights import keys
from semflow_jax.weights.load import fill, load_safetensors

FILES = {
    "taesd": "taesd/taesd_bf16.safetensors",
    "taesd3": "taesd/taesd3_bf16.safetensors",
    "taef1": "taesd/taef1_bf16.safetensors",
    "taef2": "taef2/taef2_fp16.safetensors",
}


def make_torch_pair(torch, name):
    """The encoder and decoder as the original `nn.Sequential`s."""
    nn = torch.nn

    def conv(n_in, n_out, **kwargs):
        return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)

    class Clamp(nn.Module):
        def forward(self, x):
            return 3 * torch.tanh(x / 3)

    class Block(nn.Module):
        def __init__(self, n=64, pool=False):
            super().__init__()
            self.conv = nn.Sequential(conv(n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))
            if pool:
                wide = (nn.Conv2d(n, 4 * n, 1, bias=False), nn.GroupNorm(4, 4 * n), nn.ReLU())
                self.pool = nn.Sequential(*wide, nn.Conv2d(4 * n, n, 1, bias=False))

        def forward(self, x):
            if hasattr(self, "pool"):
                x = x + self.pool(x)
            return torch.relu(self.conv(x) + x)

    channels, pool = TINY_VAES[name].latent_channels, name == "taef2"
    if name == "taesana":
        stem = [conv(3, 32, stride=2), nn.ReLU(), conv(32, 64, stride=2), nn.ReLU()]
        widths = [256, 128, 64, 64, 64, 64]
    else:
        stem, widths = [conv(3, 64)], [64, 64, 64, 64]
    encoder = [*stem, Block()]
    for stage in range(3):
        encoder += [conv(64, 64, stride=2, bias=False)] + [Block(pool=pool and stage == 2) for _ in range(3)]
    decoder = [Clamp(), conv(channels, widths[0]), nn.ReLU()]
    for stage, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        decoder += [Block(n_in, pool and stage == 0) for _ in range(3)]
        decoder += [nn.Upsample(scale_factor=2), conv(n_in, n_out, bias=False)]
    return nn.Sequential(*encoder, conv(64, channels)), nn.Sequential(*decoder, Block(), conv(64, 3))


def make_calls(torch, encoder, decoder):
    """The torch pair as `encode` and `decode` of arrays, channels last."""

    def call(network, x):
        with torch.no_grad():
            return network(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()

    return lambda image: call(encoder, (image + 1) / 2), lambda z: call(decoder, z) * 2 - 1


def load_torch_pair(name, path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    encoder, decoder = make_torch_pair(torch, name)
    states = {"encoder": {}, "decoder": {}}
    for key, tensor in load_file(path).items():
        half, *rest = key.split(".")
        if rest[0] == "layers":  # diffusers leaves the clamp out of its numbering
            rest = [str(int(rest[1]) + (half == "decoder")), *rest[2:]]
        states[half][".".join(rest)] = tensor.float()
    encoder.load_state_dict(states["encoder"])
    decoder.load_state_dict(states["decoder"])
    return make_calls(torch, encoder, decoder)


def relative_rms(x, reference):
    return np.sqrt(np.mean((np.asarray(x) - reference) ** 2) / np.mean(reference**2))


@pytest.mark.parametrize("name", FILES)
def test_equals_torch_with_the_real_weights(name, shared_dir):
    path = shared_dir / "weights" / FILES[name]
    torch_encode, torch_decode = load_torch_pair(name, path)
    abstract, (encode, decode) = make_fns(lambda rngs: TinyVAE(TINY_VAES[name], rngs=rngs), "encode", "decode")
    params = fill(abstract, load_safetensors(path), keys.TINY_VAE, path)

    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 64, 96, 3)).astype(np.float32)
    z = rng.normal(0, 2, (2, 8, 12, TINY_VAES[name].latent_channels)).astype(np.float32)
    encoded = jax.jit(encode)(params, image)
    decoded = jax.jit(decode)(params, z)
    assert relative_rms(encoded, torch_encode(image)) < 2e-6
    assert relative_rms(decoded, torch_decode(z)) < 2e-6


def make_random_torch_pair(torch, name):
    """With weights that keep the signal's size: torch's own let the biases drown it."""
    torch.manual_seed(0)
    pair = make_torch_pair(torch, name)
    for path, x in itertools.chain.from_iterable(network.named_parameters() for network in pair):
        if path.endswith("weight"):
            torch.nn.init.kaiming_normal_(x, nonlinearity="relu")
    return pair


def test_taesana_equals_torch_with_random_weights():
    torch = pytest.importorskip("torch")
    pair = make_random_torch_pair(torch, "taesana")
    halves = zip(("encoder", "decoder"), pair, strict=True)
    tensors = {f"{half}.{key}": x.numpy() for half, network in halves for key, x in network.state_dict().items()}
    torch_encode, torch_decode = make_calls(torch, *(network.double() for network in pair))

    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 64, 96, 3))
    z = rng.normal(0, 2, (2, 2, 3, 32))
    # In float32 the rounding of torch alone is 1.6e-6 here.
    config = dataclasses.replace(TINY_VAES["taesana"], dtype="float64")
    with jax.enable_x64(True):
        abstract, (encode, decode) = make_fns(lambda rngs: TinyVAE(config, rngs=rngs), "encode", "decode")
        params = fill(abstract, tensors, keys.TINY_VAE, "tensors")
        encoded, decoded = jax.jit(encode)(params, image), jax.jit(decode)(params, z)
    assert (encoded.shape, decoded.shape) == (z.shape, image.shape)
    assert relative_rms(encoded, torch_encode(image)) <= 1e-6
    assert relative_rms(decoded, torch_decode(z)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "factor", "size"),
    [("taesd", 8, (12, 16)), ("taesd", 8, (16, 20)), ("taesana", 32, (48, 64)), ("taesana", 32, (64, 40))],
)
def test_encode_wants_multiples_of_the_factor(name, factor, size):
    vae = nnx.eval_shape(lambda: TinyVAE(TINY_VAES[name], rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=f"multiples of {factor}, found {size[0]} x {size[1]}"):
        vae.encode(jax.numpy.zeros((1, *size, 3)))


def test_computes_in_bfloat16_and_answers_in_float32():
    config = TinyVAEConfig(num_channels=8, num_blocks=1, pool=True, dtype="bfloat16", param_dtype="bfloat16")

    def round_trip(image):
        vae = TinyVAE(config, rngs=nnx.Rngs(0))
        z = vae.encode(image)
        return flatten(vae), z, vae.decode(z)

    image = jax.ShapeDtypeStruct((1, 16, 24, 3), np.float32)
    params, z, decoded = jax.eval_shape(round_trip, image)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert (z.shape, z.dtype.name) == ((1, 2, 3, 4), "float32")
    assert (decoded.shape, decoded.dtype.name) == (image.shape, "float32")
