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


def logit_normal(mean: float, std: float) -> TimeLaw:
    """t = sigmoid(mean + std · n), n ~ N(0, 1): times in (0, 1) (arXiv 2403.03206, section 3.1)."""
    return lambda key: jax.nn.sigmoid(mean + std * jax.random.normal(key))


def uniform() -> TimeLaw:
    """t ~ U[0, 1)."""
    return lambda key: jax.random.uniform(key)


def interval(law: TimeLaw) -> Callable[[Array], tuple[Array, Array]]:
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
