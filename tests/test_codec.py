"""codec.py: patches there and back, weights of places, and sizes that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from semflow_jax import codec
from semflow_jax.errors import UserError
from semflow_jax.models.tiny_vae import TINY_VAES


def make_image(h: int = 8, w: int = 12) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (2, h, w, 3), minval=-1, maxval=1)


def make_pictures(num: int = 40) -> list[np.ndarray]:
    """Smooth, with a little grain: as in photos, most of the spread is in few directions."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:8, :12] / 12
    waves = [np.sin(rng.uniform(0, 6, (3, 1, 1)) + rng.normal(size=(3, 1, 1)) * (x + y)) for _ in range(num)]
    grain = rng.normal(0, 5, (num, 8, 12, 3))
    return [
        np.clip(127 + 80 * w.transpose(1, 2, 0) + g, 0, 255).astype(np.uint8) for w, g in zip(waves, grain, strict=True)
    ]


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_patches_are_lossless(factor):
    c, image = codec.make_patch_codec(factor, {}), make_image()
    z = c.encode(c.params, image, None)
    assert z.shape == (2, *c.latent_shape((8, 12))) == (2, 8 // factor, 12 // factor, 3 * factor**2)
    np.testing.assert_array_equal(c.decode(c.params, z), image)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_whitened_patches_lose_no_grey_level(exponent):
    params = codec.fit_patch_codec(make_pictures(), 4, exponent)
    c = codec.make_patch_codec(4, params)
    image = jnp.asarray(np.stack(make_pictures()), jnp.float32) / 127.5 - 1
    z = c.encode(c.params, image, None)
    assert z.shape == (40, *c.latent_shape((8, 12)))
    np.testing.assert_allclose(c.decode(c.params, z), image, atol=0.1 / 127.5)
    assert jnp.square(z).mean() == pytest.approx(1, rel=1e-3)
    spread = np.asarray(z).reshape(-1, 48).std(0)
    if exponent == 1:
        np.testing.assert_allclose(spread, 1, rtol=1e-2)
    else:
        assert spread.max() > 3 * spread.min()


def test_a_latent_holds_its_own_patch():
    image = make_image()
    z = codec.to_patches(image, 4)
    np.testing.assert_array_equal(z[1, 1, 2].reshape(4, 4, 3), image[1, 4:8, 8:12])


def test_pool_is_the_mean_of_a_place():
    c = codec.make_patch_codec(2, {})
    weight = jnp.zeros((1, 4, 6, 1)).at[0, :2, 2:4].set(1).at[0, 2, 0].set(1)
    np.testing.assert_array_equal(c.pool(weight)[0, :, :, 0], [[0, 1, 0], [0.25, 0, 0]])


@pytest.fixture
def tiny_codec(monkeypatch):
    """A tiny autoencoder without its weights."""

    def zeros(abstract, *_, **__):
        return {path: np.zeros(x.shape, x.dtype) for path, x in abstract.items()}

    monkeypatch.setattr(codec, "fill", zeros)
    return codec.make_codec({"name": "taef2"}, {})


def test_pool_of_autoencoders_is_the_mean_of_a_place(tiny_codec):
    weight = jnp.zeros((1, 16, 24, 1)).at[0, :8, 8:16].set(1).at[0, 8:12, :8].set(1)
    np.testing.assert_array_equal(tiny_codec.pool(weight)[0, :, :, 0], [[0, 1, 0], [0.5, 0, 0]])


def test_autoencoders_tell_their_latents_shape(tiny_codec):
    assert tiny_codec.latent_shape((16, 24)) == (2, 3, TINY_VAES["taef2"].latent_channels)
    z = jax.eval_shape(tiny_codec.encode, tiny_codec.params, jnp.zeros((1, 16, 24, 3)), None)
    assert z.shape == (1, *tiny_codec.latent_shape((16, 24)))
    assert jax.eval_shape(tiny_codec.decode, tiny_codec.params, z).shape == (1, 16, 24, 3)


@pytest.mark.parametrize(
    ("size", "found", "near"), [((60, 64), "60 x 64", "64 x 64"), ((64, 8), "64 x 8", "64 x 16"), ((0, 0), "0 x 0", "")]
)
def test_sizes_that_do_not_fit(size, found, near):
    c = codec.make_patch_codec(4, {})
    with pytest.raises(UserError) as caught:
        c.latent_shape(size, 4)
    message = str(caught.value)
    assert message.startswith("size: height and width must be multiples of 16 (codec 4 x network 4), got " + found)
    assert near in message and "\n" not in message


def test_the_remedy_fits():
    c = codec.make_patch_codec(4, {})
    assert c.latent_shape((64, 16), 4) == (16, 4, 48)


def test_unknown_codec():
    with pytest.raises(UserError, match=r"codec.name: one of .*patch.*taef2.*, got 'vqgan'"):
        codec.load_codec(ConfigDict({"name": "vqgan", "factor": 4, "path": ""}))


def test_missing_weights(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/nowhere")
    with pytest.raises(UserError, match=r"codec.path: the taesd weights, .*found none at /nowhere/x.safetensors"):
        codec.load_codec(ConfigDict({"name": "taesd", "factor": 4, "path": "$SOMEWHERE/x.safetensors"}))


def test_real_weights_carry_a_picture(shared_dir):
    """Encoded and decoded, a smooth picture comes back nearly as it was; with misplaced weights nothing would."""
    path = shared_dir / "weights" / "taef2" / "taef2_fp16.safetensors"
    c = codec.load_codec(ConfigDict({"name": "taef2", "factor": 4, "path": str(path)}))
    y, x = jnp.meshgrid(jnp.linspace(-1, 1, 64), jnp.linspace(-1, 1, 64), indexing="ij")
    image = jnp.stack([x, y, 0.5 * jnp.sin(3 * x)], axis=-1)[None]
    decoded = jax.jit(lambda params, image: c.decode(params, c.encode(params, image, None)))(c.params, image)
    assert (decoded - image).std() < 0.25 * image.std()
