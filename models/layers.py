"""Layers shared by the networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

TIME_INPUTS = ("t", "r", "t-r")


def sinusoids(t: Array, size: int = 256, max_period: float = 10_000.0) -> Array:
    """Embeds times (n,) in [0, 1] as float32 (n, size): cosines and sines of falling frequency.

    The time is fed as it is. Scaled by 1000 or more, as diffusion codes do, the derivative du/dt
    grows with the frequencies and MeanFlow diverges.
    """
    frequencies = max_period ** (-np.arange(size // 2, dtype=np.float32) / (size // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedder(nn.Module):
    """Times (n,) → float32 (n, hidden_size), as in DiT (arXiv 2212.09748)."""

    hidden_size: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """See the class."""
        init = nn.initializers.normal(0.02)
        h = nn.Dense(self.hidden_size, kernel_init=init, name="in")(sinusoids(t))
        return nn.Dense(self.hidden_size, kernel_init=init, name="out")(nn.silu(h))


class Condition(nn.Module):
    """(r, t, label) → float32 (n, hidden_size): the sum of an embedding of each.

    `time_inputs` says what the network is told, a comma-separated choice of t, r and t-r. With
    num_classes = 0 labels are ignored; else label num_classes is the null label.
    """

    hidden_size: int
    num_classes: int
    time_inputs: str

    @nn.compact
    def __call__(self, r: Array, t: Array, label: Array) -> Array:
        """See the class; r, t (n,) float32, label (n,) int32."""
        times = {"t": t, "r": r, "t-r": t - r}
        told = [name.strip() for name in self.time_inputs.split(",")]
        c = jnp.zeros((t.shape[0], self.hidden_size))
        for name in told:
            c += TimeEmbedder(self.hidden_size, name=f"time_{name}")(times[name])
        if self.num_classes:
            table = nn.Embed(
                self.num_classes + 1,
                self.hidden_size,
                embedding_init=nn.initializers.normal(0.02),
                name="label",
            )
            c += table(label)
        return c


class Dense(nn.Dense):
    """`nn.Dense` on all leading axes as one: XLA's backward pass on CPUs is then twice as fast."""

    def __call__(self, x: Array) -> Array:
        """(..., d) → (..., features)."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def dropout(x: Array, rate: float, keys: Array | None, layer: Array | int) -> Array:
    """Dropout with one key (n,) per sample, so that a sample's mask is its own; off without keys.

    Args:
      layer: a number that tells apart the places that share the keys.
    """
    if keys is None or rate == 0:
        return x
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(own)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
