"""The objectives: what a network u(z, r, t) is trained on.

`objective(network, params, batch, key) -> (loss, metrics)`. There `network(params, z, r, t, label,
dropout_keys)` gives u, the batch holds x (n, ...), label (n,) and position (n,), and each metric is
a pair (total, count), so that microbatches and devices add up. Each sample draws from a key folded
with its position in the global batch.

Losses are means over samples of squared errors summed over pixels and channels. `error` is the same
per element, before any weight; `velocity_error` is that at r = t against plain v, and compares
across objectives with one law of t and no guidance.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from flows.apart import derivative, predictions
from flows.guidance import guided_target
from flows.path import interpolate, like, velocity
from flows.times import TimeLaw, interval, interval_pattern, spans_interval

GAPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # edges of the bins of t − r in which errors are logged

Metrics = dict[str, tuple[Array, Array]]


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
    keys = SampleKeys.of(key, batch["position"])
    t = jax.vmap(time_law)(keys.time)
    label, _ = drop_labels(keys.label, batch["label"], class_dropout_prob, null_label)
    noise = normal(keys.noise, batch["x"])
    z, v = interpolate(batch["x"], noise, t), velocity(batch["x"], noise)

    u = network(params, z, t, t, label, keys.dropout)
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
    apart: bool = False,
    forward: Callable | None = None,
    dropout: bool = True,
) -> tuple[Array, Metrics]:
    """E w ‖u − sg(u_tgt)‖², u_tgt = v_g − (t − r) du/dt (arXiv 2505.13447, equations 9 to 11, 19).

    du/dt is the derivative along the flow: the jvp of u in the direction (v_g, 0, 1) of (z, r, t).
    v_g is the guided velocity (`guided_target`), plain v without guidance. The weight is
    w = 1 / sg(‖u − u_tgt‖² + c)^p (equation 22), so with p = 1 the loss stays near 1: read `error`.

    Args:
      apart: computes the parts of the target by `flows.apart`, each for the samples that need it:
        the same numbers with less work. The batch's positions must then be consecutive, from a
        multiple of the pattern's period on.
      forward: the network whose du/dt is taken, where it is computed by other means than
        `network`: apart, in forward mode alone.
      dropout: whether the network drops units, so that u cannot stand for u(·|c) of the guidance.
    """
    keys = SampleKeys.of(key, batch["position"])
    r, t = jax.vmap(interval(time_law))(keys.time)
    r = jnp.where(spans_interval(batch["position"], interval_share), r, t)
    label, dropped = drop_labels(keys.label, batch["label"], class_dropout_prob, null_label)
    noise = normal(keys.noise, batch["x"])
    z, v = interpolate(batch["x"], noise, t), velocity(batch["x"], noise)

    frozen, pattern = stop_gradient(params), interval_pattern(interval_share)
    forward, predict = forward or network, None
    if apart:
        u = network(params, z, r, t, label, keys.dropout)
        known = None if dropout else stop_gradient(u)
        predict = functools.partial(predictions, known=known, pattern=pattern)
    v_g = guided_target(
        network, frozen, z, t, label, v, dropped, predict=predict,
        omega=omega, kappa=kappa, interval=guidance_interval, null_label=null_label,
    )  # fmt: skip
    along = (z, r, t), (v_g, jnp.zeros_like(r), jnp.ones_like(t))
    if apart:
        du_dt = derivative(forward, frozen, *along, label, keys.dropout, pattern)
    else:
        u, du_dt = jax.jvp(lambda *at: forward(params, *at, label, keys.dropout), *along)
    u_tgt = stop_gradient(v_g - like(t - r, z) * du_dt)
    error = squared_norm(u - u_tgt)
    weight = 1 / stop_gradient(error + c) ** p
    return jnp.mean(weight * error), error_metrics(error, squared_norm(u - v), t - r, z)


class SampleKeys(NamedTuple):
    """Keys (n,), one per sample, for each thing that is drawn."""

    noise: Array
    time: Array
    label: Array
    dropout: Array

    @classmethod
    def of(cls, key: Array, position: Array) -> "SampleKeys":
        """Folds the step's key with each sample's position in the global batch."""
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 4))(position)
        return cls(*(keys[:, i] for i in range(4)))


def normal(keys: Array, x: Array) -> Array:
    """Noise e ~ N(0, I) of x's shape (n, ...), each sample from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def drop_labels(
    keys: Array, label: Array, probability: float, null_label: int
) -> tuple[Array, Array]:
    """Replaces labels (n,) by the null label with a probability; also says where."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(dropped, jnp.asarray(null_label, label.dtype), label), dropped


def squared_norm(z: Array) -> Array:
    """‖z‖² per sample: (n, ...) → (n,), summed over pixels and channels."""
    return jnp.sum(jnp.square(z), axis=tuple(range(1, z.ndim)))


def error_metrics(error: Array, velocity_error: Array, gap: Array, z: Array) -> Metrics:
    """Errors per element: over all, at r = t against v, and by bin of t − r."""
    elements = z.size // z.shape[0]
    everywhere = jnp.ones_like(gap, bool)
    metrics = {
        "error": _mean_where(everywhere, error / elements),
        "velocity_error": _mean_where(gap == 0, velocity_error / elements),
    }
    for low, high in itertools.pairwise(GAPS):
        inside = (gap > low) & (gap <= high)
        metrics[f"error_by_gap/{low:g}-{high:g}"] = _mean_where(inside, error / elements)
    return metrics


def _mean_where(mask: Array, value: Array) -> tuple[Array, Array]:
    return jnp.sum(jnp.where(mask, value, 0.0)), jnp.sum(mask.astype(value.dtype))
