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
from flows.samplers import consistency_step, integrate, mean_step, uniform_grid
from models.dit import DiT
from models.layers import dropout
from models.prediction import velocity_from_data
from tests import gaussian
from tests.conftest import THOROUGH
from tests.test_objectives import (
    FLOW_OPTIONS,
    KEY,
    LAW,
    assert_trees_close,
    options,
    with_all_weights_drawn,
)
from utils.step import accumulate, microbatches

LABELS = {key: FLOW_OPTIONS[key] for key in ("class_dropout_prob", "null_label")}
NONE = {"omega": 1.0, "kappa": 0.0, "guidance_interval": (0.0, 1.0)}
IMPROVED = {"time_law": LAW, "interval_share": 0.5, "p": 0.0, "c": 0.01, "guidance_law": None}
ALPHA = {"pair_law": times.interval(LAW), "interval_share": 0.5, "p": 0.0, "c": 0.01, **NONE}
SHORTCUT = {"levels": 4, "interval_share": 0.5, "clip": 0.0}
CHUNKS, N = 40, 1024


def thousandths(step):
    """α by the number of the step: one program serves all."""
    return step / 1000


def improved_options(**changes):
    return IMPROVED | LABELS | changes


def alpha_options(**changes):
    return ALPHA | LABELS | {"alpha": thousandths} | changes


def shortcut_options(**changes):
    return SHORTCUT | LABELS | changes


CASES = {
    "improved_mean_flow": (improved_mean_flow, improved_options()),
    "alpha_flow": (alpha_flow, alpha_options()),
    "shortcut": (shortcut, shortcut_options()),
    "consistency": (consistency, alpha_options(pair_law=times.to_data(LAW))),
}


# Exact solutions.


def steps_done(batch, step=0):
    return batch | {"step": jnp.full_like(batch["position"], step)}


def gaussian_batch(n=N, start=0, step=0):
    x = gaussian.SIGMA * jax.random.normal(jax.random.key(start + 3), (n, 1))
    zero = jnp.zeros(n, jnp.int32)
    return steps_done({"x": x, "label": zero, "position": start + jnp.arange(n)}, step)


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
    loss, _ = own(**LONG)
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


# Small fields that depend on all that a network sees, and compile in no time.

DROPOUT = 0.3
MOVED = jnp.linspace(-0.2, 0.3, K)  # parameters of the field below


def toy(a, z, r, t, label, keys, told=None):
    """u (n, d): a moved Gaussian's, other by label and guidance, with units dropped."""
    u = exact_and(a, z, r, t) * like(1 + 0.3 * label.astype(z.dtype), z)
    if told is not None:
        u += a[0] * z * like(jnp.sum(told * jnp.array([[0.3, 0.5, 0.7]]), axis=1), z)
    return dropout(u, DROPOUT, keys, 0)


def toy_heads(a, z, r, t, label, keys, told=None):
    """And a second head's v, which is another function."""
    given = label, keys, told
    return toy(a, z, r, t, *given), 0.5 * jnp.sin(z) + toy(a[::-1], z, t, t, *given)


def toy_batch(step=500):
    x = jax.random.normal(jax.random.key(5), (8, 3))
    label = jnp.arange(8, dtype=jnp.int32) % 3
    return steps_done({"x": x, "label": label, "position": jnp.arange(8)}, step)


def graded(objective, network=toy):
    """(a, batch, numbers) → (loss, metrics), gradient: compiled, with p, c and the like traced."""

    def run(a, batch, numbers):
        return jax.value_and_grad(
            lambda a: objective(network, a, batch, KEY, **numbers), has_aux=True
        )(a)

    return jax.jit(run)


def drawn(batch, pair_law, share=0.5, time_law=None):
    """z, v, r, t and keys of dropout of a batch whose labels are all kept."""
    keys = SampleKeys.of(KEY, batch["position"])
    spans = times.spans_interval(batch["position"], share)
    r, t = jax.vmap(pair_law)(keys.time)
    t = jnp.where(spans, t, jax.vmap(time_law)(keys.time)) if time_law else t
    noise = normal(keys.noise, batch["x"])
    z, v = interpolate(batch["x"], noise, t), velocity(batch["x"], noise)
    return z, v, jnp.where(spans, r, t), t, keys.dropout


def sum_of_squares(x):
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def assert_regression(found, predict, target, weight):
    """Loss and gradient are those of E w ‖predict(a) − target‖², with target and w as numbers."""

    def loss(a):
        return jnp.mean(weight * sum_of_squares(predict(a) - target))

    expected = jax.jit(jax.value_and_grad(loss))(MOVED)
    (value, _), slope = found
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    assert np.linalg.norm(slope) > 0.01
    np.testing.assert_allclose(slope, expected[1], rtol=1e-4, atol=1e-5)


def without(name, *keys):
    objective, bound = CASES[name]
    return functools.partial(
        objective, **{key: value for key, value in bound.items() if key not in keys}
    )


def test_improved_mean_flows_regression_written_out():
    """V's derivative is along (v_θ, 0, 1), v_θ without dropped units, the rest with u's mask."""
    batch = toy_batch()
    z, v, r, t, keys = drawn(batch, times.interval(LAW))
    own = toy(MOVED, z, t, t, batch["label"], None)
    h = 1e-2
    see = lambda a, z, t: toy(a, z, r, t, batch["label"], keys)  # noqa: E731
    moves = [see(MOVED, z + s * h * own, t + s * h) for s in (1, -1)]
    rest = like(t - r, z) * (moves[0] - moves[1]) / (2 * h)
    error = sum_of_squares(see(MOVED, z, t) + rest - v)
    found = graded(without("improved_mean_flow", "p", "c"))(MOVED, batch, {"p": 0.7, "c": 0.1})
    predict = lambda a: see(a, z, t) + rest  # noqa: E731
    (value, _), slope = found
    weight = (error + 0.1) ** -0.7
    expected = jax.grad(lambda a: jnp.mean(weight * sum_of_squares(predict(a) - v)))(MOVED)
    np.testing.assert_allclose(value, jnp.mean(weight * error), rtol=1e-4)
    np.testing.assert_allclose(slope, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("p", "c"), [(0.0, 1.0), (1.0, 0.01), (0.6, 0.2)])
def test_alpha_flows_regression_written_out(p, c):
    """Target at z_s with the prediction's mask, and the weight α / (error + c) at p = 1."""
    value, batch = 0.3, toy_batch(300)
    z, v, r, t, keys = drawn(batch, times.interval(LAW))
    s = t - value * (t - r)
    ahead = toy(MOVED, z - like(t - s, z) * v, r, s, batch["label"], keys)
    spans = np.asarray(r < t)
    target = jnp.where(spans[:, None], value * v + (1 - value) * ahead, v)
    predict = lambda a: toy(a, z, r, t, batch["label"], keys)  # noqa: E731
    error = sum_of_squares(predict(MOVED) - target)
    scale = jnp.where(spans, {0.0: 1 / value, 1.0: value, 0.6: value**0.2}[p], 1.0)
    found = alpha_steps()(MOVED, batch, {"p": p, "c": c})
    assert spans.sum() == 4
    assert_regression(found, predict, target, scale / (error + 3 * c) ** p)  # of 3 elements


@functools.cache
def alpha_steps():
    return graded(without("alpha_flow", "p", "c"))


def test_shortcuts_regression_written_out():
    batch = toy_batch()
    levels = SHORTCUT["levels"]
    z, v, r, t, keys = drawn(batch, times.dyadic(levels), 0.5, times.ticks(levels))
    see = lambda a, *at: toy(a, *at, batch["label"], keys)  # noqa: E731
    m = (r + t) / 2
    finest = np.asarray(t - r) == 2.0 ** (1 - levels)
    first = see(MOVED, z, jnp.where(finest, t, m), t)
    z_m = jnp.clip(z - like(t - m, z) * first, -0.5, 0.5)
    second = see(MOVED, z_m, jnp.where(finest, m, r), m)
    mean = jnp.clip((first + second) / 2, -0.5, 0.5)
    target = jnp.where(np.asarray(r < t)[:, None], mean, v)
    bound = CASES["shortcut"][1] | {"clip": 0.5}
    found = graded(functools.partial(shortcut, **bound))(MOVED, batch, {})
    predict = lambda a: see(a, z, r, t)  # noqa: E731
    assert_regression(found, predict, target, jnp.ones(8))


def test_consistency_training_is_that_of_f():
    """‖f(z_t, t) − sg f(z_s, s)‖² of f = z − t u(z, 0, t), written out: α-Flow's times t²."""
    value, batch = 0.25, toy_batch(250)
    z, v, _, t, keys = drawn(batch, times.to_data(LAW), 1.0)
    s = (1 - value) * t

    def f(a, z, t):
        return z - like(t, z) * toy(a, z, jnp.zeros_like(t), t, batch["label"], keys)

    objective = functools.partial(
        consistency, **(CASES["consistency"][1] | {"interval_share": 1.0})
    )
    found = graded(objective)(MOVED, batch, {})
    ahead = f(MOVED, z - like(t - s, z) * v, s)
    assert_regression(found, lambda a: f(a, z, t), ahead, 1 / (value * t**2))


# α-Flow.

PAIR = 0.1, 0.6


@functools.cache
def scale_slopes(objective, pair):
    """Step → the gradient along the scale of the exact u, which is linear in z."""
    r, t = pair
    always = lambda key: (jnp.float32(r), jnp.float32(t))  # noqa: E731
    bound = alpha_options(pair_law=always, interval_share=1.0)

    def network(a, z, r, t, label, keys):
        return a * gaussian.average_velocity(z, r[:, None], t[:, None])

    def slope(step):
        batch = gaussian_batch(200_000, step=step)
        return jax.grad(lambda a: objective(network, a, batch, KEY, **bound)[0])(jnp.ones(()))

    return jax.jit(slope)


def target_over_exact(value, objective=alpha_flow, pair=PAIR):
    """E[target | z] / u(z, r, t) of the exact field: with p = 0 and u's scale a, the gradient at
    a = 1 is (2 / α) E[u (u − target)]."""
    slope = scale_slopes(objective, pair)(jnp.int32(1000 * value))
    power = gaussian.average_velocity(1.0, *pair) ** 2 * gaussian.spread(pair[1]) ** 2
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
    bias = [target_over_exact(value) - 1 for value in (0.5, 0.25, 0.125)]
    assert bias[0] > 4 * bias[1] > 12 * bias[2] > 0
    assert bias[2] < 0.015


def test_at_alpha_one_u_is_regressed_on_v_for_every_r():
    batch = toy_batch(1000)
    z, v, r, t, keys = drawn(batch, times.interval(LAW))
    found = alpha_steps()(MOVED, batch, {"p": 0.0, "c": 1.0})
    predict = lambda a: toy(a, z, r, t, batch["label"], keys)  # noqa: E731
    assert_regression(found, predict, v, jnp.ones(8))
    assert int((r < t).sum()) == 4


def plain_mean_flow(**changes):
    return graded(functools.partial(mean_flow, **options(**changes)))


def test_as_alpha_falls_the_gradient_becomes_mean_flows():
    """With p = 0: the distance falls as α, and at α = 0 there is none."""
    _, expected = plain_mean_flow(p=0.0)(MOVED, toy_batch(), {})

    def distance(step):
        _, found = alpha_steps()(MOVED, toy_batch(step), {"p": 0.0, "c": 1.0})
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    far, half, near = distance(40), distance(20), distance(5)
    assert far / half == pytest.approx(2, rel=0.2) and half / near == pytest.approx(4, rel=0.2)
    assert near < 0.05
    assert distance(0) < 1e-5


GUIDED = {"omega": 0.2, "kappa": 0.7, "guidance_interval": (0.2, 0.6)}


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_at_alpha_zero_alpha_flow_is_mean_flow(p):
    """Up to the convention of c, to an element's error in one and to the sum in the other."""
    _, expected = plain_mean_flow(p=p, c=3 * 0.01, **GUIDED)(MOVED, toy_batch(), {})
    bound = alpha_options(p=p, c=0.01, **GUIDED)
    _, found = graded(functools.partial(alpha_flow, **bound))(MOVED, toy_batch(0), {})
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_schedule_of_alpha_and_its_corners():
    alpha = times.annealed(100, 300, 25.0, 0.005)
    at = {step: float(alpha(jnp.int32(step))) for step in (0, 100, 150, 190, 200, 210, 300, 10**9)}
    assert at[0] == at[100] == 1 and at[300] == at[10**9] == 0
    assert at[200] == 0.5 and at[190] + at[210] == pytest.approx(1)
    assert at[190] == pytest.approx(1 / (1 + np.exp(-25 * 10 / 200)), rel=1e-6)
    # 1 / (1 + e^−x) is clamped beyond x = log(0.995 / 0.005) = 5.29: 42.3 steps from the middle.
    steps = jnp.arange(100, 301)
    every = np.asarray(alpha(steps))
    assert (np.diff(every) <= 0).all()
    within = (every > 0) & (every < 1)
    assert steps[within].min() == 158 and steps[within].max() == 242
    assert every[within].max() <= 0.995 and every[within].min() >= 0.005
    smooth = times.annealed(0, 10, 1.0, 0.0)  # a flat sigmoid without clamps has no corners
    assert 0 < float(smooth(jnp.int32(10))) < float(smooth(jnp.int32(0))) < 1


# Consistency training.


def test_consistency_stands_still_where_it_is_continuous_and_errs_by_the_discretisation():
    law = times.clipped(times.uniform(), 0.05, 1.0)
    bound = alpha_options(pair_law=times.to_data(law), interval_share=1.0)
    assert_fixed(consistency, exact_network, K, bound)
    coarse = functools.partial(gaussian_batch, step=500)
    assert_not_fixed(consistency, exact_network, jnp.zeros(K), bound, coarse)
    bias = [target_over_exact(value, consistency, (0.0, 0.6)) - 1 for value in (0.5, 0.25)]
    assert 3 < bias[0] / bias[1] < 8 and bias[1] > 0.01


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_sampling_of_the_exact_field_has_the_datas_distribution(steps):
    n = 20_000
    noise = jax.random.normal(jax.random.key(1), (n, 1))
    keys = jax.random.split(jax.random.key(2), n)
    grid = uniform_grid(steps)
    x = integrate(consistency_step, gaussian.average_velocity, noise, grid, keys)[:, 0]
    assert stats.kstest(np.asarray(x), stats.norm(0, gaussian.SIGMA).cdf).pvalue > 1e-3
    # Beyond one step it has forgotten some of the noise that it began with.
    kept = np.corrcoef(x, noise[:, 0])[0, 1]
    assert kept > 0.999 if steps == 1 else abs(kept) < 0.95


# Guidance as an input.

LARGE = jnp.array([[0.0, 0.0, 1.0]])  # with it an interval is all times
MEANS = jnp.array([-1.0, 1.0])  # of the two classes; label 2 is neither


def two_classes(n=N, start=0):
    keys = jax.random.split(jax.random.key(start + 9))
    label = jax.random.bernoulli(keys[0], shape=(n,)).astype(jnp.int32)
    x = MEANS[label][:, None] + gaussian.SIGMA * jax.random.normal(keys[1], (n, 1))
    return {"x": x, "label": label, "position": start + jnp.arange(n)}


def of_class(z, t, mean):
    """E[e − x | z_t = z] for x ~ N(mean, SIGMA²)."""
    return gaussian.velocity(z - (1 - t) * mean, t, t) - mean


def of_mixture(z, t):
    """The same for either mean with probability one half: each weighted by its posterior."""
    log_odds = 2 * (1 - t) * z / gaussian.spread(t) ** 2
    share = jax.nn.sigmoid(log_odds)
    return share * of_class(z, t, MEANS[1]) + (1 - share) * of_class(z, t, MEANS[0])


def guided_field(z, t, label, told):
    """ω v_c − (ω − 1) v_∅ in the interval, v_c outside, and v_∅ without a label."""
    omega, low, high = jnp.split(told, 3, axis=1)
    omega = jnp.where((low <= t) & (t <= high), omega, 1.0)
    c, nothing = of_class(z, t, MEANS[jnp.minimum(label, 1)][:, None]), of_mixture(z, t)
    return jnp.where((label == 2)[:, None], nothing, omega * c - (omega - 1) * nothing)


def told_directions(a, z, r, t, label, told):
    """Moves, some for a label or a scale alone."""
    every = directions(z, r, t)
    of = (label == 2)[:, None], (label == 1)[:, None], (told[:, :1] - 1) / 3
    groups = [every, *(every * x.astype(z.dtype)[None] for x in of)]
    return jnp.tensordot(a, jnp.concatenate(groups), 1)


def any_guidance(key, spans):
    """ω ~ U(1, 4) and intervals, at r = t as well."""
    omega, low, high = jax.random.uniform(key, (3,))
    return jnp.stack([1 + 3 * omega, 0.5 * low, 0.5 + 0.5 * high])


def told_velocity(a, z, r, t, label, keys, told):
    return guided_field(z, t[:, None], label, told) + told_directions(a, z, t, t, label, told)


TOLD = improved_options(
    time_law=times.clipped(times.uniform(), 0.1, 1.0), interval_share=0.0, null_label=2,
    guidance_law=any_guidance, class_dropout_prob=0.3,
)  # fmt: skip


def test_told_guidance_stands_still_at_the_guided_field():
    """At r = t: v_g = ω v_c − (ω − 1) v_∅ inside the interval, plain v outside and unlabelled."""
    assert_fixed(improved_mean_flow, told_velocity, 4 * K, TOLD, two_classes)

    def unguided(a, z, r, t, label, keys, told):
        return told_velocity(a, z, r, t, label, keys, told.at[:, 0].set(1.0))

    assert_not_fixed(improved_mean_flow, unguided, jnp.zeros(4 * K), TOLD, two_classes)

    def everywhere(a, z, r, t, label, keys, told):
        return told_velocity(a, z, r, t, label, keys, told * jnp.array([[1.0, 0, 0]]) + LARGE)

    assert_not_fixed(improved_mean_flow, everywhere, jnp.zeros(4 * K), TOLD, two_classes)


def test_told_guidance_over_intervals_stands_still_at_the_guided_flow():
    """u is (z_t − z_r) / (t − r) of the guided field, integrated by Runge and Kutta's method."""

    def guided_heads(a, z, r, t, label, keys, told):
        h = (r - t)[:, None] / 8
        v = lambda z, t: guided_field(z, t, label, told)  # noqa: E731

        def one(at, _):
            z, t = at
            first = v(z, t)
            second = v(z + h / 2 * first, t + h / 2)
            third = v(z + h / 2 * second, t + h / 2)
            fourth = v(z + h * third, t + h)
            return (z + h / 6 * (first + 2 * second + 2 * third + fourth), t + h), None

        (end, _), _ = jax.lax.scan(one, (z, t[:, None]), length=8)
        u = (z - end) / jnp.maximum((t - r)[:, None], 1e-6)
        moved = told_directions(a, z, r, t, label, told)
        return u + moved, guided_field(z, t[:, None], label, told)

    def always(key, spans):
        return any_guidance(key, spans) * jnp.array([1.0, 0.0, 0.0]) + LARGE[0]

    bound = TOLD | {"interval_share": 1.0, "guidance_law": always, "heads": guided_heads}
    network = lambda *inputs: guided_heads(*inputs)[0]  # noqa: E731
    assert_fixed(improved_mean_flow, network, 4 * K, bound, two_classes)
    off = jnp.zeros(4 * K).at[: 4 * K : 5].set(0.2)
    assert_not_fixed(improved_mean_flow, network, off, bound, two_classes)


def test_told_target_by_sample():
    """Inside, outside, without a label: written out, and what the network is told there."""
    asked = []

    def own(params, z, t, label, told):
        asked.append((label, told))
        return like((label + 1).astype(z.dtype), z) * z + told[:, :1]

    z, v, t = jnp.full((3, 1), 2.0), jnp.full((3, 1), 10.0), jnp.array([0.3, 0.7, 0.3])
    label, dropped = jnp.array([1, 1, 2]), jnp.array([False, False, True])
    told = jnp.tile(jnp.array([[4.0, 0.2, 0.5]]), (3, 1))
    v_g, v_own = told_target(own, None, z, t, label, v, dropped, told, 2)
    np.testing.assert_allclose(v_own[:, 0], [2 * 2 + 4, 2 * 2 + 1, 3 * 2 + 1])
    np.testing.assert_allclose(v_g[:, 0], [10 + 0.75 * (8 - 7), 10, 10])
    ((labels, guidance),) = asked  # one doubled batch, the null label told of no guidance
    assert labels.tolist() == [1, 2, 1, 2, 2, 2]
    np.testing.assert_array_equal(guidance[1::2], [[1, 0, 1]] * 3)


def test_told_a_scale_of_one_is_not_guided():
    """Loss and gradient; and a network that is not told takes it for that."""
    module = DiT(1, 16, 2, 2, num_classes=3, guidance_inputs=True)
    network, params, batch = with_all_weights_drawn(module, (4, 4, 1))
    found = []
    for law in (None, lambda key, spans: jnp.array([1.0, 0.0, 1.0])):
        bound = improved_options(guidance_law=law, p=1.0, class_dropout_prob=0.3)
        found.append(graded(functools.partial(improved_mean_flow, **bound), network))
    plain, told = ((loss, slope) for (loss, _), slope in (f(params, batch, {}) for f in found))
    assert told[0] == pytest.approx(float(plain[0]), rel=1e-6)
    assert_trees_close(told[1], plain[1], 1e-5)


def test_told_guidance_is_one_call_per_step_and_compiles_once():
    calls = []

    def network(params, z, r, t, label, keys, told):
        jax.debug.callback(calls.append, told)
        return z * told[:, :1]

    @jax.jit
    def run(z, scale, low, high):
        label = jnp.zeros(4, jnp.int32)
        field = guided_velocity(network, None, label, 3, scale, (low, high), told=True)
        return integrate(mean_step, field, z, uniform_grid(5))

    for scale in (1.0, 2.0, 7.5):
        calls.clear()
        end = run(jnp.ones((4, 1)), scale, 0.1, 0.6)
        jax.effects_barrier()
        assert len(calls) == 5
        np.testing.assert_allclose(np.asarray(calls), np.tile([scale, 0.1, 0.6], (5, 4, 1)), 1e-6)
        np.testing.assert_allclose(end, (1 - scale / 5) ** 5, rtol=1e-3, atol=1e-4)
    assert run._cache_size() == 1


# For every objective.

FAR = times.clipped(LAW, 0.2, 0.9)  # so that no time is below what x is divided by
EVERY = {
    "flow_matching": (flow_matching, FLOW_OPTIONS),
    "mean_flow": (mean_flow, options(p=0.5)),
    **CASES,
}


@pytest.mark.parametrize("name", EVERY)
def test_data_and_velocity_predictions_of_one_field_have_the_same_loss(name):
    """x = z − t u, read as u again: also through forward mode, and in the gradient."""
    objective, bound = EVERY[name]
    bound = bound | {"levels": 3} if name == "shortcut" else bound
    if "time_law" in bound:
        bound = bound | {"time_law": FAR}
    if "pair_law" in bound:
        law = times.to_data if name == "consistency" else times.interval
        bound = bound | {"pair_law": law(FAR)}

    def from_data(a, z, r, t, *rest):
        x = z - like(t, z) * toy(a, z, r, t, *rest)
        return velocity_from_data(x, z, t)

    (loss, _), slope = graded(functools.partial(objective, **bound))(MOVED, toy_batch(), {})
    data = graded(functools.partial(objective, **bound), from_data)(MOVED, toy_batch(), {})
    assert data[0][0] == pytest.approx(float(loss), rel=1e-4)
    np.testing.assert_allclose(data[1], slope, rtol=1e-3, atol=1e-4)
    assert float(loss) > 0.1


def parted(name, share, apart, told):
    """An objective with all that it can be given, and a network for it."""
    objective, bound = CASES[name]
    bound = bound | {"apart": apart, "interval_share": share, "class_dropout_prob": 0.4}
    if name == "improved_mean_flow" and told:
        bound |= {"heads": toy_heads, "guidance_law": power_law(4.0, 1.5), "p": 0.5}
    if "omega" in bound and told:
        bound |= GUIDED | {"p": 0.5}
    return graded(functools.partial(objective, **bound))


APART = [
    *itertools.product(CASES, [0.25], [False, True]),
    *(itertools.product(CASES, [0.0, 1.0], [False]) if THOROUGH else ()),
]


@pytest.mark.parametrize(("name", "share", "told"), APART)
def test_the_parts_give_the_same_loss_metrics_and_gradient(name, share, told):
    """With units and labels dropped, guidance and a second head; and at α = 0 as well. Two
    microbatches, each with its own positions, add up to the whole."""
    plain, apart = (parted(name, share, apart, told) for apart in (False, True))
    alphas = (0, 400) if "alpha" in CASES[name][1] else (0,)
    for step in alphas:
        batch = toy_batch(step)
        expected, found = (form(MOVED, batch, {}) for form in (plain, apart))
        same = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
        jax.tree.map(same, found, expected)
        spans = 8 - int(expected[0][1]["velocity_error"][1])
        assert spans == 8 * share
    if share != 0.25:
        return

    def flat(params, part):
        (_, metrics), slope = apart(params, part, {})
        return slope, metrics

    slope, metrics = accumulate(flat, MOVED, microbatches(batch, 2))
    jax.tree.map(same, (slope, metrics), (found[1], found[0][1]))


@pytest.mark.parametrize("name", CASES)
def test_labels_dropped_at_random_are_null_labels(name):
    """All dropped: what null labels give, guidance or not."""
    objective, bound = CASES[name]
    batch = toy_batch()
    null = batch | {"label": jnp.full(8, 3, jnp.int32)}
    guided = GUIDED if "omega" in bound else {}
    all_dropped = bound | guided | {"class_dropout_prob": 1.0}
    dropped = graded(functools.partial(objective, **all_dropped))
    kept = graded(functools.partial(objective, **bound))
    expected = kept(MOVED, null, {})
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 dropped(MOVED, batch, {}), expected)  # fmt: skip
    assert abs(float(kept(MOVED, batch, {})[0][0]) / float(expected[0][0]) - 1) > 1e-3


# Laws.


def law_draws(law, n=20_000):
    return np.asarray(jax.jit(jax.vmap(law))(jax.random.split(jax.random.key(0), n)))


def test_a_time_range_clips_and_leaves_what_lies_inside():
    free, held = law_draws(LAW), law_draws(times.clipped(LAW, 0.2, 0.7))
    np.testing.assert_array_equal(held, np.clip(free, np.float32(0.2), np.float32(0.7)))
    r, t = map(np.asarray, jax.vmap(times.interval(times.clipped(LAW, 0.2, 0.7)))(
        jax.random.split(jax.random.key(1), 2000)
    ))  # fmt: skip
    assert r.min() == np.float32(0.2) and t.max() == np.float32(0.7) and (r <= t).all()


def test_dyadic_steps_and_ticks_have_their_frequencies():
    n, levels = 40_000, 4
    r, t = jax.vmap(times.dyadic(levels))(jax.random.split(jax.random.key(0), n))
    r, t = np.asarray(r), np.asarray(t)
    expected = {
        (i / 2**k, (i + 1) / 2**k): n / levels / 2**k for k in range(levels) for i in range(2**k)
    }
    pairs, counts = np.unique(np.stack([r, t], 1), axis=0, return_counts=True)
    assert {tuple(map(float, pair)) for pair in pairs} == set(expected)
    ideal = [expected[tuple(map(float, pair))] for pair in pairs]
    assert stats.chisquare(counts, ideal).pvalue > 1e-3
    ticks, counts = np.unique(law_draws(times.ticks(levels), n), return_counts=True)
    np.testing.assert_array_equal(ticks, np.arange(1, 17) / 16)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_told_scales_have_a_density_that_falls_as_a_power(power):
    most = 8.0
    law = power_law(most, power)
    told = law_draws(lambda key: law(key, jnp.bool_(True)))
    cdf = {  # ∫ ω^−power from 1, over that up to `most`
        0.0: lambda w: (w - 1) / (most - 1),
        1.0: lambda w: np.log(w) / np.log(most),
        2.0: lambda w: (1 - 1 / w) / (1 - 1 / most),
    }[power]
    assert stats.kstest(told[:, 0], cdf).pvalue > 1e-3
    assert stats.kstest(told[:, 1], stats.uniform(0, 0.5).cdf).pvalue > 1e-3
    assert stats.kstest(told[:, 2], stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(told.T) - np.eye(3)).max() < 0.03  # each is drawn by itself
    moment = law_draws(lambda key: law(key, jnp.bool_(False)))
    np.testing.assert_array_equal(moment[:, 0], told[:, 0])
    assert (moment[:, 1] == 0).all() and (moment[:, 2] == 1).all()


def test_what_a_network_is_told_is_drawn_beside_its_label():
    """Scales do not depend on whether the label is dropped, nor on the time or the noise."""
    keys = SampleKeys.of(KEY, jnp.arange(4000))
    omega = np.asarray(jax.vmap(power_law(8.0, 0.0))(keys.guidance, jnp.ones(4000, bool)))[:, 0]
    dropped = np.asarray(jax.vmap(lambda key: jax.random.bernoulli(key, 0.3))(keys.label))
    t = np.asarray(jax.vmap(times.uniform())(keys.time))
    noise = np.asarray(normal(keys.noise, jnp.zeros((4000, 1))))[:, 0]
    for other in (dropped, t, noise):
        assert abs(np.corrcoef(omega, other)[0, 1]) < 0.06
