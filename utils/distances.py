"""Distances of points and of pictures, without features: sliced Wasserstein, nearest neighbour."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

CHUNK = 4096  # rows of either side that are compared at a time
PROJECTIONS = 128  # directions of the sliced distance


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
