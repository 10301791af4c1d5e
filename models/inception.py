"""The Inception of the Fréchet Inception Distance: the network of 2015 with 1008 logits.

It is Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as TensorFlow's graph
`classify_image_graph_def` of 2015-12-05 holds it, which Heusel et al. (2017, arXiv 1706.08500)
measure with. It differs from what torchvision calls Inception v3: average pools leave the padding
out of their average, the last block pools by the maximum, and there are 1008 classes.

Batch norms (eps 1e-3, running statistics) are folded into the convolutions when the weights are
read. Tensors are named as in pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, 566 of them with
the batch norms' step counters, and so are the submodules here.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.lax import Precision

from models import resize
from models.tensors import check

SIDE = 299  # pixels of the network's input
EPS = 1e-3  # of the batch norms
SPATIAL = 7  # channels of the spatial features


class Inception(nn.Module):
    """Pictures in the network's range → the features of FID, sFID and the Inception Score."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        """Returns float32 features, computed in float32 throughout.

        Args:
          x: float32 (n, 299, 299, 3) about [−1, 1].

        Returns:
          pool (n, 2048): the average over the last grid, for FID, KID, precision and recall.
          spatial (n, 2023): the first 7 channels of the 1×1 branch of Mixed_6d (after its ReLU),
            17×17×7 flattened with the channel running fastest, as ADM's evaluator does for sFID.
          logits (n, 1008): without the bias, for the Inception Score, as Salimans et al.'s code
            (arXiv 1606.03498) takes them from this graph.
        """
        x = _Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _Conv(80, (1, 1), name="Conv2d_3b_1x1")(_halved(x))
        x = _Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _halved(x)
        for block, width in {"b": 32, "c": 64, "d": 64}.items():
            x = _A(width, name=f"Mixed_5{block}")(x)
        x = _B(name="Mixed_6a")(x)
        for block, width in {"b": 128, "c": 160, "d": 160, "e": 192}.items():
            x = _C(width, name=f"Mixed_6{block}")(x)
            if block == "d":
                spatial = x[..., :SPATIAL].reshape(len(x), -1)  # the 1×1 branch comes first
        x = _D(name="Mixed_7a")(x)
        x = _E(_averaged, name="Mixed_7b")(x)
        x = _E(_highest, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, precision=Precision.HIGHEST, name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


class _Conv(nn.Module):
    """Convolution with the batch norm folded in, and ReLU; "SAME" is symmetric at stride 1."""

    width: int
    size: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.size, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=Precision.HIGHEST,
        )
        return nn.relu(x + bias[None, None, None])


def _halved(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _averaged(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _highest(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _joined(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


class _A(nn.Module):
    """Mixed_5b to 5d, on 35×35."""

    pool_width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = _Conv(64, (1, 1), name="branch1x1")(x)
        five = _Conv(48, (1, 1), name="branch5x5_1")(x)
        five = _Conv(64, (5, 5), name="branch5x5_2")(five)
        three = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        three = _Conv(96, (3, 3), name="branch3x3dbl_2")(three)
        three = _Conv(96, (3, 3), name="branch3x3dbl_3")(three)
        pool = _Conv(self.pool_width, (1, 1), name="branch_pool")(_averaged(x))
        return _joined(one, five, three, pool)


class _B(nn.Module):
    """Mixed_6a, 35×35 → 17×17."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = _Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        double = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        double = _Conv(96, (3, 3), name="branch3x3dbl_2")(double)
        double = _Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double)
        return _joined(three, double, _halved(x))


class _C(nn.Module):
    """Mixed_6b to 6e, on 17×17."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, row, column = self.width, (1, 7), (7, 1)
        one = _Conv(192, (1, 1), name="branch1x1")(x)
        seven = _Conv(width, (1, 1), name="branch7x7_1")(x)
        seven = _Conv(width, row, name="branch7x7_2")(seven)
        seven = _Conv(192, column, name="branch7x7_3")(seven)
        double = _Conv(width, (1, 1), name="branch7x7dbl_1")(x)
        double = _Conv(width, column, name="branch7x7dbl_2")(double)
        double = _Conv(width, row, name="branch7x7dbl_3")(double)
        double = _Conv(width, column, name="branch7x7dbl_4")(double)
        double = _Conv(192, row, name="branch7x7dbl_5")(double)
        pool = _Conv(192, (1, 1), name="branch_pool")(_averaged(x))
        return _joined(one, seven, double, pool)


class _D(nn.Module):
    """Mixed_7a, 17×17 → 8×8."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = _Conv(192, (1, 1), name="branch3x3_1")(x)
        three = _Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = _Conv(192, (1, 1), name="branch7x7x3_1")(x)
        seven = _Conv(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = _Conv(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = _Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return _joined(three, seven, _halved(x))


class _E(nn.Module):
    """Mixed_7b and 7c, on 8×8; they differ in how they pool."""

    pooled: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = _Conv(320, (1, 1), name="branch1x1")(x)
        three = _Conv(384, (1, 1), name="branch3x3_1")(x)
        three_a = _Conv(384, (1, 3), name="branch3x3_2a")(three)
        three_b = _Conv(384, (3, 1), name="branch3x3_2b")(three)
        double = _Conv(448, (1, 1), name="branch3x3dbl_1")(x)
        double = _Conv(384, (3, 3), name="branch3x3dbl_2")(double)
        double_a = _Conv(384, (1, 3), name="branch3x3dbl_3a")(double)
        double_b = _Conv(384, (3, 1), name="branch3x3dbl_3b")(double)
        pool = _Conv(192, (1, 1), name="branch_pool")(self.pooled(x))
        return _joined(one, three_a, three_b, double_a, double_b, pool)


# Protocols: uint8 pictures (n, H, W, 3) → the network's input. The range is the graph's own but for
# pytorch-fid's, which is that of torchvision; the network is the same.


def tf(x: Array) -> Array:
    """As the graph of 2015 does itself, and with it ADM's evaluator and the original FID."""
    return (resize.tf1_bilinear(x, SIDE) - 128.0) / 128.0


def clean(x: Array) -> Array:
    """As clean-fid (Parmar et al. 2022, arXiv 2104.11222): Pillow's antialiased bicubic."""
    return (resize.pil_bicubic(x, SIDE) - 128.0) / 128.0


def pytorch(x: Array) -> Array:
    """As pytorch-fid: half-pixel bilinear, and [−1, 1] where the others end at 127/128."""
    return resize.half_pixel_bilinear(x, SIDE) / 127.5 - 1.0


PROTOCOLS: dict[str, Callable[[Array], Array]] = {"tf": tf, "clean": clean, "pytorch": pytorch}


# Weights


def params_of(tensors: Mapping[str, np.ndarray]) -> dict:
    """Parameters of `Inception`, float32 numpy arrays, from the tensors of the .pth.

    Args:
      tensors: the 566, by name in PyTorch's layout. The batch norms' step counters
        (num_batches_tracked) may be absent; they and `fc.bias` are not used.

    Raises:
      ValueError: a tensor is missing, unknown or of another shape; how many, and the first.
    """
    wanted = shapes()
    given = {name: a for name, a in tensors.items() if not name.endswith(".num_batches_tracked")}
    check(given, wanted)
    flat: dict[tuple[str, ...], np.ndarray]
    flat = {("fc", "kernel"): np.asarray(given["fc.weight"], np.float32).T}
    for name in wanted:
        if name.endswith(".conv.weight"):
            module = name.removesuffix(".conv.weight")
            kernel, bias = _folded(given, module)
            flat[*module.split("."), "kernel"], flat[*module.split("."), "bias"] = kernel, bias
    return unflatten_dict(flat)


def _folded(tensors: Mapping[str, np.ndarray], module: str) -> tuple[np.ndarray, np.ndarray]:
    """The kernel (height, width, in, out) and the bias of a convolution and its batch norm."""
    norm = {
        leaf: np.asarray(tensors[f"{module}.bn.{leaf}"], np.float64)
        for leaf in ("weight", "bias", "running_mean", "running_var")
    }
    factor = norm["weight"] / np.sqrt(norm["running_var"] + EPS)
    kernel = tensors[f"{module}.conv.weight"].transpose(2, 3, 1, 0) * factor
    bias = norm["bias"] - norm["running_mean"] * factor
    return kernel.astype(np.float32), bias.astype(np.float32)


def shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that `params_of` takes, without the step counters."""
    picture = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(Inception().init, jax.random.key(0), picture)["params"]
    found: dict[str, tuple[int, ...]] = {}
    for path, leaf in flatten_dict(params).items():
        if path[0] == "fc":
            found |= {"fc.weight": leaf.shape[::-1], "fc.bias": leaf.shape[-1:]}
        elif path[-1] == "kernel":
            module, (height, width, inputs, outputs) = ".".join(path[:-1]), leaf.shape
            found[f"{module}.conv.weight"] = (outputs, inputs, height, width)
            for of_norm in ("weight", "bias", "running_mean", "running_var"):
                found[f"{module}.bn.{of_norm}"] = (outputs,)
    return found
