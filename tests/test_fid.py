"""Statistics and distances against closed forms, theorems and brute force."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import scipy.stats

from utils import fid
from utils.fid import (
    FeatureStats,
    Gaussian,
    ScoreSums,
    bootstrap_deviation,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


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


@pytest.mark.parametrize(("rows", "rel"), [(40, 1e-9), (400, 1e-9)])  # d = 64: singular, regular
@pytest.mark.parametrize("cuts", [[1], [13, 14, 30], [20]])
def test_distance_does_not_depend_on_the_split(rows, rel, cuts):
    rng = np.random.default_rng(9)
    x, y = (rng.normal(m, s, size=(n, 64)) for m, s, n in ((0.4, 1, rows), (0.5, 2, 500)))
    merged = FeatureStats.empty(64)
    for part in np.split(x, cuts):
        merged = merged.merge(FeatureStats.of(part))
    whole, real = FeatureStats.of(x), FeatureStats.of(y)
    for pair in ((whole, real), (real, whole)):
        other = [merged if side is whole else side for side in pair]
        assert frechet_distance(*other) == pytest.approx(frechet_distance(*pair), rel=rel)


@pytest.mark.parametrize("rows", [3, 20, 63])
def test_fewer_rows_than_dimensions_equals_the_small_problem(rows):
    """What a set of n features spans is all that matters of the other covariance.

    With C₁ = Xᵀ X / (n − 1), X (n, d) centred, tr (C₁C₂)^½ is the sum of the roots of the
    eigenvalues of X C₂ Xᵀ / (n − 1), which is n × n: computed here without any d × d root.
    """
    rng = np.random.default_rng(rows)
    x, real = rng.normal(1.0, 2.0, size=(rows, 64)), FeatureStats.of(rng.normal(size=(500, 64)))
    centred = x - x.mean(0)
    small = np.linalg.eigvalsh(centred @ real.cov @ centred.T / (rows - 1)).clip(0)
    expected = np.sum((x.mean(0) - real.mean) ** 2) + np.trace(real.cov)
    expected += np.sum(centred**2) / (rows - 1) - 2 * np.sqrt(small[1:]).sum()  # one is 0
    stats = FeatureStats.of(x)
    assert frechet_distance(stats, real) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, stats) == pytest.approx(expected, rel=1e-9)


def test_near_singular_covariances():
    rng = np.random.default_rng(11)
    axes = scipy.linalg.qr(rng.normal(size=(40, 40)))[0]
    s1, s2 = 10.0 ** np.linspace(2, -4, 40), 10.0 ** np.linspace(-4, 2, 40)
    a, b = (Gaussian(np.zeros(40), axes * s**2 @ axes.T) for s in (s1, s2))
    assert frechet_distance(a, b) == pytest.approx(np.sum((s1 - s2) ** 2), rel=1e-9)


def test_a_constant_set_has_no_spread():
    still, x = np.tile([1.0, 2.0, 3.0], (9, 1)), np.random.default_rng(12).normal(size=(50, 3))
    a, b = FeatureStats.of(still), FeatureStats.of(x)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(b.cov)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_statistics_read_from_a_file_have_no_count():
    rng = np.random.default_rng(13)
    a, b = (FeatureStats.of(rng.normal(size=(100, 8))) for _ in range(2))
    known, unknown = (Gaussian(b.mean, b.cov, count) for count in (100, 0))
    expected = frechet_distance(a, b)
    assert frechet_distance(a, known) == frechet_distance(a, unknown) == expected
    assert frechet_distance(a, known, fid.root(known)) == expected
    with pytest.raises(ValueError, match="two features"):
        frechet_distance(a, known._replace(count=1))
    with pytest.raises(ValueError, match="two features"):
        frechet_distance(FeatureStats.empty(8), known)
    with pytest.raises(ValueError, match="one dimension: 3, 8"):
        frechet_distance(Gaussian(np.zeros(3), np.eye(3)), known)


# The bootstrap.


def test_bootstrap_equals_resampling_by_hand():
    rng = np.random.default_rng(14)
    x, real = rng.normal(size=(60, 4)), FeatureStats.of(rng.normal(0.3, 1.5, size=(200, 4)))
    draws, found = np.random.default_rng(5), []
    for _ in range(6):
        times = draws.multinomial(60, np.full(60, 1 / 60))
        found.append(frechet_distance(FeatureStats.of(np.repeat(x, times, axis=0)), real))
    expected = np.std(found, ddof=1)
    assert bootstrap_deviation(x, real, 6, seed=5) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_estimates_the_deviation_over_seeds():
    """In one dimension, at equal spread and means 1 apart, it is the mean's part, 2/√n."""
    rng = np.random.default_rng(15)
    real, n = Gaussian(np.zeros(1), np.eye(1)), 400
    draws = rng.normal(1.0, 1.0, size=(300, n, 1))
    over_seeds = np.std([frechet_distance(FeatureStats.of(x), real) for x in draws])
    assert over_seeds == pytest.approx(2 / np.sqrt(n), rel=0.15)
    assert bootstrap_deviation(draws[0], real, 300) == pytest.approx(over_seeds, rel=0.2)


@pytest.mark.parametrize(("rows", "repeats"), [(1, 10), (10, 1)])
def test_bootstrap_needs_two(rows, repeats):
    with pytest.raises(ValueError, match="two"):
        bootstrap_deviation(np.ones((rows, 2)), Gaussian(np.zeros(2), np.eye(2)), repeats)


# The Inception Score.


def scores_of(logits: np.ndarray, batch: int = 1000) -> ScoreSums:
    sums = ScoreSums.empty(len(logits), logits.shape[1])
    for start in range(0, len(logits), batch):
        sums = sums.update(logits[start : start + batch], start)
    return sums


def test_inception_score_equals_its_definition():
    logits = np.random.default_rng(16).normal(0, 3, size=(237, 12)).astype(np.float32)
    p, found = scipy.special.softmax(logits.astype(np.float64), axis=1), []
    for k in range(10):
        part = p[k * 237 // 10 : (k + 1) * 237 // 10]
        found.append(np.exp(np.mean([scipy.stats.entropy(row, part.mean(0)) for row in part])))
    assert inception_score(scores_of(logits)) == pytest.approx((np.mean(found), np.std(found)))


def test_inception_score_is_1_of_equals_and_the_number_of_classes_of_certain_ones():
    equal = np.tile(np.random.default_rng(17).normal(size=8), (100, 1))
    assert inception_score(scores_of(equal)) == pytest.approx((1, 0), abs=1e-12)
    certain = 1000.0 * np.eye(10)[np.arange(100) % 10]  # far beyond what exp holds
    assert inception_score(scores_of(certain)) == pytest.approx((10, 0), abs=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_scores_do_not_depend_on_batches_or_their_order(batch):
    logits = np.random.default_rng(18).normal(0, 2, size=(105, 6))
    parts = [
        ScoreSums.empty(105, 6).update(logits[start : start + batch], start)
        for start in range(0, 105, batch)
    ]
    merged = parts.pop()
    for part in parts[::-1]:
        merged = merged.merge(part)
    assert merged.count.sum() == 105
    assert inception_score(merged) == pytest.approx(inception_score(scores_of(logits)), rel=1e-12)


def test_scores_of_fewer_pictures_than_splits():
    logits = np.random.default_rng(19).normal(size=(4, 6))
    assert inception_score(scores_of(logits)) == pytest.approx((1, 0), abs=1e-12)


def test_scores_refuse_other_totals_and_too_many_pictures():
    sums, logits = ScoreSums.empty(10, 3), np.zeros((4, 3))
    with pytest.raises(ValueError, match="7 to 11 of 10"):
        sums.update(logits, 7)
    with pytest.raises(ValueError, match="10 pictures and of 11"):
        sums.merge(ScoreSums.empty(11, 3))
    with pytest.raises(ValueError, match="needs pictures"):
        inception_score(sums)


# The kernel distance.


def discrepancy_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate as a sum over pairs."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    value = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    value += sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return value - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_of_whole_sets_equals_the_sum_over_pairs():
    rng = np.random.default_rng(20)
    x, y = rng.normal(size=(9, 5)), rng.normal(0.5, 1, size=(9, 5))
    mean, deviation = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(discrepancy_by_hand(x, y), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-12)  # each subset is all


def test_subsets_are_drawn_from_both_sides(monkeypatch):
    seen = []
    monkeypatch.setattr(fid, "_discrepancy", lambda x, y: seen.append((x, y)) or float(len(seen)))
    x, y = np.arange(50.0)[:, None], np.arange(100.0, 130)[:, None]
    assert kernel_distance(x, y, subsets=40, size=20) == pytest.approx((20.5, np.std(range(40))))
    for side, whole in zip(zip(*seen, strict=True), (x, y), strict=True):
        drawn = np.stack(side)[..., 0]
        assert drawn.shape == (40, 20)
        assert all(len(set(row)) == 20 for row in drawn)  # without replacement
        assert set(drawn.ravel()) == set(whole.ravel())
    assert kernel_distance(x, y, subsets=1)[0] == 41
    assert len(seen[-1][0]) == len(seen[-1][1]) == 30  # no more than the smaller side has


def test_kernel_distance_is_unbiased():
    """Of draws from one distribution the mean is 0 within its error, often below."""
    rng = np.random.default_rng(21)
    values = [kernel_distance(*rng.normal(size=(2, 30, 4)), subsets=1)[0] for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert np.min(values) < 0
    x, far = rng.normal(size=(200, 4)), rng.normal(1, 1, size=(200, 4))
    assert kernel_distance(x, far, size=50)[0] > 10 * np.std(values)


def test_kernel_distance_needs_two_features_of_one_dimension():
    for y in (np.zeros((1, 3)), np.zeros((5, 4))):
        with pytest.raises(ValueError, match="one dimension"):
            kernel_distance(np.zeros((5, 3)), y)


# Precision and recall.


def precision_recall_by_hand(x, y, k):
    def inside(points, others):
        within = np.sort(scipy.spatial.distance.cdist(others, others), axis=1)[:, k]
        return np.any(scipy.spatial.distance.cdist(points, others) <= within, axis=1).mean()

    return inside(x, y), inside(y, x)


@pytest.mark.parametrize("block", [8, 16, 4096])
@pytest.mark.parametrize(("n", "m", "k"), [(50, 50, 3), (37, 64, 3), (64, 33, 1), (7, 100, 5)])
def test_precision_and_recall_equal_brute_force(monkeypatch, block, n, m, k):
    monkeypatch.setattr(fid, "BLOCK", block)
    rng = np.random.default_rng(n + m)
    # Far from 0: the distances are small differences of large numbers unless they are centred.
    x, y = rng.normal(100, 1, size=(n, 6)), rng.normal(100.5, 0.8, size=(m, 6))
    x, y = x.astype(np.float32), y.astype(np.float32)
    expected = precision_recall_by_hand(x.astype(np.float64), y.astype(np.float64), k)
    assert precision_recall(x, y, k) == pytest.approx(expected, abs=1e-9)
    assert all(0 < value < 1 for value in expected) or n == 7


def test_precision_and_recall_of_equal_and_of_distant_sets():
    rng = np.random.default_rng(22)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    assert precision_recall(x, x[::-1].copy()) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_a_mode_that_is_missing_costs_recall_and_a_false_one_precision():
    rng = np.random.default_rng(23)
    one, other = rng.normal(size=(2, 100, 3)).astype(np.float32) + np.float32([[[0]], [[50]]])
    fresh = rng.normal(size=(100, 3)).astype(np.float32)
    both = np.concatenate([one, other])
    precision, recall = precision_recall(fresh, both)
    assert precision > 0.85
    assert 0.4 < recall < 0.5
    swapped = precision_recall(both, fresh)
    assert swapped == (recall, precision)


def test_precision_and_recall_need_more_features_than_neighbours():
    for x in (np.zeros((3, 2)), np.zeros((9, 3))):
        with pytest.raises(ValueError, match="more than 3 features"):
            precision_recall(x, np.zeros((9, 2)))


# Features in a file.


def test_a_memory_map_gives_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "BLOCK", 32)
    rng = np.random.default_rng(24)
    sides = rng.normal(size=(2, 100, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", sides[0])
    np.save(tmp_path / "y.npy", sides[1])
    maps = [np.load(tmp_path / name, mmap_mode="r") for name in ("x.npy", "y.npy")]
    real = FeatureStats.of(sides[1])
    assert bootstrap_deviation(maps[0], real) == bootstrap_deviation(sides[0], real)
    assert kernel_distance(*maps, size=50) == kernel_distance(*sides, size=50)
    assert precision_recall(*maps) == precision_recall(*sides)
    for mapped, side in zip(maps, sides, strict=True):
        np.testing.assert_array_equal(mapped, side)


def test_changes_of_a_private_map_are_kept(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5000, 2), np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
    mapped[:] = 1
    assert all((rows == 1).all() for rows in fid.blocks(mapped, 1000))
    assert (mapped == 1).all()
