"""evaluate/calibration.py: counts by bin against a loop, and errors in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semflow_jax.data.info import VOID
from semflow_jax.evaluate.calibration import Counts, calibration_counts, expected_calibration_error

counts_fn = jax.jit(calibration_counts, static_argnums=2)


def make_pixels(seed: int, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels, some void."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.5] * num_classes, (2, 7, 9)).astype(np.float32)
    label = rng.integers(0, num_classes, (2, 7, 9, 1)).astype(np.uint8)
    return p, np.where(rng.random(label.shape) < 0.2, np.uint8(VOID), label)


def make_binary(confidences, rights) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Pixels of two classes, the first of which is predicted."""
    p = jnp.array(confidences, jnp.float32)
    return jnp.stack([p, 1 - p], -1)[None, None], (1 - jnp.array(rights, jnp.uint8))[None, None, :, None]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 15]))
def test_counts_as_a_loop(seed, num_bins):
    p, label = make_pixels(seed)
    num, right, total = np.zeros(num_bins, int), np.zeros(num_bins, int), np.zeros(num_bins)
    for x, true in zip(p.reshape(-1, 3), label.ravel(), strict=True):
        if true != VOID:
            m = int(np.ceil(x.max() * num_bins)) - 1
            num[m] += 1
            right[m] += x.argmax() == true
            total[m] += x.max()
    found = counts_fn(p, label, num_bins)
    assert jnp.issubdtype(found.num_pixels.dtype, jnp.integer)
    np.testing.assert_array_equal(found.num_pixels, num)
    np.testing.assert_array_equal(found.num_correct, right)
    np.testing.assert_allclose(found.confidence, total, rtol=1e-6)
    there = num > 0
    by_bin = abs(right[there] / num[there] - total[there] / num[there])
    assert expected_calibration_error(found) == pytest.approx((num[there] / num.sum() * by_bin).sum(), abs=1e-6)


def test_in_closed_form():
    p, label = make_binary([0.8] * 5, [1, 1, 1, 0, 0])
    assert expected_calibration_error(counts_fn(p, label, 15)) == pytest.approx(0.8 - 0.6)
    p, label = make_binary([0.75] * 4, [1, 1, 1, 0])
    assert expected_calibration_error(counts_fn(p, label, 15)) == pytest.approx(0, abs=1e-7)
    p, label = make_binary([0.9, 0.9, 0.6, 0.6], [1, 1, 0, 0])
    assert expected_calibration_error(counts_fn(p, label, 15)) == pytest.approx((0.1 + 0.6) / 2)
    # In one bin for all, too much of one confidence makes up for too little of another.
    assert expected_calibration_error(counts_fn(p, label, 1)) == pytest.approx(0.75 - 0.5)


def test_bins_are_closed_above():
    p, label = make_binary([0.5, 0.75, 0.750001, 1.0, 1.000001], [1, 1, 1, 1, 1])
    assert counts_fn(p, label, 4).num_pixels.tolist() == [0, 1, 1, 3]


def test_batches_add_up():
    parts = [make_pixels(seed) for seed in range(2)]
    whole = counts_fn(*(np.concatenate(x) for x in zip(*parts, strict=True)), 15)
    total = Counts(*map(np.add, *(counts_fn(*x, 15) for x in parts)))
    np.testing.assert_array_equal(total.num_pixels, whole.num_pixels)
    np.testing.assert_array_equal(total.num_correct, whole.num_correct)
    assert expected_calibration_error(total) == pytest.approx(expected_calibration_error(whole), abs=1e-6)


def test_without_a_pixel():
    p, label = make_pixels(0)
    assert np.isnan(expected_calibration_error(counts_fn(p, np.full_like(label, VOID), 15)))


def test_sums_of_many_pixels():
    """As many as are one batch of large images; 0.9 has no short binary fraction."""
    p, label = jnp.full((4, 512, 512, 1), 0.9), jnp.zeros((4, 512, 512, 1), jnp.uint8)
    assert expected_calibration_error(counts_fn(p, label, 15)) == pytest.approx(0.1, abs=2e-6)
