"""How far an average velocity is from being one: the self-consistency of u."""

import jax.numpy as jnp
from jax import Array

from flows.path import like
from flows.samplers import Velocity


def self_consistency(velocity: Velocity, z: Array, r: Array, s: Array, t: Array) -> Array:
    """‖(t−r) u(z_t,r,t) − (t−s) u(z_t,s,t) − (s−r) u(z_s,r,s)‖ / ‖(t−r) u(z_t,r,t)‖.

    With z_s = z_t − (t−s) u(z_t,s,t). Zero for an exact average velocity: going from t to r at once
    is going by way of s (arXiv 2505.13447, section 4.1). Of no meaning for r = t.

    Args:
      velocity: u(z, r, t) with times (n,).
      z: (n, ...) at time t. r, s, t: (n,), r ≤ s ≤ t, r < t.
    Returns:
      (n,) ratios.
    """

    def displacement(z: Array, r: Array, t: Array) -> Array:
        return like(t - r, z) * velocity(z, r, t)

    whole, first = displacement(z, r, t), displacement(z, s, t)
    second = displacement(z - first, r, s)
    return _norm(whole - first - second) / _norm(whole)


def _norm(z: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(z), axis=tuple(range(1, z.ndim))))
