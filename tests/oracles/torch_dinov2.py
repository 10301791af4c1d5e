"""DINOv2 restated in torch from its paper and the original's tensors, with random weights."""

import numpy as np
import torch
from torch.nn import functional

EPSILON = 1e-6


def random_tensors(
    width: int, depth: int, side: int = 37, gated: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Tensors in the original's names, a mask token among them; nothing stays 0 or 1."""
    random = np.random.default_rng(seed)
    hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8 if gated else 4 * width
    first, second = ("mlp.w12", "mlp.w3") if gated else ("mlp.fc1", "mlp.fc2")
    dense = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    dense |= {first: ((1 + gated) * hidden, width), second: (width, hidden)}
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + side**2, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for name, shape in dense.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (width,)
        shapes[f"blocks.{i}.ls1.gamma"] = shapes[f"blocks.{i}.ls2.gamma"] = (width,)
    tensors = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        if len(shape) in (2, 4):
            values *= 2 / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            values = 1 + 0.3 * values
        tensors[name] = values.astype(np.float32)
    return tensors


@torch.no_grad()
def features(tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Normalised pictures (n, 224, 224, 3) → the class token (n, width) after the final norm."""
    t = {name: torch.from_numpy(value) for name, value in tensors.items()}

    def norm(x, name):
        return functional.layer_norm(
            x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], EPSILON
        )

    def dense(x, name):
        return functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    picture = torch.from_numpy(x).permute(0, 3, 1, 2)
    x = functional.conv2d(
        picture, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=14
    )
    x = x.flatten(2).mT
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions(t["pos_embed"])
    depth = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    for block in (f"blocks.{i}" for i in range(depth)):
        qkv = dense(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = (part.unflatten(2, (-1, 64)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + t[f"{block}.ls1.gamma"] * dense(h, f"{block}.attn.proj")
        h = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in t:
            gate, value = dense(h, f"{block}.mlp.w12").chunk(2, dim=-1)
            h = dense(functional.silu(gate) * value, f"{block}.mlp.w3")
        else:
            h = dense(functional.gelu(dense(h, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + t[f"{block}.ls2.gamma"] * h
    return norm(x, "norm")[:, 0].numpy()


def positions(embedding: torch.Tensor) -> torch.Tensor:
    """The original's interpolation to 16 × 16, its offset of 0.1 included."""
    side = round((embedding.shape[1] - 1) ** 0.5)
    if side == 16:
        return embedding
    grid = embedding[:, 1:].mT.unflatten(2, (side, side))
    scale = (16 + 0.1) / side
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1], grid.flatten(2).mT], dim=1)
