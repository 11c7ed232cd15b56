"""evaluate/views.py: averages over scales and mirror images, and sizes that the network can take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax.codec import make_patch_codec
from semflow_jax.data.transforms import mirrored_ids
from semflow_jax.errors import UserError
from semflow_jax.evaluate.views import (
    Views,
    probabilities,
    resize_image,
    resize_label,
    view_sizes,
)
from semflow_jax.mask_code import make_colour_code
from semflow_jax.palette import colourise, make_palette
from semflow_jax.sampling import Sampler, to_uint8

CODEC = make_patch_codec(4, {})
COLOURS = make_palette("spread", 3)
SIZE = (8, 16)


def make_sampler(field) -> Sampler:
    code = make_colour_code(CODEC, COLOURS, 0.1, 0.0)
    return Sampler(lambda params, zt, t, context, d: field(zt), CODEC, code)


STILL = make_sampler(jnp.zeros_like)  # an image that is its own pseudo-mask is segmented right
LABEL = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 2, 4, 1)).astype(np.uint8).repeat(4, 1).repeat(4, 2))
IMAGE = to_uint8(colourise(LABEL, COLOURS))


def predict(sampler, image, label_size=SIZE, sizes=(SIZE,), mirror=None):
    return probabilities(sampler, {}, sampler.frozen, image, label_size, list(sizes), mirror, 1, "euler")


def test_one_view_is_what_the_decoder_says():
    p = predict(STILL, IMAGE)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    z1 = STILL.encode_image(STILL.frozen, IMAGE)
    np.testing.assert_array_equal(p, jax.nn.softmax(STILL.mask_logits(STILL.frozen, z1)))
    np.testing.assert_array_equal(p.argmax(-1)[..., None], LABEL)
    assert p.max(-1).min() > 0.9


def test_probabilities_come_at_the_labels_resolution():
    large = resize_label(LABEL, (16, 32))
    p = predict(STILL, IMAGE, (16, 32))
    assert p.shape == (2, 16, 32, 3)
    inner = np.zeros((16, 32), bool)
    inner.reshape(2, 8, 4, 8)[:, 2:-2, :, 2:-2] = True  # away from the borders, where classes blend
    np.testing.assert_array_equal(np.asarray(p.argmax(-1))[:, inner], np.asarray(large[..., 0])[:, inner])


def test_the_mirror_is_undone_and_sides_trade_places():
    """A segmenter that sees everything in the right half as class 1, in the left as class 2."""
    halves = jnp.where(jnp.arange(16) < 8, 2, 1).astype(jnp.uint8) * jnp.ones((2, 8, 1), jnp.uint8)
    target = CODEC.encode({}, colourise(halves[..., None], COLOURS), None)
    sided = make_sampler(lambda zt: target - zt)
    plain = predict(sided, IMAGE)
    np.testing.assert_array_equal(plain.argmax(-1), halves)
    np.testing.assert_allclose(predict(sided, IMAGE, mirror=mirrored_ids(3, [(1, 2)])), plain, atol=1e-6)
    blind = predict(sided, IMAGE, mirror=mirrored_ids(3, []))  # without the swap the two views contradict each other
    np.testing.assert_allclose(blind[..., 1], blind[..., 2], atol=1e-6)


def test_views_are_averaged():
    one, two = ((8, 16), (16, 32))
    both = predict(STILL, IMAGE, sizes=(one, two))
    np.testing.assert_allclose(both, (predict(STILL, IMAGE) + predict(STILL, IMAGE, sizes=(two,))) / 2, atol=1e-6)


def test_sizes_are_multiples():
    assert view_sizes((512, 512), Views((0.75, 1.0, 1.25)), 64) == [(384, 384), (512, 512), (640, 640)]
    assert view_sizes((96, 128), Views((0.5, 0.01)), 32) == [(64, 64), (32, 32)]
    assert view_sizes((100, 36), Views(), 1) == [(100, 36)]


def test_names_and_bad_scales():
    assert Views((0.5, 1.0), mirror=True).names() == ["0.5", "0.5 mirrored", "1", "1 mirrored"]
    for scales in ((), (1.0, 0.0), (-1.0,)):
        with pytest.raises(UserError, match="scales: positive numbers"):
            Views(scales)


def test_resizing_by_the_right_filters():
    assert resize_image(IMAGE, SIZE) is IMAGE
    flat = jnp.full((1, 8, 8, 3), 77, jnp.uint8)
    np.testing.assert_array_equal(resize_image(flat, (5, 3)), 77)
    label = jnp.asarray([[1, 2], [3, 255]], jnp.uint8)[None, ..., None]
    np.testing.assert_array_equal(resize_label(label, (4, 4)), label.repeat(2, 1).repeat(2, 2))
    assert set(np.unique(resize_label(LABEL, (7, 5)))) <= {0, 1, 2}
