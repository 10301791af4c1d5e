"""The Stable Diffusion VAE (arXiv 2112.10752) as diffusers' `AutoencoderKL` has it.

Submodules are named so that a tensor's name converts by rule: `encoder.down_blocks.0.resnets.0.
conv1.weight` is encoder/down_blocks_0/resnets_0/conv1/kernel, as in the Flax files of old.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision


class AutoencoderKL(nn.Module):
    """Pictures ↔ latents at 1/2 the size per block after the first, with a normal posterior.

    Attributes:
      in_channels, out_channels, latent_channels: of the picture, the reconstruction, the latents.
      block_out_channels: width of each block, finest first; multiples of norm_num_groups.
      layers_per_block: residual layers of each block of the encoder; the decoder has one more.
      use_quant_conv, use_post_quant_conv: 1×1 convolutions after the encoder, before the decoder.
      mid_block_add_attention: single-head attention at the coarsest grid.
      dtype: of convolutions and attention; parameters, norms, softmax and outputs are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """The two halves, each with parameters of its own."""
        common = {
            "widths": self.block_out_channels,
            "groups": self.norm_num_groups,
            "attend": self.mid_block_add_attention,
            "dtype": self.dtype,
        }
        moments = 2 * self.latent_channels
        self.encoder = Encoder(layers=self.layers_per_block, channels=moments, **common)
        self.decoder = Decoder(
            layers=self.layers_per_block + 1, channels=self.out_channels, **common
        )
        if self.use_quant_conv:
            self.quant_conv = conv(moments, None, self.dtype, size=1)
        if self.use_post_quant_conv:
            self.post_quant_conv = conv(self.latent_channels, None, self.dtype, size=1)

    def __call__(self, x: Array) -> Array:
        """Reconstructs x from the posterior's mean; what `init` runs."""
        return self.decode(self.encode(x)[0])

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Pictures float32 (n, H, W, c) in [−1, 1] → mean and log-variance of the posterior.

        Both float32 (n, h, w, latent), unscaled; the log-variance is clipped to [−30, 20].
        """
        h = self.encoder(x.astype(self.dtype))
        if self.use_quant_conv:
            h = self.quant_conv(h)
        mean, log_variance = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, z: Array) -> Array:
        """Raw latents float32 (n, h, w, latent) → pictures float32 about [−1, 1], not clipped."""
        z = z.astype(self.dtype)
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)


class Encoder(nn.Module):
    """Picture → the posterior's moments."""

    widths: tuple[int, ...]
    layers: int
    channels: int
    groups: int
    attend: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, H, W, c) → (n, h, w, channels)."""
        x = conv(self.widths[0], "conv_in", self.dtype)(x)
        last = len(self.widths) - 1
        for i, width in enumerate(self.widths):
            name, halve = f"down_blocks_{i}", i < last
            x = Down(width, self.layers, self.groups, halve, self.dtype, name=name)(x)
        x = Middle(self.groups, self.attend, self.dtype, name="mid_block")(x)
        x = norm_silu(x, self.groups, "conv_norm_out")
        return conv(self.channels, "conv_out", self.dtype)(x)


class Decoder(nn.Module):
    """Latents → picture."""

    widths: tuple[int, ...]
    layers: int
    channels: int
    groups: int
    attend: bool
    dtype: Any

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """(n, h, w, latent) → (n, H, W, channels)."""
        x = conv(self.widths[-1], "conv_in", self.dtype)(z)
        x = Middle(self.groups, self.attend, self.dtype, name="mid_block")(x)
        last = len(self.widths) - 1
        for i, width in enumerate(reversed(self.widths)):
            name, double = f"up_blocks_{i}", i < last
            x = Up(width, self.layers, self.groups, double, self.dtype, name=name)(x)
        x = norm_silu(x, self.groups, "conv_norm_out")
        return conv(self.channels, "conv_out", self.dtype)(x)


class Down(nn.Module):
    """Residual layers, then half the grid: one row and column of zeros after the last, stride 2."""

    width: int
    layers: int
    groups: int
    halve: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, c) → (n, h/2, w/2, width)."""
        for i in range(self.layers):
            x = Residual(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
        return Halve(self.dtype, name="downsamplers_0")(x) if self.halve else x


class Up(nn.Module):
    """Residual layers, then twice the grid."""

    width: int
    layers: int
    groups: int
    double: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, c) → (n, 2h, 2w, width)."""
        for i in range(self.layers):
            x = Residual(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
        return Double(self.dtype, name="upsamplers_0")(x) if self.double else x


class Halve(nn.Module):
    """A convolution of stride 2; padding after the last row and column alone."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, c) → (n, h/2, w/2, c)."""
        padding = ((0, 1), (0, 1))
        return conv(x.shape[-1], "conv", self.dtype, stride=2, padding=padding)(x)


class Double(nn.Module):
    """Nearest neighbours, then a convolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, c) → (n, 2h, 2w, c)."""
        return conv(x.shape[-1], "conv", self.dtype)(upsample(x))


class Middle(nn.Module):
    """Residual layer, attention where wanted, residual layer."""

    groups: int
    attend: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, c) → the same."""
        x = Residual(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
        if self.attend:
            x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return Residual(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class Residual(nn.Module):
    """x + two of (norm, SiLU, convolution); a 1×1 convolution of x where the width changes."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, c) → (n, h, w, width)."""
        h = conv(self.width, "conv1", self.dtype)(norm_silu(x, self.groups, "norm1"))
        h = conv(self.width, "conv2", self.dtype)(norm_silu(h, self.groups, "norm2"))
        if x.shape[-1] != self.width:
            x = conv(self.width, "conv_shortcut", self.dtype, size=1)(x)
        return x + h


class Attention(nn.Module):
    """x + single-head self-attention over the grid, the softmax in float32."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, c) → the same. Einsum letters: n picture, t s place, c channel."""
        n, height, width, channels = x.shape
        exact = precision(self.dtype)
        h = normed(x, self.groups, "group_norm").reshape(n, height * width, channels)
        q, k, v = (self._dense(channels, name)(h) for name in ("to_q", "to_k", "to_v"))
        logits = jnp.einsum(
            "ntc,nsc->nts", q, k, precision=exact, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(self.dtype)
        h = jnp.einsum("nts,nsc->ntc", weights, v, precision=exact)
        return x + self._dense(channels, "to_out_0")(h).reshape(x.shape)

    def _dense(self, channels: int, name: str) -> nn.Dense:
        return nn.Dense(channels, dtype=self.dtype, precision=precision(self.dtype), name=name)


def conv(
    features: int,
    name: str | None,
    dtype: Any,
    *,
    size: int = 3,
    stride: int = 1,
    padding: Any = None,
    bias: bool = True,
) -> nn.Conv:
    """A square convolution that keeps the grid at stride 1: float32 parameters, `dtype` sums."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2 if padding is None else padding,
        use_bias=bias,
        dtype=dtype,
        precision=precision(dtype),
        name=name,
    )


def upsample(x: Array) -> Array:
    """Twice the grid by nearest neighbours: (n, h, w, c) → (n, 2h, 2w, c)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def normed(x: Array, groups: int, name: str) -> Array:
    """Group norm in float32, back in the type of x; called inside a compact module."""
    norm = nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def norm_silu(x: Array, groups: int, name: str) -> Array:
    """`normed`, then SiLU."""
    return nn.silu(normed(x, groups, name))


def precision(dtype: Any) -> Precision | None:
    """float32 means float32: accelerators would multiply in TF32 or bfloat16."""
    return Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
