"""What every objective draws for a batch, and how it measures errors.

Each sample draws from a key folded with its position in the global batch.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from flows.path import interpolate, velocity
from flows.times import spans_interval

GAPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # edges of the bins of t − r in which errors are logged

GUIDANCE = 1  # of a label's key: what is drawn from it beside whether the label is dropped

Metrics = dict[str, tuple[Array, Array]]


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

    @property
    def guidance(self) -> Array:
        """Keys (n,) for what a network is told of guidance."""
        return jax.vmap(lambda key: jax.random.fold_in(key, GUIDANCE))(self.label)


class Draws(NamedTuple):
    """A batch on the path: z_t and v (n, ...); the rest (n,)."""

    z: Array
    v: Array
    r: Array
    t: Array
    label: Array  # some replaced by the null label
    dropped: Array  # bool: which
    keys: SampleKeys

    @property
    def rest(self) -> tuple[Array, Array]:
        """What a network is told beside z, r and t: labels and keys for dropout."""
        return self.label, self.keys.dropout


def draws(
    batch: dict,
    key: Array,
    pair_law: Callable[[Array], tuple[Array, Array]],
    interval_share: float,
    class_dropout_prob: float,
    null_label: int,
    time_law: Callable[[Array], Array] | None = None,
) -> Draws:
    """Noise, times and dropped labels for a batch {x (n, ...), label (n,), position (n,)}.

    Args:
      pair_law: key → (r, t) of a sample.
      interval_share: of the samples that keep r ≠ t (`spans_interval`).
      time_law: key → t of the others; None: t of the pair.
    """
    keys = SampleKeys.of(key, batch["position"])
    r, t = jax.vmap(pair_law)(keys.time)
    spans = spans_interval(batch["position"], interval_share)
    if time_law is not None:
        t = jnp.where(spans, t, jax.vmap(time_law)(keys.time))
    r = jnp.where(spans, r, t)
    label, dropped = drop_labels(keys.label, batch["label"], class_dropout_prob, null_label)
    noise = normal(keys.noise, batch["x"])
    z, v = interpolate(batch["x"], noise, t), velocity(batch["x"], noise)
    return Draws(z, v, r, t, label, dropped, keys)


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


def adaptive_weight(error: Array, p: float, c: float) -> Array:
    """w = 1 / sg(error + c)^p (n,) (arXiv 2505.13447, equation 22)."""
    return 1 / stop_gradient(error + c) ** p


def error_metrics(error: Array, velocity_error: Array, gap: Array, z: Array) -> Metrics:
    """Errors per element: over all, at r = t against v, and by bin of t − r."""
    elements = z.size // z.shape[0]
    everywhere = jnp.ones_like(gap, bool)
    metrics = {
        "error": mean_where(everywhere, error / elements),
        "velocity_error": mean_where(gap == 0, velocity_error / elements),
    }
    for low, high in itertools.pairwise(GAPS):
        inside = (gap > low) & (gap <= high)
        metrics[f"error_by_gap/{low:g}-{high:g}"] = mean_where(inside, error / elements)
    return metrics


def mean_where(mask: Array, value: Array) -> tuple[Array, Array]:
    """The sum of values (n,) where a mask is true, and how many these are."""
    return jnp.sum(jnp.where(mask, value, 0.0)), jnp.sum(mask.astype(value.dtype))
