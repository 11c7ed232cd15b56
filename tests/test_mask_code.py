"""mask_code.py: masks there and back, what tint is and is not, and codecs that are too narrow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from semflow_jax import mask_code, palette
from semflow_jax.codec import fit_patch_codec, make_patch_codec
from semflow_jax.data.info import VOID
from semflow_jax.errors import UserError

NUM_CLASSES = 5
CODEC = make_patch_codec(4, {})
COLOURS = palette.make_palette("spread", NUM_CLASSES)


def make_labels(num: int, seed: int = 0) -> np.ndarray:
    """Random blobs: the nearest of a few random points decides; class 4 is rare."""
    rng = np.random.default_rng(seed)
    pixels = np.stack(np.mgrid[:32, :32], axis=-1)[None, :, :, None]
    points = rng.uniform(0, 32, (num, 1, 1, 12, 2))
    classes = rng.choice(NUM_CLASSES, (num, 12), p=[0.4, 0.3, 0.2, 0.08, 0.02])
    nearest = np.square(pixels - points).sum(-1).argmin(-1)
    return np.take_along_axis(classes[:, None, None, :], nearest[..., None], -1).astype(np.uint8)


def make_config(**changes) -> ConfigDict:
    return ConfigDict({"name": "linear", "palette": "spread", "pixel": 0.3, "region": 2.0, "whiten": 0.5} | changes)


def make_linear(whiten: float = 0.5, **changes) -> mask_code.MaskCode:
    params = mask_code.fit_linear_code(make_labels(60), NUM_CLASSES, CODEC, whiten)
    return mask_code.make_mask_code(make_config(**changes), CODEC, NUM_CLASSES, params)


@pytest.fixture(scope="module")
def linear() -> mask_code.MaskCode:
    return make_linear()


def test_linear_latents_have_the_images_shape(linear):
    z1 = linear.encode(linear.params, {}, jnp.asarray(make_labels(2)), jax.random.key(0))
    assert z1.shape == (2, *CODEC.latent_shape((32, 32)))


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_linear_round_trip_of_masks_it_was_not_fitted_to(linear, key):
    label = make_labels(20, seed=1)
    decoded = np.asarray(linear.decode(linear.params, {}, linear.encode(linear.params, {}, jnp.asarray(label), key)))
    assert (decoded == label).mean() > 0.995
    rare = label == 4
    assert rare.any() and (decoded == label)[rare].mean() > 0.97


def test_linear_components_have_unit_rms_and_whitened_ones_unit_variance(linear):
    label = jnp.asarray(make_labels(60))
    z = np.asarray(linear.encode(linear.params, {}, label, None))[..., mask_code.NUM_TINT :].reshape(-1, 45)
    assert np.mean(z**2) == pytest.approx(1, rel=1e-2)
    assert z.std(0).max() > 1.5 * z.std(0).min()
    white = make_linear(whiten=1.0)
    z = np.asarray(white.encode(white.params, {}, label, None))[..., mask_code.NUM_TINT :].reshape(-1, 45)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(z.std(0), 1, rtol=2e-2)


def test_the_fit_is_deterministic():
    ours, again = (mask_code.fit_linear_code(make_labels(10), NUM_CLASSES, CODEC, 0.5) for _ in range(2))
    assert ours.keys() == again.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], again[name])


def test_void_is_fitted_and_encoded_as_no_class(linear):
    label = make_labels(1)
    label[:, :4, :4] = VOID
    params = mask_code.fit_linear_code(label, NUM_CLASSES, CODEC, 0.5)
    assert all(np.isfinite(x).all() for x in params.values())
    z1 = linear.encode(linear.params, {}, jnp.asarray(label), jax.random.key(0))
    assert jnp.isfinite(z1).all()
    decoded = np.asarray(linear.decode(linear.params, {}, z1))
    assert (decoded == label)[label != VOID].mean() > 0.99


def test_tint_is_absent_without_a_key(linear):
    z1 = linear.encode(linear.params, {}, jnp.asarray(make_labels(2)), None)
    assert not z1[..., : mask_code.NUM_TINT].any()


def test_tint_is_one_colour_a_region():
    code = make_linear(pixel=0.0, region=2.0)
    label = np.zeros((2, 32, 32, 1), np.uint8)
    label[:, 16:] = 1
    label[1, :, 16:] = VOID
    z1 = np.asarray(code.encode(code.params, {}, jnp.asarray(label), jax.random.key(3)))
    tint, components = np.split(z1, [mask_code.NUM_TINT], axis=-1)
    regions = [tint[0, :4], tint[0, 4:], tint[1, :4, :4], tint[1, 4:, :4]]
    for region in regions:
        np.testing.assert_allclose(region, np.broadcast_to(region[0, 0], region.shape), rtol=1e-5)
    colours = np.stack([region[0, 0] for region in regions])
    assert len(np.unique(colours)) == 12 and np.abs(colours).max() <= 1.0
    assert not tint[1, :, 4:].any()
    plain = np.asarray(code.encode(code.params, {}, jnp.asarray(label), None))
    np.testing.assert_allclose(components, plain[..., mask_code.NUM_TINT :], atol=1e-6)


def test_tint_does_not_touch_the_decoded_mask(linear):
    z1 = linear.encode(linear.params, {}, jnp.asarray(make_labels(2)), None)
    tinted = z1.at[..., : mask_code.NUM_TINT].add(100.0)
    np.testing.assert_array_equal(linear.decode(linear.params, {}, tinted), linear.decode(linear.params, {}, z1))


def test_another_key_another_latent(linear):
    label = jnp.asarray(make_labels(2))
    first, again, other = (linear.encode(linear.params, {}, label, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99
    noise = (first - linear.encode(linear.params, {}, label, None))[..., mask_code.NUM_TINT :]
    assert jnp.abs(noise).max() <= 0.15 + 1e-5
    assert noise.std() == pytest.approx(0.3 / 12**0.5, rel=0.05)


def test_linear_needs_a_wide_codec():
    narrow = dataclasses.replace(CODEC, name="narrow one", channels=6)
    with pytest.raises(UserError) as caught:
        mask_code.fit_linear_code(make_labels(2), NUM_CLASSES, narrow, 0.5)
    message = str(caught.value)
    assert "'linear' needs a codec of at least 7 channels for 5 classes, narrow one has 6" in message
    assert "use 'colour' or another codec" in message
    just = dataclasses.replace(CODEC, channels=7)
    assert mask_code.fit_linear_code(make_labels(2), NUM_CLASSES, just, 0.5)["synthesis"].shape == (4, 80)


def make_colour(**changes) -> mask_code.MaskCode:
    config = {"name": "colour", "pixel": 0.1, "region": 0.0} | changes
    return mask_code.make_mask_code(make_config(**config), CODEC, NUM_CLASSES, {})


@pytest.mark.parametrize("key", [None, jax.random.key(5)])
def test_colour_code_is_the_papers_way(key):
    """Palette, perturbation, image codec; and back by the nearest colour."""
    code = make_colour()
    label = jnp.asarray(make_labels(2)).at[0, :3].set(VOID)
    mask_rgb = palette.colourise(label, COLOURS)
    if key is not None:
        mask_rgb = palette.perturb(key, mask_rgb, label, NUM_CLASSES, 0.1, 0.0)
    z1 = code.encode(code.params, CODEC.params, label, key)
    np.testing.assert_array_equal(z1, CODEC.encode(CODEC.params, mask_rgb, None))
    decoded = np.asarray(code.decode(code.params, CODEC.params, z1))
    known = np.asarray(label != VOID)
    np.testing.assert_array_equal(decoded[known], np.asarray(label)[known])


def test_colour_code_refuses_amplitudes_that_change_classes():
    with pytest.raises(UserError, match=r"mask_code.pixel \+ mask_code.region: at least 0 and below"):
        make_colour(pixel=2.0, region=2.0)


def make_images(num: int, seed: int = 0) -> np.ndarray:
    """Dark pictures with little red in them, and grain."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal((40, 90, 90), (5, 20, 40), (num, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    return (pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)


def make_balanced(codec, labels, images, **changes) -> mask_code.MaskCode:
    c = make_config(name="colour", balance="minmax", **{"pixel": 0.1, "region": 0.0} | changes)
    params = mask_code.fit_balance(labels, images, NUM_CLASSES, codec, c, seed=3)
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
        name: (x.shape, x.dtype) for name, x in mask_code.abstract_balance(c, codec).items()
    }
    return mask_code.make_mask_code(c, codec, NUM_CLASSES, params)


def find_ends(z) -> np.ndarray:
    return np.quantile(np.asarray(z).reshape(-1, z.shape[-1]), (0.001, 0.999), axis=0)


@pytest.mark.parametrize(("pixel", "tolerance"), [(0.0, 1e-4), (0.2, 0.1)])
def test_balanced_masks_have_the_range_of_images(pixel, tolerance):
    """Exactly without a perturbation; with it, another key has other ends, but for a little."""
    labels, images = make_labels(40), make_images(40)
    codec = make_patch_codec(4, fit_patch_codec(images, 4, 0.5))
    code = make_balanced(codec, labels, images, pixel=pixel)
    wanted = find_ends(codec.encode(codec.params, jnp.asarray(palette.scale(images))))
    found = find_ends(code.encode(code.params, codec.params, jnp.asarray(labels), jax.random.key(0)))
    np.testing.assert_allclose(found, wanted, atol=tolerance * (wanted[1] - wanted[0]).max())
    plain = make_colour(pixel=pixel)
    before = find_ends(plain.encode({}, codec.params, jnp.asarray(labels), jax.random.key(0)))
    assert np.abs(before - wanted).max() > 3 * np.abs(found - wanted).max()


def random_moments(params, image):
    """Those of a codec that is a distribution."""
    mean, _ = CODEC.moments(params, image)
    return mean, jnp.full_like(mean, 0.5)


@pytest.mark.parametrize("codec", [CODEC, dataclasses.replace(CODEC, moments=random_moments)])
def test_balanced_masks_decode_as_the_others_do(codec):
    label = jnp.asarray(make_labels(4)).at[0, :3].set(VOID)
    balanced = make_balanced(codec, np.asarray(label), make_images(4))
    plain = mask_code.make_colour_code(codec, COLOURS, 0.1, 0.0)
    decoded = []
    for code in (balanced, plain):
        z1 = code.encode(code.params, codec.params, label, jax.random.key(1))
        decoded.append(np.asarray(code.decode(code.params, codec.params, z1)))
    np.testing.assert_array_equal(*decoded)
    known = np.asarray(label != VOID)
    np.testing.assert_array_equal(decoded[0][known], np.asarray(label)[known])


def test_images_are_balanced_as_they_are_sampled():
    """A codec that is a distribution widens their ends."""
    labels, images = make_labels(4), make_images(4)
    narrow, wide = (
        make_balanced(codec, labels, images) for codec in (CODEC, dataclasses.replace(CODEC, moments=random_moments))
    )
    assert (wide.params["scale"] > 1.5 * narrow.params["scale"]).all()


def test_a_flat_channel_is_only_moved():
    labels, images = np.zeros((2, 32, 32, 1), np.uint8), make_images(2)
    code = make_balanced(CODEC, labels, images, pixel=0.0)
    np.testing.assert_array_equal(code.params["scale"], 1)
    z1 = code.encode(code.params, CODEC.params, jnp.asarray(labels), None)
    middle = find_ends(CODEC.encode(CODEC.params, jnp.asarray(palette.scale(images)))).mean(0)
    np.testing.assert_allclose(z1, np.broadcast_to(middle, z1.shape), atol=1e-6)
    assert not np.asarray(code.decode(code.params, CODEC.params, z1)).any()


def test_the_balance_is_deterministic_and_part_of_the_code():
    ours, again = (make_balanced(CODEC, make_labels(4), make_images(4)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, ours.params, again.params)
    assert ours.config["balance"] == "minmax"
    with pytest.raises(ValueError, match="arrays of a colour code that don't fit mask_code.balance"):
        mask_code.make_mask_code(ConfigDict(ours.config), CODEC, NUM_CLASSES, {})
    with pytest.raises(ValueError, match="arrays of a colour code that don't fit mask_code.balance"):
        mask_code.make_mask_code(make_config(name="colour", pixel=0.1, region=0.0), CODEC, NUM_CLASSES, ours.params)


def test_unknown_names():
    with pytest.raises(UserError, match=r"mask_code.balance: one of .*, got 'zscore'"):
        mask_code.make_mask_code(make_config(name="colour", balance="zscore"), CODEC, NUM_CLASSES, {})
    with pytest.raises(UserError, match=r"mask_code.balance: 'none' for the code 'linear', got 'minmax'"):
        mask_code.make_mask_code(make_config(balance="minmax"), CODEC, NUM_CLASSES, {})
    with pytest.raises(UserError, match=r"mask_code.name: one of .*, got 'one_hot'"):
        mask_code.make_mask_code(make_config(name="one_hot"), CODEC, NUM_CLASSES, {})
    with pytest.raises(UserError, match="palette: one of .*, got 'rainbow'"):
        mask_code.make_mask_code(make_config(palette="rainbow"), CODEC, NUM_CLASSES, {})
