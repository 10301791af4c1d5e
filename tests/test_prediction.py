"""Networks that predict noise, read as velocities: `models/prediction.py`.

The data of these tests are a Gaussian, x ~ N(μ, σ²), of which everything is known: the noise that
a perfect network predicts, E[ε | y], and the velocity E[ε − x | z].
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import base
from models.prediction import TIMES, diffusion_step, velocity_from_noise
from pipelines import build
from pipelines.flow import FlowPipeline

MEAN, SIGMA = 0.7, 0.5
# The schedule of DiT's paper and code, written once more: β from 1e-4 to 0.02 in 1000 steps.
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def exact_noise(y, step):
    """E[ε | y] where y = √ᾱ x + √(1 − ᾱ) ε, at steps (n,) between which ᾱ's ratio is that of t."""
    signal, noise = between(step)
    return noise * (y - signal * MEAN) / (signal**2 * SIGMA**2 + noise**2)


def between(step):
    """√ᾱ and √(1 − ᾱ) (n, 1) of fractional steps, by the line between their times."""
    t = jnp.interp(step, jnp.arange(1000.0), jnp.asarray(TIMES))[:, None]
    length = jnp.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / length, t / length


def exact_velocity(z, t):
    """E[ε − x | z] where z = (1 − t) x + t ε."""
    t = t[:, None]
    gain = (t - (1 - t) * SIGMA**2) / ((1 - t) ** 2 * SIGMA**2 + t**2)
    return gain * (z - (1 - t) * MEAN) - MEAN


@pytest.fixture(scope="module")
def points():
    return jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)


def test_times_are_where_the_noise_to_signal_ratios_agree():
    t = TIMES.astype(np.float64)
    assert np.all(np.diff(t) > 0)
    np.testing.assert_allclose((1 - t) ** 2 / ((1 - t) ** 2 + t**2), ALPHA_BAR, rtol=1e-4)
    steps = np.array([0, 1, 500, 999])
    np.testing.assert_allclose(diffusion_step(jnp.asarray(TIMES[steps])), steps, atol=1e-2)


@pytest.mark.parametrize("t", [0.01, 0.2, 0.5, 0.9, 0.99])
def test_the_exact_noise_gives_the_exact_velocity(points, t):
    t = jnp.full(64, t)
    found = velocity_from_noise(exact_noise, points, t)
    expected = exact_velocity(points, t)
    # Dividing by 1 − t makes the rounding of ε larger.
    np.testing.assert_allclose(found, expected, atol=float(3e-6 / (1 - t[0])))


def test_the_other_sign_is_another_velocity(points):
    t = jnp.full(64, 0.5)
    wrong = velocity_from_noise(lambda y, step: -exact_noise(y, step), points, t)
    assert abs(wrong - exact_velocity(points, t)).max() > 1


def test_the_network_is_told_the_step_and_the_scaled_point(points):
    told = {}

    def predict(y, step):
        told.update(y=y, step=step)
        return y

    velocity_from_noise(predict, points, jnp.full(64, TIMES[321]))
    np.testing.assert_allclose(told["step"], 321, atol=1e-2)
    signal, noise = np.sqrt(ALPHA_BAR[321]), np.sqrt(1 - ALPHA_BAR[321])
    # z = (1 − t) x + t ε is y = √ᾱ x + √(1 − ᾱ) ε but for its length.
    np.testing.assert_allclose(told["y"], points * (signal + noise), rtol=1e-4)


@pytest.mark.parametrize(("t", "step"), [(0.0, 0), (0.001, 0), (0.9999, 999), (1.0, 999)])
def test_times_beyond_the_schedule_are_those_of_its_ends(points, t, step):
    told = []
    found = velocity_from_noise(
        lambda y, s: told.append(s) or exact_noise(y, s), points, jnp.full(64, t)
    )
    np.testing.assert_allclose(told[0], step, atol=1e-3)
    assert jnp.isfinite(found).all()
    # There the velocity is nearly that of the end; a hundredth of the time is that far.
    t = jnp.full(64, np.clip(t, TIMES[0], TIMES[-1]))
    assert abs(found - exact_velocity(points, t)).max() < 0.1


def test_sampling_from_pure_noise_is_finite_and_arrives(points):
    """Euler from t = 1, where 1 − t divides, to t = 0: the moments are the data's."""
    z = jnp.asarray(np.random.default_rng(1).normal(size=(4096, 1)), jnp.float32)
    times = np.linspace(1, 0, 65, dtype=np.float32)
    step = jax.jit(lambda z, t: velocity_from_noise(exact_noise, z, jnp.full(4096, t)))
    for t, r in itertools.pairwise(times):
        z = z - (t - r) * step(z, t)
    assert jnp.isfinite(z).all()
    assert float(z.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(z.std()) == pytest.approx(SIGMA, abs=0.03)


def tiny(prediction: str) -> FlowPipeline:
    """A DiT of one block on points 4×4×1, with random parameters."""
    config = base.get_config()
    sizes = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    config.model.update(sizes | {"prediction": prediction, "time_inputs": "t"})
    config.objective = "flow_matching"
    pipeline = FlowPipeline.build(config, {"shape": [4, 4, 1], "num_classes": 3})
    shapes = jax.eval_shape(pipeline.network.init, jax.random.key(0))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape, np.float32), shapes)
    assert flatten_dict(params).keys() == flatten_dict(shapes).keys()
    return pipeline.with_params(params)


def test_the_config_key_makes_a_velocity_of_the_network():
    """The same parameters under both predictions: u = (ε(z / n, τ) − z) / (1 − t)."""
    noise, plain = tiny("noise"), tiny("velocity")
    z = np.random.default_rng(3).normal(size=(5, 4, 4, 1)).astype(np.float32)
    steps = np.array([10, 100, 300, 500, 700])
    label = jnp.arange(5, dtype=jnp.int32) % 4
    t = TIMES[steps]
    length = np.sqrt((1 - t) ** 2 + t**2)[:, None, None, None]
    step = jnp.asarray(steps, jnp.float32)
    predicted = plain.network.apply(plain.params, z / length, step, step, label, None)
    expected = (predicted - z) / (1 - t)[:, None, None, None]
    np.testing.assert_allclose(noise.velocity(z, t, t, label), expected, atol=2e-4)
    assert build.told(noise.config.model) == ["t"]


def test_samples_of_a_network_of_noise_are_finite():
    for sampler in ("euler", "heun"):
        found = tiny("noise").draw(np.arange(8) % 3, steps=3, sampler=sampler, decode=False)
        assert np.isfinite(found.samples).all() and np.asarray(found.finite).all()
