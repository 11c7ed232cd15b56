"""The shape of a flow's paths from image to mask, and what is left after a way there and back.

States z_0 .. z_s are those of one integration at s + 1 evenly spaced times, both ends included, in either direction.
With d = z_s - z_0 and the velocity v_i = s (z_{i+1} - z_i) of step i, whose mean over the steps is d,

    S = mean_i |v_i - d|^2                                                                                      (1)
    S' = S / |d|^2                                                                                              (2)
    K = mean_i |v_i| / |d| - 1                                                                                  (3)

where |x|^2 is the mean square over a latent's values. (1) is the straightness of Liu, Gong and Liu (2022), "Flow
straight and fast: learning to generate and transfer data with rectified flow", with sums over steps for its integral
over time; theirs sums over values, ours has a size that does not depend on the resolution. It is 0 only for a straight
path at constant speed, which one step of Euler's method follows exactly. (3) is the length of the path over the
distance of its ends, minus 1: it sees bends alone, not changes of speed. The one bounds the other,
(1 + K)^2 <= 1 + S'. Of a path that ends where it began, (2) and (3) are infinite, or nan if it never left. Two states
have no shape, all three are 0: compare flows on one grid, of many states.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

States = Float[Array, "n b h w c"]
Pictures = Float[Array, "b h w c"] | UInt8[Array, "b h w c"]


def _mean_square(x: Float[Array, "*n h w c"]) -> Float[Array, "*n"]:
    return jnp.square(x).mean((-3, -2, -1))


def _velocities(states: States) -> tuple[Float[Array, "s b h w c"], Float[Array, "b h w c"]]:
    """v_i of every step, and d."""
    states = states.astype(jnp.float32)
    return (len(states) - 1) * jnp.diff(states, axis=0), states[-1] - states[0]


def straightness(states: States) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """S and S' of each path, equations (1) and (2): 0 where it is straight and even, more where it is not."""
    v, d = _velocities(states)
    absolute = _mean_square(v - d).mean(0)
    return absolute, absolute / _mean_square(d)


def curvature(states: States) -> Float[Array, " b"]:
    """K of each path, equation (3): 0 where it is straight, pi / 2 - 1 for half a circle."""
    v, d = _velocities(states)
    return jnp.sqrt(_mean_square(v)).mean(0) / jnp.sqrt(_mean_square(d)) - 1


def round_trip(start: Pictures, end: Pictures) -> Float[Array, " b"]:
    """Root mean square difference of each example from what came back; of uint8 images on the 0..1 scale."""
    unit = 255 if start.dtype == jnp.uint8 else 1
    return jnp.sqrt(_mean_square((start.astype(jnp.float32) - end.astype(jnp.float32)) / unit))
