"""Distances of points and of pictures against closed forms and brute force."""

import numpy as np
import pytest

from utils import distances
from utils.distances import nearest_distances, sliced_wasserstein

# The sliced Wasserstein distance.


def test_sliced_wasserstein_of_a_set_in_any_order_is_zero():
    x = np.random.default_rng(4).normal(size=(300, 2)).astype(np.float32)
    assert sliced_wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("shift", [(3.0, 0.0), (0.6, -0.8)])
def test_sliced_wasserstein_of_a_shift(shift, seed):
    x = np.random.default_rng(5).normal(size=(200, 2))
    expected = np.hypot(*shift) / np.sqrt(2)
    assert sliced_wasserstein(x, x + shift, seed=seed) == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_of_a_stretch():
    x = np.random.default_rng(6).normal(size=(200, 2))
    expected = 1.5 * np.sqrt(np.mean(np.sum(x**2, axis=1)) / 2)
    assert sliced_wasserstein(x, 2.5 * x) == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_needs_equal_sizes():
    with pytest.raises(ValueError, match="equally many"):
        sliced_wasserstein(np.zeros((3, 2)), np.zeros((4, 2)))


# The nearest training picture.


def test_nearest_distances_equal_brute_force(monkeypatch):
    monkeypatch.setattr(distances, "CHUNK", 5)  # several chunks, the last ones shorter
    rng = np.random.default_rng(7)
    x, train = (rng.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in (12, 23))
    gaps = x[:, None].astype(float) - train[None].astype(float)
    expected = np.sqrt(np.mean(gaps**2, axis=(2, 3, 4))).min(1) / 255
    np.testing.assert_allclose(nearest_distances(x, train), expected, rtol=1e-12)


def test_a_copy_is_at_zero_and_black_is_one_from_white():
    train = np.random.default_rng(8).integers(0, 256, (50, 8, 8, 1), np.uint8)
    assert np.all(nearest_distances(train[::3], train) == 0)
    black, white = np.zeros((1, 8, 8, 1), np.uint8), np.full((1, 8, 8, 1), 255, np.uint8)
    assert nearest_distances(black, white) == pytest.approx(1)
    assert nearest_distances(black[:0], white).shape == (0,)


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (5, 8, 8, 3)])
def test_nearest_distances_need_training_pictures_of_the_same_shape(shape):
    with pytest.raises(ValueError, match="one shape"):
        nearest_distances(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(shape, np.uint8))


def test_nearest_distances_need_uint8():
    with pytest.raises(ValueError, match="uint8"):
        nearest_distances(np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8, 1), np.uint8))
