"""DiT with two times: (z, r, t, label) → velocity (arXiv 2212.09748, and 2505.13447 for r).

With conditioning=tokens, qk_norm, rope, swiglu, rms, guidance_inputs and a velocity_head it is the
network of improved MeanFlow (arXiv 2512.02012), whose positions are in one dimension, not two, and
whose products have no bias. Sequence length is height · width / patch², and `prefix` more. Einsum
letters: n sample, h w patches down and across, p q pixels within a patch, c channel, d width.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.attention import attention
from models.layers import Condition, Dense, Tokens, count_tokens, dropout, rms

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
zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
PARTS = ("attention", "mlp")  # of a block


class DiT(nn.Module):
    """A transformer on patches, modulated by time and label through adaLN-Zero.

    Parameters are float32; `dtype` is that of the blocks' products, `residual_dtype` that of what
    the blocks add to. Time and label embeddings, norms, modulation, GELU, the softmax and the
    output are computed in float32: docs/precision.md has the errors. `attention` is of
    `models.attention`. `remat` says what the backward pass computes again: none, dots (all but the
    products with parameters) or full (each block). `unroll` blocks make one turn of the scan over
    depth: more compile longer, and on CPUs run up to twice as fast.

    Attributes:
      positions: absolute adds fixed sines to the patches, rope turns queries and keys.
      mlp: gelu, or swiglu (arXiv 2002.05202), whose first layer makes mlp_ratio · hidden_size gates
        and as many values.
      norm: layer, or rms (arXiv 1910.07467).
      qk_norm: RMS norm of each head's queries and keys, with a learnt scale.
      conditioning: adaln; or tokens, which go before the patches, norms then having a learnt scale
        and what a block adds a learnt gate, zero at the start.
      velocity_head: blocks, of `depth` the last, that there are twice: for u, and for v.
      guidance_inputs: whether it is told by how much, and when, it is guided.
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
    positions: str = "absolute"
    mlp: str = "gelu"
    norm: str = "layer"
    qk_norm: bool = False
    conditioning: str = "adaln"
    velocity_head: int = 0
    guidance_inputs: bool = False

    @nn.compact
    def __call__(
        self,
        z: Array,
        r: Array,
        t: Array,
        label: Array,
        dropout_keys: Array | None = None,
        guidance: Array | None = None,
        heads: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Returns u (n, height, width, channels) float32.

        Args:
          z: (n, height, width, channels) float32, height and width multiples of the patch.
          r, t: (n,) float32 in [0, 1], r ≤ t.
          label: (n,) int32, num_classes for none.
          dropout_keys: (n,) keys; None turns dropout off.
          guidance: (n, 3) float32, the scale ω > 0 and the first and last t at which there is
            guidance, for a network with guidance_inputs; None: without guidance, (1, 0, 1).
          heads: (u, v), v as u by the second head, and not u alone; of `init`: all parameters.
        Raises:
          ValueError: guidance or heads that this network has not.
        """
        if (heads and not self.velocity_head) or (
            guidance is not None and not self.guidance_inputs
        ):
            raise ValueError("heads needs velocity_head, and guidance needs guidance_inputs")
        height, width, channels = z.shape[1:]
        grid = height // self.patch_size, width // self.patch_size
        c, tokens = self._condition(r, t, label, guidance)
        x = patches(z, self.patch_size).astype(self.dtype)
        x = Dense(self.hidden_size, xavier, self.dtype, name="patch")(x)
        x = x.astype(jnp.float32)
        if self.positions == "absolute":
            x = x + positions(*grid, self.hidden_size)[None]
        x = x if tokens is None else jnp.concatenate([tokens, x], axis=1)
        x = x.astype(self.residual_dtype)
        before = x.shape[1] - grid[0] * grid[1]
        places = grid_places(*grid, before) if self.positions == "rope" else None
        shared, own = self.depth - self.velocity_head, self.velocity_head

        def blocks(x: Array, name: str, first: int, count: int) -> Array:
            if not count:
                return x
            layers = jnp.arange(first, first + count)
            return self._blocks(name, count)(x, c, dropout_keys, places, layers)[0]

        def out(x: Array, name: str) -> Array:
            head = Head(
                self.patch_size**2 * channels, self.dtype, self.norm, self.conditioning, name=name
            )
            return pixels(head(x[:, before:], c), *grid, self.patch_size)

        x = blocks(x, "blocks", 0, shared)
        u = out(blocks(x, "blocks_u", shared, own), "head")
        return (u, out(blocks(x, "blocks_v", self.depth, own), "head_v")) if heads else u

    def _condition(
        self, r: Array, t: Array, label: Array, guidance: Array | None
    ) -> tuple[Array | None, Array | None]:
        """What modulates the blocks (n, d), or else what goes before the patches (n, tokens, d)."""
        if self.guidance_inputs and guidance is None:
            guidance = jnp.broadcast_to(jnp.array([[1.0, 0.0, 1.0]]), (t.shape[0], 3))
        told = self.num_classes, self.time_inputs, self.time_scale
        kind = Condition if self.conditioning == "adaln" else Tokens
        c = kind(self.hidden_size, *told, name="condition")(r, t, label, guidance)
        return (nn.silu(c).astype(self.dtype), None) if kind is Condition else (None, c)

    def _blocks(self, name: str, length: int) -> nn.Module:
        """Blocks as one scan: parameters are stacked, compile time is flat in depth."""
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=length,
            unroll=self.unroll,
        )(
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.dtype,
            self.attention,
            self.mlp,
            self.norm,
            self.qk_norm,
            self.conditioning,
            name=name,
        )


def check(
    depth: int,
    hidden_size: int,
    num_heads: int,
    positions: str = "absolute",
    velocity_head: int = 0,
) -> None:
    """Raises ValueError, one line that names the mend, where DiT's options do not fit its sizes."""
    if positions == "rope" and hidden_size // num_heads % 4:
        raise ValueError(
            f"model.positions=rope needs heads of a multiple of 4 wide, not "
            f"{hidden_size // num_heads}: give another --model.num_heads or --model.hidden_size"
        )
    if not 0 <= velocity_head <= depth:
        raise ValueError(
            f"model.velocity_head={velocity_head}: of the {depth} blocks of model.depth, "
            f"give --model.velocity_head from 0 to {depth}"
        )


def prefix(conditioning: str, guidance_inputs: bool, time_inputs: str, num_classes: int) -> int:
    """How many tokens go before the patches."""
    if conditioning == "adaln":
        return 0
    return count_tokens(num_classes, time_inputs, guidance_inputs)


class Block(nn.Module):
    """Attention and MLP, each after a norm, and gated.

    With adaLN-Zero the condition shifts, scales and gates; with tokens parameters scale and gate.
    """

    num_heads: int
    mlp_ratio: float
    dropout: float
    dtype: jnp.dtype
    attention: str
    mlp: str
    norm: str
    qk_norm: bool
    conditioning: str

    @nn.compact
    def __call__(
        self,
        x: Array,
        c: Array | None,
        dropout_keys: Array | None,
        places: Array | None,
        layer: Array,
    ) -> tuple[Array, None]:
        """x (n, tokens, d), c (n, d), places as in `rope` → (x, None), as nn.scan wants it."""
        d, before = x.shape[-1], BEFORE[self.conditioning, self.norm]
        if c is None:
            first, second = ([vector(self, f"{part}_norm", ones, d)] for part in PARTS)
            gates = [vector(self, f"{part}_gate", zeros, d) for part in PARTS]
        else:
            modulation = modulations(c, 6, self.dtype)
            first, second, gates = modulation[:2], modulation[3:5], modulation[2::3]
        heads = Attention(
            self.num_heads, self.dtype, self.attention, before, self.qk_norm, name="attention"
        )
        h = heads(x, places, *first)
        x = gated(x, gates[0], dropout(h, self.dropout, dropout_keys, 2 * layer))
        h = MLP(self.mlp_ratio, self.dtype, before, self.mlp, name="mlp")(x, *second)
        x = gated(x, gates[1], dropout(h, self.dropout, dropout_keys, 2 * layer + 1))
        return x, None


class Attention(nn.Module):
    """Multi-head self-attention on what is modulated, by one of `models.attention`."""

    num_heads: int
    dtype: jnp.dtype
    implementation: str
    before: Callable[..., Array]
    qk_norm: bool

    @nn.compact
    def __call__(self, x: Array, places: Array | None, *how: Array) -> Array:
        """x (n, tokens, d), places as in `rope`, how (n or 1, 1, d) → (n, tokens, d)."""
        n, tokens, d = x.shape
        qkv = Dense(3 * d, xavier, self.dtype, before=self.before, name="qkv")(x, *how)
        parts = jnp.split(qkv, 3, axis=-1)  # before heads are told apart: kernels then need no copy
        q, k, v = (part.reshape(n, tokens, self.num_heads, -1) for part in parts)
        norms: list[Array | None] = [None, None]
        if self.qk_norm:
            norms = [vector(self, f"{name}_norm", ones, q.shape[-1]) for name in "qk"]
        if self.qk_norm or places is not None:
            q, k = turned(q, norms[0], places), turned(k, norms[1], places)
        h = attention(q, k, v, self.implementation)
        h = h.reshape(n, tokens, d)
        return Dense(d, xavier, self.dtype, name="out")(h)


class MLP(nn.Module):
    """Two layers on what is modulated, with a GELU (tanh form) or a gate between."""

    ratio: float
    dtype: jnp.dtype
    before: Callable[..., Array]
    kind: str

    @nn.compact
    def __call__(self, x: Array, *how: Array) -> Array:
        """x (n, tokens, d), how (n or 1, 1, d) → (n, tokens, d)."""
        d = x.shape[-1]
        between, parts = (gelu, 1) if self.kind == "gelu" else (swiglu, 2)
        width = parts * round(self.ratio * d)
        h = Dense(width, xavier, self.dtype, before=self.before, name="in")(x, *how)
        return Dense(d, xavier, self.dtype, before=between, name="out")(h)


class Head(nn.Module):
    """The last layer: a norm, modulated or scaled, then to pixels, all zero at the start."""

    features: int
    dtype: jnp.dtype
    norm: str
    conditioning: str

    @nn.compact
    def __call__(self, x: Array, c: Array | None) -> Array:
        """(n, tokens, d), (n, d) → float32 (n, tokens, features)."""
        d = x.shape[-1]
        how = [vector(self, "norm", ones, d)] if c is None else modulations(c, 2, self.dtype)
        before = BEFORE[self.conditioning, self.norm]
        out = Dense(self.features, zeros, jnp.float32, before=before, name="out")
        return out(x, *how)


def vector(module: nn.Module, name: str, init: Callable, size: int) -> Array:
    """A parameter of a module in its compact method, as (1, 1, size)."""
    return module.param(name, init, (size,))[None, None]


def modulations(c: Array, count: int, dtype: jnp.dtype) -> list[Array]:
    """Returns `count` arrays (n, 1, d) from the condition (n, d), zero at the start."""
    out = Dense(count * c.shape[-1], zeros, dtype, name="modulation")(c)
    return jnp.split(out[:, None], count, axis=-1)


standardize = partial(jax.nn.standardize, epsilon=1e-6)


def modulate(x: Array, shift: Array, scale: Array, norm: Callable = standardize) -> Array:
    """A norm without parameters, then x · (1 + scale) + shift, float32."""
    x, shift, scale = (a.astype(jnp.float32) for a in (x, shift, scale))
    return norm(x) * (1 + scale) + shift


def scaled(x: Array, scale: Array, norm: Callable = standardize) -> Array:
    """A norm, then x · scale, float32."""
    return norm(x.astype(jnp.float32)) * scale


BEFORE: dict[
    tuple[str, str], Callable[..., Array]
] = {  # by conditioning and norm: what precedes attention, MLP and the last layer
    ("adaln", "layer"): modulate,
    ("adaln", "rms"): partial(modulate, norm=rms),
    ("tokens", "layer"): scaled,
    ("tokens", "rms"): partial(scaled, norm=rms),
}


@partial(jax.checkpoint, prevent_cse=False)  # keeps h as it came, not in float32
def gated(x: Array, gate: Array, h: Array) -> Array:
    """x + gate · h, in float32 and then of x's type."""
    out = x.astype(jnp.float32) + gate.astype(jnp.float32) * h.astype(jnp.float32)
    return out.astype(x.dtype)


def gelu(x: Array) -> Array:
    """x · Φ(x), Φ the normal distribution's, in its tanh form, float32."""
    return nn.gelu(x.astype(jnp.float32))


def swiglu(x: Array) -> Array:
    """(…, 2 d) → (…, d): the second half times the first half's SiLU, float32."""
    gate, value = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return nn.silu(gate) * value


@partial(jax.checkpoint, prevent_cse=False)  # keeps x as it came
def turned(x: Array, scale: Array | None, places: Array | None) -> Array:
    """Queries or keys (n, tokens, heads, d), normed where a scale (1, 1, d) is given, then `rope`.

    In float32 from end to end, then of x's type; without places nothing is turned.
    """
    h = x if scale is None else rms(x) * scale[None]
    return (h if places is None else rope(h, places)).astype(x.dtype)


def rope(x: Array, places: Array) -> Array:
    """Turns each token's channels by angles that grow with its row and column, float32.

    Rotary embedding (arXiv 2104.09864) in two dimensions: the products of queries with keys depend
    on the difference of their places alone. A place of 0 turns nothing.

    Args:
      x: queries or keys, (n, tokens, heads, d), d a multiple of 4. The first half of d is turned by
        the row, the second by the column; in each, the first half of channels and the second are
        the parts of as many complex numbers.
      places: (tokens, 2), row and column, in patches.
    """
    quarter = x.shape[-1] // 4
    frequencies = (10_000.0 ** (-np.arange(quarter) / quarter)).astype(np.float32)
    places = jnp.asarray(places, jnp.float32)
    angles = places[None, :, None, :, None] * frequencies[None, None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # (1, tokens, 1, row or column, quarter)
    parts = x.astype(jnp.float32).reshape(*x.shape[:3], 2, 2, quarter)
    a, b = parts[..., 0, :], parts[..., 1, :]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-2).reshape(x.shape)


def grid_places(h: int, w: int, before: int = 0) -> np.ndarray:
    """Row and column of each patch, after `before` tokens at 0: float32 (tokens, 2)."""
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    places = np.stack([rows.reshape(-1), columns.reshape(-1)], axis=1)
    return np.concatenate([np.zeros((before, 2)), places]).astype(np.float32)


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
