"""Distances between two sets of features, in float64 on the host: Frechet's (FID), the kernel's (KID), and precision
and recall.

Which network made the features, and of how many images, belongs beside every figure: the Frechet distance of few images
is too large, while that of the kernel is unbiased.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from semflow_jax.errors import UserError

Features = Float[np.ndarray, "n d"]
Others = Float[np.ndarray, "m d"]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features that come in batches; sums about the mean, so that nothing cancels.

    Batches and processes can be cut anywhere: merging follows Chan, Golub and LeVeque 1983.

    Attributes:
        num: number of features.
        mean: their mean; anything where there are none.
        scatter: sum of the outer products of their deviations from it.
    """

    num: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, batch: Features) -> "Moments":
        """Those of all so far and of [n d] more."""
        if not len(batch):
            return self
        x = np.asarray(batch, np.float64)
        mean = x.mean(0)
        return self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other: "Moments") -> "Moments":
        """Those of both sets together."""
        if not self.num or not other.num:
            return self if self.num else other
        num = self.num + other.num
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.num * other.num / num)
        return Moments(num, self.mean + step * (other.num / num), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased. Raises `UserError` where there are fewer than two features."""
        if self.num < 2:
            raise UserError(f"covariance: must have at least 2 images, found {self.num}: take more")
        return self.scatter / (self.num - 1)


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """R with R R' = covariance, as narrow as its rank: rounding's eigenvalues would come out of a root enlarged."""
    values, vectors = np.linalg.eigh(covariance)
    keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet's distance of two Gaussians, squared as usual (Dowson and Landau 1982; the FID of Heusel et al. 2017).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). With A = R R' and B = S S' the last root's trace is the sum of the
    singular values of R' S. Both factors come from symmetric matrices and nothing small is rooted at the end, so that
    it holds where there are fewer images than dimensions; the root of the product A B, which is not symmetric, loses
    half of the digits there. Follows pytorch-fid and torch-fidelity where those are stable.
    """
    cov_a, cov_b = a.covariance, b.covariance
    cross = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    shift = np.square(a.mean - b.mean).sum()
    return max(float(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over the subsets; 0 the latter where all of both sets are the one subset."""

    mean: float
    std: float
    num_subsets: int
    subset_size: int


def _squared_mmd(x: Features, y: Features) -> float:
    """Unbiased, for sets of one size; polynomial kernel (x.y / d + 1)^3."""
    m, d = x.shape
    xx, yy, xy = ((u @ v.T / d + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return float(within / (m * (m - 1)) - 2 * xy.mean())


def kernel_distance(
    x: Features, y: Others, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Squared maximum mean discrepancy over random subsets (the KID of Binkowski et al. 2018).

    Follows torch-fidelity, whose subsets it takes for the same seed. Where a set has fewer than `subset_size`, subsets
    are as large as the smaller set; may come out a little below 0 for sets that are alike.

    Raises:
        UserError: fewer than two features in a set.
    """
    num = min(len(x), len(y))
    if num < 2:
        raise UserError(f"kernel distance: must have at least 2 images a set, found {num}: take more")
    size = min(subset_size, num)
    if len(x) == len(y) == size:
        num_subsets = 1
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    rng = np.random.RandomState(seed)
    found = [_squared_mmd(*(z[rng.choice(len(z), size, replace=False)] for z in (x, y))) for _ in range(num_subsets)]
    return KernelDistance(float(np.mean(found)), float(np.std(found)), num_subsets, size)


def _squared_distances(x: Features, y: Others) -> Float[np.ndarray, "n m"]:
    """Of all pairs. What cancellation leaves of two that are equal is made 0."""
    norms = np.square(x).sum(1)[:, None] + np.square(y).sum(1)
    squares = norms - 2 * x @ y.T
    return np.where(squares < 1e-13 * norms, 0.0, squares)


def _radii(x: Features, k: int, chunk: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each to its k-th neighbour; itself is the 0-th."""
    parts = [x[i : i + chunk] for i in range(0, len(x), chunk)]
    return np.concatenate([np.partition(_squared_distances(part, x), k, axis=1)[:, k] for part in parts])


def _coverage(x: Features, y: Others, k: int, chunk: int) -> float:
    """Share of x within reach of y: no farther from one of y than that one's k-th neighbour in y."""
    radii = _radii(y, k, chunk)
    parts = [x[i : i + chunk] for i in range(0, len(x), chunk)]
    return float(np.concatenate([(_squared_distances(part, y) <= radii).any(1) for part in parts]).mean())


def precision_recall(real: Features, fake: Others, k: int = 3, chunk: int = 512) -> tuple[float, float]:
    """Share of the fakes among the real (quality), and of the real among the fakes (variety), Kynkaanniemi et al. 2019.

    Args:
        real, fake: features; sets of different sizes bias the comparison.
        k: neighbours that say how far a feature's surroundings reach.
        chunk: features at a time; memory is that of chunk x n distances.

    Raises:
        UserError: no more than k features in a set.
    """
    num = min(len(real), len(fake))
    if num <= k:
        raise UserError(f"precision and recall: must have more than k = {k} images a set, found {num}: take more")
    centre = np.asarray(real, np.float64).mean(0)  # large common parts would cancel in the distances
    real, fake = real - centre, fake - centre
    return _coverage(fake, real, k, chunk), _coverage(real, fake, k, chunk)
