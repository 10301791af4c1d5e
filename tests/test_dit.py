"""DiT's options against the same network written in NumPy, and what must hold of each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import dit
from models.dit import DiT
from models.layers import Tokens
from utils import flops

SHAPE = (4, 6, 3)
SMALL = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "num_classes": 5}
SMALL |= {"mlp_ratio": 1.5}
ALL = {
    **{"positions": "rope", "mlp": "swiglu", "norm": "rms", "qk_norm": True},
    **{"conditioning": "tokens", "velocity_head": 1, "guidance_inputs": True},
}
OPTIONS = {
    "none": {},
    "rope": {"positions": "rope", "norm": "rms"},
    "swiglu": {"mlp": "swiglu", "qk_norm": True},
    "tokens": {"conditioning": "tokens", "num_classes": 0, "time_inputs": "t-r"},
    "heads": {"velocity_head": 1, "guidance_inputs": True},
    "all": ALL,
}
OTHERS = {"one head": ALL | {"velocity_head": 0}}  # compiled sooner
N = 3


def inputs():
    z = jax.random.normal(jax.random.key(0), (N, *SHAPE))
    t = jnp.linspace(0.3, 0.9, N)
    return z, t / 2, t, jnp.arange(N)


GUIDANCE = jnp.array([[1.0, 0.0, 1.0], [2.5, 0.1, 0.9], [8.0, 0.3, 0.6]])


def module(name: str = "all", **changes) -> DiT:
    return DiT(**(SMALL | (OPTIONS | OTHERS)[name] | changes))


def heads(net: DiT) -> bool:
    return bool(net.velocity_head)


def told(net: DiT):
    return GUIDANCE if net.guidance_inputs else None


@functools.cache
def parameters(name: str):
    """Of which none is near zero; scales of norms are about 1."""
    net = module(name)
    init = functools.partial(net.init, heads=heads(net))
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs())["params"]
    rng = np.random.default_rng(0)
    draw = lambda path, a: (0.3 * rng.normal(size=a.shape) + ("norm" in str(path))).astype("f4")  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, shapes)


def applied(net: DiT, params, z, r, t, *rest, **options):
    return net.apply({"params": params}, z, r, t, *rest, **options)


# The network in NumPy, float64, sample by sample


def silu(x):
    return x / (1 + np.exp(-x))


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def embedded(value, p):
    angles = value * np.exp(-np.log(1e4) * np.arange(128) / 128)
    wave = np.concatenate([np.cos(angles), np.sin(angles)])
    return dense(silu(dense(wave, p["in"])), p["out"])


def normed(x, norm):
    if norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def rotated(x, row, column):
    """(heads, d) by complex numbers."""
    quarter = x.shape[-1] // 4
    turns = 1e4 ** (-np.arange(quarter) / quarter)
    out = []
    for half, place in zip(np.split(x, 2, axis=-1), (row, column), strict=True):
        number = half[:, :quarter] + 1j * half[:, quarter:]
        number = number * np.exp(1j * place * turns)
        out += [number.real, number.imag]
    return np.concatenate(out, axis=-1)


def attended(x, p, net, places):
    """x (tokens, d), after its norm."""
    tokens, d = x.shape
    q, k, v = np.moveaxis(dense(x, p["qkv"]).reshape(tokens, 3, net.num_heads, -1), 1, 0)
    if net.qk_norm:
        q, k = normed(q, "rms") * p["q_norm"], normed(k, "rms") * p["k_norm"]
    if net.positions == "rope":
        q, k = (np.stack([rotated(a, *b) for a, b in zip(c, places, strict=True)]) for c in (q, k))
    out = np.zeros_like(q)
    for head in range(net.num_heads):
        scores = q[:, head] @ k[:, head].T / math.sqrt(d / net.num_heads)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head]
    return dense(out.reshape(tokens, d), p["out"])


def fed(x, p, net):
    h = dense(x, p["in"])
    if net.mlp == "swiglu":
        gate, value = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
        h = silu(gate) * value
    else:
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return dense(h, p["out"])


def block(x, p, c, net, places):
    if c is None:
        x = x + p["attention_gate"] * attended(
            normed(x, net.norm) * p["attention_norm"], p["attention"], net, places
        )
        return x + p["mlp_gate"] * fed(normed(x, net.norm) * p["mlp_norm"], p["mlp"], net)
    a, b, c, d, e, f = np.split(dense(silu(c), p["modulation"]), 6)
    x = x + c * attended(normed(x, net.norm) * (1 + b) + a, p["attention"], net, places)
    return x + f * fed(normed(x, net.norm) * (1 + e) + d, p["mlp"], net)


def tokens_of(p, net, r, t, label, guidance):
    """The condition's parts in the order of their tokens: (name, embedding)."""
    p = p["condition"]
    parts = [("label", p["label"]["embedding"][label])] if net.num_classes else []
    if net.guidance_inputs:
        omega, low, high = guidance
        given = (("omega", 1 - 1 / omega), ("t_min", low), ("t_max", high))
        parts += [(name, embedded(value, p[name])) for name, value in given]
    times = {"t": t, "r": r, "t-r": t - r}
    for name in net.time_inputs.split(","):
        parts.append((f"time_{name}", embedded(times[name], p[f"time_{name}"])))
    return parts


def sample(net, p, z, r, t, label, guidance, second):
    """u of one sample, or v where `second`."""
    height, width, channels = z.shape
    side = net.patch_size
    grid = [(i, j) for i in range(height // side) for j in range(width // side)]
    cut = lambda i, j: np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]  # noqa: E731
    x = dense(np.stack([z[cut(i, j)].reshape(-1) for i, j in grid]), p["patch"])
    if net.positions == "absolute":
        x = x + dit.positions(height // side, width // side, net.hidden_size)
    parts = tokens_of(p, net, r, t, label, guidance)
    c, before = sum(e for _, e in parts), 0
    if net.conditioning == "tokens":
        c = None
        first = [p["condition"][f"{name}_tokens"] + e for name, e in parts]
        x, before = np.concatenate([*first, x]), sum(map(len, first))
    places = [(0, 0)] * before + grid
    shared = net.depth - net.velocity_head
    own = "blocks_v" if second else "blocks_u"
    rows = [("blocks", i) for i in range(shared)] + [(own, i) for i in range(net.velocity_head)]
    for name, i in rows:
        x = block(x, jax.tree.map(lambda a, i=i: a[i], p[name]), c, net, places)
    p, x = p["head_v" if second else "head"], normed(x[before:], net.norm)
    if c is None:
        x = x * p["norm"]
    else:
        shift, scale = np.split(dense(silu(c), p["modulation"]), 2)
        x = x * (1 + scale) + shift
    out = np.zeros_like(z)
    for (i, j), row in zip(grid, dense(x, p["out"]), strict=True):
        out[cut(i, j)] = row.reshape(side, side, channels)
    return out


def reference(name: str, z, r, t, second: bool = False, params=None):
    net = module(name)
    params = parameters(name) if params is None else params
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    label, guidance = np.arange(N), np.asarray(GUIDANCE, np.float64)
    rows = zip(z, r, t, label, guidance, strict=True)
    return np.stack([sample(net, params, *row, second) for row in rows])


def exact_inputs():
    z, r, t, _ = (np.asarray(a, np.float64) for a in inputs())
    return z, r, t


TANGENT = (np.random.default_rng(1).normal(size=(N, *SHAPE)), np.zeros(N) + 0.7, np.ones(N))


@functools.cache
def values(name: str, **changes):
    """((u, v or nothing), their derivatives along TANGENT), by jax.jvp."""
    net = module(name, **changes)

    def outputs(params, z, r, t):
        u = applied(net, params, z, r, t, inputs()[3], guidance=told(net), heads=heads(net))
        return u if heads(net) else (u,)

    def both(params, *times):
        tangents = tuple(jnp.asarray(a, jnp.float32) for a in TANGENT)
        return jax.jvp(functools.partial(outputs, params), times, tangents)

    return jax.jit(both)(parameters(name), *inputs()[:3])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_what_it_is_in_numpy(name):
    """Values, and derivatives along a direction of (z, r, t) as differences of those in NumPy."""
    found, derivatives = values(name)
    step, point = 1e-5, exact_inputs()
    ahead, behind = (
        [a + sign * step * b for a, b in zip(point, TANGENT, strict=True)] for sign in (1, -1)
    )
    for second, (u, du) in enumerate(zip(found, derivatives, strict=True)):
        right = reference(name, *point, second=bool(second))
        assert np.abs(right).std() > 0.05
        np.testing.assert_allclose(u, right, atol=2e-5 * np.abs(right).max())
        slope = reference(name, *ahead, bool(second)) - reference(name, *behind, bool(second))
        slope /= 2 * step
        np.testing.assert_allclose(du, slope, atol=1e-4 * np.abs(slope).max())


# RoPE


def scores(q, k, places, shift=(0.0, 0.0)):
    moved = places + np.asarray(shift)
    return jnp.einsum("nqhd,nkhd->nhqk", dit.rope(q, moved), dit.rope(k, moved))


def test_rope_is_relative():
    """Scores are those of the same patches anywhere else, and not those of others."""
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 12, 3, 8))
    places = dit.grid_places(3, 4)
    right = scores(q, k, places)
    for shift in ((5.0, 0.0), (0.0, -3.0), (2.5, 7.0)):
        np.testing.assert_allclose(scores(q, k, places, shift), right, atol=2e-5)
        other = jnp.einsum(
            "nqhd,nkhd->nhqk", dit.rope(q, places + np.asarray(shift)), dit.rope(k, places)
        )
        assert np.abs(other - right).max() > 0.5
    swapped = scores(q, k, places[:, ::-1])
    assert np.abs(swapped - right).max() > 0.5  # rows are no columns
    np.testing.assert_allclose(  # lengths stay
        jnp.linalg.norm(dit.rope(q, places), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(dit.rope(q, 0 * places), q)


def test_places_count_rows_and_columns_after_the_tokens():
    places = dit.grid_places(2, 3, before=2)
    assert places.tolist() == [[0, 0]] * 2 + [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


# What is told, and the second head


@pytest.mark.parametrize("name", ["heads", "all"])
def test_guidance_is_told_to_each_sample(name):
    net, params, point = module(name), parameters(name), inputs()
    u = jax.jit(lambda guidance: applied(net, params, *point, guidance=guidance))
    right = u(GUIDANCE)
    for column, value in ((0, 4.0), (1, 0.2), (2, 0.7)):
        changed = u(GUIDANCE.at[1, column].set(value)) - right
        assert np.abs(changed[1]).max() > 1e-3
        assert np.abs(changed[::2]).max() < 1e-5
    without = jnp.broadcast_to(jnp.array([[1.0, 0.0, 1.0]]), (N, 3))
    np.testing.assert_allclose(u(None), u(without), atol=1e-5 * np.abs(right).max())


def test_what_a_network_has_not_is_refused():
    net = module("none")
    for options in ({"guidance": GUIDANCE}, {"heads": True}):
        with pytest.raises(ValueError, match=r"heads needs velocity_head, and guidance needs"):
            jax.eval_shape(functools.partial(net.init, **options), jax.random.key(0), *inputs())


def test_u_alone_costs_what_a_network_without_a_second_head_costs():
    """As the program is written, and where v is computed and thrown away, as it is compiled."""
    net, params, point = module("all"), parameters("all"), inputs()
    without = module("all", velocity_head=0)
    joined = {k: v for k, v in params.items() if k not in ("blocks_u", "blocks_v", "head_v")}
    stack = lambda *parts: jnp.concatenate(parts)  # noqa: E731
    joined["blocks"] = jax.tree.map(stack, params["blocks"], params["blocks_u"])
    alone = lambda p: applied(net, p, *point)  # noqa: E731
    first = lambda p: applied(net, p, *point, heads=True)[0]  # noqa: E731
    single = lambda p: applied(without, p, *point)  # noqa: E731
    a, b, c = jax.jit(alone)(params), jax.jit(first)(params), jax.jit(single)(joined)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, c, atol=1e-5)
    assert flops.count(alone, params) == flops.count(single, joined)
    assert flops.count(first, params) > 1.3 * flops.count(alone, params)
    costs = [jax.jit(f).lower(params).compile().cost_analysis()["flops"] for f in (alone, first)]
    assert costs[0] == costs[1]


# Parameters


def test_parameters_of_the_default_network():
    """Names and shapes that checkpoints, imports and exports count on."""
    shapes = jax.eval_shape(module("none").init, jax.random.key(0), *inputs())["params"]
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    layers = {  # a stack of depth 2 where the kernel has three axes
        **{f"condition.time_{name}.in": (256, 16) for name in ("t", "t-r")},
        **{f"condition.time_{name}.out": (16, 16) for name in ("t", "t-r")},
        **{"patch": (12, 16), "head.modulation": (16, 32), "head.out": (16, 12)},
        **{"blocks.attention.qkv": (2, 16, 48), "blocks.attention.out": (2, 16, 16)},
        **{"blocks.mlp.in": (2, 16, 24), "blocks.mlp.out": (2, 24, 16)},
        "blocks.modulation": (2, 16, 96),
    }
    expected = {f"{name}.kernel": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": (*shape[:-2], shape[-1]) for name, shape in layers.items()}
    assert flat == expected | {"condition.label.embedding": (6, 16)}


@pytest.mark.parametrize(
    ("depth", "width", "count_heads", "millions"),
    [(12, 768, 12, 89), (24, 768, 12, 174), (32, 1024, 16, 409), (48, 1024, 16, 610)],
)
def test_parameter_counts_are_those_of_improved_mean_flow(depth, width, count_heads, millions):
    """As published (arXiv 2512.02012), without what v alone needs; ours have biases, 0.1 % more."""
    sizes = {"depth": depth, "hidden_size": width, "num_heads": count_heads, "patch_size": 2}
    options = ALL | {"velocity_head": 8, "mlp_ratio": 8 / 3, "time_inputs": "t-r"}
    net = DiT(**sizes, **options, num_classes=1000)
    point = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *point)
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    print(f"{found:.2f} M, published {millions}")
    assert abs(found - millions) < 0.5 + 0.001 * millions  # as rounded, and the biases


def test_all_start_at_zero():
    net, key = module("all"), jax.random.key(0, impl="rbg")  # which compiles sooner
    params = jax.jit(functools.partial(net.init, heads=True))(key, *inputs())["params"]
    for head in ("head", "head_v"):
        assert not any(leaf.any() for leaf in jax.tree.leaves(params[head]["out"]))
    for name in ("blocks", "blocks_u", "blocks_v"):
        for part in ("attention", "mlp"):
            assert (params[name][f"{part}_gate"] == 0).all()
            assert (params[name][f"{part}_norm"] == 1).all()
        assert (params[name]["attention"]["q_norm"] == 1).all()
    assert float(params["condition"]["label_tokens"].std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_classes": 5, "time_inputs": "t-r", "guidance_inputs": True}, 20),
        ({"num_classes": 0, "time_inputs": "t, t-r", "guidance_inputs": False}, 8),
    ],
)
def test_tokens_are_as_many_as_is_said(options, count):
    """20 as published: 8 of the class, 4 each of the time and ω, 2 each of the interval's ends."""
    assert dit.prefix("tokens", **options) == count and dit.prefix("adaln", **options) == 0
    *_, r, t, label = inputs()
    guidance = GUIDANCE if options["guidance_inputs"] else None
    net = Tokens(16, options["num_classes"], options["time_inputs"])
    out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), r, t, label, guidance)
    assert out.shape == (N, count, 16)


def test_sizes_that_do_not_fit_are_refused():
    dit.check(depth=2, hidden_size=16, num_heads=4, positions="rope", velocity_head=2)
    with pytest.raises(ValueError, match=r"heads of a multiple of 4 wide, not 2: give another"):
        dit.check(depth=2, hidden_size=16, num_heads=8, positions="rope")
    for blocks in (3, -1):
        with pytest.raises(ValueError, match=f"velocity_head={blocks}: of the 2 blocks"):
            dit.check(depth=2, hidden_size=16, num_heads=4, velocity_head=blocks)


# How it is computed


def test_a_sample_depends_on_its_own_alone():
    """Dropout's masks included, of which the second head has its own."""
    net, params, (z, r, t, label) = module("all", dropout=0.4), parameters("all"), inputs()
    keys = jax.random.split(jax.random.key(5), N)

    @jax.jit
    def both(params, z, r, t, label, keys, guidance):
        return applied(net, params, z, r, t, label, keys, guidance, heads=True)

    one = slice(1, 2)
    u, v = both(params, z, r, t, label, keys, GUIDANCE)
    alone = both(params, z[one], r[one], t[one], label[one], keys[one], GUIDANCE[one])
    for together, own in zip((u, v), alone, strict=True):
        np.testing.assert_allclose(together[one], own, atol=2e-5)
    assert np.abs(u - both(params, z, r, t, label, keys[::-1], GUIDANCE)[0]).max() > 0.01
    params = params | {"blocks_v": params["blocks_u"], "head_v": params["head"]}
    u, v = both(params, z, r, t, label, keys, GUIDANCE)
    assert np.abs(u - v).max() > 0.01


def test_gradient_of_a_jvp_with_recomputation():
    """Of a loss of u and du/dt, along a direction of the parameters: as differences in NumPy."""
    name, (z, r, t, label) = "one head", inputs()
    params = parameters(name)

    def loss(params):
        u = functools.partial(applied, module(name, remat="full"), params)
        told = {"label": label, "guidance": GUIDANCE}
        u, du_dt = jax.jvp(lambda *x: u(*x, **told), (z, r, t), (z, 0 * r, jnp.ones_like(t)))
        return jnp.sum(jnp.square(u + du_dt))

    def exact(step):
        moved = jax.tree.map(lambda a, b: a + step * b.astype(np.float64), params, direction)
        z, r, t = exact_inputs()
        near = [reference(name, z * (1 + s), r, t + s, params=moved) for s in (1e-5, -1e-5)]
        u = reference(name, z, r, t, params=moved)
        return np.sum(np.square(u + (near[0] - near[1]) / 2e-5))

    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape).astype("f4"), params)
    slope = (exact(1e-4) - exact(-1e-4)) / 2e-4
    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(grads))
    parts = jax.tree.map(lambda a, b: np.vdot(np.float64(a), b), grads, direction)
    print(sum(jax.tree.leaves(parts)), slope)
    assert sum(jax.tree.leaves(parts)) == pytest.approx(slope, rel=1e-3)


def test_the_kernel_of_forward_mode_gives_the_same():
    for found, right in zip(values("all", attention="fused"), values("all"), strict=True):
        for a, b in zip(found, right, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.usefixtures("standard_promotion")
def test_bfloat16_computes_near_float32_and_returns_float32():
    for rough, exact in zip(values("all", dtype=jnp.bfloat16)[0], values("all")[0], strict=True):
        assert rough.dtype == jnp.float32
        error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
        assert 1e-5 < error < 0.05
