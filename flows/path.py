"""The convention of this project: t = 0 is data, t = 1 is noise (arXiv 2505.13447, section 3).

z_t = (1 − t) x + t e and v = dz_t/dt = e − x, for x data and e ~ N(0, I).
Times have shape (n,), everything else (n, ...).
"""

import jax.numpy as jnp
from jax import Array


def like(t: Array, z: Array) -> Array:
    """Returns a value per sample (n,) as (n, 1, ..., 1), to go with z (n, ...)."""
    return jnp.reshape(t, t.shape + (1,) * (z.ndim - 1))


def interpolate(x: Array, noise: Array, t: Array) -> Array:
    """Returns z_t = (1 − t) x + t e."""
    t = like(t, x)
    return (1 - t) * x + t * noise


def velocity(x: Array, noise: Array) -> Array:
    """Returns v = e − x, the velocity of `interpolate` at every t."""
    return noise - x
