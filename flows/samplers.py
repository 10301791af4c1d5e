"""From noise to data: a velocity and a grid of times.

z_r = z_t − (t − r) u(z_t, r, t), over any grid from 1 to 0. With u bound at (t, t) this is Euler's
method for the flow's ordinary differential equation, of order 1; with an average velocity over
[r, t] it is MeanFlow sampling (arXiv 2505.13447, algorithm 2), exact for an exact u. Heun's method,
of order 2, averages the velocities at both ends of Euler's step.
"""

from collections.abc import Callable
from typing import NamedTuple

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


def euler(velocity: Velocity, noise: Array, grid: Array) -> Array:
    """`sample` along the velocity of the flow, u bound at (t, t)."""
    return sample(instantaneous(velocity), noise, grid)


def heun(velocity: Velocity, noise: Array, grid: Array) -> Array:
    """Returns data (n, ...) by Heun's method (the explicit trapezoidal rule), u bound at (t, t).

    The velocity is called at both ends of every step, the last one's end at 0 included.
    """

    def step(z: Array, times: tuple[Array, Array]) -> tuple[Array, None]:
        t, r = times
        start = velocity(z, t, t)
        end = velocity(z - (t - r) * start, r, r)
        return z - (t - r) * (start + end) / 2, None

    return jax.lax.scan(step, noise, (grid[:-1], grid[1:]))[0]


class Sampler(NamedTuple):
    """A way from noise to data, and the times at which it calls the velocity."""

    run: Callable[[Velocity, Array, Array], Array]  # (velocity, noise, grid) → data
    times: Callable[[Array], Array]  # grid → (calls,)


SAMPLERS = {
    "meanflow": Sampler(sample, lambda grid: grid[:-1]),
    "euler": Sampler(euler, lambda grid: grid[:-1]),
    "heun": Sampler(heun, lambda grid: jnp.stack([grid[:-1], grid[1:]], axis=1).ravel()),
}
