"""The public repositories' own network code, run as it is, from the folder that PEERS names.

    for peer in facebookresearch/DiT willisma/SiT Gsunshine/meanflow kvfrans/jax-flow; do
        git -C $PEERS clone https://github.com/$peer; done
    git clone https://github.com/zhuyu-cs/MeanFlow $PEERS/MeanFlow-zhuyu

Nothing of theirs is in this repository. timm, which the PyTorch ones import, is stood in for by
the few lines that they use of it.
"""

import importlib
import importlib.util
import os
import pathlib
import sys
import types

import pytest
import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """timm's: a convolution, then one row per patch."""

    def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool = True) -> None:
        """Sizes in pixels."""
        super().__init__()
        self.patch_size = (patch, patch)
        self.num_patches = (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, size, size) → (n, patches, width)."""
        return self.proj(x).flatten(2).mT


class Attention(nn.Module):
    """timm's: queries, keys and values from one layer, in this order, then heads."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, qk_norm: bool = False
    ) -> None:
        """dim: a multiple of num_heads."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        norm = nn.LayerNorm if qk_norm else lambda _: nn.Identity()
        self.q_norm, self.k_norm = norm(dim // num_heads), norm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, dim) → the same."""
        n, tokens, dim = x.shape
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        h = torch.softmax(q @ k.mT * (dim // self.num_heads) ** -0.5, -1) @ v
        return self.proj(h.transpose(1, 2).reshape(n, tokens, dim))


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, in_features: int, hidden_features: int, act_layer, drop: float = 0) -> None:
        """act_layer: makes the layer between."""
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → the same."""
        return self.fc2(self.act(self.fc1(x)))


def folder(peer: str) -> pathlib.Path:
    """Where a repository lies; skips the test where it does not."""
    root = os.environ.get("PEERS", "")
    if not root:
        pytest.skip(
            "PEERS names no folder with the public repositories: see tests/oracles/peers.py"
        )
    place = pathlib.Path(root) / peer
    if not place.is_dir():
        pytest.skip(f"no {place}: clone it as tests/oracles/peers.py says")
    return place


def file(peer: str, path: str) -> types.ModuleType:
    """A file of a repository as a module, imported under a name of its own."""
    vision = types.ModuleType("timm.models.vision_transformer")
    vision.__dict__.update({"PatchEmbed": PatchEmbed, "Attention": Attention, "Mlp": Mlp})
    stand_ins = {name: types.ModuleType(name) for name in ("timm", "timm.models")}
    spec = importlib.util.spec_from_file_location(
        f"peer_{peer}_{pathlib.Path(path).stem}".replace("-", "_"), folder(peer) / path
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in (stand_ins | {vision.__name__: vision}).items():
            patch.setitem(sys.modules, name, stand_in)
        patch.setitem(sys.modules, module.__name__, module)
        spec.loader.exec_module(module)
    return module


def package(peer: str, path: str, room: str) -> types.ModuleType:
    """A file whose imports of its repository's `room` would find ours, as `models`."""
    theirs = types.ModuleType(room)
    theirs.__path__ = [str(folder(peer) / room)]
    ours = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == room}
    sys.modules[room] = theirs
    try:
        return file(peer, path)
    finally:
        for key in [k for k in sys.modules if k.split(".")[0] == room]:
            del sys.modules[key]
        sys.modules.update(ours)
