"""A U-Net with two times: (z, r, t, label) → velocity, as DDPM++ and NCSN++ have it.

The residual blocks, their order and their scales are those of arXiv 2011.13456, appendix H, as EDM
(2206.00364, table 7) and MeanFlow's CIFAR-10 network (2505.13447, appendix A; github.com/Gsunshine/
py-meanflow) have them. Only the embedding of time and label is this project's own, the same as
DiT's. Einsum letters: n sample, h w rows and columns of the result, p q of the input, c channel.
"""

import itertools
import reprlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models import dit
from models.attention import attention
from models.layers import Condition, dropout

FILTERS = {"box": (1, 1), "fir": (1, 3, 3, 1)}  # of `model.resample`; fir is that of NCSN++
EMBEDDING = 4  # width of the condition, in base channels
WIDEST = 64  # of what multiplies them
MOST_LEVELS = 8
MOST_BLOCKS = 64  # per resolution, times resolutions: each is traced and compiled on its own
SKIP_SCALE = 0.5**0.5  # keeps the variance of a sum of two

xavier = nn.initializers.xavier_uniform()
attention_init = nn.initializers.variance_scaling(0.2, "fan_avg", "uniform")
zeros = nn.initializers.zeros_init()


def is_convolution(primitive: object, *_: Any, **__: Any) -> bool:
    """Whether what is computed is one, for a policy of `jax.checkpoint`."""
    return primitive is jax.lax.conv_general_dilated_p


REMAT = dit.REMAT | {  # convolutions are products with parameters too
    "dots": jax.checkpoint_policies.save_from_both_policies(dit.REMAT["dots"], is_convolution)
}


class UNet(nn.Module):
    """`depth` residual blocks per resolution on the way down and one more on the way up.

    Level i has hidden_size · channel_multipliers[i] channels on maps of side / 2^i. Self-attention
    with `num_heads` heads is in the blocks whose maps have a side of `attention_resolutions` (on
    the way up, in the last of each), and once at the bottom always. `resample` is of FILTERS.

    Parameters are float32; `dtype` is that of convolutions and of what is kept between them. Time
    and label embeddings, group norms, residual sums, the softmax and the output are float32. It can
    be differentiated in both modes. `remat` says what the backward pass computes again: none, dots
    (all but convolutions and other products with parameters) or full (each block).
    """

    hidden_size: int
    depth: int
    num_heads: int = 1
    channel_multipliers: tuple[int, ...] = (1, 2, 2)
    attention_resolutions: tuple[int, ...] = ()
    resample: str = "box"
    num_classes: int = 0
    dropout: float = 0.0
    time_inputs: str = "t,t-r"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self, z: Array, r: Array, t: Array, label: Array, dropout_keys: Array | None = None
    ) -> Array:
        """Returns u (n, height, width, channels) float32, zero at the start.

        Args:
          z: (n, height, width, channels) float32.
          r, t: (n,) float32 in [0, 1], r ≤ t.
          label: (n,) int32, num_classes for none.
          dropout_keys: (n,) keys; None turns dropout off.
        Raises:
          ValueError: sizes that do not fit, as `check` says them.
        """
        check(
            z.shape[1:], self.hidden_size, self.depth, self.num_heads, self.channel_multipliers,
            self.attention_resolutions, self.resample,
        )  # fmt: skip
        told = self.num_classes, self.time_inputs
        c = Condition(EMBEDDING * self.hidden_size, *told, name="condition")(r, t, label)
        c = nn.silu(c).astype(self.dtype)
        # Numbers tell the blocks' masks of dropout apart.
        block = partial(self._block, c=c, keys=dropout_keys, layers=itertools.count())
        x = conv(self.hidden_size, 3, self.dtype, name="in")(z.astype(self.dtype))
        x, skips = self._down(x, block)
        x = block(x, "middle_0", attention=True)
        x = block(x, "middle_1")
        x = self._up(x, skips, block)
        x = conv(z.shape[-1], 3, self.dtype, zeros, name="out")(nn.silu(norm(x, "norm_out")))
        return x.astype(jnp.float32)

    def _down(self, x: Array, block: Callable) -> tuple[Array, list[Array]]:
        """Returns the smallest map, and all that the way up is to see again."""
        skips = [x]
        for level, multiplier in enumerate(self.channel_multipliers):
            if level:
                x = block(x, f"down_{level}", resize="halve")
                skips.append(x)
            for i in range(self.depth):
                attend = x.shape[1] in self.attention_resolutions
                width = multiplier * self.hidden_size
                x = block(x, f"encoder_{level}_{i}", width, attention=attend)
                skips.append(x)
        return x, skips

    def _up(self, x: Array, skips: list[Array], block: Callable) -> Array:
        """Returns the map of the first level; uses up `skips` from the last on."""
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            if level < len(self.channel_multipliers) - 1:
                x = block(x, f"up_{level}", resize="double")
            for i in range(self.depth + 1):
                attend = i == self.depth and x.shape[1] in self.attention_resolutions
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                width = multiplier * self.hidden_size
                x = block(x, f"decoder_{level}_{i}", width, attention=attend)
        return x

    def _block(
        self,
        x: Array,
        name: str,
        width: int = 0,
        *,
        c: Array,
        keys: Array | None,
        layers: Iterator[int],
        **more: Any,
    ) -> Array:
        """One residual block of `width` channels, by default as many as x has.

        Args:
          more: resize, attention, as `Block` takes them.
        """
        sizes = width or x.shape[-1], self.num_heads, self.dropout, self.resample, self.dtype
        kind = Block
        if self.remat != "none":  # nothing but a barrier keeps XLA from undoing it outside a scan
            kind = nn.remat(Block, policy=REMAT[self.remat], static_argnums=(4,))
        return kind(*sizes, **more, name=name)(x, c, keys, next(layers))


class Block(nn.Module):
    """Two convolutions, the condition added between them; then attention, where it is asked for.

    `resize` is halve, double or empty. Each of the two sums is scaled by SKIP_SCALE.
    """

    width: int
    num_heads: int
    dropout: float
    resample: str
    dtype: jnp.dtype
    resize: str = ""
    attention: bool = False

    @nn.compact
    def __call__(self, x: Array, c: Array, dropout_keys: Array | None, layer: int) -> Array:
        """x (n, h, w, channels), c (n, d), keys (n,) or None → (n, h′, w′, width) of `dtype`."""
        h = nn.silu(norm(x, "norm_0"))
        if self.resize:
            law = halved if self.resize == "halve" else doubled
            x, h = law(x, self.resample), law(h, self.resample)
        h = conv(self.width, 3, self.dtype, name="conv_0")(h.astype(self.dtype))
        shift = nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype, name="condition")(c)
        h = nn.silu(norm(h + shift[:, None, None], "norm_1"))
        h = dropout(h, self.dropout, dropout_keys, layer)
        h = conv(self.width, 3, self.dtype, zeros, name="conv_1")(h)
        if self.resize or x.shape[-1] != self.width:
            x = conv(self.width, 1, self.dtype, name="skip")(x)
        x = scaled_sum(x, h)
        if self.attention:
            x = scaled_sum(x, self._attention(x))
        return x

    def _attention(self, x: Array) -> Array:
        """Self-attention between the places of a map (n, h, w, width)."""
        n, height, width, channels = x.shape
        h = norm(x, "norm_2").reshape(n, height * width, channels)
        init = attention_init
        qkv = nn.Dense(3 * channels, kernel_init=init, dtype=self.dtype, name="qkv")(h)
        q, k, v = (
            part.reshape(n, height * width, self.num_heads, -1)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        h = attention(q, k, v).reshape(x.shape)
        return nn.Dense(channels, kernel_init=zeros, dtype=self.dtype, name="proj")(h)


def conv(
    features: int,
    side: int,
    dtype: jnp.dtype,
    init: nn.initializers.Initializer = xavier,
    *,
    name: str,
) -> nn.Conv:
    """A convolution by side × side, zeros around the map."""
    return nn.Conv(features, (side, side), kernel_init=init, dtype=dtype, name=name)


def norm(x: Array, name: str) -> Array:
    """Group norm in float32: as many groups, up to 32 of 4 channels or more, as divide x's."""
    channels = x.shape[-1]
    most = max(1, min(32, channels // 4))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    layer = nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)
    return layer(x.astype(jnp.float32))


def scaled_sum(x: Array, h: Array) -> Array:
    """(x + h) / √2, in float32 and then of x's type."""
    return ((x.astype(jnp.float32) + h.astype(jnp.float32)) * SKIP_SCALE).astype(x.dtype)


def halved(x: Array, resample: str) -> Array:
    """(n, 2h, 2w, c) → (n, h, w, c): filtered, then every other row and column."""
    rows, columns = (_halving(side, resample).astype(x.dtype) for side in x.shape[1:3])
    return jnp.einsum("wq,nhqc->nhwc", columns, jnp.einsum("hp,npqc->nhqc", rows, x))


def doubled(x: Array, resample: str) -> Array:
    """(n, h, w, c) → (n, 2h, 2w, c): zeros between, then filtered: 4 times `halved` transposed."""
    rows, columns = (2 * _halving(2 * side, resample).T.astype(x.dtype) for side in x.shape[1:3])
    return jnp.einsum("wq,nhqc->nhwc", columns, jnp.einsum("hp,npqc->nhqc", rows, x))


def _halving(side: int, resample: str) -> np.ndarray:
    """The matrix (side / 2, side) of a filter at every other place, zeros beyond the ends."""
    taps = np.array(FILTERS[resample], np.float32) / sum(FILTERS[resample])
    pad = len(taps) // 2 - 1
    wide = np.zeros((side // 2, side + 2 * pad), np.float32)
    for row in range(side // 2):
        wide[row, 2 * row : 2 * row + len(taps)] = taps
    return wide[:, pad : pad + side]


def check(
    shape: tuple[int, ...],
    hidden_size: int,
    depth: int,
    num_heads: int,
    channel_multipliers: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
    resample: str,
) -> None:
    """Raises ValueError, in one line that names the mend, where a U-Net cannot have these sizes.

    Args:
      shape: of a sample. The others are fields of `UNet`.
    """
    if len(shape) != 3:
        raise ValueError("model.name=unet needs pictures: --model.name=mlp for points")
    if resample not in FILTERS:
        raise ValueError(f"model.resample={resample!r}: give --model.resample=box or fir")
    check_levels(depth, channel_multipliers, attention_resolutions)
    levels = len(channel_multipliers)
    if any(side % 2 ** (levels - 1) for side in shape[:2]):
        fit = next(n for n in range(levels, 0, -1) if not any(s % 2 ** (n - 1) for s in shape[:2]))
        raise ValueError(
            f"{shape[0]}x{shape[1]} cannot be halved {levels - 1} times: give "
            f"--model.channel_multipliers of at most {fit} numbers, as "
            f"{','.join(map(str, channel_multipliers[:fit]))}"
        )
    sides = [shape[0] // 2**level for level in range(levels)]
    unknown = [side for side in attention_resolutions if side not in sides]
    if unknown:
        raise ValueError(
            f"model.attention_resolutions={reprlib.repr(attention_resolutions)}: no map is "
            f"{unknown[0]} high, give --model.attention_resolutions of {', '.join(map(str, sides))}"
        )
    _check_heads(sides, hidden_size, num_heads, channel_multipliers, attention_resolutions)


def check_levels(
    depth: int, channel_multipliers: tuple[int, ...], attention_resolutions: tuple[int, ...]
) -> None:
    """Raises ValueError, as `check`, where no picture's U-Net has them: fields of `UNet`."""
    levels = len(channel_multipliers)
    if not 1 <= levels <= MOST_LEVELS or not all(_is_count(m) for m in channel_multipliers):
        raise ValueError(
            f"model.channel_multipliers={reprlib.repr(channel_multipliers)}: give whole numbers "
            f"from 1 to {WIDEST}, one for each of up to {MOST_LEVELS} levels, as "
            "--model.channel_multipliers=1,2,2"
        )
    if not all(type(side) is int and side > 0 for side in attention_resolutions):
        raise ValueError(
            f"model.attention_resolutions={reprlib.repr(attention_resolutions)}: give sides of "
            "maps in whole numbers, as --model.attention_resolutions=16"
        )
    if depth * levels > MOST_BLOCKS:
        raise ValueError(
            f"model.depth={depth} blocks at each of {levels} levels are more than {MOST_BLOCKS}: "
            f"give --model.depth={MOST_BLOCKS // levels} or less"
        )


def _check_heads(
    sides: list[int],
    hidden_size: int,
    num_heads: int,
    channel_multipliers: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
) -> None:
    """Raises ValueError where the heads do not divide the channels of a map with attention."""
    for side, multiplier in zip(sides, channel_multipliers, strict=True):
        channels = multiplier * hidden_size
        if (side == sides[-1] or side in attention_resolutions) and channels % num_heads:
            fit = next(heads for heads in range(num_heads, 0, -1) if channels % heads == 0)
            raise ValueError(
                f"model.num_heads={num_heads} does not divide the {channels} channels of the maps "
                f"of {side}: give --model.num_heads={fit}"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= WIDEST
