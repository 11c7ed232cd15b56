"""solve.py: exactness, orders of convergence, the time grid, and results that do not depend on the batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax import solve
from semflow_jax.errors import UserError

SHAPE = (3, 2, 2, 2)
BOTH = {"to_mask": solve.image_to_mask, "to_image": solve.mask_to_image}


def make_latent(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), SHAPE)


def constant(zt, t):
    return jnp.broadcast_to(jnp.array([3.0, -2.0]), zt.shape)


def linear(zt, t):
    """dz/dt = z, whose solution is z(0) exp(t)."""
    return zt


def wavy(zt, t):
    """Depends on both state and time, with a solution that can be run back."""
    return jnp.sin(3 * t)[:, None, None, None] * zt + jnp.cos(zt)


def record_times(run) -> list[np.ndarray]:
    """Calls run(velocity_fn) on a field that notes every t it is asked for."""
    times = []

    def field(zt, t):
        jax.debug.callback(lambda t: times.append(np.asarray(t)), t, ordered=True)
        return jnp.zeros_like(zt)

    jax.block_until_ready(run(field))
    jax.effects_barrier()
    return times


@pytest.mark.parametrize("solver", solve.SOLVERS)
def test_a_straight_path_is_exact_in_any_number_of_steps(solver):
    z = make_latent()
    np.testing.assert_allclose(solve.image_to_mask(constant, z, 1, solver), z + constant(z, 0), atol=2e-6)
    np.testing.assert_allclose(solve.mask_to_image(constant, z, 7, solver), z - constant(z, 0), atol=2e-6)


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [("euler", 1, 16), ("heun", 2, 16), ("midpoint", 2, 16), ("adams", 2, 32)],  # the first step of adams is Euler's
)
@pytest.mark.parametrize(("direction", "end"), [("to_mask", math.e), ("to_image", 1 / math.e)])
def test_order_of_convergence(solver, order, steps, direction, end):
    """Halving the step divides the error by 2^order."""
    z = jnp.ones((1, 1, 1, 1))
    coarse, fine = (abs(float(BOTH[direction](linear, z, n, solver)[0, 0, 0, 0]) - end) for n in (steps, 2 * steps))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.08)


@pytest.mark.parametrize("direction", BOTH)
def test_tsit5_meets_its_tolerance(direction):
    z = make_latent()
    end = z * math.exp(1 if direction == "to_mask" else -1)
    np.testing.assert_allclose(BOTH[direction](linear, z, solver="tsit5"), end, rtol=solve.TOLERANCE, atol=1e-3)


@pytest.mark.parametrize(("solver", "tolerance"), [("tsit5", 5e-3), ("heun", 2e-3)])
def test_the_directions_are_inverse(solver, tolerance):
    z0 = make_latent()
    z1 = solve.image_to_mask(wavy, z0, 40, solver)
    assert jnp.abs(z1 - z0).max() > 0.5
    np.testing.assert_allclose(solve.mask_to_image(wavy, z1, 40, solver), z0, atol=tolerance)


@pytest.mark.parametrize("solver", ["euler", "adams"])
@pytest.mark.parametrize("steps", [7, 25, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 30))])
def test_euler_and_adams_ask_the_network_once_a_step_on_the_papers_grid(steps, solver):
    z = make_latent()
    grid = np.arange(steps) / steps
    there = record_times(lambda field: solve.image_to_mask(field, z, steps, solver))
    back = record_times(lambda field: solve.mask_to_image(field, z, steps, solver))
    for times, expected in ((there, grid), (back, 1 - grid)):
        assert len(times) == steps
        assert all(t.shape == (SHAPE[0],) and t.dtype == np.float32 for t in times)
        np.testing.assert_allclose(np.stack(times), np.repeat(expected[:, None], SHAPE[0], 1), atol=2e-7)


@pytest.mark.parametrize(("solver", "offsets"), [("heun", (0.0, 1.0)), ("midpoint", (0.0, 0.5))])
def test_second_order_solvers_ask_twice_a_step(solver, offsets):
    times = record_times(lambda field: solve.image_to_mask(field, make_latent(), 5, solver))
    # Where one step ends the next begins, and a solver may keep the value: what matters is where it asked.
    expected = sorted({round((i + offset) / 5, 5) for i in range(5) for offset in offsets})
    assert sorted({round(float(t[0]), 5) for t in times}) == expected
    assert len(times) <= 10


@pytest.mark.parametrize("direction", BOTH)
def test_adams_follows_the_textbook(direction):
    """The first step is Euler's; others weigh the velocities of two steps by 3/2 and -1/2."""
    z, steps = make_latent(), 4
    sign = 1 if direction == "to_mask" else -1
    expected, before = z, None
    for i in range(steps):
        t = jnp.full((len(z),), i / steps if sign > 0 else 1 - i / steps)
        v = wavy(expected, t)
        expected = expected + sign / steps * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
    np.testing.assert_allclose(BOTH[direction](wavy, z, steps, "adams"), expected, atol=2e-6)


def test_tsit5_of_a_sample_does_not_depend_on_its_batch_mates():
    """A stiff batch mate needs many small steps; they must not change the others' result by a bit."""

    def field(zt, t):
        return zt * jnp.sin(20 * zt)

    run = jax.jit(functools.partial(solve.mask_to_image, field, solver="tsit5"))
    z, mates = make_latent(), 5 * make_latent(1)
    together = run(z)
    np.testing.assert_array_equal(run(mates.at[1].set(z[1]))[1], together[1])
    np.testing.assert_array_equal(run(z[jnp.array([2, 0, 1])]), together[jnp.array([2, 0, 1])])


@pytest.mark.parametrize(("solver", "to_mask"), [("euler", True), ("euler", False), ("tsit5", False)])
def test_a_path_passes_from_the_start_to_the_integral(solver, to_mask):
    z = make_latent()
    run = solve.image_to_mask if to_mask else solve.mask_to_image
    frames = solve.path(linear, z, 5, to_mask, 8, solver)
    assert frames.shape == (5, *SHAPE)
    np.testing.assert_array_equal(frames[0], z)
    np.testing.assert_allclose(frames[-1], run(linear, z, 8, solver), rtol=1e-5)
    sign = 1 if to_mask else -1
    for i, t in enumerate(np.linspace(0, 1, 5)):
        np.testing.assert_allclose(frames[i], z * math.exp(sign * t), rtol=0.08)


def test_frames_of_a_straight_path_are_evenly_spaced():
    z = make_latent()
    frames = solve.path(constant, z, 4, True, 25)
    expected = [z + i / 3 * constant(z, 0) for i in range(4)]
    np.testing.assert_allclose(frames, expected, atol=5e-6)


@pytest.mark.parametrize("run", BOTH.values())
def test_bad_arguments(run):
    with pytest.raises(UserError, match="solver: one of .*euler.*tsit5.*, got 'rk4'"):
        run(constant, make_latent(), 25, "rk4")
    with pytest.raises(UserError, match="steps: at least 1, got 0"):
        run(constant, make_latent(), 0)


@pytest.mark.parametrize("solver", solve.SOLVERS)
@pytest.mark.parametrize("name", BOTH)
def test_programs_never_call_back_to_python(name, solver):
    """JAX's compilation cache would not keep them."""
    program = jax.jit(lambda z: BOTH[name](wavy, z, 3, solver)).lower(make_latent())
    assert "callback" not in program.as_text()
