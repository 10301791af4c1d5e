"""MeanFlow's target in parts, each computed for the samples that need it.

In passes of the whole batch forward, a step of flow matching costs 3, one forward and two backward.
The plain form of MeanFlow carries tangents through all of it, 4, and its guidance adds 2. Apart, it
is 3.5 with a quarter of the samples at r ≠ t: u in reverse mode, by any kernel of attention, and
du/dt in forward mode alone, which keeps nothing for a pass backward. Guidance adds 1.25: at r = t
u(z, t, t | c) is u itself, known already.

Which samples have r ≠ t is a pattern along the batch (`flows.times.interval_pattern`), known before
the step runs: a slice of every period.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flows.guidance import both


def taken(a: Array, pattern: np.ndarray) -> Array:
    """The samples of (n, ...) where the pattern is true, in order.

    Args:
      pattern: bool (d,), one period.
    Raises:
      ValueError: n is no multiple of d.
    """
    n, spanning = len(a), np.flatnonzero(pattern)
    if n % len(pattern):
        raise ValueError(f"{n} samples hold no whole number of periods of {len(pattern)}")
    periods = a.reshape(-1, len(pattern), *a.shape[1:])
    return periods[:, spanning].reshape(n * len(spanning) // len(pattern), *a.shape[1:])


def put(whole: Array, part: Array, pattern: np.ndarray) -> Array:
    """`whole` (n, ...) with `part` in the places that `taken` takes."""
    periods = whole.reshape(-1, len(pattern), *whole.shape[1:])
    part = part.reshape(len(periods), -1, *whole.shape[1:])
    return periods.at[:, np.flatnonzero(pattern)].set(part).reshape(whole.shape)


def derivative(
    network: Callable,
    params,
    inputs: tuple[Array, Array, Array],
    tangents: tuple[Array, Array, Array],
    rest: tuple[Array, ...],
    pattern: np.ndarray,
) -> Array:
    """du/dt (n, ...) where r ≠ t, and 0 where r = t and it has no weight.

    Args:
      inputs, tangents: z (n, ...), r (n,) and t (n,), and the direction of the derivative.
      rest: what else the network takes, (n, ...) each: labels, keys for dropout.
    Raises:
      ValueError: n is no whole number of periods.
    """
    z, r, t, v, dr, dt, *rest_taken = (taken(a, pattern) for a in (*inputs, *tangents, *rest))
    if not pattern.any():
        return jnp.zeros_like(inputs[0])
    _, du_dt = jax.jvp(lambda *at: network(params, *at, *rest_taken), (z, r, t), (v, dr, dt))
    return put(jnp.zeros_like(inputs[0]), du_dt, pattern)


def predictions(
    network: Callable,
    params,
    z: Array,
    r: Array,
    t: Array,
    label: Array,
    null: Array,
    *,
    known: Array | None,
    pattern: np.ndarray,
) -> tuple[Array, Array]:
    """u of the labels and u of the null label, as `flows.guidance.both`, in fewer passes.

    Args:
      known: u(z, r, t | label) (n, ...), right where the pattern is false; None: not known.
    """
    if known is None:
        return both(network, params, z, r, t, label, null)
    n = len(z)
    every = ((z, z), (r, r), (t, t), (null, label))
    u = network(params, *(jnp.concatenate([a, taken(b, pattern)]) for a, b in every), None)
    return put(known, u[n:], pattern), u[:n]
