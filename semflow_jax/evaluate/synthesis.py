"""Synthesis figures that need no other network.

Agreement: a synthesized image is segmented again by the same flow, and should give the mask it came from. Diversity:
the root mean square difference between two images of one mask, on the 0..1 scale; 0 means that the mask decides all.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def diversity(samples: UInt8[Array, "s b h w 3"]) -> Float[Array, " b"]:
    """Mean over all pairs of the s samples of a mask of their RMS difference."""
    num = samples.shape[0]
    x = samples.astype(jnp.float32) / 255
    pairs = [(i, j) for i in range(num) for j in range(i + 1, num)]
    return jnp.stack([jnp.sqrt(jnp.square(x[i] - x[j]).mean((1, 2, 3))) for i, j in pairs]).mean(0)
