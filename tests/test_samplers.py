"""Samplers against the closed-form flow of a Gaussian."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flows.consistency import self_consistency
from flows.samplers import SAMPLERS, euler, heun, instantaneous, sample, uniform_grid
from tests import gaussian

NOISE = jnp.linspace(-3.0, 3.0, 31)[:, None]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_average_velocity_is_exact_at_any_number_of_steps(steps):
    x = sample(gaussian.average_velocity, NOISE, uniform_grid(steps))
    np.testing.assert_allclose(x, gaussian.SIGMA * NOISE, atol=2e-6)


def test_average_velocity_is_exact_on_an_uneven_grid():
    x = sample(gaussian.average_velocity, NOISE, jnp.array([1.0, 0.9, 0.35, 0.3, 0.0]))
    np.testing.assert_allclose(x, gaussian.SIGMA * NOISE, atol=2e-6)


@pytest.mark.parametrize(
    ("method", "steps", "order"),
    [(euler, [16, 32, 64, 128, 256], 1), (heun, [16, 24, 32, 48, 64], 2)],
)
def test_order_of_convergence(method, steps, order):
    errors = [
        np.abs(method(gaussian.velocity, NOISE, uniform_grid(n)) - gaussian.SIGMA * NOISE).max()
        for n in steps
    ]
    found = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(found - order) < 0.05 * order


def test_euler_is_the_average_velocity_bound_at_r_equal_t():
    grid = uniform_grid(5)
    euler = sample(gaussian.velocity, NOISE, grid)
    bound = sample(instantaneous(gaussian.average_velocity), NOISE, grid)
    np.testing.assert_allclose(euler, bound, rtol=1e-5)
    assert np.abs(euler - sample(gaussian.average_velocity, NOISE, grid)).max() > 0.01


def calls_of(method, grid) -> list[tuple[float, float]]:
    """The (r, t) of all calls of the velocity, from the latest t on."""
    calls = []

    def velocity(z, r, t):
        jax.debug.callback(lambda r, t: calls.append((float(r), float(t))), r, t)
        return z

    method(velocity, NOISE, grid).block_until_ready()
    jax.effects_barrier()
    return sorted(calls, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_every_step_calls_the_network_once(steps):
    grid = np.linspace(1, 0, steps + 1)
    expected = [(r, t) for t, r in itertools.pairwise(grid)]
    np.testing.assert_allclose(calls_of(sample, uniform_grid(steps)), expected, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_times_of_a_sampler_are_those_it_calls_the_velocity_at(name, steps):
    method, times = SAMPLERS[name]
    grid = uniform_grid(steps)
    called = [t for _, t in calls_of(method, grid)]
    np.testing.assert_allclose(sorted(called), np.sort(times(grid)), atol=1e-6)
    assert len(called) == steps * (2 if name == "heun" else 1)


def test_every_step_count_gives_another_result():
    ends = [float(sample(gaussian.velocity, NOISE, uniform_grid(n))[0, 0]) for n in range(1, 9)]
    assert np.diff(sorted(ends)).min() > 1e-4


def test_self_consistency_is_zero_for_the_average_velocity_alone():
    n = NOISE.shape[0]
    r, s, t = (jnp.full(n, value) for value in (0.1, 0.4, 0.8))

    def per_sample(u):
        return lambda z, r, t: u(z, r[:, None], t[:, None])

    exact = self_consistency(per_sample(gaussian.average_velocity), NOISE + 0.05, r, s, t)
    wrong = self_consistency(per_sample(gaussian.velocity), NOISE + 0.05, r, s, t)
    assert exact.max() < 1e-5
    assert wrong.min() > 0.05
