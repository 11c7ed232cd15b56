"""evaluate/geometry.py: straight lines, arcs and other paths whose shape is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semflow_jax import solve
from semflow_jax.evaluate.geometry import curvature, round_trip, straightness


def make_path(times, shape=(2, 3, 4, 5)) -> jnp.ndarray:
    """States along the straight lines from each example's start to its end, at these shares of the way."""
    start, end = jax.random.normal(jax.random.key(0), (2, *shape))
    return start + jnp.reshape(jnp.asarray(times, jnp.float32), (-1, 1, 1, 1, 1)) * (end - start)


def make_arc(angle: float, num_steps: int, radius: float = 3.0) -> jnp.ndarray:
    """Of a circle, in one pixel with two channels."""
    a = np.linspace(0, angle, num_steps + 1)
    return jnp.asarray(radius * np.stack([np.cos(a), np.sin(a)], -1), jnp.float32).reshape(-1, 1, 1, 1, 2)


@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_even_straight_lines_are_straight(num_steps):
    path = make_path(np.linspace(0, 1, num_steps + 1))
    for figure in (*straightness(path), curvature(path)):
        assert figure.shape == (2,)
        np.testing.assert_allclose(figure, 0, atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 10])
def test_a_straight_line_with_growing_speed(num_steps):
    """At t^2 of the way: no bend, but S' = (1 - 1 / s^2) / 3."""
    path = make_path(np.linspace(0, 1, num_steps + 1) ** 2)
    absolute, relative = straightness(path)
    np.testing.assert_allclose(relative, (1 - num_steps**-2) / 3, rtol=1e-5)
    np.testing.assert_allclose(absolute, relative * jnp.square(path[-1] - path[0]).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(curvature(path), 0, atol=1e-5)


@pytest.mark.parametrize("angle", [math.pi / 2, math.pi, 5.0])
def test_an_arc(angle):
    """Of s chords: their length over the arc's chord; even speed, so that (1 + K)^2 = 1 + S'."""
    s, radius = 12, 3.0
    length, chord = 2 * radius * s * math.sin(angle / 2 / s), 2 * radius * math.sin(angle / 2)
    path = make_arc(angle, s, radius)
    absolute, relative = straightness(path)
    np.testing.assert_allclose(curvature(path), length / chord - 1, rtol=1e-4)
    np.testing.assert_allclose(absolute, (length**2 - chord**2) / 2, rtol=1e-4)
    np.testing.assert_allclose(relative, (length / chord) ** 2 - 1, rtol=1e-4)


def test_half_a_circle():
    assert curvature(make_arc(math.pi, 500))[0] == pytest.approx(math.pi / 2 - 1, abs=1e-4)


def test_paths_that_go_nowhere():
    there_and_back, nothing = make_path([0, 1, 0]), make_path([0, 0, 0])
    assert (straightness(there_and_back)[0] > 0).all()
    assert np.isinf(straightness(there_and_back)[1]).all() and np.isinf(curvature(there_and_back)).all()
    assert (straightness(nothing)[0] == 0).all()
    assert np.isnan(straightness(nothing)[1]).all() and np.isnan(curvature(nothing)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_properties(seed, scale):
    """Neither direction, place nor (relative) size of a path matter, and no bend is without its unevenness."""
    states = np.random.default_rng(seed).normal(size=(5, 2, 2, 3, 2)).astype(np.float32)
    (absolute, relative), bend = straightness(jnp.asarray(states)), curvature(jnp.asarray(states))
    assert (bend > -1e-5).all() and ((1 + bend) ** 2 <= (1 + relative) * (1 + 1e-5)).all()
    moved = jnp.asarray(np.float32(scale) * states[::-1] + 1)
    np.testing.assert_allclose(straightness(moved)[0], scale**2 * absolute, rtol=0.01)
    np.testing.assert_allclose(straightness(moved)[1], relative, rtol=0.01)
    np.testing.assert_allclose(curvature(moved), bend, rtol=0.01)
    each = curvature(jnp.asarray(states[:, 1:]))
    np.testing.assert_allclose(each, bend[1:], rtol=1e-5)


@pytest.mark.parametrize("to_mask", [True, False])
def test_of_the_solver(to_mask):
    """States as `solve.path` gives them, of dz/dt = c z, whose exact path from z is a straight line, unevenly."""
    s, rate = 16, 1.5
    z = jax.random.normal(jax.random.key(0), (2, 2, 3, 1))
    path = solve.path(lambda z, t: rate * z, z, s + 1, to_mask, steps=s, solver="midpoint")
    x = np.exp((rate if to_mask else -rate) * np.linspace(0, 1, s + 1))
    expected = (s * np.square(np.diff(x)).sum()) / (x[-1] - x[0]) ** 2 - 1
    np.testing.assert_allclose(straightness(path)[1], expected, rtol=0.01)
    np.testing.assert_allclose(curvature(path), 0, atol=1e-5)


def test_half_precision_states_are_computed_with_in_full():
    path = make_path(np.linspace(0, 1, 9) ** 2).astype(jnp.bfloat16)
    found, expected = straightness(path), straightness(path.astype(jnp.float32))
    assert found[0].dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_round_trip():
    z = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    np.testing.assert_allclose(round_trip(z, z + jnp.array([0.5, 2]).reshape(2, 1, 1, 1)), [0.5, 2], rtol=1e-6)
    black, white = jnp.zeros((1, 4, 4, 3), jnp.uint8), jnp.full((1, 4, 4, 3), 255, jnp.uint8)
    assert round_trip(black, white)[0] == round_trip(white, black)[0] == 1
    np.testing.assert_allclose(round_trip(black, black.at[..., 0].set(51)), 0.2 / 3**0.5, rtol=1e-6)
