"""The networks: published sizes, initialisation, derivatives through scan and remat, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import autoencoder
from models.dit import SIZES, DiT, patches, pixels
from models.layers import dropout
from models.mlp import MLP


def inputs(shape, n=3):
    z = jax.random.normal(jax.random.key(0), (n, *shape))
    t = jnp.linspace(0.3, 0.9, n)
    return z, t / 2, t, jnp.arange(n)


def parameters(module, shape):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs(shape))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S/2", 33), ("B/4", 131), ("B/2", 131), ("M/2", 308), ("L/2", 459), ("XL/2", 676)],
)
def test_parameter_counts_are_the_published_ones(size, millions):
    """DiT's counts (arXiv 2212.09748) and one more time embedder (2505.13447, table 3)."""
    module = DiT(**SIZES[size], num_classes=1000)
    assert round(parameters(module, (32, 32, 4)) / 1e6) == millions


def test_sizes_are_keyed_by_name_and_patch():
    assert set(SIZES) == {f"{s}/{p}" for s in ("S", "B", "M", "L", "XL") for p in (1, 2, 4, 8)}


def small(**changes):
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "num_classes": 5}
    return DiT(**(sizes | changes))


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 12, 3), (16, 16, 4)])
def test_any_size_and_channels(shape):
    u, variables = small().init_with_output(jax.random.key(0), *inputs(shape))
    assert u.shape == (3, *shape) and u.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_initialised_as_dit_is():
    """Zero output and modulation, xavier elsewhere, 0.02 for the embeddings."""
    u, variables = small(num_classes=1000).init_with_output(jax.random.key(0), *inputs((8, 8, 1)))
    params = variables["params"]
    assert (u == 0).all()
    assert (params["blocks"]["modulation"]["kernel"] == 0).all()
    assert (params["head"]["modulation"]["kernel"] == 0).all()
    qkv = params["blocks"]["attention"]["qkv"]["kernel"]
    assert qkv.shape == (2, 32, 96)
    assert float(jnp.abs(qkv).max()) == pytest.approx((6 / (32 + 96)) ** 0.5, rel=0.01)
    assert (qkv[0] != qkv[1]).all()  # each layer draws its own
    condition = params["condition"]
    for name in ("time_t", "time_t-r"):
        assert float(condition[name]["in"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(condition["label"]["embedding"].std()) == pytest.approx(0.02, rel=0.05)
    assert condition["label"]["embedding"].shape == (1001, 32)  # one for no label


def drawn(module, shape):
    """Parameters with no weight left at zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs(shape))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize("time_inputs", ["t,t-r", "t,r", "t-r"])
def test_what_the_network_is_told(time_inputs):
    """Another r or t changes u exactly where it is told."""
    module = small(time_inputs=time_inputs)
    z, r, t, label = inputs((4, 4, 1))
    params = drawn(module, (4, 4, 1))
    u, shifted, other_r = (
        module.apply(params, z, *times, label) for times in ((r, t), (r + 0.1, t + 0.1), (r / 2, t))
    )
    assert np.abs(u - other_r).max() > 1e-4
    same = np.abs(u - shifted).max() < 1e-6
    assert same == (time_inputs == "t-r")


def test_gradient_of_a_jvp_through_scan_and_remat():
    """The same whatever is computed again, dropout's masks included."""
    shape = (4, 4, 1)
    z, r, t, label = inputs(shape)

    def loss(params, module):
        u, du_dt = jax.jvp(
            lambda z, r, t: module.apply(params, z, r, t, label, jax.random.split(KEY, 3)),
            (z, r, t),
            (z, jnp.zeros_like(r), jnp.ones_like(t)),
        )
        return jnp.sum(jnp.square(u + du_dt))

    KEY = jax.random.key(2)
    params = drawn(small(), shape)
    plain, dots, full = (
        jax.jit(jax.grad(functools.partial(loss, module=small(dropout=0.3, remat=remat))))(params)
        for remat in ("none", "dots", "full")
    )
    for a, *others in zip(*map(jax.tree.leaves, (plain, dots, full)), strict=True):
        for b in others:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())
        assert np.abs(a).max() > 0


@pytest.mark.usefixtures("standard_promotion")
def test_bfloat16_computes_near_float32_and_returns_float32():
    shape = (8, 8, 1)
    params = drawn(small(), shape)
    exact = small().apply(params, *inputs(shape))
    rough = small(dtype=jnp.bfloat16).apply(params, *inputs(shape))
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05


def test_dropout_is_a_samples_own_and_scaled():
    x, keys = jnp.ones((64, 50, 40)), jax.random.split(jax.random.key(0), 64)
    out = dropout(x, 0.25, keys, 3)
    np.testing.assert_array_equal(out[5:9], dropout(x[5:9], 0.25, keys[5:9], 3))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    assert (out != dropout(x, 0.25, keys, 4)).any()
    assert (dropout(x, 0.25, None, 3) == x).all()


def test_patches_and_back():
    z = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    x = patches(z, 2)
    np.testing.assert_array_equal(x[1, 2], z[1, 0:2, 4:6].reshape(-1))  # third patch of row one
    np.testing.assert_array_equal(pixels(x, 2, 3, 2), z)


def test_mlp_on_points():
    module = MLP(depth=2, hidden_size=16)
    u, _ = module.init_with_output(jax.random.key(0), *inputs((2,)))
    assert u.shape == (3, 2) and (u == 0).all()


def test_pixels_have_the_published_range():
    """Every uint8 value comes back, and x beyond the range is clipped."""
    codec = autoencoder.pixels()
    values = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    x = codec.sample(values, None)
    assert float(x.min()) == -1 and float(x.max()) == 1
    np.testing.assert_array_equal(codec.decode(x), values)
    np.testing.assert_array_equal(codec.decode(jnp.array([-3.0, 3.0])), [0, 255])
