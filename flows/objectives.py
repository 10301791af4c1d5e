"""The objectives that regress a network u(z, r, t) on what its derivative says; and flow matching.

`objective(network, params, batch, key) -> (loss, metrics)`. There `network(params, z, r, t, label,
dropout_keys)` gives u, the batch holds x (n, ...), label (n,), position (n,) and step (n,), and
each metric is a pair (total, count), so that microbatches and devices add up. `flows.bootstrap` has
the objectives that take targets from the network at another point instead.

Losses are means over samples of squared errors summed over pixels and channels. `error` is the same
per element, before any weight; `velocity_error` is that at r = t against plain v, and compares
across objectives with one law of t and no guidance.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient

from flows.apart import derivative, predictions, put, taken
from flows.draws import (
    Metrics,
    adaptive_weight,
    draws,
    error_metrics,
    mean_where,
    squared_norm,
)
from flows.guidance import GuidanceLaw, guided_target, told_target
from flows.path import like
from flows.times import TimeLaw, interval, interval_pattern, moment

EVERY = np.array([True])  # a pattern of all samples


def flow_matching(
    network: Callable,
    params,
    batch: dict,
    key: Array,
    *,
    time_law: TimeLaw,
    class_dropout_prob: float,
    null_label: int,
) -> tuple[Array, Metrics]:
    """E ‖u(z, t, t) − v‖² (arXiv 2210.02747, equation 14; 2209.03003)."""
    z, v, _, t, *_ = d = draws(batch, key, moment(time_law), 0.0, class_dropout_prob, null_label)
    u = network(params, z, t, t, *d.rest)
    error = squared_norm(u - v)
    return jnp.mean(error), error_metrics(error, error, t - t, z)


def mean_flow(
    network: Callable,
    params,
    batch: dict,
    key: Array,
    *,
    time_law: TimeLaw,
    interval_share: float,
    p: float,
    c: float,
    omega: float,
    kappa: float,
    guidance_interval: tuple[float, float],
    class_dropout_prob: float,
    null_label: int,
    tangent: tuple[float, float] = (0.0, 1.0),
    apart: bool = False,
    forward: Callable | None = None,
    dropout: bool = True,
) -> tuple[Array, Metrics]:
    """E w ‖u − sg(u_tgt)‖², u_tgt = v_g − (t − r) du/dt (arXiv 2505.13447, equations 9 to 11, 19).

    du/dt is the derivative along the flow: the jvp of u in the direction (v_g, 0, 1) of (z, r, t).
    v_g is the guided velocity (`guided_target`), plain v without guidance. The weight is
    w = 1 / sg(‖u − u_tgt‖² + c)^p (equation 22), so with p = 1 the loss stays near 1: read `error`.

    Args:
      tangent: (dr, dt) of that direction; any but (0, 1) is wrong, and there to be compared.
      apart: computes the parts of the target by `flows.apart`, each for the samples that need it:
        the same numbers with less work. The batch's positions must then be consecutive, from a
        multiple of the pattern's period on.
      forward: the network whose du/dt is taken, where it is computed by other means than
        `network`: apart, in forward mode alone.
      dropout: whether the network drops units, so that u cannot stand for u(·|c) of the guidance.
    """
    pair_law = interval(time_law)
    d = draws(batch, key, pair_law, interval_share, class_dropout_prob, null_label)
    z, v, r, t, label, dropped, _ = d
    frozen, pattern = stop_gradient(params), interval_pattern(interval_share)
    forward, predict = forward or network, None
    if apart:
        u = network(params, z, r, t, *d.rest)
        known = None if dropout else stop_gradient(u)
        predict = functools.partial(predictions, known=known, pattern=pattern)
    v_g = guided_target(
        network, frozen, z, t, label, v, dropped, predict=predict,
        omega=omega, kappa=kappa, interval=guidance_interval, null_label=null_label,
    )  # fmt: skip
    along = (z, r, t), (v_g, jnp.full_like(r, tangent[0]), jnp.full_like(t, tangent[1]))
    if apart:
        du_dt = derivative(forward, frozen, *along, d.rest, pattern)
    else:
        u, du_dt = jax.jvp(lambda *at: forward(params, *at, *d.rest), *along)
    u_tgt = stop_gradient(v_g - like(t - r, z) * du_dt)
    error = squared_norm(u - u_tgt)
    loss = jnp.mean(adaptive_weight(error, p, c) * error)
    return loss, error_metrics(error, squared_norm(u - v), t - r, z)


def improved_mean_flow(
    network: Callable,
    params,
    batch: dict,
    key: Array,
    *,
    time_law: TimeLaw,
    interval_share: float,
    p: float,
    c: float,
    guidance_law: GuidanceLaw | None,
    class_dropout_prob: float,
    null_label: int,
    heads: Callable | None = None,
    forward: Callable | None = None,
    apart: bool = False,
) -> tuple[Array, Metrics]:
    """E w ‖V − sg(v_g)‖², V = u + (t − r) sg(du/dt) (arXiv 2512.02012, section 4).

    A regression on a velocity: V is the flow's velocity where u is its average velocity. du/dt is
    the derivative in the direction (v_θ, 0, 1) with v_θ the network's own velocity, so that both
    sides are functions of z alone but for the target. With a second head, v_θ is what that says,
    and E w ‖v_θ − sg(v_g)‖² is added.

    Guidance is an input: each sample is told a scale ω and an interval of times, and
    v_g = v + (1 − 1/ω)(v_θ(·|c, ω) − v_θ(·|∅, 1)) inside it, plain v outside and without a label.
    At its fixed point v_g = ω v_c − (ω − 1) v_∅, and ω = 1 is no guidance.

    Args:
      guidance_law: (key, spans) → (ω, t_min, t_max) of a sample; None: the network is not told any.
      heads: as `network`, gives (u, v); None: v_θ is u at r = t.
      forward, apart: as `mean_flow` takes them; not apart, du/dt is taken of all samples.
    """
    pair_law = interval(time_law)
    d = draws(batch, key, pair_law, interval_share, class_dropout_prob, null_label)
    z, v, r, t, *_ = d
    frozen, forward = stop_gradient(params), forward or network
    pattern = interval_pattern(interval_share) if apart else EVERY
    own = functools.partial(own_velocity, network, heads)
    rest: tuple[Array, ...] = d.rest
    if guidance_law is None:
        v_g, v_own = v, v  # where r = t it has no weight
        if pattern.any():
            part = own(frozen, *(taken(a, pattern) for a in (z, t, d.label)))
            v_own = put(v, part, pattern)
    else:
        told = jax.vmap(guidance_law)(d.keys.guidance, r < t)
        rest = *d.rest, told
        v_g, v_own = told_target(own, frozen, z, t, d.label, v, d.dropped, told, null_label)
    along = (z, r, t), (v_own, jnp.zeros_like(r), jnp.ones_like(t))
    du_dt = derivative(forward, frozen, *along, rest, pattern)
    u, v_head = heads(params, z, r, t, *rest) if heads else (network(params, z, r, t, *rest), None)
    error = squared_norm(u + like(t - r, z) * stop_gradient(du_dt) - v_g)
    loss = jnp.mean(adaptive_weight(error, p, c) * error)
    metrics = error_metrics(error, squared_norm(u - v), t - r, z)
    if v_head is not None:
        head_error = squared_norm(v_head - v_g)
        loss += jnp.mean(adaptive_weight(head_error, p, c) * head_error)
        metrics["head_error"] = mean_where(jnp.ones_like(t, bool), head_error / (z.size // len(z)))
    return loss, metrics


def own_velocity(
    network: Callable,
    heads: Callable | None,
    params,
    z: Array,
    t: Array,
    label: Array,
    *told: Array,
) -> Array:
    """v_θ(z, t) (n, ...) without dropout: the second head's, or u at r = t where there is none."""
    if heads is None:
        return network(params, z, t, t, label, None, *told)
    return heads(params, z, t, t, label, None, *told)[1]
