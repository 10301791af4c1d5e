"""Laws for the time t and the interval (r, t), one sample at a time.

A law takes the key of one sample, and callers vmap it: what a sample draws then depends on its own
key alone, not on the batch it travels in.
"""

from collections.abc import Callable
from fractions import Fraction

import jax
import numpy as np
from jax import Array

TimeLaw = Callable[[Array], Array]
PairLaw = Callable[[Array], tuple[Array, Array]]  # key → (r, t)


def logit_normal(mean: float, std: float) -> TimeLaw:
    """t = sigmoid(mean + std · n), n ~ N(0, 1): times in (0, 1) (arXiv 2403.03206, section 3.1)."""
    return lambda key: jax.nn.sigmoid(mean + std * jax.random.normal(key))


def uniform() -> TimeLaw:
    """t ~ U[0, 1)."""
    return lambda key: jax.random.uniform(key)


def clipped(law: TimeLaw, low: float, high: float) -> TimeLaw:
    """Times of `law`, those below `low` or above `high` taken to be there."""
    return lambda key: jax.numpy.clip(law(key), low, high)


def moment(law: TimeLaw) -> PairLaw:
    """(t, t): no interval."""

    def draw(key: Array) -> tuple[Array, Array]:
        t = law(key)
        return t, t

    return draw


def to_data(law: TimeLaw) -> PairLaw:
    """(0, t): intervals that end at the data."""

    def draw(key: Array) -> tuple[Array, Array]:
        t = law(key)
        return jax.numpy.zeros_like(t), t

    return draw


def dyadic(levels: int) -> PairLaw:
    """(t − d, t) with d = 2^−k, k uniform in 0 … levels − 1, and t uniform in d, 2d, …, 1.

    Steps of halved lengths, of which each is two of the next (arXiv 2410.12557, section 3.1).
    """

    def draw(key: Array) -> tuple[Array, Array]:
        level_key, place_key = jax.random.split(key)
        count = 2 ** jax.random.randint(level_key, (), 0, levels)
        t = jax.random.randint(place_key, (), 1, count + 1) / count
        return t - 1 / count, t

    return draw


def ticks(levels: int) -> TimeLaw:
    """t uniform in d, 2d, …, 1 with d = 2^−levels."""
    return lambda key: jax.random.randint(key, (), 1, 2**levels + 1) / 2**levels


def annealed(start: int, end: int, sharpness: float, clamp: float) -> Callable[[Array], Array]:
    """step → α, which falls from 1 to 0 between two steps as a sigmoid (arXiv 2510.20771).

    Half way it is 1/2; within `clamp` of 1 or 0 it is 1 or 0.
    """

    def alpha(step: Array) -> Array:
        passed = (step - start) / (end - start)
        a = jax.nn.sigmoid(sharpness * (0.5 - passed))
        a = jax.numpy.where(a > 1 - clamp, 1.0, a)
        return jax.numpy.where(a < clamp, 0.0, a)

    return alpha


def interval(law: TimeLaw) -> PairLaw:
    """(r, t): two independent draws of `law`, in order (arXiv 2505.13447, section 4.3)."""

    def draw(key: Array) -> tuple[Array, Array]:
        first, second = (law(k) for k in jax.random.split(key))
        return jax.numpy.minimum(first, second), jax.numpy.maximum(first, second)

    return draw


def spans_interval(position: Array, share: float) -> Array:
    """Says which samples keep r ≠ t: a pattern of the position in the global batch.

    Every run of `d` consecutive positions holds exactly `share · d` of them, where d is the
    denominator of `share` as a fraction, so the batch splits evenly over devices and microbatches,
    and the choice is independent of label dropout, which is random.

    Args:
      position: (n,) int32 places in the global batch.
      share: in [0, 1], taken to the nearest fraction with a denominator up to 100.
    Returns:
      (n,) bool.
    """
    pattern = interval_pattern(share)
    return jax.numpy.asarray(pattern)[position % len(pattern)]


def interval_pattern(share: float) -> np.ndarray:
    """One period of `spans_interval`: bool (d,), of which share · d are true."""
    part = Fraction(share).limit_denominator(100)
    counted = np.arange(part.denominator + 1) * part.numerator // part.denominator
    return np.diff(counted) > 0
