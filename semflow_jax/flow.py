"""The paper: one rectified flow between image latents and mask latents (SemFlow, Wang et al., NeurIPS 2024).

With z_0 the latent of an image and z_1 the latent of its pseudo-mask, the flow follows the straight path

    z_t = (1 - t) z_0 + t z_1,    t in [0, 1],                                  (1)

whose velocity is the same all along,

    v* = dz_t / dt = z_1 - z_0,                                                 (2)

and a network v(z_t, t) learns it by least squares,

    L = E_{z_0, z_1, t} || v(z_t, t) - v* ||^2   (mean over elements).          (3)

The pairs are given, so no noise enters: integrating dz = v dt from 0 to 1 segments, from 1 to 0 synthesizes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from semflow_jax import noise

TIME_SAMPLINGS = ("uniform", "logit_normal", "mode", "u_shaped")
ERRORS = ("mse", "huber")
MODE_SCALE = 1.29  # s of mode sampling: rf/mode(1.29) of Esser et al. (2024)


def interpolate(
    z0: Float[Array, "b h w c"], z1: Float[Array, "b h w c"], t: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """z_t of equation (1)."""
    t = t[:, None, None, None]
    return (1 - t) * z0 + t * z1


def velocity(z0: Float[Array, "b h w c"], z1: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """v* of equation (2)."""
    return z1 - z0


def sample_time(key: Key[Array, "..."], num: int, sampling: str = "uniform") -> Float[Array, " num"]:
    """Draws times in [0, 1], always in float32: bfloat16 knows 256 values near 1 and no more.

    `uniform` is the paper's; `logit_normal` (Esser et al. 2024) favours the middle and leaves out the ends; `mode`
    (theirs too, 'with heavy tails') favours it, and the ends keep a density of 1 / (1 + s); `u_shaped` (Lee et al.
    2024), density proportional to cosh(4 (t - 1/2)), favours both ends.

    Raises:
        ValueError: unknown `sampling`.
    """
    u = noise.uniform(key, (num,))
    if sampling == "uniform":
        return u
    if sampling == "logit_normal":
        return jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6)))
    if sampling == "mode":
        t = 1 - u - MODE_SCALE * (jnp.square(jnp.cos(jnp.pi / 2 * u)) - 1 + u)
        return jnp.clip(t, 0, 1)  # rounding steps over them
    if sampling == "u_shaped":  # the inverse of its distribution function
        return 0.5 + jnp.arcsinh((2 * u - 1) * jnp.sinh(2.0)) / 4
    raise ValueError(f"time sampling: one of {TIME_SAMPLINGS}, got {sampling!r}")


def make_error_fn(kind: str = "mse", delta: float = 1.0) -> Callable[[Array], Array]:
    """What takes the place of the square in equation (3), by name.

    `mse` is the square, e^2; `huber` is the pseudo-Huber error, 2 delta^2 (sqrt(1 + (e / delta)^2) - 1), which is about
    e^2 for errors small beside `delta` and about 2 delta |e| for large ones.

    Raises:
        ValueError: unknown `kind`.
    """
    if kind == "mse":
        return jnp.square
    if kind == "huber":  # in a form that loses no digits of small errors
        return lambda e: 2 * jnp.square(e) / (1 + jnp.sqrt(1 + jnp.square(e / delta)))
    raise ValueError(f"error: one of {ERRORS}, got {kind!r}")


def loss_terms(
    v: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    weight: Float[Array, "b h w d"] | None = None,
    error_fn: Callable[[Array], Array] = jnp.square,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Equation (3) in float32 as a quotient, (mean of w e, mean of w), whose terms add up over equal parts of a batch.

    e are the squares, or what `error_fn` makes of the differences; `weight` w (1 or c channels) is 1 by default, and 0
    leaves a place out.
    """
    error = error_fn(v.astype(jnp.float32) - target.astype(jnp.float32))
    if weight is None:
        return error.mean(), jnp.ones(())
    weight = jnp.broadcast_to(weight, error.shape)
    return (weight * error).mean(), weight.mean()
