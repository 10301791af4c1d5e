"""Pictures ↔ what the flow sees: the sole owner of scale and range.

An `Autoencoder` turns what lies on disk (moments) into what is trained on, and back into pictures.
For pixels the moments are the uint8 picture itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Autoencoder(NamedTuple):
    """Pure functions with names.

    moments: picture (n, ...) → what is stored. sample: (moments, keys (n,)) → float32 x, near zero
    mean and unit scale. decode: x → picture.
    """

    moments: Callable[[Array], Array]
    sample: Callable[[Array, Array], Array]
    decode: Callable[[Array], Array]


def pixels() -> Autoencoder:
    """uint8 pictures as x in [−1, 1]; back by clip(trunc(127.5 x + 128)), as files hold them."""
    return Autoencoder(
        moments=lambda picture: picture,
        sample=lambda picture, keys: picture.astype(jnp.float32) / 127.5 - 1,
        decode=lambda x: jnp.clip(jnp.trunc(127.5 * x + 128), 0, 255).astype(jnp.uint8),
    )


def points() -> Autoencoder:
    """Points in the plane are what they are, float32."""
    return Autoencoder(lambda x: x, lambda x, keys: x, lambda x: x)
