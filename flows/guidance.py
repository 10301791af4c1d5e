"""Classifier-free guidance: as a target in training and as a velocity in sampling.

`network(params, z, r, t, label, dropout_keys)` is the average velocity u; dropout is off where the
keys are None. Both forms call the conditional and the unconditional network in one doubled batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flows.path import like

GuidanceLaw = Callable[[Array, Array], Array]


def effective_scale(omega: float, kappa: float) -> float:
    """ω′ = ω / (1 − κ), the guidance scale a network trained on `guided_target` shows."""
    return omega / (1 - kappa)


def guided_target(
    network: Callable,
    params,
    z: Array,
    t: Array,
    label: Array,
    v: Array,
    dropped: Array,
    *,
    omega: float,
    kappa: float,
    interval: tuple[float, float],
    null_label: int,
    predict: Callable | None = None,
) -> Array:
    """v_g = ω v + κ u(z,t,t|c) + (1 − ω − κ) u(z,t,t|∅) (arXiv 2505.13447, equation 21).

    Plain v where the label was dropped and where t lies outside `interval`. No gradient flows
    through it, and the network runs without dropout.

    Args:
      z, v: (n, ...). t: (n,). label: (n,) int32. dropped: (n,) bool.
      predict: (network, params, z, r, t, label, null label) → u of either label; None: `both`.
    """
    if omega == 1 and kappa == 0:
        return v
    null = jnp.full_like(label, null_label)
    guided = omega * v
    if kappa:
        conditional, unconditional = (predict or both)(network, params, z, t, t, label, null)
        guided += kappa * conditional
    else:
        unconditional = network(params, z, t, t, null, None)
    guided += (1 - omega - kappa) * unconditional
    inside = (interval[0] <= t) & (t <= interval[1]) & ~dropped
    return jax.lax.stop_gradient(jnp.where(like(inside, z), guided, v))


def power_law(omega_max: float, power: float) -> GuidanceLaw:
    """(key, spans) → (ω, t_min, t_max), what a sample's network is told (arXiv 2512.02012).

    ω has a density that falls as ω^−power on [1, omega_max]; t_min ~ U(0, 1/2) and
    t_max ~ U(1/2, 1) where r ≠ t (`spans`), else 0 and 1.
    """

    def draw(key: Array, spans: Array) -> Array:
        share, low, high = jax.random.uniform(key, (3,))
        if power == 1:
            omega = jnp.exp(share * np.log(omega_max))
        else:
            omega = (1 + share * (omega_max ** (1 - power) - 1)) ** (1 / (1 - power))
        low, high = jnp.where(spans, low / 2, 0.0), jnp.where(spans, (1 + high) / 2, 1.0)
        return jnp.stack([omega, low, high])

    return draw


def told_target(
    own: Callable,
    params,
    z: Array,
    t: Array,
    label: Array,
    v: Array,
    dropped: Array,
    told: Array,
    null_label: int,
) -> tuple[Array, Array]:
    """v_g = v + (1 − 1/ω)(v_θ(·|c, ω) − v_θ(·|∅, 1)) and v_θ(·|c, ω) (arXiv 2512.02012).

    ω is 1 outside the interval that a sample is told, and where its label was dropped. No gradient
    flows through them.

    Args:
      own: (params, z, t, label, told) → v_θ.
      z, v: (n, ...). t: (n,). label: (n,) int32. dropped: (n,) bool.
      told: (n, 3), ω, t_min and t_max.
    """
    scale = jnp.where(_inside(t, told.T[1:]) & ~dropped, told[:, 0], jnp.ones_like(t))
    everywhere = jnp.stack([jnp.zeros_like(t), jnp.ones_like(t)], axis=1)
    here, unguided = (
        jnp.concatenate([s[:, None], everywhere], axis=1) for s in (scale, jnp.ones_like(t))
    )
    null = jnp.full_like(label, null_label)
    v_c, v_u = in_pairs(
        functools.partial(own, params), (z, z), (t, t), (label, null), (here, unguided)
    )
    v_g = v + like(1 - 1 / scale, z) * (v_c - v_u)
    return jax.lax.stop_gradient(v_g), jax.lax.stop_gradient(v_c)


def guided_velocity(
    network: Callable,
    params,
    label: Array,
    null_label: int,
    scale: Array | float,
    interval: Array | tuple[float, float] = (0.0, 1.0),
    guided: bool | None = None,
    told: bool = False,
) -> Callable:
    """Returns the velocity u(∅) + scale · (u(c) − u(∅)) (arXiv 2207.12598).

    Guided where it is called at a t within `interval` (arXiv 2404.07724); elsewhere, and at
    scale 1 everywhere, it is u(c) from a single call. Times are scalars, or (n,), where both are
    called for all samples.

    Args:
      scale, interval: numbers, or arrays where `guided` says that there is something to guide.
      told: the network takes scale and interval as an input: one call, guided or not.
    """

    def as_told(z: Array, r: Array, t: Array) -> Array:
        r, t = (jnp.broadcast_to(time, z.shape[:1]) for time in (r, t))
        guidance = jnp.stack([jnp.asarray(x, jnp.float32) for x in (scale, *interval)])
        guidance = jnp.broadcast_to(guidance, (len(z), 3))
        return network(params, z, r, t, label, None, guidance)

    def plain(z: Array, r: Array, t: Array) -> Array:
        r, t = (jnp.broadcast_to(time, z.shape[:1]) for time in (r, t))
        return network(params, z, r, t, label, None)

    def with_null(z: Array, r: Array, t: Array) -> Array:
        r, t = (jnp.broadcast_to(time, z.shape[:1]) for time in (r, t))
        null = jnp.full_like(label, null_label)
        conditional, unconditional = both(network, params, z, r, t, label, null)
        factor = like(jnp.where(_inside(t, interval), scale, 1.0), z)
        return unconditional + factor * (conditional - unconditional)

    def guided_where_inside(z: Array, r: Array, t: Array) -> Array:
        if jnp.ndim(t):
            return with_null(z, r, t)
        return jax.lax.cond(_inside(t, interval), with_null, plain, z, r, t)

    if told:
        return as_told
    if guided is None:
        guided = bool(scale != 1)
    return guided_where_inside if guided else plain


def calls_at(t, guided: bool, interval) -> Array:
    """The network calls per sample (NFE) of a velocity called at t: two where guided, int32."""
    return 1 + jnp.asarray(guided & _inside(t, interval), jnp.int32)


def network_calls(times, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> int:
    """Counts the network calls per sample (NFE) of a velocity called at `times`.

    Args:
      times: (calls,), `Sampler.times` of the grid.
    """
    return int(np.sum(calls_at(np.asarray(times), scale != 1, interval)))


def _inside(t, interval):
    return (t >= interval[0]) & (t <= interval[1])


def both(network, params, z, r, t, label, null) -> tuple[Array, Array]:
    """u(z, r, t | label) and u(z, r, t | null), from one doubled batch."""
    call = lambda *inputs: network(params, *inputs, None)  # noqa: E731
    return in_pairs(call, (z, z), (r, r), (t, t), (label, null))


def in_pairs(network: Callable, *inputs: tuple[Array, Array]) -> tuple[Array, Array]:
    """network(*firsts) and network(*seconds), from one doubled batch.

    The two of a sample lie side by side, so that on several devices each doubles what it has;
    one whole batch behind the other would move half of it to other devices, and back.
    """
    pairs = (jnp.stack(pair, axis=1) for pair in inputs)
    u = network(*(a.reshape(-1, *a.shape[2:]) for a in pairs))
    u = u.reshape(-1, 2, *u.shape[1:])
    return u[:, 0], u[:, 1]
