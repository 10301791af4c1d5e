"""Six distributions in the plane, each a function (rng, n) → n points, float32 (n, 2).

All are shifted and scaled by constants to mean 0 and standard deviation 1 along both axes, so that
the noise N(0, I) is of their size, and two samples of one law are scaled alike. The laws are those
of FFJORD (Grathwohl et al., arXiv:1810.01367); moons and roll are those of scikit-learn.
"""

from collections.abc import Callable

import numpy as np

Toy = Callable[[np.random.Generator, int], np.ndarray]


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform on 8 of the 16 squares of a board that spans [-√3, √3]²; the lower left is one."""
    column = rng.integers(4, size=n)
    row = 2 * rng.integers(2, size=n) + column % 2
    points = np.stack([column, row], axis=1) + rng.random((n, 2))
    return _standardise(points, mean=2.0, std=2 / np.sqrt(3))


def two_moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two half circles that reach into each other, with noise across."""
    angle = np.pi * rng.random(n)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
    points = np.where(rng.random((n, 1)) < 0.5, upper, lower)
    return _standardise(points + 0.06 * rng.normal(size=(n, 2)), (0.5, 0.25), (0.868, 0.498))


def spirals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two arms of one and a half turns, opposite to each other."""
    angle = 3 * np.pi * np.sqrt(rng.random(n))  # the root: points at an even distance along an arm
    arm = np.stack([np.cos(angle), np.sin(angle)], axis=1) * angle[:, None]
    points = rng.choice([-1.0, 1.0], size=(n, 1)) * arm
    return _standardise(points + 0.3 * rng.normal(size=(n, 2)), 0.0, (4.8, 4.64))


def swiss_roll(rng: np.random.Generator, n: int) -> np.ndarray:
    """One spiral from 1.5π to 4.5π: the roll seen along its axis."""
    angle = np.pi * (1.5 + 3 * rng.random(n))
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * angle[:, None]
    return _standardise(points + 0.3 * rng.normal(size=(n, 2)), (2.0, 0.212), (6.63, 6.96))


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight round Gaussians on a circle, of an eighth of its radius; the first is on the right."""
    angle = 2 * np.pi * rng.integers(8, size=n) / 8
    centre = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return _standardise(centre + rng.normal(size=(n, 2)) / 8, 0.0, np.sqrt(1 / 2 + 1 / 64))


def pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five Gaussian blades, long along the radius and bent by an angle that grows with it."""
    along, across = 1 + 0.3 * rng.normal(size=n), 0.1 * rng.normal(size=n)
    angle = 2 * np.pi * rng.integers(5, size=n) / 5 + 0.25 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    points = np.stack([cos * along - sin * across, sin * along + cos * across], axis=1)
    return _standardise(points, 0.0, np.sqrt((1 + 0.3**2 + 0.1**2) / 2))


def _standardise(points, mean, std) -> np.ndarray:
    return ((points - np.asarray(mean)) / np.asarray(std)).astype(np.float32)


TOYS: dict[str, Toy] = {
    toy.__name__: toy
    for toy in (checkerboard, two_moons, spirals, swiss_roll, eight_gaussians, pinwheel)
}
