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
        def __init__(self, pool):
            super().__init__()
            self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))
            if pool:
                wide = (nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU())
                self.pool = nn.Sequential(*wide, nn.Conv2d(256, 64, 1, bias=False))

        def forward(self, x):
            if hasattr(self, "pool"):
                x = x + self.pool(x)
            return torch.relu(self.conv(x) + x)

    channels, pool = TINY_VAES[name].latent_channels, name == "taef2"
    encoder = [conv(3, 64), Block(False)]
    decoder = [Clamp(), conv(channels, 64), nn.ReLU()]
    for stage in range(3):
        encoder += [conv(64, 64, stride=2, bias=False)] + [Block(pool and stage == 2) for _ in range(3)]
        decoder += [Block(pool and stage == 0) for _ in range(3)] + [
            nn.Upsample(scale_factor=2),
            conv(64, 64, bias=False),
        ]
    return nn.Sequential(*encoder, conv(64, channels)), nn.Sequential(*decoder, Block(False), conv(64, 3))


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

    def call(network, x):
        with torch.no_grad():
            return network(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()

    return lambda image: call(encoder, (image + 1) / 2), lambda z: call(decoder, z) * 2 - 1


def relative_rms(x, reference):
    return np.sqrt(np.mean((np.asarray(x) - reference) ** 2) / np.mean(reference**2))


@pytest.mark.parametrize("name", FILES)
def test_equals_torch_with_the_real_weights(name, shared_dir):
    path = shared_dir / "weights" / FILES[name]
    torch_encode, torch_decode = load_torch_pair(name, path)
    abstract, (encode, decode) = make_fns(lambda: TinyVAE(TINY_VAES[name], rngs=nnx.Rngs(0)), "encode", "decode")
    params = fill(abstract, load_safetensors(path), keys.TINY_VAE, path)

    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 64, 96, 3)).astype(np.float32)
    z = rng.normal(0, 2, (2, 8, 12, TINY_VAES[name].latent_channels)).astype(np.float32)
    encoded = jax.jit(encode)(params, image)
    decoded = jax.jit(decode)(params, z)
    assert relative_rms(encoded, torch_encode(image)) < 2e-6
    assert relative_rms(decoded, torch_decode(z)) < 2e-6


@pytest.mark.parametrize("size", [(12, 16), (16, 20)])
def test_encode_wants_multiples_of_8(size):
    vae = nnx.eval_shape(lambda: TinyVAE(TinyVAEConfig(), rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=f"multiples of 8, found {size[0]} x {size[1]}"):
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
