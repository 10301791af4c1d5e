"""DINOv2 (arXiv 2304.07193): vision transformers whose class token is the feature of FD-DINOv2.

FD-DINOv2 is the Fréchet distance of Stein et al. 2023 (arXiv 2306.04675, layer6ai-labs/dgm-eval):
ViT-L/14, the class token after the final norm, pictures at 224 by PIL's bicubic, ImageNet's mean
and deviation. Our `clean` is dgm-eval with `--clean_resize`; without it, its default, the resized
picture is also rounded to uint8.

Names are those of the original (facebookresearch/dinov2) with "blocks.0" written "blocks_0".
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.lax import Precision

from models.resize import pil_bicubic
from models.tensors import check

SIZE = 224
PATCH = 14
GRID = SIZE // PATCH
HEAD = 64  # channels of an attention head, in all sizes from S to G
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]


class DinoV2(nn.Module):
    """Patches and a class token through pre-norm blocks with layer scale.

    float32 at the highest precision, so that accelerators agree.

    Attributes:
      width: channels, a multiple of 64; one attention head per 64.
      depth: number of blocks.
      hidden: inner width of the blocks' MLP, or of each half of SwiGLU's.
      gated: SwiGLU (in G/14) instead of an MLP with exact GELU.
    """

    width: int
    depth: int
    hidden: int
    gated: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """float32 (n, 224, 224, 3), normalised → "pool" (n, width) float32, the class token."""
        patches = nn.Conv(
            self.width,
            (PATCH, PATCH),
            strides=PATCH,
            padding="VALID",
            precision=Precision.HIGHEST,
            name="patch_embed",
        )(x)
        zeros = nn.initializers.zeros
        token = self.param("cls_token", zeros, (1, 1, self.width))
        positions = self.param("pos_embed", zeros, (1, 1 + GRID * GRID, self.width))
        tokens = jnp.broadcast_to(token, (len(x), 1, self.width))
        x = jnp.concatenate([tokens, patches.reshape(len(x), -1, self.width)], axis=1) + positions
        for i in range(self.depth):
            x = Block(self.hidden, self.gated, name=f"blocks_{i}")(x)
        return {"pool": _norm(x[:, 0], "norm")}


class Block(nn.Module):
    """x + γ₁·attention(norm(x)), then x + γ₂·mlp(norm(x))."""

    hidden: int
    gated: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, tokens, width) → the same."""
        x = x + self._scale("ls1", x) * Attention(name="attn")(_norm(x, "norm1"))
        h = _norm(x, "norm2")
        if self.gated:
            gate, value = jnp.split(_dense(2 * self.hidden, "mlp_fc1")(h), 2, axis=-1)
            h = nn.silu(gate) * value
        else:
            h = nn.gelu(_dense(self.hidden, "mlp_fc1")(h), approximate=False)
        return x + self._scale("ls2", x) * _dense(x.shape[-1], "mlp_fc2")(h)

    def _scale(self, name: str, x: jax.Array) -> jax.Array:
        return self.param(name, nn.initializers.ones, (1, 1, x.shape[-1]))


class Attention(nn.Module):
    """Self-attention over all tokens, 64 channels a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, tokens, width) → the same. Letters: n picture, t s token, h head, d channel."""
        qkv = _dense(3 * x.shape[-1], "qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, -1, HEAD), 2, 0)
        logits = jnp.einsum("nthd,nshd->nhts", q, k, precision=Precision.HIGHEST) * HEAD**-0.5
        weights = jax.nn.softmax(logits, axis=-1)
        h = jnp.einsum("nhts,nshd->nthd", weights, v, precision=Precision.HIGHEST)
        return _dense(x.shape[-1], "proj")(h.reshape(x.shape))


def clean(pictures: jax.Array) -> jax.Array:
    """Pictures (n, H, W, 3) in 0…255 → float32 (n, 224, 224, 3): PIL's bicubic, normalised."""
    x = pil_bicubic(pictures, SIZE) / 255.0
    mean, deviation = (jnp.array([[[row]]], jnp.float32) for row in (MEAN, DEVIATION))
    return (x - mean) / deviation


PROTOCOLS: dict[str, Callable[[jax.Array], jax.Array]] = {"clean": clean}


def network_of(tensors: Mapping[str, np.ndarray]) -> DinoV2:
    """The network that these tensors are of, in any names that `params_of` takes.

    Raises:
      ValueError: as `params_of` does.
    """
    return _sized(_original(tensors))


def params_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `network_of(tensors)`, float32, positions interpolated to the grid of 224.

    Names may be the original's, timm's or those of Hugging Face's files of Dinov2Model, also below
    "dinov2."; classifier heads and the mask token are left out.

    Raises:
      ValueError: not a DINOv2 with patches of 14, one with register tokens, or a tensor is missing,
        unknown or of another shape; how many, and the first.
    """
    tensors = _original(tensors)
    network = _sized(tensors)
    check(tensors, _shapes(network, _side(tensors)))
    params = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    params["pos_embed"] = positions(params["pos_embed"])
    return unflatten_dict(dict(_flax(name, tensor) for name, tensor in params.items()))


def positions(embedding: np.ndarray) -> np.ndarray:
    """Position embedding float32 (1, 1 + s·s, d), class token first → (1, 1 + 16·16, d).

    As the original does it: torch's bicubic (a = −0.75, half-pixel, edges repeated, no antialias)
    with the scale factor (16 + 0.1)/s, which is not 16/s: the sampled points lie 0.6 % closer.
    Unchanged where s is 16. Computed in float64.
    """
    side = round((embedding.shape[1] - 1) ** 0.5)
    if side == GRID:
        return embedding
    grid = embedding[0, 1:].reshape(side, side, -1).astype(np.float64)
    rows = _bicubic(side, GRID, (GRID + 0.1) / side)
    grid = np.einsum("ia,jb,abd->ijd", rows, rows, grid, optimize=True)
    patches = grid.reshape(1, GRID * GRID, -1).astype(embedding.dtype)
    return np.concatenate([embedding[:, :1], patches], axis=1)


def _bicubic(size: int, wanted: int, scale: float) -> np.ndarray:
    """(wanted, size) float64: the weights of cubic convolution (Keys 1981) with a = −0.75."""
    a = -0.75
    source = (np.arange(wanted) + 0.5) / scale - 0.5
    first = np.floor(source).astype(int) - 1
    weights = np.zeros((wanted, size))
    for tap in range(4):
        s = abs(source - (first + tap))
        near = ((a + 2) * s - (a + 3)) * s * s + 1
        far = ((s - 5) * s + 8) * s * a - 4 * a
        columns = (first + tap).clip(0, size - 1)
        np.add.at(weights, (np.arange(wanted), columns), np.where(s <= 1, near, far))
    return weights


def _sized(tensors: Mapping[str, np.ndarray]) -> DinoV2:
    """The network's sizes, from tensors in the original's names."""
    needed = ["patch_embed.proj.weight", "pos_embed"]
    needed += ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise ValueError(f"not a DINOv2: no tensor {absent[0]}, and {len(tensors)} others")
    patch, _, inner, out = (np.shape(tensors[name]) for name in needed)
    if patch[1:] != (3, PATCH, PATCH) or patch[0] % HEAD or len(out) != 2 or len(inner) != 2:
        raise ValueError(f"not a DINOv2 with patches of 14: patch_embed.proj.weight is {patch}")
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in tensors)
    depth = 1 + max(int(number[1]) for number in numbers if number)
    return DinoV2(patch[0], depth, hidden=out[1], gated=inner[0] == 2 * out[1])


def _side(tensors: Mapping[str, np.ndarray]) -> int:
    """The side of the square grid that the position embedding is for."""
    shape = np.shape(tensors["pos_embed"])
    side = round(max(0, shape[1] - 1) ** 0.5) if len(shape) == 3 else 0
    if side < 1 or side * side + 1 != shape[1]:
        raise ValueError(f"not a DINOv2: pos_embed {shape} is no square grid and a class token")
    return side


def _shapes(network: DinoV2, side: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, in the original's names."""
    width, hidden = network.width, network.hidden
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    dense = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    dense |= {"mlp.fc1": ((1 + network.gated) * hidden, width), "mlp.fc2": (width, hidden)}
    block: dict[str, tuple[int, ...]] = dict.fromkeys(vectors, (width,))
    block |= {f"{name}.weight": shape for name, shape in dense.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + side * side, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        **{f"blocks.{i}.{k}": shape for i in range(network.depth) for k, shape in block.items()},
    }


# Patterns of Hugging Face's names, and of the original's SwiGLU, → the names used here (timm's).
_NAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(w12|weights_in)\.", ".mlp.fc1."),
    (r"\.mlp\.(w3|weights_out)\.", ".mlp.fc2."),
)
_LEFT_OUT = r"^(embeddings\.)?mask_token$|^(classifier|head)\."


def _original(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by the original's names, without those that make no feature."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("dinov2.")
        if "register_token" in name or name == "reg_token":
            raise ValueError("a DINOv2 with register tokens; take one without (dinov2-large)")
        if not re.search(_LEFT_OUT, name):
            for pattern, ours in _NAMES:
                name = re.sub(pattern, ours, name)
            found[name] = tensor
    queries = [name for name in found if ".attention.attention.query." in name]
    for name in queries:
        three = [name.replace(".query.", f".{word}.") for word in ("query", "key", "value")]
        if all(part in found for part in three):
            joined = np.concatenate([found.pop(part) for part in three])
            found[name.replace(".attention.attention.query.", ".attn.qkv.")] = joined
    return found


def _flax(name: str, tensor: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """A tensor's path in the parameters, and its values in Flax's layout."""
    if name in ("cls_token", "pos_embed"):
        return (name,), tensor
    name = re.sub(r"^blocks\.", "blocks_", name).replace("patch_embed.proj", "patch_embed")
    *path, part = name.replace("mlp.", "mlp_").split(".")
    if part == "gamma":
        return tuple(path), tensor[None, None]
    if tensor.ndim == 4:
        return (*path, "kernel"), tensor.transpose(2, 3, 1, 0)
    if tensor.ndim == 2:
        return (*path, "kernel"), tensor.T
    return (*path, "scale" if "norm" in path[-1] and part == "weight" else part), tensor


def _dense(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, precision=Precision.HIGHEST, name=name)


def _norm(x: jax.Array, name: str) -> jax.Array:
    """Layer norm over channels; called inside a compact module."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)(x)
