"""palette.py: the paper's colours, the way there and back, and how much perturbation a class survives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semflow_jax import palette
from semflow_jax.data.info import VOID
from semflow_jax.errors import UserError

ALL_SIZES = range(2, 41)


def all_ids(num_classes: int) -> jax.Array:
    return jnp.arange(num_classes, dtype=jnp.uint8).reshape(1, 1, num_classes, 1)


@pytest.mark.parametrize(
    ("label", "colour"),
    [
        (0, (0, 0, 0)),
        (1, (0, 0, 50)),
        (5, (0, 0, 250)),
        (6, (0, 50, 0)),
        (36, (50, 0, 0)),
        (171, (200, 200, 150)),
        (215, (250, 250, 250)),
    ],
)
def test_official_colours(label, colour):
    assert tuple(palette.grid_palette(216)[label]) == colour


def test_a_smaller_grid_palette_is_the_beginning_of_a_larger():
    np.testing.assert_array_equal(palette.make_palette("grid", 19), palette.grid_palette(216)[:19])


def test_the_grid_ends_at_216():
    assert len(np.unique(palette.grid_palette(216), axis=0)) == 216
    with pytest.raises(UserError, match="at most 216 classes, got 217; use palette 'spread'"):
        palette.make_palette("grid", 217)


def test_round_trip_of_every_class():
    for num_classes in ALL_SIZES:
        palettes = [palette.make_palette(name, num_classes) for name in palette.PALETTES]

        @jax.jit  # one compilation for both
        def round_trips(label, palettes=palettes):
            masks = [palette.colourise(label, colours) for colours in palettes]
            return [(m, palette.decode(m, colours)) for m, colours in zip(masks, palettes, strict=True)]

        label = np.arange(num_classes, dtype=np.uint8).reshape(1, 1, num_classes, 1)
        for colours, (mask_rgb, decoded) in zip(palettes, round_trips(label), strict=True):
            assert colours.shape == (num_classes, 3) and colours.dtype == np.uint8
            np.testing.assert_array_equal(np.round((np.asarray(mask_rgb)[0, 0] + 1) * 127.5), colours)
            np.testing.assert_array_equal(decoded, label)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_void_is_white(dtype):
    label = jnp.full((1, 2, 2, 1), VOID, dtype).at[0, 0, 0].set(1)
    mask_rgb = palette.colourise(label, palette.make_palette("spread", 3))
    assert (mask_rgb[0, 1] == 1).all() and (mask_rgb[0, 0, 1] == 1).all()
    assert not (mask_rgb[0, 0, 0] == 1).all()


def test_spread_colours_are_further_apart_than_the_grids():
    for num_classes in ALL_SIZES:
        gaps = {name: palette.min_distance(palette.make_palette(name, num_classes)) for name in palette.PALETTES}
        assert gaps["spread"] > gaps["grid"]
        assert gaps["grid"] == pytest.approx(50 / 127.5)


def test_spread_colours_keep_off_voids_white():
    for num_classes in ALL_SIZES:
        colours = palette.make_palette("spread", num_classes)
        to_white = np.linalg.norm(palette.scale(colours) - palette.scale(palette.VOID_COLOUR), axis=-1).min()
        assert to_white >= 0.99 * palette.min_distance(colours)


def test_min_distance_is_the_smallest_of_all_pairs():
    colours = np.random.default_rng(0).integers(0, 256, (7, 3), np.uint8)
    pairs = [np.linalg.norm((colours[i] / 127.5) - (colours[j] / 127.5)) for i in range(7) for j in range(i)]
    assert palette.min_distance(colours) == pytest.approx(min(pairs), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(palette.PALETTES),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_perturbation_below_the_bound_never_changes_a_class(name, share, seed):
    """Whatever the share of the pixels' amplitude in the sum, and at the corners of the cube, the worst places."""
    num_classes = 12
    colours = palette.make_palette(name, num_classes)
    total = 0.999 * palette.min_distance(colours) / 3**0.5
    pixel, region = share * total, (1 - share) * total
    palette.check_amplitudes(colours, pixel, region)
    label = jnp.tile(all_ids(num_classes), (1, 8, 1, 1))
    clean = palette.colourise(label, colours)
    drawn = palette.perturb(jax.random.key(seed), clean, label, num_classes, pixel, region)
    corner = clean + total / 2 * np.random.default_rng(seed).choice([-1, 1], clean.shape)
    np.testing.assert_array_equal(palette.decode(drawn, colours), label)
    np.testing.assert_array_equal(palette.decode(corner, colours), label)


@pytest.mark.parametrize("name", palette.PALETTES)
def test_the_bound_is_tight(name):
    """Just beyond it, some corner of the cube lies nearer to another colour, where the colours' gap is diagonal."""
    colours = np.array([(0, 0, 0), (100, 100, 100)], np.uint8)
    clean = palette.colourise(all_ids(2), colours)
    total = palette.min_distance(colours) / 3**0.5
    assert (palette.decode(clean[:, :, :1] + 0.501 * total, colours) == 1).all()
    assert (palette.decode(clean[:, :, :1] + 0.499 * total, colours) == 0).all()
    with pytest.raises(UserError):
        palette.check_amplitudes(palette.make_palette(name, 12), 3.0, 0.0)


@pytest.mark.parametrize("name", palette.PALETTES)
@pytest.mark.parametrize("split", [0.0, 0.3, 1.0])
def test_amplitudes_are_refused_from_the_bound_on(name, split):
    colours = palette.make_palette(name, 12)
    bound = palette.min_distance(colours) / 3**0.5
    palette.check_amplitudes(colours, 0.99 * split * bound, 0.99 * (1 - split) * bound)
    for factor in (1.0 + 1e-12, 1.5):
        with pytest.raises(UserError, match=f"at least 0 and below {bound:.3f} for this palette, got"):
            palette.check_amplitudes(colours, factor * split * bound, factor * (1 - split) * bound)


@pytest.mark.parametrize("amplitudes", [(-0.1, 0.0), (0.0, -0.1)])
def test_negative_amplitudes_are_refused(amplitudes):
    with pytest.raises(UserError, match="at least 0"):
        palette.check_amplitudes(palette.make_palette("spread", 3), *amplitudes)


def test_the_papers_amplitude_is_allowed():
    palette.check_amplitudes(palette.make_palette("grid", 216), 0.1, 0.0)


def test_pixel_noise_is_uniform_and_independent():
    label = jnp.zeros((1, 64, 64, 1), jnp.uint8)
    noise = palette.perturb(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), label, 4, 0.1, 0.0)
    assert abs(noise).max() <= 0.05
    assert noise.mean() == pytest.approx(0, abs=1e-3)
    assert noise.std() == pytest.approx(0.1 / 12**0.5, rel=0.02)
    assert np.abs(np.corrcoef(np.asarray(noise).reshape(-1, 3).T) - np.eye(3)).max() < 0.06


def test_a_region_has_one_tint_per_image_and_class():
    label = jax.random.randint(jax.random.key(1), (2, 16, 16, 1), 0, 3).astype(jnp.uint8).at[:, 0].set(VOID)
    tint = np.asarray(palette.perturb(jax.random.key(0), jnp.zeros((2, 16, 16, 3)), label, 3, 0.0, 0.4))
    ids = np.asarray(label[..., 0])
    tints = [tint[i][ids[i] == c] for i in range(2) for c in range(3)]
    for region in tints:
        np.testing.assert_array_equal(region, np.broadcast_to(region[0], region.shape))
    firsts = np.stack([region[0] for region in tints])
    assert len(np.unique(firsts)) == firsts.size and np.abs(firsts).max() <= 0.2
    assert not tint[ids == VOID].any()


def test_no_amplitude_no_change():
    mask_rgb = palette.colourise(all_ids(3), palette.make_palette("spread", 3))
    np.testing.assert_array_equal(palette.perturb(jax.random.key(0), mask_rgb, all_ids(3), 3, 0.0, 0.0), mask_rgb)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_decode_finds_the_nearest_colour(seed):
    rng = np.random.default_rng(seed)
    colours = palette.make_palette("spread", 9)
    mask_rgb = rng.uniform(-1.5, 1.5, (1, 8, 8, 3)).astype(np.float32)
    distance = np.linalg.norm(mask_rgb[..., None, :] - palette.scale(colours), axis=-1)
    found = np.asarray(palette.decode(jnp.asarray(mask_rgb), colours))
    chosen = np.take_along_axis(distance, found.astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(-1), rtol=1e-5)


def test_unknown_palette():
    with pytest.raises(UserError, match="palette: one of .*, got 'rainbow'"):
        palette.make_palette("rainbow", 3)
