"""Streaming statistics of features, and distances between samples and real data.

Sums are float64 on the host (numpy): a float32 sum over 50,000 features loses the digits that a
small distance is made of. What needs all features reads them in blocks of rows, so that a memory
map serves as well as an array.
"""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

BLOCK = 4096  # rows that are read, or compared with as many others, at a time
SPLITS = 10  # of the pictures, for the Inception Score's deviation


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


class Gaussian(NamedTuple):
    """A mean and a covariance, as a file of statistics holds them."""

    mean: np.ndarray  # (d,) float64
    cov: np.ndarray  # (d, d) float64
    count: int = 0  # type: ignore[assignment]  # features they are of; 0: unknown


class ScoreSums(NamedTuple):
    """Sums over class probabilities that the Inception Score is made of, split by split.

    Split k of `total` pictures is those from ⌊k·total/10⌋ up to ⌊(k + 1)·total/10⌋. Additive over
    any division of the pictures.
    """

    total: int  # pictures there will be
    count: np.ndarray  # type: ignore[assignment]  # (SPLITS,) int64: pictures so far
    p: np.ndarray  # (SPLITS, classes) float64: sums of the probabilities
    plogp: np.ndarray  # (SPLITS,) float64: sums of Σ p log p

    @classmethod
    def empty(cls, total: int, classes: int) -> "ScoreSums":
        """Sums over no picture yet."""
        return cls(total, np.zeros(SPLITS, np.int64), np.zeros((SPLITS, classes)), np.zeros(SPLITS))

    def update(self, logits: np.ndarray, first: int) -> "ScoreSums":
        """Returns the sums with the logits (n, classes) of pictures `first`, `first` + 1, … added.

        Raises:
          ValueError: pictures outside of 0 … total − 1.
        """
        if first < 0 or first + len(logits) > self.total:
            raise ValueError(f"pictures {first} to {first + len(logits)} of {self.total}")
        p, plogp = _probabilities(logits)
        numbers = first + np.arange(len(logits))
        split = np.searchsorted(_bounds(self.total), numbers, side="right") - 1
        count, sum_p, sum_plogp = self.count.copy(), self.p.copy(), self.plogp.copy()
        for k in np.unique(split):
            mine = split == k
            count[k] += mine.sum()
            sum_p[k] += p[mine].sum(0)
            sum_plogp[k] += plogp[mine].sum()
        return ScoreSums(self.total, count, sum_p, sum_plogp)

    def merge(self, other: "ScoreSums") -> "ScoreSums":
        """Returns the sums over the pictures of both.

        Raises:
          ValueError: sums towards different totals, whose splits lie elsewhere.
        """
        if self.total != other.total:
            raise ValueError(f"splits of {self.total} pictures and of {other.total}")
        added = (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return ScoreSums(self.total, *added)


# The Fréchet distance.


def root(b: FeatureStats | Gaussian) -> np.ndarray:
    """A root R (d, r) of the covariance, C = R Rᵀ, with as few columns as its rank.

    Directions whose variance is below the rounding of the largest are left out: their roots, of
    the order of 10⁻⁸ each, would add up over a thousand of them.

    Raises:
      ValueError: fewer than two features.
    """
    values, vectors = np.linalg.eigh(_checked(b).cov)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    kept[: len(values) - _rank(b)] = False
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(
    a: FeatureStats | Gaussian, b: FeatureStats | Gaussian, root_b: np.ndarray | None = None
) -> float:
    """The Fréchet distance ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½) between two Gaussian fits.

    tr (C₁C₂)^½ is the sum of the roots of the eigenvalues of RᵀC₁R, where C₂ = RRᵀ: a symmetric
    and positive matrix, so there is no complex root, and singular covariances are no special case
    (Heusel et al. 2017, arXiv 1706.08500, eq. 6). It has no more eigenvalues above 0 than the
    smaller set has features, less one; the rest is rounding and left out.

    Args:
      a, b: features of one dimension d.
      root_b: `root(b)`, where it serves several distances; most of the time goes there.

    Raises:
      ValueError: fewer than two features on a side, or of different dimensions.
    """
    if _checked(a).mean.shape != _checked(b).mean.shape:
        raise ValueError(f"features of one dimension: {len(a.mean)}, {len(b.mean)}")
    cov_a, root_b = a.cov, root(b) if root_b is None else root_b
    values = np.linalg.eigvalsh(root_b.T @ cov_a @ root_b)[-_rank(a) :]
    cross = np.sqrt(values.clip(0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(cov_a) + np.trace(b.cov) - 2 * cross
    return max(0.0, float(distance))


def bootstrap_deviation(
    x: np.ndarray,
    reference: FeatureStats | Gaussian,
    repeats: int = 10,
    seed: int = 0,
    root_b: np.ndarray | None = None,
) -> float:
    """The standard deviation of the Fréchet distance over resampled pictures.

    Each repeat draws as many rows of `x` as there are, with replacement (Efron 1979); the reference
    stays as it is.

    Args:
      x: (n, d), n ≥ 2; read in blocks.
      repeats: 2 or more.
      root_b: `root(reference)`, where it is known.

    Raises:
      ValueError: too few rows or repeats.
    """
    if repeats < 2 or len(x) < 2:
        raise ValueError(f"two repeats over two features or more: {repeats}, {len(x)}")
    root_b = root(reference) if root_b is None else root_b
    rng = np.random.default_rng(seed)
    even = np.full(len(x), 1 / len(x))
    draws = (_resampled(x, rng.multinomial(len(x), even)) for _ in range(repeats))
    return float(np.std([frechet_distance(d, reference, root_b) for d in draws], ddof=1))


def _resampled(x: np.ndarray, times: np.ndarray) -> FeatureStats:
    """Statistics of x (n, d) with row i counted times[i] times."""
    stats, start = FeatureStats.empty(x.shape[1]), 0
    for rows in blocks(x, BLOCK):
        part = times[start : start + len(rows)]
        start += len(rows)
        drawn, weights = rows[part > 0].astype(np.float64), part[part > 0, None].astype(np.float64)
        half = drawn * np.sqrt(weights)
        added = FeatureStats(int(part.sum()), (drawn * weights).sum(0), half.T @ half)
        stats = stats.merge(added)
    return stats


def _checked(side: FeatureStats | Gaussian) -> FeatureStats | Gaussian:
    if side.count == 1 or (side.count == 0 and isinstance(side, FeatureStats)):
        raise ValueError("a Fréchet distance needs two features or more on either side")
    return side


def _rank(side: FeatureStats | Gaussian) -> int:
    """The most directions in which the features can vary."""
    return min(len(side.mean), side.count - 1) if side.count else len(side.mean)


# The Inception Score.


def inception_score(sums: ScoreSums) -> tuple[float, float]:
    """The Inception Score exp(mean KL(p(y|x) ‖ p(y))): its mean and deviation over the splits.

    Salimans et al. 2016, arXiv 1606.03498, section 4; 1 at least, the number of classes at most.
    Splits are of consecutive pictures, as in the original code; empty ones (fewer than ten
    pictures) do not count.

    Raises:
      ValueError: no picture yet.
    """
    some = sums.count > 0
    if not some.any():
        raise ValueError("an Inception Score needs pictures")
    count = sums.count[some]
    mean_p = sums.p[some] / count[:, None]
    logs = np.log(mean_p, out=np.zeros_like(mean_p), where=mean_p > 0)
    scores = np.exp(sums.plogp[some] / count - (mean_p * logs).sum(1))
    return float(scores.mean()), float(scores.std())


def _bounds(total: int) -> np.ndarray:
    """The number (SPLITS,) of the first picture of each split."""
    return np.arange(SPLITS) * total // SPLITS


def _probabilities(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax (n, classes) of the logits, and Σ p log p (n,), in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(1, keepdims=True)
    exp = np.exp(shifted)
    norm = exp.sum(1, keepdims=True)
    p = exp / norm
    return p, (p * (shifted - np.log(norm))).sum(1)


# The kernel distance.


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy, its mean and deviation over random subsets.

    The unbiased estimate with the kernel (x·y/d + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401,
    section 4); it may be below 0.

    Args:
      x, y: (n, d) and (m, d); only the rows drawn are read.
      subsets: how many draws; 1 or more.
      size: rows of a draw, without replacement, from either side; at most min(n, m).
      seed: of the draws.

    Raises:
      ValueError: fewer than two rows on a side, or different dimensions.
    """
    size = min(size, len(x), len(y))
    if size < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"two features or more of one dimension: {x.shape}, {y.shape}")
    rng = np.random.default_rng(seed)
    values = [_discrepancy(_drawn(rng, x, size), _drawn(rng, y, size)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def _drawn(rng: np.random.Generator, x: np.ndarray, size: int) -> np.ndarray:
    # In the file's order: the estimate is symmetric in the rows, a disk is not.
    rows = np.asarray(x[np.sort(rng.choice(len(x), size, replace=False))], np.float64)
    _forget(x)
    return rows


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared discrepancy of equally many rows."""
    n, d = x.shape
    xx, yy, xy = (_cubed(a @ b.T / d + 1) for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return float(within / (n * (n - 1)) - 2 * xy.mean())


def _cubed(x: np.ndarray) -> np.ndarray:
    return x * x * x  # a seventh of the time of x**3


# Precision and recall.


def precision_recall(x: np.ndarray, y: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, section 2).

    A set's manifold is the union of balls around its features, each reaching to the feature's
    k-th nearest neighbour of the same set. Precision is the part of the samples within the
    manifold of the real features; recall the part of the real features within the samples'.
    Distances are float32, about the real features' mean, and compared block by block.

    Args:
      x, y: (n, d) samples and (m, d) real features; read in blocks.
      neighbours: k.

    Raises:
      ValueError: no more than k features on a side, or different dimensions.
    """
    if min(len(x), len(y)) <= neighbours or x.shape[1] != y.shape[1]:
        raise ValueError(f"more than {neighbours} features of one dimension: {x.shape}, {y.shape}")
    centre = _mean(y)
    # Whole blocks only, so that one shape is compiled; a power of two, so that sizes share it.
    size = min(BLOCK, 1 << (max(len(x), len(y)) - 1).bit_length())
    radii_x, radii_y = (_radii(side, centre, size, neighbours) for side in (x, y))
    in_y, in_x = np.zeros(len(x), bool), np.zeros(len(y), bool)
    for i, part_x in _padded(x, centre, size):
        for j, part_y in _padded(y, centre, size):
            reach_x, reach_y = (_reach(r, k, size) for r, k in ((radii_x, i), (radii_y, j)))
            found_x, found_y = jax.device_get(_within(part_x, part_y, reach_x, reach_y))
            in_y[i : i + size] |= found_x[: len(x) - i]
            in_x[j : j + size] |= found_y[: len(y) - j]
    return float(in_y.mean()), float(in_x.mean())


def _mean(y: np.ndarray) -> np.ndarray:
    return (sum(rows.sum(0, dtype=np.float64) for rows in blocks(y, BLOCK)) / len(y)).astype("f4")


def _radii(x: np.ndarray, centre: np.ndarray, size: int, neighbours: int) -> np.ndarray:
    """Squared distances (n,) of each row of x to its k-th nearest other row."""
    radii = np.empty(len(x), np.float32)
    for i, part in _padded(x, centre, size):
        best = jnp.full((size, neighbours), jnp.inf, jnp.float32)
        for j, other in _padded(x, centre, size):
            best = _nearest(best, part, other, i - j, min(size, len(x) - j))
        radii[i : i + size] = np.asarray(best)[: len(x) - i, -1]
    return radii


def _padded(
    x: np.ndarray, centre: np.ndarray, size: int
) -> Iterator[tuple[int, np.ndarray | jax.Array]]:
    """Yields the first row's number and `size` centred rows, on the device; zeros at the end."""
    start = 0
    for rows in blocks(x, size):
        full = np.zeros((size, x.shape[1]), np.float32)
        full[: len(rows)] = rows - centre
        yield start, jnp.asarray(full)
        start += size


def _reach(radii: np.ndarray, start: int, size: int) -> np.ndarray:
    """Radii (size,) of a block; −1 where there is no row: nothing is as near as that."""
    part = radii[start : start + size]
    return np.pad(part, (0, size - len(part)), constant_values=-1)


def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    product = jnp.einsum("nd,md->nm", x, y, precision=Precision.HIGHEST)
    norms = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None]
    return jnp.maximum(norms - 2.0 * product, 0.0)


@jax.jit
def _nearest(best: jax.Array, x: jax.Array, y: jax.Array, offset: int, rows: int) -> jax.Array:
    """The k least of `best` (n, k) and the distances of x to `rows` of y; ascending.

    Row i of x and row i + offset of y are the same feature, and not each other's neighbour.
    """
    column = jnp.arange(len(y))[None]
    left_out = (column == jnp.arange(len(x))[:, None] + offset) | (column >= rows)
    distances = jnp.where(left_out, jnp.inf, _squared_distances(x, y))
    least, _ = jax.lax.top_k(-jnp.concatenate([best, distances], axis=1), best.shape[1])
    return -least


@jax.jit
def _within(
    x: jax.Array, y: jax.Array, reach_x: jax.Array, reach_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which rows of x lie within the reach of a row of y, and the other way round."""
    distances = _squared_distances(x, y)
    in_y = jnp.any(distances <= reach_y[None], axis=1)
    return in_y, jnp.any(distances <= reach_x[:, None], axis=0)


# Reading.


def blocks(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields x (n, d) in blocks of rows, in order."""
    for start in range(0, len(x), size):
        yield np.asarray(x[start : start + size])
        _forget(x)


def _forget(x: np.ndarray) -> None:
    """Gives pages of a file back that were read: they would count as resident until needed."""
    # Only where nothing can have been written: changes of a private map would be lost.
    if isinstance(x, np.memmap) and x.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        x._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
