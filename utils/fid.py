"""Streaming statistics of features, and distances between samples and real data.

Sums are float64 on the host (numpy): a float32 sum over 50,000 features loses the digits that a
small distance is made of.
"""

from typing import NamedTuple

import numpy as np


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
