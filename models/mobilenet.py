"""MobileNet v1 (arXiv 1704.04861) at width 0.75, in Keras' names: a light extractor of features.

No published number is measured with it; it is for development, where Inception is too slow or its
weights cannot be had. Its Fréchet distances are on a scale of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from models.resize import pil_bicubic
from models.tensors import check

SIZE = 224
STEM = 24
# Of each depthwise-separable block: the width that it makes (three quarters of v1's), its stride.
BLOCKS = (
    *((48, 1), (96, 2), (96, 1), (192, 2), (192, 1), (384, 2)),
    *((384, 1),) * 5,
    *((768, 2), (768, 1)),
)
CLASSES = 1000
EPSILON = 1e-3  # of Keras' batch norms


class MobileNet(nn.Module):
    """A convolution, 13 of (depthwise convolution, 1×1 convolution), the grid's average, classes.

    Batch norms are folded into the convolutions by `params_of`. Padding is TensorFlow's "same": at
    stride 2 on an even grid, one row and column after the last. float32 at the highest precision,
    so that accelerators agree.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """float32 (n, 224, 224, 3) in [−1, 1] → "pool" (n, 768), "logits" (n, 1000), float32."""
        x = _relu6(_conv(STEM, 3, 2, "conv1")(x))
        for i, (width, stride) in enumerate(BLOCKS, 1):
            x = _relu6(Depthwise(stride, name=f"conv_dw_{i}")(x))
            x = _relu6(_conv(width, 1, 1, f"conv_pw_{i}")(x))
        pool = x.mean(axis=(1, 2))
        classes = nn.Dense(CLASSES, precision=Precision.HIGHEST, name="conv_preds")
        return {"pool": pool, "logits": classes(pool)}


class Depthwise(nn.Module):
    """A 3×3 convolution of each channel by itself, as nine multiplications of shifted grids.

    XLA makes one loop of them; on CPU a convolution in groups takes six times as long.
    """

    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, H, W, c) → (n, H/stride, W/stride, c)."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        padding = (2 - self.stride, 1)
        x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
        height, width = (size - 2 for size in x.shape[1:3])
        return bias[None, None, None] + sum(
            x[:, i : i + height : self.stride, j : j + width : self.stride]
            * kernel[None, i, j][None, None]
            for i in range(3)
            for j in range(3)
        )


def clean(pictures: jax.Array) -> jax.Array:
    """Pictures (n, H, W, 3) in 0…255 → float32 (n, 224, 224, 3) in [−1, 1], PIL's bicubic."""
    return pil_bicubic(pictures, SIZE) / 127.5 - 1.0


PROTOCOLS: dict[str, Callable[[jax.Array], jax.Array]] = {"clean": clean}


def params_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `MobileNet` from Keras' tensors (HWIO, such as "conv_dw_1_bn/gamma").

    Each convolution and the batch norm behind it become one: kernel·s and β − μ·s, where
    s = γ / √(σ² + 1e-3), computed in float64.

    Raises:
      ValueError: a tensor is missing, unknown or of another shape; how many, and the first.
    """
    check(tensors, shapes())
    params = {}
    for name in shapes():
        layer, part = name.split("/")
        if part not in ("kernel", "depthwise_kernel") or layer == "conv_preds":
            continue
        kernel = _float64(tensors, name)
        gamma, beta, mean, variance = (
            _float64(tensors, f"{layer}_bn/{statistic}") for statistic in _STATISTICS
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        if part == "depthwise_kernel":
            kernel = kernel[..., 0]  # (3, 3, c, 1): one filter a channel
        params[layer] = {"kernel": kernel * scale, "bias": beta - mean * scale}
    classes = _float64(tensors, "conv_preds/kernel")[0, 0]
    params["conv_preds"] = {"kernel": classes, "bias": _float64(tensors, "conv_preds/bias")}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that `params_of` takes."""
    kernels, channels = {"conv1/kernel": (3, 3, 3, STEM)}, STEM
    for i, (width, _) in enumerate(BLOCKS, 1):
        kernels[f"conv_dw_{i}/depthwise_kernel"] = (3, 3, channels, 1)
        kernels[f"conv_pw_{i}/kernel"] = (1, 1, channels, width)
        channels = width
    found: dict[str, tuple[int, ...]] = {}
    for name, kernel in kernels.items():
        layer, part = name.split("/")
        found[name] = kernel
        width = kernel[2] if part == "depthwise_kernel" else kernel[3]
        found |= {f"{layer}_bn/{statistic}": (width,) for statistic in _STATISTICS}
    predictions = {"conv_preds/kernel": (1, 1, channels, CLASSES), "conv_preds/bias": (CLASSES,)}
    return found | predictions


_STATISTICS = ("gamma", "beta", "moving_mean", "moving_variance")


def _conv(width: int, size: int, stride: int, name: str) -> nn.Conv:
    """A convolution over all channels, with a bias; called inside a compact module."""
    exact = Precision.HIGHEST
    return nn.Conv(width, (size, size), stride, padding="SAME", precision=exact, name=name)


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 6.0)


def _float64(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return np.asarray(tensors[name], np.float64)
