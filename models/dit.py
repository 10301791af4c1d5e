"""DiT with two times: (z, r, t, label) → velocity (arXiv 2212.09748, and 2505.13447 for r).

Sequence length is height · width / patch². Einsum letters: n sample, h w patches down and across,
p q pixels within a patch, c channel, d width.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.attention import attention
from models.layers import Condition, Dense, dropout

# depth, hidden_size, num_heads, as DiT names them
WIDTHS = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
SIZES = {
    f"{name}/{patch}": {
        "depth": depth,
        "hidden_size": width,
        "num_heads": heads,
        "patch_size": patch,
    }
    for name, (depth, width, heads) in WIDTHS.items()
    for patch in (1, 2, 4, 8)
}

REMAT = {  # what the forward pass keeps of a block
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


class DiT(nn.Module):
    """A transformer on patches, modulated by time and label through adaLN-Zero.

    Parameters are float32; `dtype` is that of the blocks' products, `residual_dtype` that of what
    the blocks add to. Time and label embeddings, norms, modulation, GELU, the softmax and the
    output are computed in float32: docs/precision.md has the errors. `attention` is of
    `models.attention`. `remat` says what the backward pass computes again: none, dots (all but the
    products with parameters) or full (each block). `unroll` blocks make one turn of the scan over
    depth: more compile longer, and on CPUs run up to twice as fast.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    num_classes: int = 0
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    time_inputs: str = "t,t-r"
    time_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    residual_dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self, z: Array, r: Array, t: Array, label: Array, dropout_keys: Array | None = None
    ) -> Array:
        """Returns u (n, height, width, channels) float32.

        Args:
          z: (n, height, width, channels) float32, height and width multiples of the patch.
          r, t: (n,) float32 in [0, 1], r ≤ t.
          label: (n,) int32, num_classes for none.
          dropout_keys: (n,) keys; None turns dropout off.
        """
        height, width, channels = z.shape[1:]
        told = self.num_classes, self.time_inputs, self.time_scale
        c = Condition(self.hidden_size, *told, name="condition")(r, t, label)
        c = nn.silu(c).astype(self.dtype)
        x = patches(z, self.patch_size).astype(self.dtype)
        x = Dense(self.hidden_size, xavier, self.dtype, name="patch")(x)
        grid = height // self.patch_size, width // self.patch_size
        x = x.astype(jnp.float32) + positions(*grid, self.hidden_size)[None]
        x = x.astype(self.residual_dtype)
        x = self._blocks()(x, c, dropout_keys, jnp.arange(self.depth))[0]
        x = Head(self.patch_size**2 * channels, self.dtype, name="head")(x, c)
        return pixels(x, *grid, self.patch_size)

    def _blocks(self) -> nn.Module:
        """`depth` blocks as one scan: parameters are stacked, compile time is flat in depth."""
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=self.depth,
            unroll=self.unroll,
        )(self.num_heads, self.mlp_ratio, self.dropout, self.dtype, self.attention, name="blocks")


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    num_heads: int
    mlp_ratio: float
    dropout: float
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(
        self, x: Array, c: Array, dropout_keys: Array | None, layer: Array
    ) -> tuple[Array, None]:
        """x (n, tokens, d), c (n, d) → (x, None), as nn.scan wants it."""
        modulation = modulations(c, 6, self.dtype)
        shift, scale, gate = modulation[:3]
        heads = Attention(self.num_heads, self.dtype, self.attention, name="attention")
        h = heads(x, shift, scale)
        x = gated(x, gate, dropout(h, self.dropout, dropout_keys, 2 * layer))
        shift, scale, gate = modulation[3:]
        h = MLP(self.mlp_ratio, self.dtype, name="mlp")(x, shift, scale)
        x = gated(x, gate, dropout(h, self.dropout, dropout_keys, 2 * layer + 1))
        return x, None


class Attention(nn.Module):
    """Multi-head self-attention on what is modulated, by one of `models.attention`."""

    num_heads: int
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x: Array, shift: Array, scale: Array) -> Array:
        """x (n, tokens, d), shift and scale (n, 1, d) → (n, tokens, d)."""
        n, tokens, d = x.shape
        qkv = Dense(3 * d, xavier, self.dtype, before=modulate, name="qkv")(x, shift, scale)
        parts = jnp.split(qkv, 3, axis=-1)  # before heads are told apart: kernels then need no copy
        q, k, v = (part.reshape(n, tokens, self.num_heads, -1) for part in parts)
        h = attention(q, k, v, self.implementation)
        h = h.reshape(n, tokens, d)
        return Dense(d, xavier, self.dtype, name="out")(h)


class MLP(nn.Module):
    """Two layers on what is modulated, with a GELU (tanh form) between."""

    ratio: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, shift: Array, scale: Array) -> Array:
        """x (n, tokens, d), shift and scale (n, 1, d) → (n, tokens, d)."""
        d = x.shape[-1]
        up = Dense(round(self.ratio * d), xavier, self.dtype, before=modulate, name="in")
        return Dense(d, xavier, self.dtype, before=gelu, name="out")(up(x, shift, scale))


class Head(nn.Module):
    """The last layer: modulated, to pixels, all zero at the start."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        """(n, tokens, d), (n, d) → float32 (n, tokens, features)."""
        shift, scale = modulations(c, 2, self.dtype)
        out = Dense(self.features, zeros, jnp.float32, before=modulate, name="out")
        return out(x, shift, scale)


def modulations(c: Array, count: int, dtype: jnp.dtype) -> list[Array]:
    """Returns `count` arrays (n, 1, d) from the condition (n, d), zero at the start."""
    out = Dense(count * c.shape[-1], zeros, dtype, name="modulation")(c)
    return jnp.split(out[:, None], count, axis=-1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Layer norm without parameters, then x · (1 + scale) + shift, float32."""
    x, shift, scale = (a.astype(jnp.float32) for a in (x, shift, scale))
    return jax.nn.standardize(x, epsilon=1e-6) * (1 + scale) + shift


@partial(jax.checkpoint, prevent_cse=False)  # keeps h as it came, not in float32
def gated(x: Array, gate: Array, h: Array) -> Array:
    """x + gate · h, in float32 and then of x's type."""
    out = x.astype(jnp.float32) + gate.astype(jnp.float32) * h.astype(jnp.float32)
    return out.astype(x.dtype)


def gelu(x: Array) -> Array:
    """x · Φ(x), Φ the normal distribution's, in its tanh form, float32."""
    return nn.gelu(x.astype(jnp.float32))


def patches(z: Array, patch: int) -> Array:
    """(n, h·p, w·q, c) → (n, h·w, p·q·c)."""
    n, height, width, channels = z.shape
    z = z.reshape(n, height // patch, patch, width // patch, patch, channels)
    return jnp.einsum("nhpwqc->nhwpqc", z).reshape(n, -1, patch * patch * channels)


def pixels(x: Array, h: int, w: int, patch: int) -> Array:
    """(n, h·w, p·q·c) → (n, h·p, w·q, c), the inverse of `patches`."""
    x = x.reshape(x.shape[0], h, w, patch, patch, -1)
    return jnp.einsum("nhwpqc->nhpwqc", x).reshape(x.shape[0], h * patch, w * patch, -1)


def positions(h: int, w: int, size: int) -> np.ndarray:
    """Fixed sines and cosines of the patch's column, then its row: float32 (h·w, size)."""

    def along(place: np.ndarray) -> np.ndarray:
        frequency = 10_000.0 ** (-np.arange(size // 4) / (size // 4))
        angle = place.reshape(-1, 1) * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    return np.concatenate([along(columns), along(rows)], axis=1).astype(np.float32)
