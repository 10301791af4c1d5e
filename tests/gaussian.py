"""The flow of Gaussian data in closed form: x ~ N(0, SIGMA²) per element.

z_t ~ N(0, s(t)²) with s(t)² = (1 − t)² SIGMA² + t², and the flow map is z_r = z_t s(r) / s(t).
"""

import jax.numpy as jnp

SIGMA = 0.5


def spread(t):
    """s(t), the standard deviation of z_t."""
    return jnp.sqrt((1 - t) ** 2 * SIGMA**2 + t**2)


def velocity(z, r, t):
    """v(z, t) = E[e − x | z_t = z] = z s'(t) / s(t), whatever r is."""
    return z * (t - (1 - t) * SIGMA**2) / spread(t) ** 2


def average_velocity(z, r, t):
    """u(z, r, t) = (z_t − z_r) / (t − r); at r = t its limit, the velocity.

    Written without the cancellation in s(t) − s(r): the difference of squares is
    (t − r) ((t + r)(1 + SIGMA²) − 2 SIGMA²).
    """
    slope = (t + r) * (1 + SIGMA**2) - 2 * SIGMA**2
    return z * slope / (spread(t) * (spread(t) + spread(r)))
