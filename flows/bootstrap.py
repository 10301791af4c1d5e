"""Objectives whose targets are the network's own values at another point of the path.

They need no derivative: a target is one or two calls of the network with stopped gradients. As in
`flows.objectives`, `objective(network, params, batch, key) -> (loss, metrics)`. The published
shortcut models take targets from averaged parameters; here they come from the parameters
themselves, as for the other objectives.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from flows.apart import derivative, put, taken
from flows.draws import Metrics, adaptive_weight, draws, error_metrics, squared_norm
from flows.guidance import guided_target
from flows.objectives import EVERY
from flows.path import like
from flows.times import PairLaw, dyadic, interval_pattern, ticks


def alpha_flow(
    network: Callable,
    params,
    batch: dict,
    key: Array,
    *,
    pair_law: PairLaw,
    interval_share: float,
    alpha: Callable[[Array], Array],
    p: float,
    c: float,
    omega: float,
    kappa: float,
    guidance_interval: tuple[float, float],
    class_dropout_prob: float,
    null_label: int,
    forward: Callable | None = None,
    apart: bool = False,
) -> tuple[Array, Metrics]:
    """E w ‖u − sg(u_tgt)‖², u_tgt = α v_g + (1 − α) u(z_s, r, s) (arXiv 2510.20771, section 4).

    s = t − α (t − r), and z_s = z_t − (t − s) v_g. α = 1 regresses u(z, r, t) on v for every r; as
    α → 0 the residual over α becomes MeanFlow's, and at α = 0 the target is MeanFlow's own. In
    between it is biased by about α².

    The weight is α^(2p − 1) / (error + c)^p where r ≠ t, that of α = 1 where r = t and at α = 0; c
    is of an element. Errors of r ≠ t fall as α² untaught: read `velocity_error`.

    Args:
      pair_law: key → (r, t).
      alpha: step () → α in [0, 1], `flows.times.annealed`; `step` (n,) of a batch is one number.
      forward, apart: as `mean_flow` takes them; not apart, targets are computed for all samples.
    """
    d = draws(batch, key, pair_law, interval_share, class_dropout_prob, null_label)
    z, v, r, t, label, dropped, _ = d
    frozen, forward = stop_gradient(params), forward or network
    pattern = interval_pattern(interval_share) if apart else EVERY
    a = alpha(batch["step"][0])
    v_g = guided_target(
        network, frozen, z, t, label, v, dropped,
        omega=omega, kappa=kappa, interval=guidance_interval, null_label=null_label,
    )  # fmt: skip

    def from_further_on() -> Array:
        z_t, v_t, r_t, t_t, *rest = (taken(x, pattern) for x in (z, v_g, r, t, *d.rest))
        s = t_t - a * (t_t - r_t)
        ahead = network(frozen, z_t - like(t_t - s, z_t) * v_t, r_t, s, *rest)
        return put(v_g, a * v_t + (1 - a) * ahead, pattern)

    def from_derivative() -> Array:
        along = (z, r, t), (v_g, jnp.zeros_like(r), jnp.ones_like(t))
        return v_g - like(t - r, z) * derivative(forward, frozen, *along, d.rest, pattern)

    u_tgt = jax.lax.cond(a > 0, from_further_on, from_derivative) if pattern.any() else v_g
    u_tgt = jnp.where(like(r < t, z), u_tgt, v_g)
    u = network(params, z, r, t, *d.rest)
    error = squared_norm(u - stop_gradient(u_tgt))
    scale = jnp.where((r < t) & (a > 0), jnp.where(a > 0, a, 1.0) ** (2 * p - 1), 1.0)
    weight = scale * adaptive_weight(error, p, c * (z.size // len(z)))
    return jnp.mean(weight * error), error_metrics(error, squared_norm(u - v), t - r, z)


def consistency(
    network: Callable, params, batch: dict, key: Array, **options
) -> tuple[Array, Metrics]:
    """Consistency training (arXiv 2303.01469, algorithm 3), of f(z, t) = z − t u(z, 0, t).

    f is regressed on itself at z_s, nearer to the data on the same line. In terms of u that is
    `alpha_flow` with r = 0, whose α is the share of the way that s lies ahead: the discretisation,
    finer as α falls, until at α = 0 it is continuous.

    Args:
      options: of `alpha_flow`, `pair_law` with r = 0 (`flows.times.to_data`).
    """
    return alpha_flow(network, params, batch, key, **options)


def shortcut(
    network: Callable,
    params,
    batch: dict,
    key: Array,
    *,
    levels: int,
    interval_share: float,
    clip: float,
    class_dropout_prob: float,
    null_label: int,
    apart: bool = False,
) -> tuple[Array, Metrics]:
    """E ‖u − sg(u_tgt)‖², a step as two of half its length (arXiv 2410.12557, equations 3 to 5).

    With m = (r + t)/2, u_tgt is the mean of u(z_t, m, t) and u(z_m, r, m), where
    z_m = z_t − (t − m) u(z_t, m, t); at r = t it is v. Steps have lengths 1, 1/2, … down to
    2^(1 − levels), whose halves are Euler's, by u at r = t.

    Args:
      clip: z_m and u_tgt are clipped to ± this, as the authors' code does; 0: they are not.
      apart: as `mean_flow` takes it; not apart, targets are computed for all samples.
    """
    d = draws(
        batch, key, dyadic(levels), interval_share, class_dropout_prob, null_label, ticks(levels)
    )
    frozen = stop_gradient(params)
    pattern = interval_pattern(interval_share) if apart else EVERY
    limited = (lambda x: jnp.clip(x, -clip, clip)) if clip else (lambda x: x)

    def halves() -> Array:
        z, r, t, *rest = (taken(x, pattern) for x in (d.z, d.r, d.t, *d.rest))
        m = (r + t) / 2
        finest = t - r < 1.5 * 2.0 ** (1 - levels)
        first = network(frozen, z, jnp.where(finest, t, m), t, *rest)
        z_m = limited(z - like(t - m, z) * first)
        second = network(frozen, z_m, jnp.where(finest, m, r), m, *rest)
        return limited((first + second) / 2)

    u_tgt = put(d.v, halves(), pattern) if pattern.any() else d.v
    u_tgt = jnp.where(like(d.r < d.t, d.z), u_tgt, d.v)
    u = network(params, d.z, d.r, d.t, *d.rest)
    error = squared_norm(u - stop_gradient(u_tgt))
    return jnp.mean(error), error_metrics(error, squared_norm(u - d.v), d.t - d.r, d.z)
