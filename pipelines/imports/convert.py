"""Tensors under a repository's names → parameters of `models.dit.DiT`: pure functions on arrays.

Every public network of this kind is our own with other tensors. Times that run the other way are
put into the first layer of the time's embedding, and the sign into the last layer, so that what
comes out is an ordinary network: it can be sampled, exported and trained on.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from models import tensors as compared
from models.dit import positions
from pipelines.imports.formats import FORMATS, PARTS, QKV, Format

SINUSOIDS = 256  # of a time, in every one of these networks
QK_NORM = re.compile(r"\.(q|k)_norm\.")
# A table of positions differs by rounding alone, bfloat16's at most by 4e-3; another table by 1.
SAME_POSITIONS = 1e-2

Tensors = Mapping[str, np.ndarray]


class Sizes(NamedTuple):
    """What the tensors say of a network.

    Attributes:
      channels: of what it sees.
      outputs: channels of its last layer, those of a variance included.
      num_heads, grid: None where the tensors do not say; grid: patches along a side.
    """

    depth: int
    hidden_size: int
    patch_size: int
    channels: int
    outputs: int
    mlp_size: int
    num_classes: int
    num_heads: int | None
    grid: int | None


def sizes(style: Format, tensors: Tensors) -> Sizes:
    """Reads off the sizes.

    Raises:
      ValueError: tensors are missing that would tell, or are of an impossible shape.
    """
    embedding = "weight" if style.torch else "embedding"
    kernel = "weight" if style.torch else "kernel"
    patch = f"{style.modules['patch']}.{kernel}"
    table = f"{style.modules['condition.label']}.{embedding}"
    bias = f"{style.modules['head.out']}.bias"
    hidden = f"{_block(style, 'blocks.mlp.in', 0)}.bias"
    shapes = _shapes_of(tensors, {patch: 4, table: 2, bias: 1, hidden: 1})
    height, width, channels, d = _conv(style, shapes[patch])
    if height != width:
        raise ValueError(f"{patch} {shapes[patch]}: patches are not square")
    if d % 4:
        raise ValueError(f"{patch} {shapes[patch]}: a width of {d} is no multiple of 4")
    if shapes[table][0] < 2:
        raise ValueError(f"{table} {shapes[table]}: no labels beside the null label")
    return Sizes(
        depth=_depth(style, tensors),
        hidden_size=d,
        patch_size=height,
        channels=channels,
        outputs=shapes[bias][0] // height**2,
        mlp_size=shapes[hidden][0],
        num_classes=shapes[table][0] - 1,
        num_heads=_heads(style, tensors),
        grid=_grid(style, tensors),
    )


def expected(style: Format, s: Sizes) -> dict[str, tuple[int, ...]]:
    """Their names → shapes, of a network of these sizes."""
    d, patch, hidden = s.hidden_size, s.patch_size**2, s.mlp_size
    linear = {
        "condition.time_t.in": (SINUSOIDS, d),
        "condition.time_t.out": (d, d),
        "condition.time_t-r.in": (SINUSOIDS, d),
        "condition.time_t-r.out": (d, d),
        QKV: (d, 3 * d),
        "blocks.attention.out": (d, d),
        "blocks.mlp.in": (d, hidden),
        "blocks.mlp.out": (hidden, d),
        "blocks.modulation": (d, 6 * d),
        "head.modulation": (d, 2 * d),
        "head.out": (d, patch * s.outputs),
    }
    found: dict[str, tuple[int, ...]] = {}
    for ours in style.modules:
        for theirs in _names(style, ours, s.depth):
            if ours == "patch":
                found |= _patch_shapes(style, theirs, s)
            elif ours == "condition.label":
                found[f"{theirs}.{'weight' if style.torch else 'embedding'}"] = (
                    s.num_classes + 1,
                    d,
                )
            elif s.num_heads and ours.startswith("blocks.attention"):
                found |= _head_shapes(ours, theirs, s)
            else:
                found |= _linear_shapes(style, theirs, linear[ours])
    if style.positions and s.grid:
        found[style.positions] = (1, s.grid**2, d)
    return found


def convert(
    style: Format, tensors: Tensors, timeless: bool = False
) -> tuple[dict[str, np.ndarray], Sizes, list[str]]:
    """Returns our parameters by name ("blocks.mlp.in.kernel"), the sizes, and what is left out.

    Args:
      tensors: floating-point arrays by their names, without the names of wrappers.
      timeless: their network is told time 0 always: jax-flow's `t_conditioning=0`.
    Raises:
      ValueError: tensors are missing, unknown or misshapen, or hold what is not finite; queries and
        keys are normed; positions are others than ours.
    """
    normed = [name for name in tensors if QK_NORM.search(name)]
    if normed:
        raise ValueError(f"queries and keys are normed ({normed[0]}), which our network has not")
    left = sorted(name for name in tensors if name.startswith(style.projectors or ("\0",)))
    used = {name: value for name, value in tensors.items() if name not in left}
    s = sizes(style, used)
    compared.check(used, expected(style, s))
    if s.outputs not in (s.channels, 2 * s.channels):
        raise ValueError(f"the last layer has {s.outputs} channels for {s.channels}")
    used = {name: _ready(name, value) for name, value in used.items()}
    if style.positions:
        _check_positions(used[style.positions], s)
    ours = _renamed(style, used, s)
    kept = slice(s.channels)  # what follows is the variance of learn_sigma
    for leaf in ("kernel", "bias"):
        value = ours[f"head.out.{leaf}"]
        grouped = value.reshape(*value.shape[:-1], s.patch_size**2, s.outputs)[..., kept]
        ours[f"head.out.{leaf}"] = grouped.reshape(*value.shape[:-1], -1)
    if timeless:
        ours = without_time(ours)
    if style.reverses:
        ours = reversed_time(ours, style.time_scale)
    left += [f"{s.outputs - s.channels} channels of the last layer"] * (s.outputs > s.channels)
    return {k: np.ascontiguousarray(v, np.float32) for k, v in ours.items()}, s, left


def reversed_time(params: dict[str, np.ndarray], time_scale: float) -> dict[str, np.ndarray]:
    """The parameters of −net(z, 1 − t), from those of net(z, t).

    With the angle Ω t of a sinusoid, cos(Ω − Ωt) = cos Ω cos Ωt + sin Ω sin Ωt and
    sin(Ω − Ωt) = sin Ω cos Ωt − cos Ω sin Ωt: the first layer takes both, linearly.
    """
    half = SINUSOIDS // 2
    frequency = 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)  # those of models.layers
    omega = time_scale * frequency.astype(np.float64)[:, None]
    cosine, sine = np.split(params["condition.time_t.in.kernel"].astype(np.float64), 2)
    turned = [
        np.cos(omega) * cosine + np.sin(omega) * sine,
        np.sin(omega) * cosine - np.cos(omega) * sine,
    ]
    changed = {"condition.time_t.in.kernel": np.concatenate(turned)}
    signs = {name: -params[name] for name in ("head.out.kernel", "head.out.bias")}
    return params | changed | signs


def without_time(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of net(z, 0), whatever t is, from those of net(z, t)."""
    kernel, bias = (params[f"condition.time_t.in.{leaf}"] for leaf in ("kernel", "bias"))
    constant = bias + kernel[: SINUSOIDS // 2].sum(axis=0)  # cosines of 0 are 1
    return params | {
        "condition.time_t.in.kernel": np.zeros_like(kernel),
        "condition.time_t.in.bias": constant,
    }


def likely(tensors: Tensors) -> list[str]:
    """The formats whose names these tensors have; the nearest alone, and none where few are."""

    def share(style: Format) -> float:
        depth = _depth(style, tensors)
        names = [name for ours in style.modules for name in _names(style, ours, depth)]
        modules = {name.rpartition(".")[0] for name in tensors}
        return len(modules & set(names)) / len(modules | set(names))

    shares = {name: share(style) for name, style in FORMATS.items()}
    return [name for name in shares if shares[name] == max(0.8, *shares.values())]


# Their names and shapes


def _block(style: Format, ours: str, layer: int) -> str:
    return style.modules[ours].replace("#", str(layer))


def _names(style: Format, ours: str, depth: int) -> list[str]:
    """What they call a module of ours: one name, or one per block."""
    stacked = "#" in style.modules[ours]
    return [_block(style, ours, layer) for layer in range(depth if stacked else 1)]


def _depth(style: Format, tensors: Tensors) -> int:
    pattern = re.escape(style.modules["blocks.modulation"]).replace(r"\#", "#")
    found = re.compile(pattern.replace("#", "([0-9]{1,4})") + r"\.")
    layers = {int(match[1]) for name in tensors if (match := found.match(name))}
    return max(layers) + 1 if layers else 0


def _shapes_of(tensors: Tensors, ranks: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors that must be there, of these ranks and not empty."""
    missing = [name for name in ranks if name not in tensors]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    shapes = {name: tuple(tensors[name].shape) for name in ranks}
    for name, rank in ranks.items():
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise ValueError(f"{name} {shapes[name]} should have {rank} axes")
    return shapes


def _conv(style: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(height, width, in, out) of a convolution's weights."""
    return (shape[2], shape[3], shape[1], shape[0]) if style.torch else shape


def _heads(style: Format, tensors: Tensors) -> int | None:
    name = f"{QKV}.query"
    if name not in style.modules:
        return None
    query = f"{_block(style, name, 0)}.kernel"
    return _shapes_of(tensors, {query: 3})[query][1]


def _grid(style: Format, tensors: Tensors) -> int | None:
    if not style.positions:
        return None
    tokens = _shapes_of(tensors, {style.positions: 3})[style.positions][1]
    side = round(tokens**0.5)
    if side**2 != tokens:
        raise ValueError(f"{style.positions} has {tokens} places, which make no square")
    return side


def _linear_shapes(
    style: Format, theirs: str, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    kernel = (f"{theirs}.weight", shape[::-1]) if style.torch else (f"{theirs}.kernel", shape)
    return {kernel[0]: kernel[1], f"{theirs}.bias": (shape[-1],)}


def _patch_shapes(style: Format, theirs: str, s: Sizes) -> dict[str, tuple[int, ...]]:
    p, c, d = s.patch_size, s.channels, s.hidden_size
    kernel = ("weight", (d, c, p, p)) if style.torch else ("kernel", (p, p, c, d))
    return {f"{theirs}.{kernel[0]}": kernel[1], f"{theirs}.bias": (d,)}


def _head_shapes(ours: str, theirs: str, s: Sizes) -> dict[str, tuple[int, ...]]:
    """Of flax's attention, where heads have an axis of their own."""
    d, heads = s.hidden_size, s.num_heads or 1
    if ours == "blocks.attention.out":
        return {f"{theirs}.kernel": (heads, d // heads, d), f"{theirs}.bias": (d,)}
    return {f"{theirs}.kernel": (d, heads, d // heads), f"{theirs}.bias": (heads, d // heads)}


# Their values


def _ready(name: str, value: np.ndarray) -> np.ndarray:
    """A tensor's numbers as float32.

    Raises:
      ValueError: one of them is not finite.
    """
    with np.errstate(over="ignore"):  # of float64's, told below
        value = np.asarray(value).astype(np.float32, copy=False)
    if not np.isfinite(value).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return value


def _check_positions(table: np.ndarray, s: Sizes) -> None:
    """Raises ValueError unless the table is the one that our network computes."""
    ours = positions(s.grid or 0, s.grid or 0, s.hidden_size)
    difference = float(np.abs(table[0] - ours).max())
    if not difference < SAME_POSITIONS:  # NaN too
        raise ValueError(
            f"its positions are not the fixed sines and cosines of DiT: they differ by "
            f"{difference:.2g}"
        )


def _renamed(style: Format, tensors: Tensors, s: Sizes) -> dict[str, np.ndarray]:
    """Their tensors under our names, in our layout, blocks stacked."""
    ours: dict[str, np.ndarray] = {}
    for name in style.modules:
        stacked = "#" in style.modules[name]
        layers = [_leaves(style, tensors, t, name, s) for t in _names(style, name, s.depth)]
        for leaf in layers[0]:
            values = [layer[leaf] for layer in layers]
            ours[f"{name}.{leaf}"] = np.stack(values) if stacked else values[0]
    if f"{QKV}.query.kernel" in ours:
        for leaf in ("kernel", "bias"):
            parts = [ours.pop(f"{QKV}.{part}.{leaf}") for part in PARTS]
            ours[f"{QKV}.{leaf}"] = np.concatenate(parts, axis=-1)
    return ours


def _leaves(
    style: Format, tensors: Tensors, theirs: str, ours: str, s: Sizes
) -> dict[str, np.ndarray]:
    """A module's kernel and bias, or its embedding, in our layout."""
    d = s.hidden_size
    if ours == "condition.label":
        return {"embedding": tensors[f"{theirs}.{'weight' if style.torch else 'embedding'}"]}
    kernel = tensors[f"{theirs}.{'weight' if style.torch else 'kernel'}"]
    bias = tensors[f"{theirs}.bias"]
    if ours == "patch":
        kernel = np.einsum("dcpq->pqcd", kernel) if style.torch else kernel
        return {"kernel": kernel.reshape(-1, d), "bias": bias}
    if s.num_heads and ours.startswith("blocks.attention"):
        return {"kernel": kernel.reshape(d, d), "bias": bias.reshape(d)}
    return {"kernel": kernel.T if style.torch else kernel, "bias": bias}
