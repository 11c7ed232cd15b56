"""shortcut.py: jumps on their grid, the target of two halves, and the places of a batch that they take."""

import jax
import jax.numpy as jnp
import numpy as np

from semflow_jax import noise, shortcut


def test_jumps_lie_on_their_grid_and_on_the_way():
    t, d = (np.asarray(x) for x in shortcut.sample_jump(jax.random.key(0), 2000))
    lengths, counts = np.unique(np.abs(d), return_counts=True)
    np.testing.assert_array_equal(lengths, 2.0 ** np.arange(1 - shortcut.NUM_LENGTHS, 1))
    assert counts.min() > 0.8 * len(t) / shortcut.NUM_LENGTHS
    assert 0.45 < (d > 0).mean() < 0.55
    np.testing.assert_array_equal(t / np.abs(d), np.round(t / np.abs(d)))
    assert t.min() >= 0 and t.max() <= 1 and (t + d).min() >= 0 and (t + d).max() <= 1
    assert len(np.unique(t[d == 0.25])) == 4


def test_examples_with_keys_of_their_own_jump_alone():
    keys = noise.example_keys(jax.random.key(1), jnp.arange(6))
    t, d = shortcut.sample_jump(keys, 6)
    alone = [shortcut.sample_jump(keys[i : i + 1], 1) for i in range(6)]
    np.testing.assert_array_equal(t, [t[0] for t, _ in alone])
    np.testing.assert_array_equal(d, [d[0] for _, d in alone])


def test_target_is_the_mean_of_two_halves():
    asked = []

    def jump_fn(zt, t, d):
        asked.append((t, d))
        return t[:, None, None, None] * jnp.ones_like(zt) + 0.5 * zt

    zt, t = jnp.ones((2, 1, 1, 1)), jnp.array([0.5, 1.0])
    d = jnp.array([0.5, -(2.0 ** (1 - shortcut.NUM_LENGTHS))])
    found = shortcut.target(jump_fn, zt, t, d)
    first = t + 0.5
    second = t + d / 2 + 0.5 * (1 + d / 2 * first)
    np.testing.assert_allclose(found[:, 0, 0, 0], (first + second) / 2, rtol=1e-6)
    np.testing.assert_array_equal([d for _, d in asked], [[0.25, 0], [0.25, 0]])  # half of the shortest is none
    np.testing.assert_allclose(asked[1][0], t + d / 2)


def test_exact_jumps_are_their_own_target():
    """dz/dt = z has z(t + d) = e^d z(t), so s(z, d) = (e^d - 1) / d z."""

    def jump_fn(zt, t, d):
        return jnp.where(d == 0, 1.0, jnp.expm1(d) / jnp.where(d == 0, 1.0, d))[:, None, None, None] * zt

    zt, t, d = jnp.full((2, 1, 1, 1), 3.0), jnp.array([0.0, 1.0]), jnp.array([1.0, -0.5])
    np.testing.assert_allclose(shortcut.target(jump_fn, zt, t, d), jump_fn(zt, t, d), rtol=1e-5)


def test_no_gradient_passes_through_the_target():
    zt, t, d = jnp.ones((1, 1, 1, 1)), jnp.zeros(1), jnp.ones(1)
    grad = jax.grad(lambda a: shortcut.target(lambda z, t, d: a * z, zt, t, d).sum())(2.0)
    assert grad == 0


def test_take_and_put_are_inverse():
    x = jnp.arange(12.0).reshape(6, 2)
    few = shortcut.take(3, x)
    np.testing.assert_array_equal(few, x[::3])
    np.testing.assert_array_equal(shortcut.put(3, few, x), x)
    found = shortcut.put(3, jnp.full((2, 2), -1.0), x)
    np.testing.assert_array_equal(found, np.where(np.arange(6)[:, None] % 3 == 0, -1, x))
