"""Principal components of patches: an exact linear map to latents whose spread is evened out.

With mean m, eigenvectors U and eigenvalues L (falling) of the covariance of patches x, and weights w of their entries,

    z = g L^(-e/2) U^T (w x - m),    x = w^-1 (U L^(e/2) z / g + m),    g such that the RMS of z is 1.        (1)

e = 1 makes all directions alike, e = 0 leaves the spread of nature. Errors in the faint directions, the fine grain of a
picture, weigh more in z than in x: a network that learns z attends to them, and what it misses is faint again in x.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Array, Float

from semflow_jax.models.build import Params


def fit(
    patches: Iterable[Float[np.ndarray, "_ d"]],
    num_components: int,
    exponent: float,
    weight_fn=lambda mean: np.ones_like(mean),
) -> dict[str, np.ndarray]:
    """Equation (1) in float64; equal patches give equal arrays.

    Args:
        patches: chunks of rows x.
        num_components: of z; the map is exact where it is d.
        exponent: e.
        weight_fn: mean of x -> w.
    """
    count, total, outer = 0, np.zeros(()), np.zeros(())
    for chunk in patches:
        rows = chunk.astype(np.float64)
        count, total, outer = count + len(rows), total + rows.sum(0), outer + rows.T @ rows
    mean = total / count
    weight = weight_fn(mean)
    values, vectors = np.linalg.eigh(weight[:, None] * (outer / count - np.outer(mean, mean)) * weight)
    keep = np.argsort(values)[::-1][:num_components]
    values, vectors = np.maximum(values[keep], 1e-9), vectors[:, keep]
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(len(keep))])  # else the sign is the library's whim
    scale = values ** (-exponent / 2)
    scale /= np.sqrt(np.mean(scale**2 * values))
    arrays = {"analysis": weight[:, None] * vectors * scale, "synthesis": (vectors / scale).T / weight, "mean": mean}
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def analyse(params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
    """x -> z."""
    return (x - params["mean"]) @ params["analysis"]


def synthesise(params: Params, z: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
    """z -> x."""
    return z @ params["synthesis"] + params["mean"]
