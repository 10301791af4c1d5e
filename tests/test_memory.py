"""What the DiT keeps for its backward pass, what it computes again, and what bfloat16 costs.

Sizes are counted in the jaxpr of the gradient: what `jax.vjp` returns is what is kept.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from models.dit import SIZES, DiT
from utils.flops import count

DEPTH, WIDTH, N, TOKENS = 3, 32, 5, 16
TOKEN_ARRAY = DEPTH * N * TOKENS * WIDTH  # elements of an array as wide as the network, per block
pytestmark = pytest.mark.usefixtures("standard_promotion")  # jax.nn's attention counts on it
TYPES = [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)]


def small(**changes):
    sizes = {"depth": DEPTH, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 2}
    return DiT(**(sizes | changes))


def inputs():
    z = jax.ShapeDtypeStruct((N, 8, 8, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((N,), jnp.float32)
    return z, t, t, jax.ShapeDtypeStruct((N,), jnp.int32)


def parameters(module):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs())


def kept(module, dropout_keys=None):
    """Shapes and types of what the blocks keep, arrays of tokens × tokens (attention's) left out.

    Returns:
      {type: elements}, of arrays with at least one element per block and token.
    """

    def pullback(params, z, r, t, label):
        return jax.vjp(lambda p: module.apply(p, z, r, t, label, dropout_keys), params)[1]

    jaxpr = jax.make_jaxpr(pullback)(parameters(module), *inputs()).jaxpr
    made = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - set(jaxpr.invars)
    found = {}
    for aval in (v.aval for v in made):
        if aval.shape[:1] == (DEPTH,) and aval.size >= TOKEN_ARRAY and aval.shape.count(TOKENS) < 2:
            found[str(aval.dtype)] = found.get(str(aval.dtype), 0) + aval.size
    return found


@pytest.mark.parametrize(("dtype", "residual"), TYPES)
def test_a_block_keeps_what_goes_into_its_products_and_norms(dtype, residual):
    """Of each token: the stream twice; q, k, v, attention's output and its product; the MLP's 4 d
    before the GELU, and its output. No copy beside the norms, modulations, GELU and gates."""
    found = kept(small(dtype=dtype, residual_dtype=residual))
    expected = {}
    for kind, widths in ((residual, 2), (dtype, 3 + 1 + 1 + 4 + 1)):
        name = jnp.dtype(kind).name
        expected[name] = expected.get(name, 0) + widths * TOKEN_ARRAY
    assert found == expected


def test_dropout_adds_its_masks_alone():
    keys = jax.random.split(jax.random.key(0), N)
    plain = kept(small(dtype=jnp.bfloat16))
    dropped = kept(small(dtype=jnp.bfloat16, dropout=0.1), keys)
    assert dropped == plain | {"bool": 2 * TOKEN_ARRAY}


@pytest.mark.parametrize(
    ("remat", "products"), [("dots", 3 + 1 + 4 + 1), ("full", 0)], ids=["dots", "full"]
)
def test_remat_keeps_the_products_with_parameters_or_the_input_alone(remat, products):
    found = kept(small(dtype=jnp.bfloat16, remat=remat))
    expected = {"float32": TOKEN_ARRAY, "bfloat16": products * TOKEN_ARRAY}
    assert found == {name: size for name, size in expected.items() if size}


def test_what_is_computed_again():
    """Nothing that counts without remat; then attention's two products; then the whole block."""

    def gradient(remat):
        module = small(remat=remat)

        def loss(params, z, r, t, label):
            return jnp.sum(module.apply(params, z, r, t, label))

        return count(jax.grad(loss, (0, 1)), parameters(module), *inputs())

    none, dots, full = map(gradient, ("none", "dots", "full"))
    module = small()
    forward = count(module.apply, parameters(module), *inputs())
    times = 2 * 2 * N * 256 * WIDTH  # of two embeddings, of sinusoids that have no gradient
    assert none == 3 * forward - times
    attention = DEPTH * 2 * 2 * N * TOKENS**2 * WIDTH
    parametric = DEPTH * 2 * N * (TOKENS * 12 + 6) * WIDTH**2
    assert dots - none == attention
    assert full - none == attention + parametric


@functools.cache
@functools.cache
def derivatives(dtype, residual):
    """u and du/dt at B/4, every weight from N(0, 0.02²), those that start at zero included."""
    module = DiT(**SIZES["B/4"], num_classes=1000, dtype=dtype, residual_dtype=residual)
    n, keys = 2, jax.random.split(jax.random.key(0), 3)
    z, v = (jax.random.normal(key, (n, 32, 32, 4)) for key in keys[:2])
    t, label = jnp.array([0.4, 0.9]), jnp.arange(n)

    def along(params, z, r, t):
        tangents = v, jnp.zeros_like(r), jnp.ones_like(t)
        return jax.jvp(lambda *point: module.apply(params, *point, label), (z, r, t), tangents)

    shapes = jax.eval_shape(module.init, keys[2], z, t, t, label)
    leaves, tree = jax.tree.flatten(shapes)
    drawn = np.random.default_rng(0)
    params = tree.unflatten(
        [0.02 * drawn.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    )
    quick = {"xla_backend_optimization_level": "0"}  # it is compiled for longer than it runs
    return jax.device_get(
        jax.jit(along).lower(params, z, t / 2, t).compile(quick)(params, z, t / 2, t)
    )


@pytest.mark.parametrize(
    ("residual", "bound_u", "bound_derivative"),
    [(jnp.float32, 0.003, 0.005), (jnp.bfloat16, 0.02, 0.01)],
    ids=["float32 stream", "bfloat16 stream"],
)
def test_derivative_in_bfloat16_is_within_one_per_cent(residual, bound_u, bound_derivative):
    exact = derivatives(jnp.float32, jnp.float32)
    rough = derivatives(jnp.bfloat16, residual)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(rough, exact, strict=True)]
    assert 1e-4 < errors[0] < bound_u  # below, it was not computed in bfloat16
    assert 1e-4 < errors[1] < bound_derivative
