"""The resizes before the networks of Fréchet distances, each as its protocol has it.

What a picture is resized with moves a FID by more than most papers differ (Parmar et al. 2022,
arXiv 2104.11222), so none of these is exchanged for a "better" one. All are separable: products
with a matrix of weights along the rows and one down the columns, up and down alike.

Each takes uint8 or float pictures (n, H, W, C), 0…255, of any H, W and C, and gives float32
(n, side, side, C) in 0…255, computed in float32 also where products are usually rounded (TPUs).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import Precision


def tf1_bilinear(x: Array, side: int) -> Array:
    """Bilinear as TensorFlow 1's `resize_bilinear`, which the FID Inception's graph of 2015 holds.

    Output pixel i is read at i·in/out: no offset by half a pixel, and no antialiasing. The place is
    rounded to float32 as it is there (tensorflow/core/kernels/image_resizer_state.h).
    """
    return _weighted(x, *(_tf1_weights(size, side) for size in x.shape[1:3]))


def half_pixel_bilinear(x: Array, side: int) -> Array:
    """Bilinear as torch's `interpolate(align_corners=False)`, without antialiasing.

    Output pixel i is read at (i + 1/2)·in/out − 1/2; pytorch-fid resizes so.
    """
    x, shape = x.astype(jnp.float32), (x.shape[0], side, side, x.shape[3])
    return jax.image.resize(x, shape, "linear", antialias=False, precision=Precision.HIGHEST)


def pil_bicubic(x: Array, side: int) -> Array:
    """Antialiased bicubic as Pillow's on float channels, clipped to 0…255, not rounded.

    clean-fid resizes so; Pillow's own bicubic of uint8 pictures rounds after each direction.
    `jax.image.resize` computes its weights in float32 and is 0.006 off at 300 pixels; with these it
    is a hundredth of that.
    """
    x = _weighted(x, *(_bicubic_weights(size, side) for size in x.shape[1:3]))
    return jnp.clip(x, 0.0, 255.0)


def _weighted(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """The product with weights (side, H) of the rows and (side, W) of the columns."""
    across, down = jnp.asarray(columns, jnp.float32), jnp.asarray(rows, jnp.float32)
    wide = jnp.einsum("nhwc,Ww->nhWc", x.astype(jnp.float32), across, precision=Precision.HIGHEST)
    return jnp.einsum("nhWc,Hh->nHWc", wide, down, precision=Precision.HIGHEST)


def _tf1_weights(size: int, side: int) -> np.ndarray:
    """The weights (side, size) of the input's pixels in each of the output's."""
    place = np.arange(side, dtype=np.float32) * np.float32(size / side)
    low = np.minimum(place.astype(np.int64), size - 1)
    share = place - low.astype(np.float32)
    weights = np.zeros((side, size))
    np.add.at(weights, (np.arange(side), low), 1 - share)
    np.add.at(weights, (np.arange(side), np.minimum(low + 1, size - 1)), share)
    return weights


def _bicubic_weights(size: int, side: int) -> np.ndarray:
    """The same for Keys' cubic with a = −1/2, stretched where the output is the smaller.

    Pillow leaves out the pixels whose middle is further away than the kernel's support, which has
    weight 0 there, and divides by the sum (src/libImaging/Resample.c).
    """
    stretch = max(size / side, 1.0)
    centre = (np.arange(side)[:, None] + 0.5) * size / side
    d = np.abs(np.arange(size) + 0.5 - centre) / stretch
    near, far = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)
