"""Streaming statistics of features, and distances between samples and real data.

Sums are float64 on the host (numpy): a float32 sum over 50,000 features loses the digits that a
small distance is made of.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

CHUNK = 4096  # rows of either side that are compared at a time
PROJECTIONS = 128  # directions of the sliced distance


class FeatureStats(NamedTuple):
    """Sums over features: enough for mean and covariance, and additive over any split."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    total: np.ndarray  # (d,) float64: the sum of the features
    outer: np.ndarray  # (d, d) float64: the sum of their outer products

    @classmethod
    def empty(cls, dimension: int) -> "FeatureStats":
        """Statistics of no feature at all."""
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    @classmethod
    def of(cls, features: np.ndarray) -> "FeatureStats":
        """Statistics of features (n, d)."""
        return cls.empty(features.shape[1]).update(features)

    def update(self, features: np.ndarray) -> "FeatureStats":
        """Returns the statistics with features (n, d) added."""
        x = np.asarray(features, np.float64)
        return FeatureStats(self.count + len(x), self.total + x.sum(0), self.outer + x.T @ x)

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Returns the statistics of both sets together."""
        total, outer = self.total + other.total, self.outer + other.outer
        return FeatureStats(self.count + other.count, total, outer)

    @property
    def mean(self) -> np.ndarray:
        """(d,), the mean."""
        return self.total / self.count

    @property
    def cov(self) -> np.ndarray:
        """(d, d), the unbiased covariance; needs two features or more."""
        mean = self.mean
        return (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """The Fréchet distance ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½) between two Gaussian fits.

    tr (C₁C₂)^½ is the sum of the roots of the eigenvalues of C₁^½ C₂ C₁^½, which is symmetric and
    positive: no complex root, and singular covariances are no special case (Heusel et al. 2017,
    arXiv 1706.08500, eq. 6). Eigenvalues below 0 are rounding and are clipped.

    Raises:
      ValueError: fewer than two features on a side.
    """
    if min(a.count, b.count) < 2:
        raise ValueError("a Fréchet distance needs two features or more on either side")
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.cov @ root).clip(0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
    return max(0.0, float(distance))


def sliced_wasserstein(
    x: np.ndarray, y: np.ndarray, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """The sliced 2-Wasserstein distance of two point sets in the plane.

    That is √(mean over directions θ of W₂²(θ·x, θ·y)), where W₂² of two equal-sized sets on a line
    is the mean squared difference of their sorted values (Bonneel et al. 2015, section 3). The
    directions are evenly spaced over half a turn from a random start, so that a shift by d gives
    exactly |d|/√2. In the units of the points.

    Args:
      x, y: (n, 2), equally many.
      projections: number of directions, 2 or more.
      seed: of the first direction.

    Raises:
      ValueError: other shapes, or unequal sizes.
    """
    if x.shape != y.shape or x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"two sets of equally many points in the plane: {x.shape}, {y.shape}")
    start = np.random.default_rng(seed).uniform()
    angles = np.pi * (np.arange(projections) + start) / projections
    directions = np.stack([np.cos(angles), np.sin(angles)])
    sorted_x, sorted_y = (np.sort(np.asarray(p, np.float64) @ directions, axis=0) for p in (x, y))
    return float(np.sqrt(np.square(sorted_x - sorted_y).mean()))


def nearest_distances(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Each picture's distance to its nearest training picture: RMS per value, in [0, 1].

    That is the Euclidean distance of the pictures scaled to [0, 1], divided by √(H·W·C): 0 for a
    copy, 1 between black and white. Which picture is nearest is decided in float32, the distance
    to it is computed from the integers, so that a copy gives exactly 0.

    Args:
      x: (n, H, W, C) uint8.
      train: (m, H, W, C) uint8.

    Returns:
      float64 (n,).

    Raises:
      ValueError: shapes that do not fit, another dtype, or no training picture.
    """
    if x.shape[1:] != train.shape[1:] or not len(train):
        raise ValueError(f"pictures of one shape: {x.shape[1:]}, {train.shape}")
    if x.dtype != np.uint8 or train.dtype != np.uint8:
        raise ValueError(f"uint8 pictures: {x.dtype}, {train.dtype}")
    best = np.full(len(x), np.inf)
    for chunk in _chunks(train):
        found = [_distances_to_nearest(part, chunk) for part in _chunks(x)]
        best = np.minimum(best, np.concatenate(found) if found else best)
    return best


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def _distances_to_nearest(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    x, train = x.reshape(len(x), -1), train.reshape(len(train), -1)
    nearest = train[np.asarray(_nearest(x, train))]
    difference = x.astype(np.int32) - nearest.astype(np.int32)
    return np.sqrt(np.square(difference).mean(axis=1, dtype=np.float64)) / 255


@jax.jit
def _nearest(x: jax.Array, train: jax.Array) -> jax.Array:
    """Indices (n,) of the rows of `train` (m, d) nearest to those of `x` (n, d)."""
    # Centred: ‖x‖² − 2x·y + ‖y‖² cancels less.
    x, train = (a.astype(jnp.float32) / 255.0 - 0.5 for a in (x, train))
    product = jnp.einsum("nd,md->nm", x, train, precision=Precision.HIGHEST)
    return jnp.argmin(jnp.sum(train**2, axis=1)[None] - 2.0 * product, axis=1)
