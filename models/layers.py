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
    def __call__(self, r: Array, t: Array, label: Array, guidance: Array | None = None) -> Array:
        """See the class; r, t (n,) float32, label (n,) int32, guidance as `embeddings` has it."""
        told = self.num_classes, self.time_inputs, self.time_scale
        c = jnp.zeros((t.shape[0], self.hidden_size))
        for embedding in embeddings(self.hidden_size, *told, r, t, label, guidance).values():
            c += embedding
        return c


class Tokens(nn.Module):
    """What `Condition` sums as tokens: float32 (n, tokens, hidden_size), `count_tokens` of them.

    In-context conditioning as improved MeanFlow has it (arXiv 2512.02012): each embedding is
    several tokens, to each of which a learnt vector is added that tells it apart.
    """

    hidden_size: int
    num_classes: int
    time_inputs: str
    time_scale: float = 1.0

    @nn.compact
    def __call__(self, r: Array, t: Array, label: Array, guidance: Array | None = None) -> Array:
        """As `Condition`; the label comes first, then the guidance, then the times."""
        told = self.num_classes, self.time_inputs, self.time_scale
        found = embeddings(self.hidden_size, *told, r, t, label, guidance)
        parts = []
        for name in sorted(found, key=_place):
            shape = token_count(name), self.hidden_size
            tokens = self.param(f"{name}_tokens", nn.initializers.normal(0.02), shape)
            parts.append(tokens[None] + found[name][:, None])
        return jnp.concatenate(parts, axis=1)


GUIDANCE = ("omega", "t_min", "t_max")  # what a network may be told of its guidance
TOKENS = {"label": 8, "omega": 4, "t_min": 2, "t_max": 2}  # of each embedding; of a time 4


def token_count(name: str) -> int:
    """How many tokens an embedding is: improved MeanFlow's numbers, with 4 for each time."""
    return TOKENS.get(name, 4)


def count_tokens(num_classes: int, time_inputs: str, guidance_inputs: bool) -> int:
    """How many tokens `Tokens` gives."""
    names = [*told_times(time_inputs), *(["label"] if num_classes else [])]
    return sum(map(token_count, names + list(GUIDANCE) * guidance_inputs))


def _place(name: str) -> int:
    """Where an embedding's tokens stand among the others; times keep their order."""
    order = list(TOKENS)
    return order.index(name) if name in order else len(order)


def told_times(time_inputs: str) -> list[str]:
    """The times of a comma-separated choice."""
    return [name.strip() for name in time_inputs.split(",")]


def embeddings(
    hidden_size: int,
    num_classes: int,
    time_inputs: str,
    time_scale: float,
    r: Array,
    t: Array,
    label: Array,
    guidance: Array | None,
) -> dict[str, Array]:
    """What a network is told, each embedded as float32 (n, hidden_size), by name.

    To be called by the module whose parameters these are.

    Args:
      guidance: (n, 3) float32, the scale ω > 0 and the times between which there is guidance, or
        None for a network that is not told. Of ω it is told 1 − 1/ω, as in improved MeanFlow:
        0 without guidance, below 1 at any scale.
    """
    times = {"t": t, "r": r, "t-r": t - r}
    found = {}
    for name in told_times(time_inputs):
        embed = TimeEmbedder(hidden_size, time_scale, name=f"time_{name}")
        found[f"time_{name}"] = embed(times[name])
    if num_classes:
        table = nn.Embed(
            num_classes + 1,
            hidden_size,
            embedding_init=nn.initializers.normal(0.02),
            name="label",
        )
        found["label"] = table(label)
    if guidance is not None:
        omega, t_min, t_max = jnp.split(guidance, 3, axis=1)
        for name, value in zip(GUIDANCE, (1 - 1 / omega, t_min, t_max), strict=True):
            found[name] = TimeEmbedder(hidden_size, name=name)(value[:, 0])
    return found


def rms(x: Array) -> Array:
    """x over the root of its mean square along the last axis (arXiv 1910.07467), float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def identity(x: Array) -> Array:
    """x."""
    return x


class Dense(nn.Module):
    """before(inputs) · kernel + bias, over all leading axes as one.

    With the leading axes as one, XLA's backward pass on CPUs is twice as fast. Of the forward pass
    the inputs alone are kept: `before`, a norm or elementwise but for what it may do to the last
    axis, is computed again in the backward pass, the product is not. Parameters are float32,
    products of `dtype`.
    """

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype
    before: Callable[..., Array] = identity

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        """(..., d), and what else `before` takes → (..., features) of `dtype`."""
        shape = inputs[0].shape
        width = jax.eval_shape(self.before, *inputs).shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, self.features))
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
