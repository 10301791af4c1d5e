"""Layers shared by the networks."""

from collections.abc import Callable

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
    """Times (n,), times `scale`, → float32 (n, hidden_size), as in DiT (arXiv 2212.09748)."""

    hidden_size: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """See the class."""
        init = nn.initializers.normal(0.02)
        h = nn.Dense(self.hidden_size, kernel_init=init, name="in")(sinusoids(self.scale * t))
        return nn.Dense(self.hidden_size, kernel_init=init, name="out")(nn.silu(h))


class Condition(nn.Module):
    """(r, t, label) → float32 (n, hidden_size): the sum of an embedding of each.

    `time_inputs` says what the network is told, a comma-separated choice of t, r and t-r. With
    num_classes = 0 labels are ignored; else label num_classes is the null label.
    """

    hidden_size: int
    num_classes: int
    time_inputs: str
    time_scale: float = 1.0

    @nn.compact
    def __call__(self, r: Array, t: Array, label: Array) -> Array:
        """See the class; r, t (n,) float32, label (n,) int32."""
        times = {"t": t, "r": r, "t-r": t - r}
        told = [name.strip() for name in self.time_inputs.split(",")]
        c = jnp.zeros((t.shape[0], self.hidden_size))
        for name in told:
            embed = TimeEmbedder(self.hidden_size, self.time_scale, name=f"time_{name}")
            c += embed(times[name])
        if self.num_classes:
            table = nn.Embed(
                self.num_classes + 1,
                self.hidden_size,
                embedding_init=nn.initializers.normal(0.02),
                name="label",
            )
            c += table(label)
        return c


def identity(x: Array) -> Array:
    """x."""
    return x


class Dense(nn.Module):
    """before(inputs) · kernel + bias, over all leading axes as one.

    With the leading axes as one, XLA's backward pass on CPUs is twice as fast. Of the forward pass
    the inputs alone are kept: `before`, elementwise or a norm, is computed again in the backward
    pass, the product is not. Parameters are float32, products of `dtype`.
    """

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype
    before: Callable[..., Array] = identity

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        """(..., d), and what else `before` takes → (..., features) of `dtype`."""
        shape = inputs[0].shape
        kernel = self.param("kernel", self.kernel_init, (shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        out = jax.checkpoint(self._product, prevent_cse=False)(kernel, bias, *inputs)
        return out.reshape(*shape[:-1], self.features)

    def _product(self, kernel: Array, bias: Array, *inputs: Array) -> Array:
        x = self.before(*inputs).astype(self.dtype)
        x = x.reshape(-1, x.shape[-1])
        return x @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None]


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
