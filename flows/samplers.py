"""From noise to data: a velocity and a grid of times.

z_r = z_t − (t − r) u(z_t, r, t), over any grid from 1 to 0. With u bound at (t, t) this is Euler's
method for the flow's ordinary differential equation, of order 1; with an average velocity over
[r, t] it is MeanFlow sampling (arXiv 2505.13447, algorithm 2), exact for an exact u. Heun's method,
of order 2, averages the velocities at both ends of Euler's step. `euler_stochastic` is of weak
order 1: its samples have the flow's distributions, on paths of their own. `consistency_step` goes
to the data and back to r. `dopri5` chooses its steps itself, for each sample by its own error.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flows.path import like

Velocity = Callable[[Array, Array, Array], Array]
Step = Callable[[Velocity, Array, Array, Array, Array], Array]

GRIDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of s from 0 to 1: times from 1 to 0
    "uniform": lambda s: 1 - s,
    "cosine": lambda s: (1 + np.cos(np.pi * s)) / 2,  # short steps at both ends
    "quadratic": lambda s: (1 - s) ** 2,  # short steps near the data
    "shifted": lambda s: 3 * (1 - s) / (3 - 2 * s),  # short steps near the noise: SD3's shift of 3
}
MOST_TRIALS = 2000  # steps that dopri5 tries for a sample until it gives up
LEAST_STEP = 1e-7  # of time, below which it does too: float32 holds no less


def grid_of(steps: int, name: str = "uniform") -> np.ndarray:
    """Returns the float32 (steps + 1,) times of a grid of `GRIDS`, from 1 to 0."""
    return GRIDS[name](np.linspace(0, 1, steps + 1)).astype(np.float32)


def uniform_grid(steps: int) -> Array:
    """Returns the steps + 1 times 1, 1 − 1/steps, …, 0."""
    return jnp.asarray(grid_of(steps))


def instantaneous(velocity: Velocity) -> Velocity:
    """Binds u at (t, t): the velocity of the flow, whatever r is."""
    return lambda z, r, t: velocity(z, t, t)


def mean_step(velocity: Velocity, z: Array, t: Array, r: Array, keys: Array) -> Array:
    """z at r from z (n, ...) at t, along the average velocity: one call."""
    return z - (t - r) * velocity(z, r, t)


def euler_step(velocity: Velocity, z: Array, t: Array, r: Array, keys: Array) -> Array:
    """The same along the velocity of the flow at t: one call."""
    return z - (t - r) * velocity(z, t, t)


def heun_step(velocity: Velocity, z: Array, t: Array, r: Array, keys: Array) -> Array:
    """The explicit trapezoidal rule: two calls, at t and at r."""
    start = velocity(z, t, t)
    end = velocity(z - (t - r) * start, r, r)
    return z - (t - r) * (start + end) / 2


def stochastic_step(velocity: Velocity, z: Array, t: Array, r: Array, keys: Array) -> Array:
    """Euler-Maruyama's step of a stochastic equation with the flow's distributions: one call.

    With ε̂ = E[e | z_t] = z + (1 − t) v the score is −ε̂ / t; a diffusion of 2 t then adds the drift
    ε̂ and noise of variance 2 t (t − r) (arXiv 2401.08740, section 3.2). The last step, to r = 0, is
    Euler's, to the mean of the data given z.

    Args:
      keys: (n,), of this step: a sample's noise is a function of its own.
    """
    v = velocity(z, t, t)
    noise = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
    spread = jnp.sqrt(2 * t * (t - r)) * noise - (t - r) * (z + (1 - t) * v)
    return z - (t - r) * v + jnp.where(r > 0, spread, jnp.zeros_like(z))


def consistency_step(velocity: Velocity, z: Array, t: Array, r: Array, keys: Array) -> Array:
    """To the data at once, and from there to r with fresh noise: one call.

    Multistep consistency sampling (arXiv 2303.01469, algorithm 1): of u it needs intervals that end
    at the data alone. The last step, to r = 0, adds nothing.

    Args:
      keys: (n,), of this step: a sample's noise is a function of its own.
    """
    data = z - t * velocity(z, jnp.zeros_like(r), t)
    noise = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
    return (1 - r) * data + r * noise


class Sampler(NamedTuple):
    """A step, and the times of a grid at which its velocity is called."""

    step: Step  # (velocity, z, t, r, keys) → z at r
    times: Callable[[Array], Array]  # grid → (calls,)


SAMPLERS = {
    "meanflow": Sampler(mean_step, lambda grid: grid[:-1]),
    "euler": Sampler(euler_step, lambda grid: grid[:-1]),
    "heun": Sampler(heun_step, lambda grid: jnp.stack([grid[:-1], grid[1:]], axis=1).ravel()),
    "euler_stochastic": Sampler(stochastic_step, lambda grid: grid[:-1]),
    "consistency": Sampler(consistency_step, lambda grid: grid[:-1]),
}
ADAPTIVE = "dopri5"


def integrate(
    step: Step,
    velocity: Velocity,
    noise: Array,
    grid: Array,
    keys: Array | None = None,
    keep: bool = False,
) -> Array:
    """Returns data (n, ...) from noise (n, ...), step by step along `grid` (steps + 1,).

    Args:
      velocity: called with scalar times.
      keys: (n,), a key per sample, of which each step folds its number; for stochastic steps.
      keep: return all of the way, (steps + 1, n, ...), the noise first.
    """
    keys = jax.random.split(jax.random.key(0), len(noise)) if keys is None else keys

    def one(z: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array | None]:
        number, t, r = inputs
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        z = step(velocity, z, t, r, own)
        return z, z if keep else None

    numbers = jnp.arange(len(grid) - 1)
    data, way = jax.lax.scan(one, noise, (numbers, grid[:-1], grid[1:]))
    return data if way is None else jnp.concatenate([noise[None], way])


def sample(velocity: Velocity, noise: Array, grid: Array) -> Array:
    """Returns data (n, ...) from noise (n, ...) along the times of `grid` by average velocities."""
    return integrate(mean_step, velocity, noise, grid)


def euler(velocity: Velocity, noise: Array, grid: Array) -> Array:
    """The same along the velocity of the flow, u bound at (t, t)."""
    return integrate(euler_step, velocity, noise, grid)


def heun(velocity: Velocity, noise: Array, grid: Array) -> Array:
    """The same by Heun's method, the last step's second call at t = 0 included."""
    return integrate(heun_step, velocity, noise, grid)


# Dormand and Prince, J. Comp. Appl. Math. 6 (1980): a step of order 5 from seven velocities, the
# last of which is the next step's first, and its difference from one of order 4.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class _Trial(NamedTuple):
    """Where each sample stands: z at t, its velocity there, the step to try, calls so far."""

    z: Array  # (n, ...)
    v: Array  # (n, ...)
    t: Array  # (n,)
    h: Array  # (n,)
    calls: Array  # (n,) int32
    trials: Array  # () int32


def dopri5(
    velocity: Velocity,
    noise: Array,
    tolerance: Array | float,
    cost: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Returns data (n, ...) by the method of Dormand and Prince, and calls (n,) int32.

    Each sample has steps of its own, so that its result depends on no other of the batch. Samples
    that need more than `MOST_TRIALS` steps, or one below `LEAST_STEP`, become NaN.

    Args:
      velocity: called with times (n,).
      tolerance: of a step, relative and absolute, in root mean square over a sample's numbers.
      cost: what a call at t (n,) counts, int32 (n,); None: 1.
    """
    n = noise.shape[0]
    count = cost or (lambda t: jnp.ones(n, jnp.int32))
    start = jnp.ones(n)
    first = _Trial(
        z=noise,
        v=velocity(noise, start, start),
        t=start,
        h=jnp.full(n, 0.05),
        calls=count(start),
        trials=jnp.zeros((), jnp.int32),
    )
    going = lambda s: _moving(s).any() & (s.trials < MOST_TRIALS)  # noqa: E731
    last = jax.lax.while_loop(going, lambda s: _tried(velocity, s, tolerance, count), first)
    done = like(last.t == 0, last.z)
    return jnp.where(done, last.z, jnp.full_like(last.z, jnp.nan)), last.calls


def _moving(s: _Trial) -> Array:
    """Which samples, (n,) bool, are neither at 0 nor given up."""
    return (s.t > 0) & (s.h > LEAST_STEP)


def _tried(velocity: Velocity, s: _Trial, tolerance: Array | float, count: Callable) -> _Trial:
    """One more step of every sample that is not at 0 yet; what errs too much stays where it is."""
    h = jnp.minimum(s.h, s.t)
    ends = h == s.t  # exactly at 0, whatever rounding does
    slopes, calls = [s.v], s.calls
    z = s.z
    for node, row in zip(_NODES, _STAGES, strict=True):
        change = sum(a * k for a, k in zip(row, slopes, strict=True))
        z = s.z - like(h, s.z) * change
        t = jnp.where(ends & (node == 1), jnp.zeros_like(h), s.t - node * h)
        slopes.append(velocity(z, t, t))
        calls = calls + count(t)
    error = like(h, z) * sum(a * k for a, k in zip(_ERROR, slopes, strict=True))
    scale = tolerance * (1 + jnp.maximum(jnp.abs(s.z), jnp.abs(z)))
    size = jnp.sqrt(jnp.mean((error / scale) ** 2, axis=tuple(range(1, z.ndim))))
    moving = _moving(s)
    taken = (size <= 1) & moving
    factor = jnp.where(jnp.isfinite(size), 0.9 * jnp.maximum(size, 1e-9) ** -0.2, 0.2)
    return _Trial(
        z=jnp.where(like(taken, z), z, s.z),
        v=jnp.where(like(taken, z), slopes[-1], s.v),
        t=jnp.where(taken, t, s.t),
        h=jnp.where(moving, h * jnp.clip(factor, 0.2, 5.0), s.h),
        calls=jnp.where(moving, calls, s.calls),
        trials=s.trials + 1,
    )
