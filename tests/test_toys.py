"""The toys' moments and the shapes their names promise."""

import numpy as np
import pytest

from utils.toys import TOYS

N = 50_000


def draw(name: str, n: int = N) -> np.ndarray:
    return TOYS[name](np.random.default_rng(0), n)


@pytest.mark.parametrize("name", TOYS)
def test_every_toy_has_mean_0_and_standard_deviation_1(name):
    points = draw(name)
    assert points.shape == (N, 2) and points.dtype == np.float32
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(points.std(axis=0), 1, atol=0.02)


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_a_function_of_the_generator(name):
    toy = TOYS[name]
    np.testing.assert_array_equal(draw(name, 100), draw(name, 100))
    assert np.any(draw(name, 100) != toy(np.random.default_rng(1), 100))


def test_checkerboard_fills_one_colour_of_the_board_evenly():
    squares = np.floor(draw("checkerboard") / (np.sqrt(3) / 2)).astype(int) + 2
    assert squares.min() == 0 and squares.max() == 3
    assert np.all(squares.sum(axis=1) % 2 == 0)
    _, counts = np.unique(squares, axis=0, return_counts=True)
    np.testing.assert_allclose(counts / N, np.full(8, 1 / 8), atol=0.01)


def test_eight_gaussians_have_their_centres_on_a_circle():
    points, radius = draw("eight_gaussians"), 1 / np.sqrt(1 / 2 + 1 / 64)
    angle = np.arctan2(points[:, 1], points[:, 0])
    which = np.round(angle / (np.pi / 4)).astype(int) % 8
    for k in range(8):
        own = points[which == k]
        centre = radius * np.array([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)])
        np.testing.assert_allclose(own.mean(axis=0), centre, atol=0.02)
        np.testing.assert_allclose(own.std(axis=0), radius / 8, atol=0.01)
        assert abs(len(own) / N - 1 / 8) < 0.01


def test_two_moons_lie_on_two_half_circles():
    x, y = (draw("two_moons") * (0.868, 0.498) + (0.5, 0.25)).T
    upper, lower = np.hypot(x, y), np.hypot(x - 1, y - 0.5)
    off = np.minimum(np.abs(upper - 1), np.abs(lower - 1))
    assert off.max() < 0.3 and np.sqrt(np.mean(off**2)) < 0.07


@pytest.mark.parametrize("name", ["spirals", "swiss_roll"])
def test_a_spiral_grows_by_the_same_step_each_turn(name):
    """Radius − angle is a multiple of the distance of two arms, but for the noise."""
    scale, shift, arms = {
        "spirals": ((4.8, 4.64), (0.0, 0.0), np.pi),
        "swiss_roll": ((6.63, 6.96), (2.0, 0.212), 2 * np.pi),
    }[name]
    x, y = (draw(name) * scale + shift).T
    off = (np.hypot(x, y) - np.arctan2(y, x)) / arms
    far = np.hypot(x, y) > 2  # at the centre the noise is as large as the spiral
    distance = arms * np.abs(off - np.round(off))[far]
    assert np.sqrt(np.mean(distance**2)) == pytest.approx(0.3, abs=0.06)


def test_pinwheel_turns_onto_itself_five_times_but_is_no_ring():
    points = draw("pinwheel") @ np.array([1, 1j])
    harmonic = np.abs(np.mean((points / np.abs(points)) ** np.arange(1, 11)[:, None], axis=1))
    blades = points[(np.abs(points) > 1.3) & (np.abs(points) < 1.5)]
    assert np.all(np.delete(harmonic, [4, 9]) < 0.02)
    assert abs(np.mean((blades / np.abs(blades)) ** 5)) > 0.5
