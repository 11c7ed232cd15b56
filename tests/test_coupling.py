"""coupling.py: states of twice the channels, whose noise neither decoder sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mask_code import CODEC, NUM_CLASSES, make_labels

from configs import base
from semflow_jax.coupling import channel_weight, couple, num_channels
from semflow_jax.errors import UserError
from semflow_jax.mask_code import make_mask_code
from semflow_jax.sampling import Sampler

NUM = CODEC.channels
LABEL = jnp.asarray(make_labels(64))
IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def code():
    return make_mask_code(base.get_config().mask_code, CODEC, NUM_CLASSES, {})


def make_sampler(code, velocity_fn=lambda params, zt, t, context, d: jnp.zeros_like(zt)) -> Sampler:
    return Sampler(velocity_fn, *couple("symmflow", CODEC, code))


def test_semflow_joins_latents_as_they_are(code):
    assert couple("semflow", CODEC, code) == (CODEC, code)
    assert num_channels("semflow", CODEC) == NUM and num_channels("symmflow", CODEC) == 2 * NUM


def test_states_are_latents_beside_noise(code):
    s = make_sampler(code)
    plain = Sampler(s.velocity_fn, CODEC, code)
    z0, z1 = (
        np.asarray(f(s.frozen, x, jax.random.key(1))) for f, x in ((s.encode_image, IMAGE), (s.encode_mask, LABEL))
    )
    assert z0.shape == z1.shape == (64, *CODEC.latent_shape((32, 32))[:2], 2 * NUM)
    np.testing.assert_array_equal(z0[..., :NUM], plain.encode_image(plain.frozen, IMAGE))
    for e in (z0[..., NUM:], z1[..., :NUM]):
        assert abs(e.mean()) < 0.02 and abs(e.std() - 1) < 0.02
    assert not np.array_equal(z0[0, ..., NUM:], z0[1, ..., NUM:])
    assert not np.array_equal(z1, s.encode_mask(s.frozen, LABEL, jax.random.key(2)))


def test_without_a_key_there_is_no_noise(code):
    s = make_sampler(code)
    z0, z1 = s.encode_image(s.frozen, IMAGE), s.encode_mask(s.frozen, LABEL)
    assert not np.any(z0[..., NUM:]) and not np.any(z1[..., :NUM])
    np.testing.assert_array_equal(s.ceiling(s.frozen, LABEL), LABEL)


def test_decoders_drop_the_noise(code):
    s = make_sampler(code)
    z0, z1 = s.encode_image(s.frozen, IMAGE, jax.random.key(1)), s.encode_mask(s.frozen, LABEL, jax.random.key(1))
    np.testing.assert_array_equal(s.decode_image(s.frozen, z0), IMAGE)
    np.testing.assert_array_equal(s.decode_mask(s.frozen, z1), LABEL)


def test_each_direction_flows_from_latent_and_noise_to_the_other(code):
    """The velocity from one known pair to another solves both ways in one step."""
    z0 = np.zeros((4, 8, 8, NUM), np.float32) + 0.5
    s = make_sampler(code)
    z1 = np.asarray(s.encode_mask(s.frozen, LABEL[:4]))[..., NUM:]

    def velocity_fn(params, zt, t, context, d):
        return jnp.concatenate([-jnp.asarray(z0), jnp.asarray(z1)], axis=-1)

    s = make_sampler(code, velocity_fn)
    picture = s.decode_image(s.frozen, jnp.concatenate([z0, z0], axis=-1))
    np.testing.assert_array_equal(s.segment({}, s.frozen, picture, 1, "euler"), LABEL[:4])


def test_weights_of_the_halves():
    assert channel_weight("semflow", 0.7, 6) is None
    weight = np.asarray(channel_weight("symmflow", 0.7, 6))[0, 0, 0]
    np.testing.assert_allclose(weight, [1.4] * 3 + [0.6] * 3)


def test_unknown_objective(code):
    with pytest.raises(UserError, match="objective: one of .*'both'"):
        couple("both", CODEC, code)
