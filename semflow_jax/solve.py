"""The flow's ODE, dz/dt = v(z, t), integrated by diffrax in either direction.

t = 0 is the image and t = 1 its mask, so 0 -> 1 segments and 1 -> 0 synthesizes. Fixed-step solvers take exactly
`steps` steps on the grid t_i = i / steps (Euler then evaluates the network where the official code does); their clock
counts steps, for whole numbers add up exactly. 'tsit5' chooses its own steps, for each sample on its own, so that a
result never depends on the rest of its batch.
"""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from semflow_jax.adams import AdamsBashforth2
from semflow_jax.errors import UserError

VelocityFn = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, "b h w c"]]

FIXED = {"euler": diffrax.Euler, "adams": AdamsBashforth2, "heun": diffrax.Heun, "midpoint": diffrax.Midpoint}
SOLVERS = (*FIXED, "tsit5")
TOLERANCE = 1e-3  # of the adaptive solver, absolute and relative
MAX_ADAPTIVE_STEPS = 256


def check(solver: str, steps: int) -> None:
    """Raises UserError unless `solver` is known and `steps` positive."""
    if solver not in SOLVERS:
        raise UserError(f"solver: one of {SOLVERS}, got {solver!r}")
    if steps < 1:
        raise UserError(f"steps: at least 1, got {steps}")


def _integrate(velocity_fn: VelocityFn, z, t0: float, t1: float, steps: int, solver: str, num_frames: int):
    """Returns the states at `num_frames` times from t0 (exclusive, unless > 1) to t1, frames first."""
    check(solver, steps)

    def run(z, stepper, controller, end, first, max_steps):
        """Integrates over a clock s from 0 to `end`, with t = t0 + s (t1 - t0) / end."""
        h = (t1 - t0) / end

        def field(s, z, args):
            return h * velocity_fn(z, jnp.full((z.shape[0],), t0 + h * s, jnp.float32))

        saveat = diffrax.SaveAt(t1=True) if num_frames == 1 else diffrax.SaveAt(ts=jnp.linspace(0, end, num_frames))
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            stepper,
            0,
            end,
            first,
            z,
            saveat=saveat,
            stepsize_controller=controller,
            max_steps=max_steps,
            adjoint=diffrax.ForwardMode(),
            throw=False,
        ).ys

    if solver in FIXED:
        # Not `StepTo`: its check of the grid calls back to Python, and JAX's cache keeps no program that does.
        return run(z, FIXED[solver](), diffrax.ConstantStepSize(), steps, 1, steps)
    adaptive = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
    one = jax.vmap(lambda z: run(z[None], diffrax.Tsit5(), adaptive, 1, 1 / 25, MAX_ADAPTIVE_STEPS)[:, 0], out_axes=1)
    return one(z)


def image_to_mask(
    velocity_fn: VelocityFn, z0: Float[Array, "b h w c"], steps: int = 25, solver: str = "euler"
) -> Float[Array, "b h w c"]:
    """Segmentation: the mask latent z_1 that the flow leads to from the image latent z_0."""
    return _integrate(velocity_fn, z0, 0.0, 1.0, steps, solver, 1)[0]


def mask_to_image(
    velocity_fn: VelocityFn, z1: Float[Array, "b h w c"], steps: int = 25, solver: str = "euler"
) -> Float[Array, "b h w c"]:
    """Synthesis: the image latent z_0 that the flow comes from at the mask latent z_1."""
    return _integrate(velocity_fn, z1, 1.0, 0.0, steps, solver, 1)[0]


def path(
    velocity_fn: VelocityFn,
    z: Float[Array, "b h w c"],
    num_frames: int,
    to_mask: bool,
    steps: int = 25,
    solver: str = "euler",
) -> Float[Array, "f b h w c"]:
    """The states at `num_frames` evenly spaced times, both ends included, in the order of integration."""
    t0, t1 = (0.0, 1.0) if to_mask else (1.0, 0.0)
    return _integrate(velocity_fn, z, t0, t1, steps, solver, num_frames)
