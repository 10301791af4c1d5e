"""Samplers against the closed-form flow of a Gaussian."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from flows.consistency import self_consistency
from flows.samplers import (
    GRIDS,
    SAMPLERS,
    dopri5,
    euler,
    grid_of,
    heun,
    instantaneous,
    integrate,
    sample,
    stochastic_step,
    uniform_grid,
)
from tests import gaussian

NOISE = jnp.linspace(-3.0, 3.0, 31)[:, None]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_average_velocity_is_exact_at_any_number_of_steps(steps):
    x = sample(gaussian.average_velocity, NOISE, uniform_grid(steps))
    np.testing.assert_allclose(x, gaussian.SIGMA * NOISE, atol=2e-6)


def test_average_velocity_is_exact_on_an_uneven_grid():
    x = sample(gaussian.average_velocity, NOISE, jnp.array([1.0, 0.9, 0.35, 0.3, 0.0]))
    np.testing.assert_allclose(x, gaussian.SIGMA * NOISE, atol=2e-6)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_grids_fall_from_noise_to_data_and_keep_their_step_count(name, steps):
    grid = grid_of(steps, name)
    assert grid.shape == (steps + 1,) and grid[0] == 1 and grid[-1] == 0
    assert (np.diff(grid) < 0).all()
    x = sample(gaussian.average_velocity, NOISE, jnp.asarray(grid))
    np.testing.assert_allclose(x, gaussian.SIGMA * NOISE, atol=2e-6)


def test_grids_differ():
    assert len({tuple(grid_of(3, name).round(6)) for name in GRIDS}) == len(GRIDS)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    ("method", "steps", "order"),
    [(euler, [16, 32, 64, 128, 256], 1), (heun, [16, 24, 32, 48, 64], 2)],
)
def test_order_of_convergence(method, steps, order, name):
    errors = [
        np.abs(
            method(gaussian.velocity, NOISE, jnp.asarray(grid_of(n, name))) - gaussian.SIGMA * NOISE
        ).max()
        for n in steps
    ]
    found = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(found - order) < 0.05 * order if name == "uniform" else found > 0.95 * order


def stochastic(noise, steps: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), len(noise))
    grid = uniform_grid(steps)
    run = jax.jit(lambda z: integrate(stochastic_step, gaussian.velocity, z, grid, keys))
    return np.asarray(run(noise), np.float64)


def stochastic_variance(steps: int) -> float:
    """Of the same method, whose steps are linear here: z ← a z + b ξ, by hand."""
    times, variance = np.linspace(1, 0, steps + 1), 1.0
    for t, r in itertools.pairwise(times):
        h, slope = t - r, (t - (1 - t) * gaussian.SIGMA**2) / gaussian.spread(t) ** 2
        a, b = 1 - h * slope - h * (1 + (1 - t) * slope), np.sqrt(2 * t * h)
        if r == 0:
            a, b = 1 - h * slope, 0.0
        variance = float(a**2 * variance + b**2)
    return variance


def test_the_moments_of_the_stochastic_sampler():
    """Those of the method to the error of the draws, and those of the data with order 1."""
    n = 200_000
    noise = jax.random.normal(jax.random.key(1), (n, 1))
    for steps in (2, 8, 32):
        x = stochastic(noise, steps)
        exact = stochastic_variance(steps)
        assert abs(x.mean()) < 4 * np.sqrt(exact / n)
        assert abs(x.var() - exact) < 4 * exact * np.sqrt(2 / n)
        kurtosis = (x**4).mean() / x.var() ** 2
        assert abs(kurtosis - 3) < 4 * np.sqrt(96 / n)
    steps = [64, 128, 256, 512]
    errors = [abs(stochastic_variance(k) - gaussian.SIGMA**2) for k in steps]
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - 1) < 0.1


def test_the_stochastic_samplers_noise_is_a_samples_own():
    noise = jax.random.normal(jax.random.key(1), (6, 1))
    whole = stochastic(noise, 3)
    keys = jax.random.split(jax.random.key(0), 6)
    grid = uniform_grid(3)
    part = integrate(stochastic_step, gaussian.velocity, noise[4:], grid, keys[4:])
    np.testing.assert_allclose(part, whole[4:], rtol=1e-6)
    assert np.abs(whole - stochastic(noise, 3, seed=7)).min() > 1e-4
    # From one noise, not one sample.
    assert np.ptp(stochastic(jnp.ones((6, 1)), 3)) > 0.1


def per_sample(velocity):
    """A velocity that is given a time per sample."""
    return lambda z, r, t: velocity(z, r[:, None], t[:, None])


def test_the_error_of_dopri5_follows_its_tolerance():
    tolerances = np.array([1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    errors, calls = [], []
    for tolerance in tolerances:
        x, called = dopri5(per_sample(gaussian.velocity), NOISE, tolerance)
        errors.append(float(np.abs(x - gaussian.SIGMA * NOISE).max()))
        calls.append(int(called.max()))
    # What a step may err adds up, and grows: scipy's RK45 errs as much here (0.016 at 1e-3).
    assert (np.array(errors) < 20 * tolerances).all(), errors
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.6 < slope < 1.4
    assert sorted(calls) == calls and 10 < calls[0] < calls[-1] < 100


def test_dopri5_agrees_with_scipys():
    """On a velocity that is not linear; the same method, other steps."""

    def velocity(z, r, t):
        return jnp.sin(3 * z) * jnp.cos(5 * t) + z * t

    x, _ = dopri5(per_sample(velocity), NOISE, 1e-6)

    def slope(t, z):
        return np.sin(3 * z) * np.cos(5 * t) + z * t

    options = {"method": "RK45", "rtol": 1e-9, "atol": 1e-9}
    found = scipy.integrate.solve_ivp(slope, (1.0, 0.0), np.asarray(NOISE[:, 0]), **options)
    np.testing.assert_allclose(x[:, 0], found.y[:, -1], atol=3e-5)


def test_dopri5_counts_its_calls_and_a_sample_depends_on_no_other():
    calls = []

    def velocity(z, r, t):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return per_sample(gaussian.velocity)(z, r, t)

    alone, count = dopri5(velocity, NOISE[:1], 1e-4)
    jax.effects_barrier()
    assert len(calls) == int(count[0])
    assert min(calls) == 0 and max(calls) == 1
    together, counts = dopri5(per_sample(gaussian.velocity), NOISE, 1e-4)
    np.testing.assert_allclose(alone, together[:1], rtol=1e-6)
    assert int(counts[0]) == int(count[0]) > int(counts.min())
    _, twice = dopri5(per_sample(gaussian.velocity), NOISE, 1e-4, lambda t: jnp.where(t > 0, 3, 1))
    assert (np.asarray(twice) > np.asarray(counts)).all()


def test_dopri5_gives_up_on_what_is_not_finite():
    def velocity(z, r, t):
        return jnp.where(z > 0, jnp.full_like(z, jnp.nan), per_sample(gaussian.velocity)(z, r, t))

    x, _ = dopri5(velocity, NOISE, 1e-3)
    np.testing.assert_array_equal(np.isnan(x), NOISE > 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_way_begins_in_the_noise_and_ends_in_the_sample(name):
    step, grid = SAMPLERS[name].step, uniform_grid(4)
    way = integrate(step, gaussian.velocity, NOISE, grid, keep=True)
    assert way.shape == (5, *NOISE.shape)
    np.testing.assert_array_equal(way[0], NOISE)
    np.testing.assert_array_equal(way[-1], integrate(step, gaussian.velocity, NOISE, grid))


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
    step, times = SAMPLERS[name]
    grid = uniform_grid(steps)
    called = [t for _, t in calls_of(functools.partial(integrate, step), grid)]
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
