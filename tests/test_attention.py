"""Attention by other means than XLA's: the same values and derivatives, without the N×N matrix.

The kernels run interpreted here; the TPU's compiler, where it is installed, says what they keep.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec, SingleDeviceSharding

from flows import times
from flows.objectives import mean_flow
from models import attention
from models.attention import forward_attention, fused, reverse_attention
from models.dit import DiT

xla = functools.partial(attention.attention, implementation="xla")


def normal(*shape, seed=0):
    """Drawn by numpy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(tokens, d, heads=2, n=1, dtype=jnp.float32):
    """q, k, v and their tangents."""
    return [normal(n, tokens, heads, d, seed=i).astype(dtype) for i in range(6)]


def jvp(function, q, k, v, *tangents):
    return jax.jvp(function, (q, k, v), tangents)


@jax.jit
def by_xla(*inputs):
    """Value and tangent in float32."""
    return jvp(xla, *(x.astype(jnp.float32) for x in inputs))


@functools.partial(jax.jit, static_argnames="block")
def by_fused(*inputs, block=0):
    return jvp(lambda q, k, v: fused(q, k, v, block), *inputs)


def relative(got, wanted):
    """Norm of the difference over that of `wanted`."""
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("tokens", "d", "heads", "block"),
    [(1, 64, 1, 0), (40, 64, 4, 16), (200, 72, 1, 64), (257, 64, 3, 128), (257, 72, 1, 0)],
)
def test_value_and_tangent_are_those_of_xla(tokens, d, heads, block):
    """Blocks that divide the tokens and that do not; heads that fill registers and that do not."""
    inputs = drawn(tokens, d, heads)
    wanted = by_xla(*inputs)
    for x, y in zip(by_fused(*inputs, block=block), wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_value_alone_is_that_of_xla():
    q, k, v, *_ = drawn(40, 64)
    value = jax.jit(lambda q, k, v: fused(q, k, v, 16))(q, k, v)
    np.testing.assert_allclose(value, jax.jit(xla)(q, k, v), atol=1e-5)


@pytest.mark.parametrize(("tokens", "d"), [(40, 64), (129, 72)])
def test_the_loop_for_gpus_gives_the_same(tokens, d):
    inputs = drawn(tokens, d)
    got = jax.jit(functools.partial(attention._on_gpu, 32, interpret=True))(*inputs)
    for x, y in zip(got, by_xla(*inputs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("moving", [0, 1, 2])
def test_a_tangent_of_one_input_alone(moving):
    """The others' are symbolic zeros."""
    inputs = drawn(24, 16)
    q_k_v = inputs[:3]

    def along(function, x, dx):
        return jax.jvp(lambda x: function(*q_k_v[:moving], x, *q_k_v[moving + 1 :]), (x,), (dx,))[1]

    case = inputs[moving], inputs[moving + 3]
    got, wanted = (jax.jit(functools.partial(along, f))(*case) for f in (fused, xla))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_no_tangent_and_zero_tangents_give_zero():
    q, k, v, *_ = drawn(24, 16)
    assert not jvp(fused, q, k, v, *map(jnp.zeros_like, (q, k, v)))[1].any()
    assert not jax.jvp(lambda t: fused(q, k, v), (0.0,), (1.0,))[1].any()


def test_the_tangent_is_the_limit_of_differences():
    inputs, step = drawn(24, 16), 1e-2
    ahead, behind = (
        jax.jit(fused)(*(x + h * dx for x, dx in zip(inputs[:3], inputs[3:], strict=True)))
        for h in (step, -step)
    )
    tangent = by_fused(*inputs)[1]
    assert relative((ahead - behind) / (2 * step), tangent) < 2e-3


def test_large_scores_stay_finite():
    """Scores of 1e5 make a softmax of zeros and ones; exp of them alone would overflow."""
    q, k, *rest = drawn(40, 16)
    inputs = [300 * q, 300 * k, *rest]
    got, wanted = by_fused(*inputs, block=16), by_xla(*inputs)
    for x, y in zip(got, wanted, strict=True):
        assert np.isfinite(x).all()
        assert relative(x, y) < 1e-3  # scores of 1e5 have 7 digits


def test_bfloat16_is_near_float32():
    inputs = drawn(40, 64, dtype=jnp.bfloat16)
    for x, y in zip(by_fused(*inputs, block=16), by_xla(*inputs), strict=True):
        assert x.dtype == jnp.bfloat16
        assert relative(x, y) < 0.01


def test_a_change_of_all_keys_alike_costs_no_digits():
    """It has no effect on the tangent, and none on its error in bfloat16 (Σ e ṡ v − c o has)."""
    q, k, v, dq, dk, dv = drawn(40, 64, dtype=jnp.bfloat16)
    shift = (64 * jnp.sign(dq[:, :1])).astype(jnp.bfloat16)
    inputs = q, k, v, dq, (jnp.round(dk * 2) / 2 + shift).astype(jnp.bfloat16), dv
    assert relative(by_fused(*inputs, block=16)[1], by_xla(*inputs)[1]) < 0.01


def test_it_works_under_jit_scan_and_vmap():
    inputs = [jnp.stack([x, x / 2]) for x in drawn(24, 16)]

    def layers(function, q, k, v):
        def layer(x, _):
            return function(x, k, v), None

        return jax.lax.scan(layer, q, None, length=2)[0]

    got, wanted = (
        jax.jit(functools.partial(jvp, jax.vmap(functools.partial(layers, f))))(*inputs)
        for f in (fused, xla)
    )
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_each_device_computes_its_own_samples():
    """In shard_map, as a step runs."""
    inputs = drawn(8, 16, n=8)
    mesh = Mesh(np.array(jax.devices()[:8]), "data")
    spec = PartitionSpec("data")
    split = jax.shard_map(
        functools.partial(jvp, fused), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    for x, y in zip(jax.jit(split)(*inputs), by_xla(*inputs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_reverse_mode_is_refused():
    """By JAX, alone and in a scan; the config cannot lead there, as the test below shows."""
    q, k, v, *_ = drawn(8, 16)

    def scanned(q):
        return jax.lax.scan(lambda x, _: (fused(x, k, v), None), q, None, length=2)[0].sum()

    for loss in (lambda q: fused(q, k, v).sum(), scanned):
        with pytest.raises(ValueError, match="does not support reverse-mode"):
            jax.grad(loss)(q)


def test_splash_has_the_values_and_gradients_of_xla():
    """The padding up to whole blocks is not seen."""
    q, k, v, do, *_ = drawn(40, 72)

    def vjp(function, q, k, v, do):
        value, back = jax.vjp(function, q, k, v)
        return value, *back(do)

    splash = functools.partial(attention._splash, interpret=True)
    got, wanted = (jax.jit(functools.partial(vjp, f))(q, k, v, do) for f in (splash, xla))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


# In the network.


@functools.cache
def networks():
    """A tiny DiT by `xla` and by `fused`, and parameters none of which is zero."""
    module = DiT(depth=2, hidden_size=32, num_heads=2, patch_size=1, num_classes=3)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)), *[jnp.zeros(1)] * 2,
        jnp.zeros(1, jnp.int32),
    )["params"]  # fmt: skip
    params = jax.tree.map(lambda a: 0.2 * normal(*a.shape, seed=a.size), shapes)

    def bound(module):
        return lambda params, *inputs: module.apply({"params": params}, *inputs)

    return bound(module), bound(module.clone(attention="fused")), params


def test_du_dt_of_a_dit_is_that_of_xla():
    *both, params = networks()
    z, v = normal(2, 2, 4, 4, 1)
    r, t, label = jnp.array([0.1, 0.2]), jnp.array([0.9, 0.5]), jnp.array([0, 3])

    def derivative(network, z, r, t):
        along = v, jnp.zeros_like(r), jnp.ones_like(t)
        return jax.jvp(lambda *at: network(params, *at, label), (z, r, t), along)[1]

    got, wanted = (jax.jit(functools.partial(derivative, network))(z, r, t) for network in both)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_mean_flow_takes_it_in_forward_mode_alone():
    """Guidance included. The test can fail: as the network itself it is refused."""
    network, forward, params = networks()
    batch = {"x": jnp.zeros((4, 4, 4, 1)), "label": jnp.arange(4) % 3, "position": jnp.arange(4)}
    loss = functools.partial(
        mean_flow, batch=batch, key=jax.random.key(2), time_law=times.uniform(),
        interval_share=0.5, p=1.0, c=0.01, omega=1.0, kappa=0.5, guidance_interval=(0.0, 1.0),
        class_dropout_prob=0.1, null_label=3, apart=True, forward=forward, dropout=False,
    )  # fmt: skip
    jax.eval_shape(jax.grad(functools.partial(loss, network), has_aux=True), params)
    with pytest.raises(ValueError, match="does not support reverse-mode"):
        jax.eval_shape(jax.grad(functools.partial(loss, forward), has_aux=True), params)


# What is chosen.


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "d", "reverse", "forward"),
    [
        ("cpu", "bfloat16", 4096, 64, "xla", "xla"),
        ("gpu", "bfloat16", 256, 64, "cudnn", "xla"),
        ("other_gpu", "bfloat16", 4096, 72, "xla", "xla"),
        ("gpu", "float32", 256, 64, "xla", "xla"),
        ("gpu", "bfloat16", 256, 68, "xla", "xla"),
        ("gpu", "bfloat16", 256, 136, "xla", "xla"),
        ("tpu", "bfloat16", 256, 64, "xla", "xla"),
        ("tpu", "bfloat16", 1024, 64, "splash", "fused"),
        ("tpu", "float32", 1024, 72, "splash", "fused"),
    ],
)
def test_auto_stands_for(platform, dtype, tokens, d, reverse, forward):
    assert reverse_attention("auto", platform, dtype, tokens, d) == reverse
    assert forward_attention("auto", platform, dtype, tokens, d) == forward


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "d", "message"),
    [
        ("cudnn", "cpu", "bfloat16", 64, "cudnn needs a GPU, not cpu: --model.attention=xla"),
        (
            "cudnn",
            "gpu",
            "float32",
            64,
            "not float32 and 64: --model.dtype=bfloat16, or --model.attention",
        ),
        ("cudnn", "gpu", "bfloat16", 68, "not bfloat16 and 68: "),
        ("splash", "gpu", "bfloat16", 64, "splash needs a TPU, not gpu: --model.attention=xla"),
    ],
)
def test_what_cannot_work_is_told_with_its_mend(name, platform, dtype, d, message):
    with pytest.raises(ValueError, match=message) as told:
        reverse_attention(name, platform, dtype, 256, d)
    assert "\n" not in str(told.value)


def test_what_is_named_and_can_work_is_taken():
    assert reverse_attention("xla", "gpu", "bfloat16", 256, 64) == "xla"
    assert reverse_attention("splash", "tpu", "float32", 256, 72) == "splash"
    assert forward_attention("fused", "cpu", "float32", 16, 16) == "fused"
    with pytest.raises(ValueError, match="attention='flash': of xla, cudnn, splash, fused"):
        attention.attention(*drawn(2, 8)[:3], "flash")


# What compilers make of it.


def abstract(tokens, d, heads, n, dtype, sharding=None):
    return [jax.ShapeDtypeStruct((n, tokens, heads, d), dtype, sharding=sharding)] * 6


@pytest.mark.parametrize(("tokens", "d", "dtype"), [(256, 64, "bfloat16"), (257, 72, "float32")])
def test_it_lowers_for_gpus(tokens, d, dtype):
    """To Triton's language; whether it runs there only a GPU can tell."""
    with described_gpu():
        traced = jax.jit(functools.partial(jvp, fused)).trace(*abstract(tokens, d, 2, 1, dtype))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("fused_attention_jvp") and "triton" in text
    assert f"{tokens}x{tokens}" not in text


def described_gpu():
    """From jax 0.12 on Pallas wants to know which GPU; before, it does not ask."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


needs_libtpu = pytest.mark.skipif(
    not (os.environ.get("TOPOLOGIES") and importlib.util.find_spec("libtpu")),
    reason="by the TPU's compiler: make topologies",
)


def tpu(topology):
    """The abstract devices of a topology."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(function, arguments):
    """The optimised program's text, and bytes of its temporaries."""
    program = jax.jit(function).lower(*arguments).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


# The cache cannot read back what is compiled for devices that are not there.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


def bytes_of_a_matrix(q, *_):
    """Of tokens × tokens, for all heads, in q's type."""
    n, tokens, heads, _ = q.shape
    return n * heads * tokens**2 * q.dtype.itemsize


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(("tokens", "d", "heads"), [(256, 64, 12), (257, 72, 2), (1000, 64, 2)])
def test_the_kernel_keeps_no_matrix_of_tokens(topology, tokens, d, heads):
    place = SingleDeviceSharding(tpu(topology)[0])
    arguments = abstract(tokens, d, heads, 32, jnp.bfloat16, place)
    text, kept = compiled(functools.partial(jvp, fused), arguments)
    assert "tpu_custom_call" in text
    assert kept < 0.1 * bytes_of_a_matrix(*arguments)


@needs_libtpu
def test_and_xla_keeps_some_v5e(standard_promotion):
    """Or the test above could not fail."""
    place = SingleDeviceSharding(tpu("v5e:2x2")[0])
    arguments = abstract(256, 64, 12, 32, jnp.bfloat16, place)
    text, kept = compiled(functools.partial(jvp, xla), arguments)
    assert "tpu_custom_call" not in text
    assert kept >= bytes_of_a_matrix(*arguments)


@needs_libtpu
def test_both_modes_compile_over_a_mesh_v5e():
    """splash's gradient and fused's tangent, each device alone, as in a step."""

    def both(q, k, v, *tangents):
        splash = functools.partial(attention.attention, implementation="splash")
        value, back = jax.vjp(splash, q, k, v)
        return *back(value), jvp(fused, q, k, v, *tangents)[1]

    mesh = Mesh(np.array(tpu("v5e:2x2")), "data")
    spec = PartitionSpec("data")
    split = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    place = jax.NamedSharding(mesh, spec)
    text, _ = compiled(split, abstract(640, 72, 2, 8, jnp.bfloat16, place))
    assert text.count('custom_call_target="tpu_custom_call"') == 4  # forward, dq, dk and dv; ours
    assert "all-gather" not in text and "all-reduce" not in text
