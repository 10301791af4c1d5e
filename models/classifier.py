"""A small classifier of pictures; its features stand in for a pretrained network's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import Precision

FEATURES = 64  # few, so that the covariance of some 2,000 samples is well determined


class Classifier(nn.Module):
    """uint8 pictures → features and logits.

    Convolutions halve the grid until it is 4 × 4 or less. The features are the grid's average, as
    in Inception's pool layer, normalised per picture: their variance adds up to at most 64 for any
    data set. All in float32 at the highest precision, so that accelerators agree.

    Attributes:
      num_classes: number of logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps uint8 (n, H, W, C) to float32 features (n, 64) and logits (n, num_classes)."""
        x = pictures.astype(jnp.float32) / 127.5 - 1.0
        tiny = max(x.shape[1:3]) <= 16  # affords a layer at full size
        x = _block(x, 32, stride=1 if tiny else 2)
        while max(x.shape[1:3]) > 4:
            x = _block(x, FEATURES, stride=2)
        x = _block(x, FEATURES, stride=1)
        features = nn.LayerNorm(use_bias=False, use_scale=False)(x.mean(axis=(1, 2)))
        return features, nn.Dense(self.num_classes, precision=Precision.HIGHEST)(features)


def _block(x: jax.Array, width: int, stride: int) -> jax.Array:
    """Convolution, normalisation, nonlinearity; called inside a compact module."""
    x = nn.Conv(width, (3, 3), strides=stride, precision=Precision.HIGHEST)(x)
    return nn.gelu(nn.GroupNorm(num_groups=8)(x))
