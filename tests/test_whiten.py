"""whiten.py: exactness, the spread of every direction, and a fit that depends on the patches alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax import whiten

DIMS = 6


def make_patches(num: int = 500, noise: float = 0.01) -> np.ndarray:
    """Correlated entries about a mean; the spread of the principal directions falls a hundredfold."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(DIMS, DIMS)))
    spread = np.geomspace(1, noise, DIMS)
    return (rng.normal(size=(num, DIMS)) * spread @ rotation + np.arange(DIMS)).astype(np.float32)


def fit(x: np.ndarray, exponent: float, num_components: int = DIMS, **options) -> dict[str, np.ndarray]:
    return whiten.fit(np.array_split(x, 7), num_components, exponent, **options)


def analyse(params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return np.asarray(whiten.analyse(params, jnp.asarray(x)))


def round_trip(params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return np.asarray(whiten.synthesise(params, whiten.analyse(params, jnp.asarray(x))))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_spread_of_the_directions(exponent):
    """The standard deviations are those of nature to the power 1 - e, and their RMS is 1."""
    x = make_patches()
    z = analyse(fit(x, exponent), x)
    nature = np.sqrt(np.linalg.eigvalsh(np.cov(x.T, ddof=0))[::-1]) ** (1 - exponent)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(z.std(0), nature / np.sqrt(np.mean(nature**2)), rtol=1e-2)
    np.testing.assert_allclose(np.mean(z**2), 1, rtol=1e-3)
    np.testing.assert_allclose(np.corrcoef(z.T), np.eye(DIMS), atol=1e-2)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_all_components_are_exact(exponent):
    x = make_patches()
    params = fit(x, exponent)
    np.testing.assert_allclose(round_trip(params, x), x, atol=1e-5)


def test_fewer_components_leave_the_spread_of_the_others():
    """The best linear map of that rank loses the smallest eigenvalues and nothing else."""
    x = make_patches()
    params = fit(x, 0.5, num_components=4)
    lost = np.square(round_trip(params, x) - x).sum(1).mean()
    assert lost == pytest.approx(np.linalg.eigvalsh(np.cov(x.T, ddof=0))[:2].sum(), rel=1e-2)


def test_weights_choose_what_is_kept_and_are_undone():
    x = make_patches(noise=1.0)

    def weight(mean):
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-4)
        return np.array([100.0] + [1.0] * (DIMS - 1))

    params = fit(x, 0.5, num_components=1, weight_fn=weight)
    error = np.square(round_trip(params, x) - x).mean(0)
    assert error[0] < 1e-3 < 0.1 < error[1:].min()
    params = fit(x, 0.5, weight_fn=weight)
    np.testing.assert_allclose(round_trip(params, x), x, atol=1e-4)


def test_directions_without_spread_do_no_harm():
    x = make_patches()
    x[:, 0] = 3.0
    params = fit(x, 1.0)
    assert all(np.isfinite(array).all() for array in params.values())
    np.testing.assert_allclose(round_trip(params, x), x, atol=1e-3)


def test_equal_patches_give_equal_arrays():
    x = make_patches()
    ours, again = fit(x, 0.5), fit(x.copy(), 0.5)
    assert all(ours[name].dtype == np.float32 for name in ours)
    for name in ours:
        np.testing.assert_array_equal(ours[name], again[name])
    for name, array in whiten.fit([x], DIMS, 0.5).items():  # in one chunk
        np.testing.assert_allclose(array, ours[name], rtol=1e-4, atol=1e-5)
