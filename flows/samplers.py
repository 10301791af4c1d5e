"""From noise to data: a velocity and a grid of times.

z_r = z_t − (t − r) u(z_t, r, t), over any grid from 1 to 0. With u bound at (t, t) this is Euler's
method for the flow's ordinary differential equation, of order 1; with an average velocity over
[r, t] it is MeanFlow sampling (arXiv 2505.13447, algorithm 2), exact for an exact u.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Velocity = Callable[[Array, Array, Array], Array]


def uniform_grid(steps: int) -> Array:
    """Returns the steps + 1 times 1, 1 − 1/steps, …, 0."""
    return jnp.linspace(1.0, 0.0, steps + 1)


def instantaneous(velocity: Velocity) -> Velocity:
    """Binds u at (t, t): the velocity of the flow, whatever r is."""
    return lambda z, r, t: velocity(z, t, t)


def sample(velocity: Velocity, noise: Array, grid: Array) -> Array:
    """Returns data (n, ...) from noise (n, ...) along the times of `grid` (steps + 1,).

    The velocity is called once per step, with scalar times.
    """

    def step(z: Array, times: tuple[Array, Array]) -> tuple[Array, None]:
        t, r = times
        return z - (t - r) * velocity(z, r, t), None

    return jax.lax.scan(step, noise, (grid[:-1], grid[1:]))[0]
