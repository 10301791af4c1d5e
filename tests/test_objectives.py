"""The objectives against mathematics: closed forms, finite differences, equalities between them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flows import times
from flows.draws import SampleKeys, drop_labels, normal
from flows.guidance import effective_scale, guided_target, guided_velocity, network_calls
from flows.objectives import flow_matching, mean_flow
from flows.path import interpolate, like, velocity
from models.dit import DiT
from models.mlp import MLP
from tests import gaussian
from utils.flops import count

LAW = times.logit_normal(-0.4, 1.0)
OPTIONS = {
    "time_law": LAW,
    "interval_share": 0.5,
    "p": 1.0,
    "c": 0.01,
    "omega": 1.0,
    "kappa": 0.0,
    "guidance_interval": (0.0, 1.0),
    "class_dropout_prob": 0.0,
    "null_label": 3,
}
FLOW_OPTIONS = {k: OPTIONS[k] for k in ("time_law", "class_dropout_prob", "null_label")}
KEY = jax.random.key(7)


def options(**changes):
    return OPTIONS | changes


def with_all_weights_drawn(module, shape):
    """A network with no weight left at zero, its parameters, and a batch of 8 for it."""
    z, t, label = jnp.zeros((8, *shape)), jnp.zeros(8), jnp.zeros(8, jnp.int32)
    shapes = jax.eval_shape(module.init, KEY, z, t, t, label)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    x = jax.random.normal(jax.random.key(1), z.shape)
    batch = {"x": x, "label": jnp.arange(8) % 3, "position": jnp.arange(8)}
    network = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))
    return network, jax.tree.unflatten(tree, drawn), batch


@functools.cache
def dit():
    module = DiT(depth=2, hidden_size=32, num_heads=2, patch_size=2, num_classes=3)
    return with_all_weights_drawn(module, (4, 4, 1))


@functools.cache
def mlp():
    return with_all_weights_drawn(MLP(depth=2, hidden_size=16, num_classes=3), (4,))


def gradient(objective, network, params, batch, **bound):
    def loss(params, batch):
        return objective(network, params, batch, KEY, **bound)[0]

    return jax.jit(jax.grad(loss))(params, batch)


def value(network, params, batch, **bound):
    return jax.jit(lambda p: mean_flow(network, p, batch, KEY, **bound))(params)


def assert_trees_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y) + 1e-12


def draws(batch):
    """What an objective without label dropout draws for `batch`: z, v, r, t."""
    keys = SampleKeys.of(KEY, batch["position"])
    r, t = jax.vmap(times.interval(LAW))(keys.time)
    r = jnp.where(times.spans_interval(batch["position"], 0.5), r, t)
    noise = normal(keys.noise, batch["x"])
    return interpolate(batch["x"], noise, t), velocity(batch["x"], noise), r, t


def test_du_dt_is_the_finite_difference_along_the_flow():
    """The target that mean_flow regresses on, rebuilt from differences along (v, 0, 1)."""
    network, params, batch = dit()
    z, v, r, t = draws(batch)
    h = 1e-2
    ahead = network(params, z + h * v, r, t + h, batch["label"], None)
    behind = network(params, z - h * v, r, t - h, batch["label"], None)
    u = network(params, z, r, t, batch["label"], None)
    target = v - like(t - r, z) * (ahead - behind) / (2 * h)
    expected = jnp.mean(jnp.sum(jnp.square(u - target), axis=(1, 2, 3)))
    loss, _ = value(network, params, batch, **options(p=0.0))
    plain = jnp.mean(jnp.sum(jnp.square(u - v), axis=(1, 2, 3)))
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert abs(loss - plain) > 0.01 * plain  # the derivative matters at this tolerance


def test_no_gradient_flows_through_the_target():
    """d/dp of the loss is 2 (u − target) · du/dp, the target held as numbers."""
    network, params, batch = mlp()
    z, v, r, t = draws(batch)
    along = jax.jit(
        lambda *tangents: jax.jvp(
            lambda z, t: network(params, z, r, t, batch["label"], None), (z, t), tangents
        )
    )
    _, du_dt = along(v, jnp.ones_like(t))
    target = v - like(t - r, z) * du_dt

    def loss(p):
        u = network(p, z, r, t, batch["label"], None)
        return jnp.mean(jnp.sum(jnp.square(u - target), axis=1))

    found = gradient(mean_flow, network, params, batch, **options(p=0.0))
    assert_trees_close(found, jax.jit(jax.grad(loss))(params), 1e-4)


def test_adaptive_weight_scales_each_sample():
    """With weights held, the gradient is the mean of w ∇‖u − target‖² with w = (error + c)^−p,
    the error being each sample's own."""
    network, params, batch = mlp()
    expected = jax.tree.map(jnp.zeros_like, params)
    for i in range(8):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        error, _ = value(network, params, one, **options(p=0.0))
        plain = gradient(mean_flow, network, params, one, **options(p=0.0))
        weight = (error + 0.5) ** -0.75
        expected = jax.tree.map(lambda sum, g, w=weight: sum + w * g / 8, expected, plain)
    weighted = gradient(mean_flow, network, params, batch, **options(p=0.75, c=0.5))
    assert_trees_close(weighted, expected, 1e-4)


def test_with_r_equal_t_and_p_zero_mean_flow_is_flow_matching():
    network, params, batch = mlp()
    later = FLOW_OPTIONS | {"time_law": lambda key: times.interval(LAW)(key)[1]}
    a = gradient(mean_flow, network, params, batch, **options(p=0.0, interval_share=0.0))
    b = gradient(flow_matching, network, params, batch, **later)
    assert_trees_close(a, b, 1e-5)
    c = gradient(mean_flow, network, params, batch, **options(p=0.0))
    assert np.linalg.norm(jax.tree.leaves(c)[0] - jax.tree.leaves(b)[0]) > 1e-3


APART = {
    "dit": (DiT, {"hidden_size": 16, "num_heads": 2, "patch_size": 2}, (4, 4, 1)),
    "mlp": (MLP, {"hidden_size": 16}, (4,)),
}
GUIDANCE = {"none": (1.0, 0.0), "omega": (3.0, 0.0), "kappa": (0.2, 0.7)}


@functools.cache
def apart_case(name, rate):
    """A network that drops units at a rate, its parameters and a batch."""
    kind, sizes, shape = APART[name]
    return with_all_weights_drawn(kind(depth=1, num_classes=3, dropout=rate, **sizes), shape)


def both_forms(name, rate, share, guidance, cases):
    """(loss, metrics), gradient of the plain form and of the parts, for (interval, label dropout)
    of each case."""
    network, params, batch = apart_case(name, rate)
    omega, kappa = GUIDANCE[guidance]

    def step(params, interval, label_dropout, apart):
        bound = options(
            interval_share=share, p=0.5, omega=omega, kappa=kappa, guidance_interval=interval,
            class_dropout_prob=label_dropout, apart=apart, dropout=rate > 0,
        )  # fmt: skip
        return jax.value_and_grad(
            lambda p: mean_flow(network, p, batch, KEY, **bound), has_aux=True
        )(params)

    quick = {"xla_backend_optimization_level": "0"}  # half the time to compile
    forms = [
        jax.jit(step, static_argnums=3).lower(params, *cases[0], apart).compile(quick)
        for apart in (False, True)
    ]
    return [[form(params, *case) for form in forms] for case in cases]


COMBINATIONS = [
    *itertools.product(["mlp"], [0.0, 0.3], [0.0, 0.25, 0.5, 0.75, 1.0], GUIDANCE),
    *itertools.product(["dit"], [0.0, 0.3], [0.25], ["kappa"]),
]


@pytest.mark.parametrize(("name", "rate", "share", "guidance"), COMBINATIONS)
def test_the_parts_give_the_same_loss_metrics_and_gradient(name, rate, share, guidance):
    """With dropout of units a sample apart drops what it drops in the batch, and the guidance,
    which drops none, cannot take u(·|c) from the pass that does."""
    cases = [((low, high), prob) for low, high in ((0.0, 1.0), (0.3, 0.7)) for prob in (0.0, 0.4)]
    losses = set()
    for plain, apart in both_forms(name, rate, share, guidance, cases):
        (loss, metrics), gradient = plain
        assert apart[0][0] == pytest.approx(float(loss), rel=1e-6)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(same, apart[0][1], metrics)
        assert_trees_close(apart[1], gradient, 1e-6)
        losses.add(float(loss))
    assert len(losses) == (2 if guidance == "none" else 4)  # the cases differ


def test_du_dt_apart_works_on_its_share_of_the_samples():
    """Forward passes of samples, in products: 1 and a tangent for each with r ≠ t, above one."""
    network, params, batch = dit()
    wide = {k: jnp.tile(v, (4, *[1] * (v.ndim - 1))) for k, v in batch.items()}

    def cost(**bound):
        return count(lambda p: mean_flow(network, p, wide, KEY, **options(**bound)), params)

    once = cost(interval_share=0.0, apart=True)
    for share in (0.25, 0.5, 1.0):
        assert cost(interval_share=share, apart=True) == pytest.approx(once * (1 + 2 * share), 0.1)
        guided = {"interval_share": share, "apart": True, "omega": 1.0, "kappa": 0.5}
        # and the null label for all, the sample's own where r ≠ t; with dropout, for all
        expected = once * (1 + 2 * share + 1 + share)
        assert cost(**guided, dropout=False) == pytest.approx(expected, 0.1)
        assert cost(**guided) == pytest.approx(once * (1 + 2 * share + 2), 0.1)


def test_du_dt_apart_needs_whole_periods():
    network, params, batch = mlp()
    with pytest.raises(ValueError, match="8 samples hold no whole number of periods of 10"):
        mean_flow(network, params, batch, KEY, **options(interval_share=0.3, apart=True))


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.1])
def test_the_exact_average_velocity_of_a_gaussian_is_stationary(scale):
    """In expectation over (x, e), the gradient along the solution's scale vanishes there alone."""
    n = 40_000
    x = gaussian.SIGMA * jax.random.normal(jax.random.key(3), (n, 1))
    batch = {"x": x, "label": jnp.zeros(n, jnp.int32), "position": jnp.arange(n)}

    def network(a, z, r, t, label, keys):
        return (1 + a) * gaussian.average_velocity(z, r[:, None], t[:, None])

    bound = options(p=0.0, interval_share=1.0, time_law=times.uniform())
    slope = jax.jit(jax.grad(lambda a: mean_flow(network, a, batch, KEY, **bound)[0]))(scale)
    if scale == 0:
        assert abs(slope) < 0.01
    else:
        assert slope * scale > 0 and abs(slope) > 0.04


def linear_network(params, z, r, t, label, keys):
    """u = (label + 1) · z: simple enough to write targets out."""
    return like((label + 1).astype(z.dtype), z) * z


def test_guidance_target_written_out():
    z, v = jnp.full((4, 1), 2.0), jnp.full((4, 1), 10.0)
    t = jnp.array([0.1, 0.3, 0.5, 0.5])
    label, dropped = jnp.array([1, 1, 1, 3]), jnp.array([False, False, False, True])
    target = guided_target(
        linear_network, None, z, t, label, v, dropped,
        omega=0.5, kappa=0.75, interval=(0.2, 0.4), null_label=3,
    )  # fmt: skip
    # In the interval and with its label kept, only the second: 0.5·10 + 0.75·(2·2) − 0.25·(4·2).
    np.testing.assert_allclose(target[:, 0], [10.0, 6.0, 10.0, 10.0])
    assert effective_scale(0.5, 0.75) == 2.0


def test_guidance_without_kappa():
    z, v, t = jnp.full((1, 1), 2.0), jnp.full((1, 1), 10.0), jnp.array([0.5])
    target = guided_target(
        linear_network, None, z, t, jnp.array([1]), v, jnp.array([False]),
        omega=3.0, kappa=0.0, interval=(0.0, 1.0), null_label=3,
    )  # fmt: skip
    np.testing.assert_allclose(target, [[3.0 * 10 - 2.0 * 8]])


def test_dropped_labels_have_plain_v_as_target_and_tangent():
    network, params, batch = mlp()
    every = {"class_dropout_prob": 1.0}
    guided = options(omega=2.0, kappa=0.5, **every)
    a = gradient(mean_flow, network, params, batch, **guided)
    b = gradient(mean_flow, network, params, batch, **options(**every))
    assert_trees_close(a, b, 1e-6)
    kept = gradient(mean_flow, network, params, batch, **options(omega=2.0, kappa=0.5))
    assert np.linalg.norm(jax.tree.leaves(kept)[0] - jax.tree.leaves(b)[0]) > 1e-4


def test_guided_velocity_is_the_tangent_too():
    """With v_g = v + d the whole target moves by d − (t − r) ∂u/∂z · d: here u = (label + 1) z."""
    n = 8
    batch = {"x": jnp.ones((n, 1)), "label": jnp.ones(n, jnp.int32), "position": jnp.arange(n)}
    z, v, r, t = draws(batch)
    bound = options(p=0.0, omega=0.5, kappa=0.75)
    v_g = 0.5 * v + 0.75 * 2 * z - 0.25 * 4 * z
    target = v_g - (t - r)[:, None] * 2 * v_g
    expected = jnp.mean(jnp.square(2 * z - target))
    loss, _ = value(linear_network, None, batch, **bound)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_label_dropout_is_independent_of_the_interval():
    n = 4000
    keys = SampleKeys.of(KEY, jnp.arange(n))
    _, dropped = drop_labels(keys.label, jnp.zeros(n, jnp.int32), 0.1, 3)
    spans = times.spans_interval(jnp.arange(n), 0.25)
    for group in (spans, ~spans):
        assert float(dropped[group].mean()) == pytest.approx(0.1, abs=0.03)


def test_what_a_sample_draws_depends_on_its_position_alone():
    batch = mlp()[2]
    part = {k: v[2:5] for k, v in batch.items()}
    whole, some = (SampleKeys.of(KEY, b["position"]) for b in (batch, part))
    np.testing.assert_array_equal(
        normal(whole.noise, batch["x"])[2:5], normal(some.noise, part["x"])
    )


def test_errors_are_binned_by_the_length_of_the_interval():
    network, params, batch = mlp()
    _, metrics = value(network, params, batch, **options())
    _, _, r, t = draws(batch)
    counts = {k: int(count) for k, (_, count) in metrics.items()}
    gaps = np.asarray(t - r)
    assert counts["velocity_error"] == (gaps == 0).sum() == 4
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)):
        assert counts[f"error_by_gap/{low:g}-{high:g}"] == ((gaps > low) & (gaps <= high)).sum()


def test_sampling_guidance_and_its_count_of_calls():
    label, z = jnp.array([1, 0]), jnp.ones((2, 1))
    guided = guided_velocity(linear_network, None, label, 3, 2.0, (0.5, 1.0))
    inside, outside = (guided(z, jnp.asarray(t - 0.1), jnp.asarray(t)) for t in (0.75, 0.25))
    np.testing.assert_allclose(inside[:, 0], [4 + 2 * (2 - 4), 4 + 2 * (1 - 4)])
    np.testing.assert_allclose(outside[:, 0], [2, 1])
    times = np.array([1, 0.75, 0.5, 0.25])
    assert network_calls(times, 1.0) == 4
    assert network_calls(times, 2.0) == 8
    assert network_calls(times, 2.0, (0.5, 1.0)) == 7
