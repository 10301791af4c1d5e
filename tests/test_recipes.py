"""The recipes after MeanFlow against mathematics: exact solutions, hand-written targets, limits.

The data of the closed forms are x ~ N(0, SIGMA²) of `tests/gaussian.py`, or two classes of means
±1 and deviation SIGMA, whose mixture is what a network without labels sees. An objective's fixed
point is one where its mean gradient vanishes in every direction; `slopes` measures it along a few,
over chunks of independent draws, so that the error of the mean is known.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flows import times
from flows.bootstrap import alpha_flow, consistency, shortcut
from flows.draws import SampleKeys, normal
from flows.guidance import guided_velocity, power_law, told_target
from flows.objectives import flow_matching, improved_mean_flow, mean_flow
from flows.path import interpolate, like, velocity
from flows.samplers import consistency_step, integrate, uniform_grid
from models.dit import DiT
from models.mlp import MLP
from models.prediction import velocity_from_data
from tests import gaussian
from tests.test_objectives import (
    FLOW_OPTIONS,
    KEY,
    LAW,
    assert_trees_close,
    gradient,
    options,
    with_all_weights_drawn,
)

LABELS = {key: FLOW_OPTIONS[key] for key in ("class_dropout_prob", "null_label")}
NONE = {"omega": 1.0, "kappa": 0.0, "guidance_interval": (0.0, 1.0)}
IMPROVED = {"time_law": LAW, "interval_share": 0.5, "p": 0.0, "c": 0.01, "guidance_law": None}
ALPHA = {"pair_law": times.interval(LAW), "interval_share": 0.5, "p": 0.0, "c": 0.01, **NONE}
SHORTCUT = {"levels": 4, "interval_share": 0.5, "clip": 0.0}
CHUNKS, N = 64, 1024


def fixed_alpha(value):
    return lambda step: jnp.full_like(step, value, jnp.float32)


def improved_options(**changes):
    return IMPROVED | LABELS | changes


def alpha_options(value, **changes):
    return ALPHA | LABELS | {"alpha": fixed_alpha(value)} | changes


def shortcut_options(**changes):
    return SHORTCUT | LABELS | changes


CASES = {  # an objective and its options, α between its ends
    "improved_mean_flow": (improved_mean_flow, improved_options()),
    "alpha_flow": (alpha_flow, alpha_options(0.5)),
    "shortcut": (shortcut, shortcut_options()),
    "consistency": (consistency, alpha_options(0.5, pair_law=times.to_data(LAW))),
}


# Exact solutions.


def steps_done(batch, step=0):
    return batch | {"step": jnp.full_like(batch["position"], step)}


def gaussian_batch(n=N, start=0):
    x = gaussian.SIGMA * jax.random.normal(jax.random.key(start + 3), (n, 1))
    zero = jnp.zeros(n, jnp.int32)
    return steps_done({"x": x, "label": zero, "position": start + jnp.arange(n)})


def directions(z, r, t):
    """Functions (k, n, 1) of what a network sees, along which it may move."""
    r, t = r[:, None], t[:, None]
    return jnp.stack([z, z * t, z * (t - r), jnp.sin(3 * z), z**3 / 3, 1 + 0 * z, t + 0 * z])


def exact_and(a, z, r, t):
    """The exact average velocity, moved by a (k,) along `directions`."""
    moved = jnp.tensordot(a, directions(z, r, t), 1)
    return gaussian.average_velocity(z, r[:, None], t[:, None]) + moved


def exact_network(a, z, r, t, label, keys):
    return exact_and(a, z, r, t)


def slopes(objective, network, a, bound, make=gaussian_batch):
    """The mean gradient at `a` (k,) and its standard error, from independent chunks."""

    def one(chunk):
        batch = make(N, chunk * N)
        return jax.grad(lambda a: objective(network, a, batch, KEY, **bound)[0])(a)

    def found():
        return jax.lax.map(one, jnp.arange(CHUNKS))

    each = np.asarray(jax.jit(found)(), np.float64)
    return each.mean(0), each.std(0, ddof=1) / np.sqrt(CHUNKS)


def assert_fixed(objective, network, k, bound, make=gaussian_batch):
    """No slope along any of k directions, beyond the error of the mean."""
    mean, error = slopes(objective, network, jnp.zeros(k), bound, make)
    assert (error < 0.05).all()  # a bias of the size that other tests find would be seen
    np.testing.assert_array_less(abs(mean), 4 * error + 1e-6)


def assert_not_fixed(objective, network, a, bound, make=gaussian_batch):
    mean, error = slopes(objective, network, a, bound, make)
    assert (abs(mean) > 8 * error).any()


K = 7
TOWARDS = jnp.linspace(-0.3, 0.3, K)  # some wrong field
LONG = improved_options(time_law=times.uniform(), interval_share=0.75)


def test_improved_mean_flow_stands_still_at_the_exact_solution_alone():
    assert_fixed(improved_mean_flow, exact_network, K, LONG)
    assert_not_fixed(improved_mean_flow, exact_network, TOWARDS, LONG)


def heads_of(a, z, r, t, label, keys):
    """u moved by the first half of a (2 k,), the second head's v by the other half."""
    return exact_and(a[:K], z, r, t), exact_and(a[K:], z, t, t)


def u_of(a, *inputs):
    return heads_of(a, *inputs)[0]


def test_with_a_second_head_both_stand_still_and_v_is_the_tangent():
    bound = LONG | {"heads": heads_of}
    assert_fixed(improved_mean_flow, u_of, 2 * K, bound)
    for half in (0, 1):  # a wrong u at r = t would be no tangent; a wrong v is, and moves u too
        wrong = jnp.zeros((2, K)).at[half].set(TOWARDS).ravel()
        mean, error = slopes(improved_mean_flow, u_of, wrong, bound)
        moves = (abs(mean) > 8 * error).reshape(2, K).any(1)
        assert moves.tolist() == [True, half == 1]


def test_improved_mean_flow_at_the_exact_solution_is_flow_matching_at_it():
    """V is then v(z, t) itself, sample by sample; MeanFlow's target still carries e − x's noise."""
    batch = gaussian_batch()
    zero = jnp.zeros(K)
    own = functools.partial(improved_mean_flow, exact_network, zero, batch, KEY)
    loss, metrics = own(**LONG)
    later = {"time_law": lambda key: times.interval(times.uniform())(key)[1]}
    flow, _ = flow_matching(exact_network, zero, batch, KEY, **(FLOW_OPTIONS | later))
    assert loss == pytest.approx(float(flow), rel=1e-5)
    bound = options(p=0.0, time_law=times.uniform(), interval_share=0.75)
    plain, _ = mean_flow(exact_network, zero, batch, KEY, **bound)
    assert abs(plain - flow) > 0.05 * flow


LEVELS = 4


def test_shortcuts_stand_still_but_for_the_finest_whose_halves_are_eulers():
    """Beyond the finest step the target is u itself, sample by sample, so that one level suffices
    to see that Euler's halves err, and by how much."""
    batch = gaussian_batch()
    bound = shortcut_options(levels=LEVELS, interval_share=1.0)
    _, metrics = shortcut(exact_network, jnp.zeros(K), batch, KEY, **bound)
    errors = {k: float(total) for k, (total, _) in metrics.items() if "gap" in k}
    finest = errors.pop("error_by_gap/0-0.25")
    assert max(errors.values()) < 1e-9 and finest > 1e-3
    assert_fixed(shortcut, exact_network, K, shortcut_options(interval_share=0.0))

    def biased(levels):
        """The mean error of the target at the finest step alone."""
        _, metrics = shortcut(
            exact_network, jnp.zeros(K), batch, KEY, **(bound | {"levels": levels})
        )
        gap = 2.0 ** (1 - levels)
        edges = [edge for edge in (0, 0.25, 0.5, 0.75) if edge < gap]
        total, _ = metrics[f"error_by_gap/{edges[-1]:g}-{edges[-1] + 0.25:g}"]
        return float(total)

    # A step of half the length: Euler's error per length halves, its square is a quarter. Levels 1
    # and 2 have their finest steps in bins of their own.
    assert 2.0 < biased(1) / biased(2) * float(share_of(2) / share_of(1)) < 8.0
    assert_not_fixed(shortcut, exact_network, TOWARDS, bound)


def share_of(levels):
    """How often a shortcut's step is the finest."""
    return 1 / levels


def test_the_exact_finest_shortcut_is_the_mean_of_two_of_eulers_steps():
    """Written out: a network that is not exact at r ≠ t of the finest is never asked there."""
    batch = gaussian_batch()
    asked = []

    def network(a, z, r, t, label, keys):
        asked.append((r, t))
        return exact_and(a, z, r, t)

    shortcut(network, jnp.zeros(K), batch, KEY, **shortcut_options(interval_share=1.0))
    (r1, t1), (r2, t2), (r, t) = asked
    gap = np.asarray(t - r)
    finest = gap == 2.0 ** (1 - SHORTCUT["levels"])
    assert finest.any() and (~finest).any()
    np.testing.assert_array_equal(r1[finest], t1[finest])
    np.testing.assert_array_equal(r2[finest], t2[finest])
    np.testing.assert_array_equal(t1 - t2, gap / 2)  # and the second half begins half way
    np.testing.assert_allclose((t1 - r1)[~finest], gap[~finest] / 2)
    np.testing.assert_allclose(r2[~finest], r[~finest])


# α-Flow.

PAIR = 0.1, 0.6


def target_over_exact(value, objective=alpha_flow, pair=PAIR, **changes):
    """E[target | z] / u(z, r, t) of the exact field, which is one number for linear fields.

    From the gradient along u's scale: with p = 0 it is (2 / α) E[u (u − target)].
    """
    r, t = pair
    always = lambda key: (jnp.float32(r), jnp.float32(t))  # noqa: E731
    bound = alpha_options(value, pair_law=always, interval_share=1.0, **changes)
    n, scale = 200_000, jnp.ones(())

    def network(a, z, r, t, label, keys):
        return a * gaussian.average_velocity(z, r[:, None], t[:, None])

    batch = gaussian_batch(n)
    loss = lambda a: objective(network, a, batch, KEY, **bound)[0]  # noqa: E731
    slope = jax.jit(jax.grad(loss))(scale)
    slope_of_u = gaussian.average_velocity(1.0, r, t)
    power = slope_of_u**2 * gaussian.spread(t) ** 2
    return 1 - float(value * slope / (2 * power))


@pytest.mark.parametrize(
    ("value", "ratio", "error"), [(0.5, 1.24, 0.01), (0.25, 1.045, 0.006), (0.1, 1.006, 0.003)]
)
def test_alpha_flows_bias_on_a_gaussian_is_the_known_one(value, ratio, error):
    """1.24, 1.045 and 1.006 at σ = 0.5, (r, t) = (0.1, 0.6), and the same by hand: in a linear
    field E[z_s | z_t] is z_t − (t − s) v(z_t, t)."""
    (r, t), v = PAIR, gaussian.velocity(1.0, *PAIR)
    s = t - value * (t - r)
    by_hand = value * v + (1 - value) * gaussian.average_velocity(1.0, r, s) * (1 - (t - s) * v)
    by_hand = float(by_hand / gaussian.average_velocity(1.0, r, t))
    found = target_over_exact(value)
    assert found == pytest.approx(by_hand, abs=error)
    assert found == pytest.approx(ratio, abs=2 * error)


def test_alpha_flows_bias_vanishes_as_the_square():
    (r, t), v = PAIR, gaussian.velocity(1.0, *PAIR)
    assert target_over_exact(0.5) - 1 > 4 * (target_over_exact(0.25) - 1)
    assert target_over_exact(0.0625) == pytest.approx(1, abs=0.003)


@functools.cache
def network_of_points(rate=0.0):
    module = MLP(depth=1, hidden_size=16, num_classes=3, dropout=rate)
    network, params, batch = with_all_weights_drawn(module, (4,))
    return network, params, steps_done(batch)


def drawn(batch, pair_law, share=0.5):
    """z, v, r, t and keys of dropout of a batch whose labels are all kept."""
    keys = SampleKeys.of(KEY, batch["position"])
    r, t = jax.vmap(pair_law)(keys.time)
    r = jnp.where(times.spans_interval(batch["position"], share), r, t)
    noise = normal(keys.noise, batch["x"])
    z, v = interpolate(batch["x"], noise, t), velocity(batch["x"], noise)
    return z, v, r, t, keys.dropout


def sum_of_squares(x):
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def test_at_alpha_one_u_is_regressed_on_v_for_every_r():
    network, params, batch = network_of_points()
    z, v, r, t, keys = drawn(batch, times.interval(LAW))

    def loss(p):
        return jnp.mean(sum_of_squares(network(p, z, r, t, batch["label"], keys) - v))

    found = gradient(alpha_flow, network, params, batch, **alpha_options(1.0))
    assert_trees_close(found, jax.jit(jax.grad(loss))(params), 1e-5)
    assert (np.asarray(r) < np.asarray(t)).sum() == 4


def test_as_alpha_falls_the_gradient_becomes_mean_flows():
    """With p = 0: the distance falls as α, and at α = 0 there is none."""
    network, params, batch = network_of_points()
    expected = gradient(mean_flow, network, params, batch, **options(p=0.0))

    def distance(value):
        found = gradient(alpha_flow, network, params, batch, **alpha_options(value))
        a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (found, expected))
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    far, half, near = distance(0.04), distance(0.02), distance(0.005)
    assert far / half == pytest.approx(2, rel=0.2) and half / near == pytest.approx(4, rel=0.2)
    assert near < 0.05
    assert distance(0.0) < 1e-5


@pytest.mark.parametrize("guidance", [NONE, NONE | {"omega": 0.2, "kappa": 0.7}], ids=str)
def test_at_alpha_zero_alpha_flow_is_mean_flow(guidance):
    """Up to the convention of c, to the mean error in one and to the sum in the other: with D
    elements, w ‖·‖² of the mean and c is D^p times that of the sum and D c."""
    network, params, batch = network_of_points()
    for p in (0.0, 0.5, 1.0):
        of_sum = options(p=p, c=4 * 0.01, **guidance)
        expected = gradient(mean_flow, network, params, batch, **of_sum)
        expected = jax.tree.map(lambda g, p=p: 4**p * g, expected)
        found = gradient(
            alpha_flow, network, params, batch, **alpha_options(0.0, p=p, c=0.01, **guidance)
        )
        assert_trees_close(found, expected, 1e-5)


def test_alpha_flows_weight_is_alpha_over_the_mean_error():
    """Where r ≠ t, and with α of 1 where r = t: FIELD's convention, p = 1."""
    network, params, batch = network_of_points()
    value, c, p = 0.3, 0.01, 1.0
    weighted = gradient(alpha_flow, network, params, batch, **alpha_options(value, p=p, c=c))
    expected = jax.tree.map(jnp.zeros_like, params)
    share = {}
    for i in range(8):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        plain = alpha_options(value)
        loss, metrics = jax.jit(
            lambda p, one=one: alpha_flow(network, p, one, KEY, **plain)  # noqa: B023
        )(params)
        spans = float(metrics["velocity_error"][1]) == 0
        share[i] = spans
        error = float(metrics["error"][0])
        assert loss == pytest.approx(4 * error / (value if spans else 1.0), rel=1e-5)
        gradient_of_square = jax.tree.map(
            lambda g, scale=value if spans else 1.0: scale * g,
            gradient(alpha_flow, network, params, one, **plain),
        )
        w = (value if spans else 1.0) / (error + c)
        expected = jax.tree.map(lambda s, g, w=w: s + w * g / 8, expected, gradient_of_square)
    assert sorted(share.values()) == [False] * 4 + [True] * 4
    assert_trees_close(weighted, expected, 1e-4)


def test_the_schedule_of_alpha_and_its_corners():
    alpha = times.annealed(100, 300, 25.0, 0.005)
    at = {step: float(alpha(jnp.int32(step))) for step in (0, 100, 150, 190, 200, 210, 300, 10**9)}
    assert at[0] == at[100] == 1 and at[300] == at[10**9] == 0
    assert at[200] == 0.5 and at[190] + at[210] == pytest.approx(1)
    assert at[190] == pytest.approx(1 / (1 + np.exp(-25 * 10 / 200)), rel=1e-6)
    # 1/(1 + e^−x) is clamped beyond x = log(0.995 / 0.005) = 5.29: 42.3 steps from the middle.
    steps = jnp.arange(100, 301)
    every = np.asarray(alpha(steps))
    assert (np.diff(every) <= 0).all()
    within = (every > 0) & (every < 1)
    assert steps[within].min() == 158 and steps[within].max() == 242
    assert every[within].max() <= 0.995 and every[within].min() >= 0.005
    smooth = times.annealed(0, 10, 1.0, 0.0)  # a flat sigmoid without clamps has no corners
    assert 0 < float(smooth(jnp.int32(10))) < float(smooth(jnp.int32(0))) < 1


# Consistency training.


def test_consistency_training_is_that_of_f():
    """‖f(z_t, t) − sg f(z_s, s)‖² of f = z − t u(z, 0, t), written out: α-Flow's times t²."""
    network, params, batch = network_of_points()
    value = 0.25
    z, v, r, t, _ = drawn(batch, times.to_data(LAW), 1.0)
    s = (1 - value) * t
    z_s = z - like(t - s, z) * v

    def f(p, z, t):
        return z - like(t, z) * network(p, z, jnp.zeros_like(t), t, batch["label"], None)

    def loss(p):
        difference = f(p, z, t) - jax.lax.stop_gradient(f(params, z_s, s))
        return jnp.mean(sum_of_squares(difference) / t**2) / value

    bound = alpha_options(value, pair_law=times.to_data(LAW), interval_share=1.0)
    found = gradient(consistency, network, params, batch, **bound)
    assert_trees_close(found, jax.jit(jax.grad(loss))(params), 1e-5)


def test_consistency_stands_still_where_it_is_continuous_and_errs_by_the_discretisation():
    law = times.clipped(times.uniform(), 0.05, 1.0)
    continuous = alpha_options(0.0, pair_law=times.to_data(law), interval_share=1.0)
    assert_fixed(consistency, exact_network, K, continuous)
    coarse = continuous | {"alpha": fixed_alpha(0.5)}
    assert_not_fixed(consistency, exact_network, jnp.zeros(K), coarse)
    ends = {"objective": consistency, "pair": (0.0, 0.6)}
    bias = [target_over_exact(value, **ends) - 1 for value in (0.5, 0.25)]
    assert 3 < bias[0] / bias[1] < 8 and bias[1] > 0.01


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_sampling_of_the_exact_field_has_the_datas_distribution(steps):
    n = 20_000
    noise = jax.random.normal(jax.random.key(1), (n, 1))
    keys = jax.random.split(jax.random.key(2), n)
    # Half of each, far from a mean of 0, so that the mean is seen as well.
    field = lambda z, r, t: gaussian.average_velocity(z, r, t)  # noqa: E731
    x = integrate(consistency_step, field, noise, uniform_grid(steps), keys)[:, 0]
    assert stats.kstest(np.asarray(x), stats.norm(0, gaussian.SIGMA).cdf).pvalue > 1e-3
    # Beyond one step it has forgotten the noise that it began with, but for the last draw.
    kept = np.corrcoef(x, noise[:, 0])[0, 1]
    assert kept > 0.999 if steps == 1 else abs(kept) < 0.95
