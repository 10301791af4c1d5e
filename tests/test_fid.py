"""Statistics and distances against closed forms and independent computations."""

import numpy as np
import pytest
import scipy.linalg

from utils.fid import FeatureStats, frechet_distance


def gaussian(mean: np.ndarray, cov: np.ndarray, count: int = 1000) -> FeatureStats:
    """The statistics of a sample that has exactly this mean and unbiased covariance."""
    outer = (count - 1) * cov + count * np.outer(mean, mean)
    return FeatureStats(count, count * np.asarray(mean, float), outer)


def random_cov(rng: np.random.Generator, d: int, rank: int) -> np.ndarray:
    half = rng.normal(size=(d, rank))
    return half @ half.T / rank


# Statistics.


@pytest.mark.parametrize("cuts", [[], [0], [500], [1, 2, 3], [250, 250, 499], [100, 400]])
def test_any_split_merges_to_the_whole(cuts):
    features = np.random.default_rng(0).normal(3.0, 2.0, size=(500, 16)).astype(np.float32)
    whole, merged = FeatureStats.of(features), FeatureStats.empty(16)
    for part in np.split(features, cuts):
        merged = merged.merge(FeatureStats.of(part))
    assert merged.count == whole.count == 500
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.cov, whole.cov, rtol=1e-9, atol=1e-9)


def test_updates_equal_numpy():
    features = np.random.default_rng(1).normal(5.0, 0.1, size=(200, 8))
    stats = FeatureStats.empty(8)
    for part in np.split(features, [7, 64, 150]):
        stats = stats.update(part)
    np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.cov, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-12)


def test_sums_are_float64_whatever_the_features_are():
    stats = FeatureStats.of(np.full((1000, 2), 1e4 + 0.5, np.float16).astype(np.float32))
    assert stats.total.dtype == stats.outer.dtype == np.float64
    assert stats.cov[0, 0] == pytest.approx(0, abs=1e-6)  # a float32 sum would be off by thousands


# The Fréchet distance.


@pytest.mark.parametrize("rows", [10, 500])  # fewer rows than dimensions, and more
def test_distance_of_a_set_from_itself_is_zero(rows):
    stats = FeatureStats.of(np.random.default_rng(2).normal(size=(rows, 32)))
    assert frechet_distance(stats, stats) == pytest.approx(0, abs=1e-6)


def test_closed_form_of_gaussians_with_common_axes():
    rng = np.random.default_rng(3)
    axes = scipy.linalg.qr(rng.normal(size=(5, 5)))[0]
    s1, s2 = np.array([1.0, 2, 3, 0, 0.5]), np.array([2.0, 2, 1, 4, 0])
    m1, m2 = rng.normal(size=(2, 5))
    a, b = gaussian(m1, axes * s1**2 @ axes.T), gaussian(m2, axes * s2**2 @ axes.T, count=77)
    expected = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(12, 12), (3, 12), (3, 4)])
def test_equals_the_matrix_square_root(rank_a, rank_b):
    rng = np.random.default_rng(rank_a + rank_b)
    a, b = (gaussian(rng.normal(size=12), random_cov(rng, 12, rank)) for rank in (rank_a, rank_b))
    # scipy's root of a singular product needs a little of the identity (as in the original code).
    nudge = 1e-10 * np.eye(12)
    root = scipy.linalg.sqrtm((a.cov + nudge) @ (b.cov + nudge)).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov + b.cov - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_one_feature_has_no_covariance():
    one, two = (FeatureStats.of(np.ones((n, 3))) for n in (1, 2))
    with pytest.raises(ValueError, match="two features"):
        frechet_distance(one, two)
