"""Optimizers: what they store and how far it is off, what they move, and where they agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import base, mnist
from models.dit import SIZES, DiT
from utils import optimizers, sharding
from utils.checkpoint import Checkpoints
from utils.cli import UserError
from utils.optimizers import check_optimizer, dequantise, make_optimizer, updates_before
from utils.sharding import abstract_state, make_mesh, state_sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")
KINDS = [("adamw8bit", "float32"), ("adamw", "bfloat16"), ("muon", "float32"), ("muon", "bfloat16")]


def config_of(name: str = "adamw", moments: str = "float32", **changes) -> ConfigDict:
    config = base.get_config()
    config.optimizer.update(
        {"name": name, "moments": moments, "lr": 1e-2, "beta2": 0.99, **changes}
    )
    return config


def shapes_of(**sizes) -> dict:
    """The shapes of a DiT's parameters."""
    module = DiT(**sizes)
    z, t = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)

    def init(key):
        return module.init(key, z, t, t, jnp.zeros(1, jnp.int32))["params"]

    return jax.eval_shape(init, jax.random.key(0))


def random_like(tree, seed: int, size: float = 1.0):
    """Normal numbers whose magnitudes differ over the entries by some orders."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        wide = 10 ** rng.uniform(-3, 0, leaf.shape)
        return jnp.asarray(size * wide * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, tree)


@functools.cache
def small_params() -> dict:
    """Two blocks' matrices in one, with what is none, named as in a DiT."""
    blocks = {
        "qkv": {"kernel": jnp.zeros((2, 32, 96))},
        "in": {"kernel": jnp.zeros((2, 32, 128)), "bias": jnp.zeros((2, 128))},
    }
    return random_like({"blocks": blocks, "label": {"embedding": jnp.zeros((64, 80))}}, 0, 0.1)


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Eight bits.


@pytest.mark.parametrize("shape", [(4, 70, 512), (5000,)], ids=str)
@pytest.mark.parametrize("moment", ["first", "second"])
def test_what_eight_bits_store_lies_within_the_bound_stated(moment, shape):
    """Over 18 orders of magnitude within a block, and blocks that are all zero."""
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-16, 2, shape) * rng.choice([-1.0, 0.0, 1.0], shape, p=[0.45, 0.1, 0.45])
    x = np.float32(x if moment == "first" else np.abs(x))
    x.reshape(-1)[: x.size // 4] = 0
    bits = jax.random.bits(jax.random.key(0), shape, jnp.uint32) >> 16
    packing = optimizers.EIGHT_BITS
    stored = jax.jit(packing.first if moment == "first" else packing.second)(x, bits)
    got = np.asarray(jax.jit(dequantise)(stored))
    floor = 3.2e-4 if moment == "first" else 9.0e-8
    scale = np.asarray(jax.jit(lambda s: optimizers._spread(s, shape))(stored.scales))
    large = np.abs(x) >= floor * scale
    assert stored.codes.dtype.itemsize == 1 and stored.codes.shape == shape
    assert 0.1 < large.mean() < 0.9
    assert (np.abs(got - x) <= np.where(large, 0.066 * 1.0001 * np.abs(x), floor * scale)).all()
    assert (got * x >= 0).all() and (got[x == 0] == 0).all()
    assert np.abs(got).max() == np.abs(x).max()  # each block's largest is exact
    if moment == "second":
        assert (got[x > 0] > 0).all()


def test_every_block_has_its_own_scale():
    x = jnp.concatenate([jnp.full(256 * 15, 1.0), jnp.full(256, 1e-20)])
    pack = jax.jit(optimizers.quantise_second)
    got = jax.jit(dequantise)(pack(x, jnp.zeros(x.shape, jnp.uint32)))
    np.testing.assert_array_equal(got, x)


def test_small_leaves_stay_as_they_are():
    x = jax.random.normal(jax.random.key(0), (4095,))
    assert optimizers.quantise_first(x, jnp.zeros(x.shape, jnp.uint32)) is x


@pytest.mark.parametrize("pack", ["eight bits", "bfloat16"])
def test_rounding_leaves_the_mean_as_it_is(pack):
    first = {"eight bits": optimizers.quantise_first, "bfloat16": optimizers.to_bfloat16}[pack]
    x = 10 ** jax.random.uniform(jax.random.key(1), (4096,), minval=-3, maxval=0)
    x = x.at[::256].set(1.0)  # of each block the scale

    def once(key):
        bits = jax.random.bits(key, x.shape, jnp.uint32) >> 16
        return dequantise(first(x, bits)) / x - 1

    errors = np.asarray(jax.lax.map(once, jax.random.split(jax.random.key(2), 400)))
    spacing = 0.066 if pack == "eight bits" else 2.0**-7
    assert np.abs(errors).max() <= spacing * 1.0001
    # 400 × 4096 draws: the mean of all within four deviations, and that of each within six.
    assert abs(errors.mean()) < 4 * spacing / 2 / np.sqrt(errors.size)
    assert np.abs(errors.mean(0)).max() < 6 * spacing / 2 / np.sqrt(400)


@pytest.mark.parametrize(
    "sizes",
    [{**SIZES["XL/2"], "num_classes": 1000}, {**SIZES["B/4"], "num_classes": 1000}, "mnist:small"],
    ids=["XL/2", "B/4", "mnist:small"],
)
def test_eight_bits_take_at_most_27_hundredths_of_the_bytes(sizes):
    if sizes == "mnist:small":
        model = mnist.get_config("small").model
        keys = ("depth", "hidden_size", "num_heads", "patch_size")
        sizes = {key: model[key] for key in keys} | {"num_classes": 10}
    params = shapes_of(**sizes)
    whole, eight = (
        jax.eval_shape(make_optimizer(config_of(name))[0].init, params)
        for name in ("adamw", "adamw8bit")
    )
    assert bytes_of(whole) == pytest.approx(2 * bytes_of(params), rel=1e-4)
    assert 0.25 < bytes_of(eight) / bytes_of(whole) <= 0.27


@pytest.mark.parametrize("pack", ["eight bits", "bfloat16"])
def test_a_second_moment_follows_where_rounding_to_the_nearest_stalls(pack):
    """beta2 = 0.998: a step changes it by less than half the distance of what can be stored."""
    packing = optimizers.EIGHT_BITS if pack == "eight bits" else optimizers.PACKINGS["bfloat16"]
    adam = optimizers.scale_by_adam(0.9, 0.998, packing)
    moving = jnp.arange(4096) % 2 == 1  # the others keep their block's scale

    def step(state, number):
        grads = jnp.where(moving & (number >= 20), 0.1, 1.0)
        return adam.update(grads, state)[1], None

    state = jax.lax.scan(step, adam.init(jnp.zeros(4096)), jnp.arange(1520))[0]
    exact, nearest = 0.0, jnp.zeros((), jnp.bfloat16)
    for number in range(1520):
        square = 1.0 if number < 20 else 0.01
        exact = 0.998 * exact + 0.002 * square
        wide = 0.998 * float(nearest) + 0.002 * square
        nearest = wide if number < 20 else np.asarray(wide, jnp.bfloat16)
    found = np.asarray(dequantise(state.nu))[1::2]
    assert found.mean() == pytest.approx(exact, rel=0.05)
    assert float(nearest) > 2 * exact  # the control: it stays where it was


def adam_against(packing, loss, params, steps: int = 300) -> tuple[float, float]:
    """The loss after training by Adam with float32 moments, and with others."""

    def train(adam):
        optimizer = optax.chain(adam, optax.scale_by_learning_rate(1e-2))

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        return float(loss(jax.lax.scan(step, start, None, steps)[0][0]))

    return train(optax.scale_by_adam(0.9, 0.99)), train(
        optimizers.scale_by_adam(0.9, 0.99, packing)
    )


PACKED = [optimizers.EIGHT_BITS, optimizers.PACKINGS["bfloat16"]]


@pytest.mark.parametrize("packing", PACKED, ids=["eight bits", "bfloat16"])
def test_few_bits_minimise_as_float32_does(packing):
    """A quadratic whose curvatures differ a thousandfold, and a network that learns another."""
    curvature = jnp.logspace(-3, 0, 4096)
    params = jax.random.normal(jax.random.key(0), (4096,))
    start = float(jnp.sum(curvature * params**2))
    exact, few = adam_against(packing, lambda p: jnp.sum(curvature * p**2), params)
    assert few < 0.02 * start and few == pytest.approx(exact, rel=0.1, abs=2e-4 * start)
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (128, 64))
    y = jnp.tanh(x @ jax.random.normal(keys[1], (64, 4)))
    net = {
        "a": 0.1 * jax.random.normal(keys[2], (64, 64)),
        "b": 0.1 * jax.random.normal(keys[3], (64, 4)),
    }

    def error(p):
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)

    exact, few = adam_against(packing, error, net, 100)
    assert exact < 0.2 * float(error(net)) and few == pytest.approx(exact, rel=0.15)


def test_float32_moments_are_those_of_optax():
    """Ours with nothing packed is optax's; the config's AdamW is optax's bit for bit."""
    params, grads = small_params(), random_like(small_params(), 1)
    theirs = optax.adamw(1e-2, 0.9, 0.99, weight_decay=0.1)
    config = config_of(weight_decay=0.1)
    ours = optax.chain(
        optimizers.scale_by_adam(0.9, 0.99, optimizers.PACKINGS["float32"]),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    rows = []
    for optimizer in (theirs, make_optimizer(config)[0], ours):
        state, jitted = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(2):
            updates, state = jitted(grads, state, params)
        rows.append(updates)
    jax.tree.map(np.testing.assert_array_equal, rows[0], rows[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), rows[0], rows[2])


# Muon.


def test_muon_makes_the_update_of_each_layer_orthogonal():
    """Also for query, key and value of one kernel, and for a convolution of 3·3·5 inputs."""
    params = {
        "blocks": {
            "attention": {"qkv": {"kernel": jnp.zeros((3, 16, 48))}},
            "mlp": {"in": {"kernel": jnp.zeros((3, 16, 64)), "bias": jnp.zeros((3, 64))}},
        },
        "down": {"conv_0": {"kernel": jnp.zeros((3, 3, 5, 24))}},
        "head": {"out": {"kernel": jnp.zeros((16, 4))}},
        "label": {"embedding": jnp.zeros((11, 16))},
        "out": {"kernel": jnp.zeros((3, 3, 16, 3))},
        "patch": {"kernel": jnp.zeros((12, 16))},
    }
    optimizer = make_optimizer(config_of("muon", lr=1.0))[0]
    updates = first_update(optimizer, random_like(params, 0), params)
    qkv = np.asarray(updates["blocks"]["attention"]["qkv"]["kernel"]).reshape(3, 16, 3, 16)
    matrices = [
        *qkv.transpose(0, 2, 1, 3).reshape(9, 16, 16),
        *np.asarray(updates["blocks"]["mlp"]["in"]["kernel"]),
        np.asarray(updates["down"]["conv_0"]["kernel"]).reshape(45, 24),
    ]
    for matrix in matrices:
        size = optimizers.MUON_SIZE * np.sqrt(max(matrix.shape))
        values = np.linalg.svd(matrix / size, compute_uv=False)
        # Five of Jordan's steps bring singular values near 1, those from 0.01 of the norm on.
        assert values.max() < 1.25 and np.median(values) > 0.6, values
        assert np.sqrt(np.mean(matrix**2)) < 1.3 * optimizers.MUON_SIZE
    others = (updates["blocks"]["mlp"]["in"]["bias"], updates["head"]["out"]["kernel"])
    others += (updates["label"]["embedding"], updates["out"]["kernel"], updates["patch"]["kernel"])
    for leaf in others:  # AdamW's first update is the gradient's sign
        np.testing.assert_allclose(np.abs(leaf), 1.0, rtol=1e-2)


def test_muon_of_stacked_layers_is_muon_of_each():
    """Against optax on single matrices, query, key and value given apart."""
    gradient = np.asarray(random_like(jnp.zeros((2, 8, 24)), 0))
    ours = optimizers.scale_by_muon()
    tree = {"blocks": {"qkv": {"kernel": jnp.asarray(gradient)}}}
    found, _ = jax.jit(lambda g: ours.update(g, ours.init(g)))(tree)
    theirs = optax.contrib.scale_by_muon()
    alone = jax.jit(lambda g: theirs.update(g, theirs.init(g))[0])
    for layer in range(2):
        for part in range(3):
            where = layer, slice(None), slice(8 * part, 8 * part + 8)
            expected = alone(jnp.asarray(gradient[where])) * 0.2 * np.sqrt(8)
            got = found["blocks"]["qkv"]["kernel"][where]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# All of them.


def three_updates(optimizer, params, places=None):
    """Updates after three gradients, and the state; over devices where `places` says so."""
    jitted, state = jax.jit(optimizer.update), jax.jit(optimizer.init)(params)
    if places:
        params, state = (jax.device_put(tree, places(tree)) for tree in (params, state))
    for seed in range(3):
        grads = random_like(params, seed)
        grads = jax.device_put(grads, places(grads)) if places else grads
        updates, state = jitted(grads, state, params)
    return updates, state


@pytest.mark.parametrize(("name", "moments"), KINDS[:3])
def test_moments_over_devices_are_those_on_one(name, moments, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 1)
    monkeypatch.setattr(optimizers, "BLOCK", 16)  # rows of several blocks, even here
    optimizer, params = make_optimizer(config_of(name, moments))[0], small_params()
    mesh = make_mesh(2, 4)
    one, _ = three_updates(optimizer, params)
    many, state = three_updates(optimizer, params, functools.partial(state_sharding, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), many, one)
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 4096]
    assert large
    for leaf in large:
        assert leaf.addressable_shards[0].data.size == leaf.size // 4


SHAPES = [(2, 64, 1022), (64, 1022), (72, 1020), (3, 68, 1022), (3, 3, 96, 96), (10_000, 20)]


@pytest.mark.parametrize("fsdp", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_block_lies_on_two_devices(shape, fsdp, monkeypatch):
    """Whichever axis fsdp splits, which for (64, 1022) and two devices is not that for four."""
    monkeypatch.setattr(sharding, "SMALLEST", 1)
    place = state_sharding(make_mesh(8 // fsdp, fsdp), jax.ShapeDtypeStruct(shape, jnp.float32))
    owner = np.zeros(shape, np.float32)
    for device, where in place.devices_indices_map(shape).items():
        owner[where] = 1 + device.id % fsdp
    assert len(np.unique(owner)) == (1 if place.is_fully_replicated else fsdp)
    blocks = np.asarray(optimizers._blocks(jnp.asarray(owner)))
    there = np.where(blocks == 0, blocks.max(axis=-1, keepdims=True), blocks)  # 0: beyond a part
    assert (np.ptp(there, axis=-1) == 0).all()
    assert blocks.shape[:-2] == optimizers._parts(shape)
    full = np.count_nonzero(blocks) / blocks.size
    assert full > 0.6, full
    # Each entry finds its own block again.
    scales = jnp.max(jnp.asarray(blocks), axis=-1)
    np.testing.assert_array_equal(optimizers._spread(scales, shape), owner)


@pytest.mark.parametrize(("name", "moments"), KINDS)
def test_the_state_goes_through_a_checkpoint(name, moments, tmp_path):
    """And back onto other devices, with the same update afterwards."""
    optimizer, params = make_optimizer(config_of(name, moments))[0], small_params()
    _, state = three_updates(optimizer, params)
    assert int(updates_before(state)) == 3
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_now(3, {"train": {"opt_state": state}})
        wanted = abstract_state(lambda: optimizer.init(params), make_mesh())
        found = checkpoints.restore({"train": {"opt_state": wanted}})["train"]["opt_state"]
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def first_update(optimizer, grads, params):
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)


@pytest.mark.parametrize(("name", "moments"), [("adamw8bit", "float32"), ("muon", "float32")])
def test_clipping_and_decay_hold_for_all(name, moments):
    """A gradient of 0 leaves the decay alone; a clipped one is the one it is clipped to."""
    params = small_params()
    none = jax.tree.map(jnp.zeros_like, params)
    decaying = make_optimizer(config_of(name, moments, weight_decay=0.5, lr=0.1))[0]
    updates = first_update(decaying, none, params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.05 * p, atol=1e-7), updates, params)
    clipping = make_optimizer(config_of(name, moments, clip_norm=1.0))[0]
    grads = random_like(params, 0)
    scaled = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
    rows = [first_update(clipping, g, params) for g in (grads, scaled)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *rows)


# Schedules and what does not go together.


@pytest.mark.parametrize(
    ("changes", "corners"),
    [
        ({"schedule": "constant"}, {0: 1, 100: 1}),
        ({"schedule": "constant", "warmup_steps": 10}, {0: 0, 5: 0.5, 10: 1, 100: 1}),
        ({"schedule": "cosine", "warmup_steps": 10}, {0: 0, 10: 1, 55: 0.5, 100: 0}),
        (
            {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 20},
            {0: 0, 5: 0.5, 10: 1, 79: 1, 80: 1, 81: 0.95, 90: 0.5, 100: 0, 101: 0},
        ),
        ({"schedule": "wsd", "decay_steps": 100}, {0: 1, 1: 0.99, 50: 0.5, 100: 0}),
        ({"schedule": "wsd", "warmup_steps": 50, "decay_steps": 50}, {25: 0.5, 50: 1, 75: 0.5}),
    ],
    ids=str,
)
def test_schedules_at_their_corners(changes, corners):
    config = config_of(lr=1.0, **changes)
    config.max_steps = 100
    check_optimizer(config)
    rate = make_optimizer(config)[1]
    np.testing.assert_allclose([rate(s) for s in corners], list(corners.values()), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer.name": "adamw8bit", "optimizer.moments": "bfloat16"}, "moments have 8 bits"),
        ({"optimizer.decay_steps": 10}, "--optimizer.schedule=wsd"),
        ({"optimizer.schedule": "wsd"}, "--optimizer.decay_steps=20"),
        (
            {
                "optimizer.schedule": "wsd",
                "optimizer.decay_steps": 60,
                "optimizer.warmup_steps": 50,
            },
            "more than max_steps=100",
        ),
        ({"ema.also": (0.9, 0.9)}, "average 0.9 twice"),
        ({"ema.also": (0.9999,)}, "average 0.9999 twice"),
        ({"ema.also": (1.0,)}, "numbers from 0 to 0.9999999"),
        ({"ema.posthoc": (0.3,)}, "numbers from 0.005 to 0.28"),
        ({"ema.snapshot_interval": 10}, "--ema.posthoc=0.05,0.1"),
        (
            {"ema.snapshot_interval": 10, "ema.posthoc": (0.1,), "ema.interval": 4},
            "a multiple of ema.interval=4",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_says_so(changes, words):
    config = config_of()
    config.max_steps = 100
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words) as raised:
        check_optimizer(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["name", "schedule"])
def test_unknown_words_are_named(key):
    with pytest.raises(UserError, match=f"optimizer.{key}='lion': "):
        make_optimizer(config_of(**{key: "lion"}))
