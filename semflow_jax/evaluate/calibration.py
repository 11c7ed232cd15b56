"""Calibration: whether a pixel that is given a class with confidence p is of that class in a share p of cases.

Guo, Pleiss, Sun and Weinberger (2017), "On calibration of modern neural networks": pixels go into M bins B_m of equal
width by their confidence, the largest probability, and the expected calibration error is

    ECE = sum_m |B_m| / n  |acc(B_m) - conf(B_m)|                                              (their equation 3)

with bins open below and closed above, ((m - 1) / M, m / M]. torchmetrics closes them below, which is the same unless
a confidence is m / M exactly.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8


class Counts(NamedTuple):
    """Of the pixels in each bin of confidence, lowest first.

    Attributes:
        num_pixels: how many there are.
        num_correct: how many of them have their true class.
        confidence: the sum of their confidences.
    """

    num_pixels: Int[Array | np.ndarray, " m"]
    num_correct: Int[Array | np.ndarray, " m"]
    confidence: Float[Array | np.ndarray, " m"]


def calibration_counts(
    probabilities: Float[Array, "b h w n"], label: UInt8[Array, "b h w 1"], num_bins: int = 15
) -> Counts:
    """Counts by bin; pixels whose label is no class (void) do not count.

    Those of many batches are added up on the host, as int64 and float64.
    """
    confidence, prediction = probabilities.max(-1).astype(jnp.float32), probabilities.argmax(-1)
    known, correct = label[..., 0] < probabilities.shape[-1], prediction == label[..., 0]
    edges = jnp.linspace(0, 1, num_bins + 1).at[jnp.array([0, -1])].set(jnp.array([-jnp.inf, jnp.inf]))  # rounding

    def one(edge: tuple[Array, Array]) -> Counts:
        low, high = edge
        inside = known & (confidence > low) & (confidence <= high)
        return Counts(inside.sum(), (inside & correct).sum(), jnp.where(inside, confidence, 0).sum())

    return lax.map(one, (edges[:-1], edges[1:]))


def expected_calibration_error(counts: Counts) -> float:
    """ECE in 0..1; nan without a pixel."""
    num_pixels, num_correct, confidence = (np.asarray(x, np.float64) for x in counts)
    total = num_pixels.sum()
    return float(np.abs(num_correct - confidence).sum() / total) if total else float("nan")
