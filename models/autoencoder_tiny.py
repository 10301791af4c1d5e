"""The TAESD family: small autoencoders of plain convolutions, for previews and small machines.

Layers are numbered as diffusers' `AutoencoderTiny` numbers them. Facts: madebyollin/taesd (MIT),
and for the pooled blocks its TAEF2.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from models.autoencoder_kl import conv, upsample


class AutoencoderTiny(nn.Module):
    """Pictures ↔ latents at 1/2 the size per stage after the first; no posterior.

    Attributes:
      in_channels, out_channels, latent_channels: of the picture, the reconstruction, the latents.
      block_out_channels: the width of each stage; the encoder's, and the decoder's in its order.
      num_encoder_blocks, num_decoder_blocks: residual blocks of each stage.
      encoder_pools, decoder_pools: the layers whose block has a pool (TAEF2); diffusers has none.
      dtype: of the convolutions; parameters, norms and outputs are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    encoder_pools: tuple[int, ...] = ()
    decoder_pools: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """The two halves, each with parameters of its own."""
        self.encoder = Encoder(
            self.encoder_block_out_channels,
            self.num_encoder_blocks,
            self.latent_channels,
            self.encoder_pools,
            self.dtype,
        )
        self.decoder = Decoder(
            self.decoder_block_out_channels,
            self.num_decoder_blocks,
            self.out_channels,
            self.decoder_pools,
            self.dtype,
        )

    def __call__(self, x: Array) -> Array:
        """Reconstructs x; what `init` runs."""
        return self.decode(self.encode(x))

    def encode(self, x: Array) -> Array:
        """Pictures float32 (n, H, W, c) in [−1, 1] → raw latents float32 (n, h, w, latent)."""
        return self.encoder(((x + 1) / 2).astype(self.dtype)).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """Raw latents float32 (n, h, w, latent) → pictures float32 about [−1, 1], not clipped."""
        z = 3 * jnp.tanh(z / 3)  # the latents' soft bound
        return 2 * self.decoder(z.astype(self.dtype)).astype(jnp.float32) - 1


class Encoder(nn.Module):
    """Each stage: a convolution, which halves the grid except in the first, then its blocks."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    latent_channels: int
    pools: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, H, W, c) in [0, 1] → (n, h, w, latent)."""
        i = 0
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            kind: dict = {"stride": 2, "bias": False} if stage else {}
            x = conv(width, f"layers_{i}", self.dtype, **kind)(x)
            i += 1
            for _ in range(blocks):
                x = Block(width, i in self.pools, self.dtype, name=f"layers_{i}")(x)
                i += 1
        return conv(self.latent_channels, f"layers_{i}", self.dtype)(x)


class Decoder(nn.Module):
    """A convolution and ReLU; each stage: its blocks, a doubled grid except after the last, conv.

    Activations and upsampling count as layers.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    out_channels: int
    pools: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """(n, h, w, latent) → (n, H, W, c), about [0, 1]."""
        x = nn.relu(conv(self.widths[0], "layers_0", self.dtype)(z))
        i = 2
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True), 1):
            for _ in range(blocks):
                x = Block(width, i in self.pools, self.dtype, name=f"layers_{i}")(x)
                i += 1
            if stage == len(self.widths):
                break
            x = conv(width, f"layers_{i + 1}", self.dtype, bias=False)(upsample(x))
            i += 2
        return conv(self.out_channels, f"layers_{i}", self.dtype)(x)


class Block(nn.Module):
    """ReLU(x + three convolutions of x); with a pool, x is first x + pool(x)."""

    width: int
    pool: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, width) → the same."""
        if self.pool:
            wide = conv(4 * self.width, "pool_0", self.dtype, size=1, bias=False)(x)
            norm = nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False, name="pool_1")
            wide = nn.relu(norm(wide.astype(jnp.float32))).astype(self.dtype)
            x += conv(self.width, "pool_3", self.dtype, size=1, bias=False)(wide)
        h = nn.relu(conv(self.width, "conv_0", self.dtype)(x))
        h = nn.relu(conv(self.width, "conv_2", self.dtype)(h))
        return nn.relu(x + conv(self.width, "conv_4", self.dtype)(h))


def pools(names: Iterable[str], half: str) -> tuple[int, ...]:
    """The layers of `half` ("encoder", "decoder") whose block has a pool, from parameter names."""
    found = (re.match(rf"{half}/layers_(\d+)/pool_", name) for name in names)
    return tuple(sorted({int(match[1]) for match in found if match}))


def from_shapes(shapes: dict[str, tuple[int, ...]]) -> AutoencoderTiny:
    """The network whose parameters these are, by name ("encoder/layers_0/kernel") and shape.

    For the original files, which come without a config.

    Raises:
      ValueError: the names are not those of such a network.
    """
    encoder, decoder = (_layers(shapes, half) for half in ("encoder", "decoder"))
    if min(len(encoder), len(decoder)) < 2:
        raise ValueError("no layers of a TAESD network")
    *encoder_kernels, last_encoder = encoder.values()
    _, *decoder_kernels = decoder.values()
    # ReLU follows the decoder's first convolution; upsampling comes before all but the last.
    ends = [*(i - 1 for i in list(decoder)[1:-1]), list(decoder)[-1]]
    starts = [2, *(i + 1 for i in list(decoder)[1:-1])]
    return AutoencoderTiny(
        in_channels=encoder_kernels[0][2],
        out_channels=decoder_kernels[-1][3],
        latent_channels=last_encoder[3],
        encoder_block_out_channels=tuple(kernel[3] for kernel in encoder_kernels),
        decoder_block_out_channels=tuple(kernel[2] for kernel in decoder_kernels),
        num_encoder_blocks=tuple(b - a - 1 for a, b in itertools.pairwise(encoder)),
        num_decoder_blocks=tuple(b - a for a, b in zip(starts, ends, strict=True)),
        encoder_pools=pools(shapes, "encoder"),
        decoder_pools=pools(shapes, "decoder"),
    )


def _layers(shapes: dict[str, tuple[int, ...]], half: str) -> dict[int, tuple[int, ...]]:
    """Index → kernel of the convolutions that stand alone, in order."""
    found = {
        int(match[1]): shape
        for name, shape in shapes.items()
        if (match := re.fullmatch(rf"{half}/layers_(\d+)/kernel", name)) and len(shape) == 4
    }
    return dict(sorted(found.items()))
