"""flow.py: the path, its velocity, the distributions of t, and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax import flow

SHAPE = (5, 4, 6, 3)


def make_pair(seed: int = 0):
    key0, key1 = jax.random.split(jax.random.key(seed))
    return jax.random.normal(key0, SHAPE), jax.random.normal(key1, SHAPE)


def test_path_begins_at_the_image_and_ends_at_the_mask():
    z0, z1 = make_pair()
    np.testing.assert_array_equal(flow.interpolate(z0, z1, jnp.zeros(5)), z0)
    np.testing.assert_array_equal(flow.interpolate(z0, z1, jnp.ones(5)), z1)


def test_every_sample_has_its_own_time():
    z0, z1 = make_pair()
    t = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    zt = flow.interpolate(z0, z1, t)
    for i in range(5):
        np.testing.assert_allclose(zt[i], (1 - t[i]) * z0[i] + t[i] * z1[i], rtol=1e-6, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path_at_any_time():
    z0, z1 = make_pair()
    t = jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])
    _, derivative = jax.jvp(lambda t: flow.interpolate(z0, z1, t), (t,), (jnp.ones(5),))
    np.testing.assert_allclose(derivative, flow.velocity(z0, z1), rtol=1e-6, atol=1e-6)


def logit_normal_cdf(t):
    return jax.scipy.special.ndtr(jax.scipy.special.logit(t))


def u_shaped_cdf(t):
    return 0.5 + jnp.sinh(4 * (t - 0.5)) / (2 * jnp.sinh(2.0))


# Of the mode sampling: u and t = f(1 - u) = 1 - f(u), which rises.
MODE_U = np.linspace(0, 1, 100_001)
MODE_T = MODE_U + 1.29 * (np.cos(np.pi / 2 * MODE_U) ** 2 - 1 + MODE_U)


def mode_cdf(t):
    return np.interp(t, MODE_T, MODE_U)


CDFS = {"uniform": lambda t: t, "logit_normal": logit_normal_cdf, "mode": mode_cdf, "u_shaped": u_shaped_cdf}


def test_closed_forms_are_densities():
    """The u-shaped one is the integral of a multiple of cosh(4 (t - 1/2)); all run from 0 to 1."""
    t = jnp.linspace(0.0, 1.0, 11)
    slope = jax.vmap(jax.grad(u_shaped_cdf))(t) / jnp.cosh(4 * (t - 0.5))
    np.testing.assert_allclose(slope, slope[0], rtol=1e-5)
    for cdf in CDFS.values():
        np.testing.assert_allclose(cdf(jnp.array([0.0, 0.5, 1.0])), [0.0, 0.5, 1.0], atol=1e-6)


@pytest.mark.parametrize("sampling", flow.TIME_SAMPLINGS)
def test_times_follow_their_distribution(sampling):
    """Kolmogorov and Smirnov: the largest gap between the two distribution functions is O(1 / sqrt(n))."""
    num = 20_000
    t = np.sort(flow.sample_time(jax.random.key(1), num, sampling))
    expected = np.asarray(CDFS[sampling](t))
    steps = np.arange(num + 1) / num
    gap = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert gap < 1.63 / num**0.5  # exceeded once in a hundred keys by the right distribution
    assert t[0] >= 0 and t[-1] <= 1


def test_mode_sampling_has_its_peak_in_the_middle_and_heavy_tails(monkeypatch):
    """Drawn times by u are monotone and symmetric; their histogram is the derivative of the inverse."""
    u = jnp.linspace(0.0, 1.0, 20_001)
    monkeypatch.setattr(flow.noise, "uniform", lambda key, shape: u)
    t = np.asarray(flow.sample_time(jax.random.key(0), len(u), "mode"))
    assert t[0] == 1 and t[10_000] == pytest.approx(0.5) and t[-1] == 0
    assert (np.diff(t) < 0).all()
    np.testing.assert_allclose(t + t[::-1], 1, atol=1e-6)
    density, edges = np.histogram(t, 40, (0, 1), density=True)
    slope = np.abs(np.gradient(MODE_T, MODE_U))
    expected = np.interp((edges[1:] + edges[:-1]) / 2, MODE_T, 1 / slope)
    np.testing.assert_allclose(density, expected, rtol=0.03)
    assert density.argmax() in (19, 20)
    assert density[0] == pytest.approx(1 / 2.29, rel=0.03)  # f'(0) = -(1 + s); logit_normal has 0 there


@pytest.mark.parametrize("sampling", flow.TIME_SAMPLINGS)
def test_times_are_float32_with_many_values(sampling):
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):
        assert flow.sample_time(jax.random.key(0), 4, sampling).dtype == jnp.float32
    t = flow.sample_time(jax.random.key(0), 2000, sampling)
    assert t.dtype == jnp.float32
    assert len(np.unique(t)) > 1990


def test_unknown_time_sampling():
    with pytest.raises(ValueError, match="time sampling: one of .*, got 'normal'"):
        flow.sample_time(jax.random.key(0), 4, "normal")


def loss(v, target, weight=None):
    """The quotient that the terms stand for."""
    error, total = flow.loss_terms(v, target, weight)
    return error / jnp.maximum(total, 1e-6)


def test_loss_is_the_mean_square_error():
    v, target = make_pair()
    expected = np.mean((np.asarray(v, np.float64) - np.asarray(target, np.float64)) ** 2)
    np.testing.assert_allclose(loss(v, target), expected, rtol=1e-6)
    assert loss(target, target) == 0


def test_loss_of_half_precision_is_taken_in_float32():
    v, target = (x.astype(jnp.bfloat16) for x in make_pair())
    expected = loss(v.astype(jnp.float32), target.astype(jnp.float32))
    assert loss(v, target).dtype == jnp.float32
    assert loss(v, target) == expected


@pytest.mark.parametrize(
    ("delta", "error", "expected"),
    [(1.0, 0.0, 0.0), (2.0, 1.5, 2.0), (2.0, -1.5, 2.0), (1.0, 3**0.5, 2.0), (5.0, 12.0, 400 / 5)],
)
def test_huber_by_hand(delta, error, expected):
    """2 delta^2 (sqrt(1 + (e / delta)^2) - 1): of 3/4 and 12/5 the roots are 5/4 and 13/5."""
    np.testing.assert_allclose(flow.make_error_fn("huber", delta)(jnp.float32(error)), expected, rtol=1e-6)


def test_huber_is_the_square_of_small_errors_and_linear_in_large_ones():
    e = jnp.array([-3.0, -1e-2, -1e-4, 1e-6, 0.5, 2.0])
    np.testing.assert_allclose(flow.make_error_fn("huber", 1e4)(e), flow.make_error_fn("mse")(e), rtol=1e-6)
    error_fn = flow.make_error_fn("huber", 0.5)
    np.testing.assert_allclose(error_fn(e[1:4]), e[1:4] ** 2, rtol=1e-3)
    slope = jax.vmap(jax.grad(error_fn))(jnp.array([-1e4, 0.0, 1e-4, 1e4]))
    np.testing.assert_allclose(slope, [-1.0, 0.0, 2e-4, 1.0], rtol=1e-3)


def test_loss_of_another_error():
    v, target = make_pair()
    error, total = flow.loss_terms(v, target, jnp.full((*SHAPE[:3], 1), 0.5), flow.make_error_fn("huber", 0.3))
    e = np.asarray(v, np.float64) - np.asarray(target, np.float64)
    np.testing.assert_allclose(error / total, np.mean(0.18 * (np.sqrt(1 + (e / 0.3) ** 2) - 1)), rtol=1e-5)


def test_unknown_error():
    with pytest.raises(ValueError, match="error: one of .*, got 'l3'"):
        flow.make_error_fn("l3")


@pytest.mark.parametrize("channels", [1, 3])
def test_loss_is_a_weighted_mean(channels):
    v, target = make_pair()
    weight = jax.random.uniform(jax.random.key(2), (*SHAPE[:3], channels))
    error = (np.asarray(v, np.float64) - np.asarray(target, np.float64)) ** 2
    expected = np.average(error, weights=np.broadcast_to(weight, SHAPE))
    np.testing.assert_allclose(loss(v, target, weight), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(v, target, 7 * weight), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(v, target, jnp.ones_like(weight)), error.mean(), rtol=1e-5)


def test_places_of_weight_zero_have_no_say():
    v, target = make_pair()
    weight = jnp.ones((*SHAPE[:3], 1)).at[:, 1].set(0)
    wild = v.at[:, 1].add(1000.0)
    assert loss(wild, target, weight) == loss(v, target, weight) != loss(wild, target)
    gradient = jax.grad(loss)(wild, target, weight)
    assert not gradient[:, 1].any() and gradient[:, 0].all()


def test_a_batch_of_void_costs_nothing():
    v, target = make_pair()
    value, gradient = jax.value_and_grad(loss)(v, target, jnp.zeros((*SHAPE[:3], 1)))
    assert value == 0 and not gradient.any()


def test_terms_of_equal_parts_add_up():
    v, target = make_pair()
    weight = jnp.arange(np.prod(SHAPE[:3]), dtype=jnp.float32).reshape(*SHAPE[:3], 1)
    parts = [flow.loss_terms(*(x[:, part] for x in (v, target, weight))) for part in (slice(0, 2), slice(2, 4))]
    error, total = (a + b for a, b in zip(*parts, strict=True))
    np.testing.assert_allclose(error / total, loss(v, target, weight), rtol=1e-6)
    mean_of_means = np.mean([a / b for a, b in parts])
    assert abs(mean_of_means - error / total) > 1e-3
