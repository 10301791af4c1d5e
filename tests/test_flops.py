"""Counted FLOPs against products counted by hand, and DiT's published ones."""

import jax
import jax.numpy as jnp
import pytest

from models.attention import fused
from models.dit import SIZES, DiT
from utils.flops import count


def test_products_counted_by_hand():
    a, b = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))
    assert count(jnp.matmul, a, b) == 2 * 3 * 5 * 7 * 11
    assert count(jax.jit(jnp.matmul), a, b) == 2 * 3 * 5 * 7 * 11


def test_a_scan_counts_its_body_as_often_as_it_runs():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert count(function, jnp.ones((2, 4)), jnp.ones((6, 4, 4))) == 6 * 2 * 2 * 4 * 4


def test_a_condition_counts_its_dearer_branch():
    w = jnp.ones((4, 4))

    def function(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert count(function, jnp.ones((2, 4))) == 2 * 2 * 2 * 4 * 4


def test_a_kernel_counts_its_body_at_each_point_of_its_grid():
    """q kᵀ and p v, for each sample and head; the sizes are such that no kernel pads them."""
    q = jnp.ones((2, 128, 3, 16))
    assert count(fused, q, q, q) == 2 * 3 * 2 * (2 * 128 * 128 * 16)


def test_convolution():
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def function(x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

    assert count(function, x) == 2 * 2 * 8 * 8 * 5 * 3 * 3 * 3


def test_a_gradient_is_twice_the_forward_pass_more():
    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    loss = jax.grad(lambda w, x: jnp.sum(jnp.square(x @ w)), (0, 1))
    assert count(loss, w, x) == 3 * 2 * 2 * 4 * 4


@pytest.mark.parametrize(("size", "giga_macs"), [("B/4", 5.6), ("B/2", 23.1), ("XL/2", 119)])
def test_published_cost_of_a_dit(size, giga_macs):
    """Multiply-adds per latent of 32×32×4 (arXiv 2212.09748, table 4; 2505.13447, table 3)."""
    module = DiT(**SIZES[size], num_classes=1000)
    z, t = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jnp.zeros(1)
    label = jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), z, t, t, label)
    found = count(lambda p, z: module.apply(p, z, t, t, label), params, z)
    assert found / 2e9 == pytest.approx(giga_macs, rel=0.02)
