"""Synthesis figures that need no other network.

Agreement: a synthesized image is segmented again by the same flow, and should give the mask it came from. Diversity:
the root mean square difference between two images of one mask, on the 0..1 scale; 0 means that the mask decides all.
"""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def mean_over_pairs(distance: Callable[[Array, Array], Array], samples: Array) -> Float[Array, " b"]:
    """Mean over all pairs of samples [s b ...] of a distance, (x [b ...], y [b ...]) -> [b]."""
    return jnp.stack([distance(x, y) for x, y in itertools.combinations(samples, 2)]).mean(0)


def diversity(samples: UInt8[Array, "s b h w 3"]) -> Float[Array, " b"]:
    """Mean over all pairs of the s samples of a mask of their RMS difference."""

    def rms(x, y):
        return jnp.sqrt(jnp.square(x - y).mean((1, 2, 3)))

    return mean_over_pairs(rms, samples.astype(jnp.float32) / 255)
