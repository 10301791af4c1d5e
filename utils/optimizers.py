"""What turns gradients into updates: AdamW, Muon, 8-bit Adam, and their learning rates.

A learning rate is one number for all of them: an update has about the size of AdamW's.

Muon (K. Jordan, 2024; arXiv 2502.16982) makes the update of every hidden matrix orthogonal, by
layer and for query, key and value apart, and scales it by 0.2 √max(in, out), which is the root mean
square of AdamW's in practice; what is no hidden matrix goes to AdamW. Who has a rate η of Jordan's
own scaling, √max(1, out / in), gives η / (0.2 √d) for matrices of d × d.

Adam's moments can be stored in fewer bits. They are rounded at random, up or down with the
probabilities that leave the mean as it is: a second moment changes by a share 1 − beta2 in a step,
less than half the distance between numbers of few bits, and rounded to the nearest would stay where
it is. The random bits are a function of the number of updates and of the place in the parameters.

Eight bits (adamw8bit): blocks of at most 256 entries have a float32 scale s, their largest
magnitude, as in arXiv 2110.02861; the codes are levels 1.066ᵏ⁻ᴺ s with N = 127 and a sign for the
first moment, N = 255 for the second, and 0. What is stored for x lies within

  0.066 |x|                of x where |x| ≥ 3.2e-4 s (first moment) or 9.0e-8 s (second),
  3.2e-4 s or 9.0e-8 s     of x below, without changing its sign;

and a second moment that is not 0 is never stored as 0, so that no update divides by it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from utils import averages
from utils.cli import UserError

BLOCK = 256  # entries that share a scale, at most
SMALL = 4096  # entries of a leaf below which its moments stay float32
RATIO = 1.066  # of a level to the one below
FIRST, SECOND = 127, 255  # levels of the moments above 0
MOMENTUM = 0.95  # of Muon, as published
MUON_SIZE = 0.2  # root mean square of an update
EPSILON = 1e-8


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of `config.optimizer`, with clipping and its learning rate by update.

    Raises:
      UserError: a name that there is not.
    """
    o, schedule = config.optimizer, learning_rate(config)
    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
    if o.name == "adamw" and o.moments == "float32":
        adamw = optax.adamw(schedule, o.beta1, o.beta2, weight_decay=o.weight_decay)
        return optax.chain(clip, adamw), schedule
    if o.name not in ("adamw", "adamw8bit", "muon"):
        raise UserError(f"optimizer.name={o.name!r}: adamw, adamw8bit or muon")
    packing = EIGHT_BITS if o.name == "adamw8bit" else PACKINGS[o.moments]
    direction = scale_by_adam(o.beta1, o.beta2, packing)
    if o.name == "muon":
        parts = {"matrix": scale_by_muon(o.moments), "other": direction}
        direction = optax.partition(parts, _kinds)
    decay = optax.add_decayed_weights(o.weight_decay)
    return optax.chain(clip, direction, decay, optax.scale_by_learning_rate(schedule)), schedule


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Updates done → the rate of the next; warm-up is linear from 0.

    constant; cosine: to 0 at `max_steps`; wsd: constant, then linear to 0 over the last
    `optimizer.decay_steps` of `max_steps` (arXiv 2404.06395, 2405.18392).

    Raises:
      UserError: a name that there is not.
    """
    o = config.optimizer
    # A warm-up of no steps stays at its first value, 0, in optax.
    start = 0.0 if o.warmup_steps else o.lr
    constant = optax.warmup_constant_schedule(start, o.lr, o.warmup_steps)
    if o.schedule == "constant":
        return constant
    if o.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, o.lr, o.warmup_steps, config.max_steps)
    if o.schedule == "wsd":
        fall = optax.linear_schedule(o.lr, 0.0, o.decay_steps)
        return optax.join_schedules([constant, fall], [config.max_steps - o.decay_steps])
    raise UserError(f"optimizer.schedule={o.schedule!r}: constant, cosine or wsd")


def check_optimizer(config: ConfigDict) -> None:
    """Raises UserError where keys of `optimizer`, or of `ema`, do not go together."""
    o, steps = config.optimizer, config.max_steps
    if o.name == "adamw8bit" and o.moments != "float32":
        raise UserError(
            f"optimizer.moments={o.moments} is for adamw and muon: leave it out with adamw8bit, "
            "whose moments have 8 bits"
        )
    if o.schedule != "wsd" and o.decay_steps:
        raise UserError(
            f"optimizer.decay_steps={o.decay_steps} is for --optimizer.schedule=wsd: give that, or "
            "leave it out"
        )
    if o.schedule == "wsd" and not o.decay_steps:
        raise UserError(
            "optimizer.schedule=wsd falls over its last steps: give "
            f"--optimizer.decay_steps={max(steps // 5, 1)} or the like"
        )
    if o.schedule == "wsd" and o.warmup_steps + o.decay_steps > steps:
        warmup = min(o.warmup_steps, steps // 10)
        fits = [f"--optimizer.warmup_steps={warmup}"] * (warmup < o.warmup_steps)
        if warmup + o.decay_steps > steps:
            fits += [f"--optimizer.decay_steps={max(steps // 5, 1)}"]
        raise UserError(
            f"optimizer.warmup_steps={o.warmup_steps} and optimizer.decay_steps={o.decay_steps} "
            f"are more than max_steps={steps}: give {' '.join(fits)}"
        )
    averages.check(config)


def updates_before(opt_state: Any) -> Array:
    """How many updates the optimizer has made, () int32: steps left out do not count."""
    return optax.tree.get(
        opt_state, "count", filtering=lambda path, _: "ScaleByScheduleState" in str(path[-1])
    )


# Muon.


def scale_by_muon(moments: str = "float32") -> optax.GradientTransformation:
    """Orthogonal updates of size `MUON_SIZE`, for kernels as `_axes` reads them.

    Args:
      moments: type of the momentum. bfloat16 is rounded to the nearest: what a step changes, a
        twentieth of gradient − momentum, is lost below 1/256 of the momentum, that is where the two
        differ by less than 8 %.
    """
    muon = optax.contrib.scale_by_muon(
        beta=MOMENTUM, mu_dtype=jnp.dtype(moments), weight_dimension_numbers=_all_axes
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        split = jax.tree_util.tree_map_with_path(_split, updates)
        split, state = muon.update(split, state)
        split = jax.tree_util.tree_map_with_path(_scaled, split)
        return jax.tree.map(lambda new, old: new.reshape(old.shape), split, updates), state

    def init(params: Any) -> Any:
        return muon.init(jax.tree_util.tree_map_with_path(_split, params))

    return optax.GradientTransformation(init, update)


def _kinds(params: Any) -> Any:
    """Which leaves are hidden matrices; embeddings, first and last layers are "other"."""

    def kind(path: tuple, leaf: Array) -> str:
        names = [str(entry.key) for entry in path]
        outer = len(names) == 2 and names[0] in ("patch", "in", "out")
        outer |= names[0].startswith("head") and names[-2:-1] == ["out"]
        matrix = names[-1] == "kernel" and 2 <= leaf.ndim <= 5 and not outer
        return "matrix" if matrix else "other"

    return jax.tree_util.tree_map_with_path(kind, params)


def _of_qkv(path: tuple) -> bool:
    return len(path) > 1 and path[-2].key == "qkv"


def _split(path: tuple, leaf: Array) -> Array:
    """(…, in, 3 · out) → (…, in, 3, out) for query, key and value in one kernel."""
    return leaf.reshape(*leaf.shape[:-1], 3, -1) if _of_qkv(path) else leaf


def _axes(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers:
    """Which axes are a matrix's inputs and outputs; the others count matrices.

    Kernels are (in, out), (layers, in, out), and of convolutions (height, width, in, out), with
    layers before it where they are stacked.
    """
    if _of_qkv(path):
        return optax.contrib.MuonDimensionNumbers(-3, -1)
    inputs = (-4, -3, -2) if leaf.ndim >= 4 else -2
    return optax.contrib.MuonDimensionNumbers(inputs, -1)


def _all_axes(updates: Any) -> Any:
    return jax.tree_util.tree_map_with_path(_axes, updates)


def _scaled(path: tuple, leaf: Array) -> Array:
    inputs = np.atleast_1d(_axes(path, leaf).reduction_axis)
    sizes = math.prod(leaf.shape[axis] for axis in inputs), leaf.shape[-1]
    return leaf * (MUON_SIZE * math.sqrt(max(sizes)))


# Adam with its moments in few bits.


class Packing(NamedTuple):
    """How moments are stored.

    first, second: (x float32, uniform uint32 of 16 bits) → what is stored. value: back to float32.
    """

    first: Callable[[Array, Array], Any]
    second: Callable[[Array, Array], Any]
    value: Callable[[Any], Array]


class AdamState(NamedTuple):
    """Moments as they are stored."""

    updates: Array  # () int32, done
    mu: Any
    nu: Any


class Quantised(NamedTuple):
    """A float32 array in eight bits."""

    codes: Array  # of the array's shape, int8 or uint8, so that it is sharded as the array is
    scales: Array  # float32, one for each block: in the shape of `_blocks` but for the last axis


def scale_by_adam(
    beta1: float, beta2: float, packing: Packing, epsilon: float = EPSILON
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) whose moments are stored by `packing`; it computes in float32."""

    def init(params: Any) -> AdamState:
        def zeros(pack: Callable) -> Any:
            none = jnp.zeros((), jnp.uint32)
            return jax.tree.map(lambda p: pack(jnp.zeros(p.shape, jnp.float32), none), params)

        return AdamState(jnp.zeros((), jnp.int32), zeros(packing.first), zeros(packing.second))

    def update(updates: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        count = optax.safe_increment(state.updates)
        key = jax.random.fold_in(jax.random.key(0), count)
        steps = count.astype(jnp.float32)
        correct1, correct2 = 1 - beta1**steps, 1 - beta2**steps
        grads, tree = jax.tree.flatten(updates)
        moments = (
            jax.tree.leaves(stored, is_leaf=lambda x: isinstance(x, Quantised))
            for stored in (state.mu, state.nu)
        )
        directions, first, second = [], [], []
        for number, (g, mu, nu) in enumerate(zip(grads, *moments, strict=True)):
            bits = jax.random.bits(jax.random.fold_in(key, number), g.shape, jnp.uint32)
            mu = beta1 * packing.value(mu) + (1 - beta1) * g
            nu = beta2 * packing.value(nu) + (1 - beta2) * g**2
            directions.append((mu / correct1) / (jnp.sqrt(nu / correct2) + epsilon))
            first.append(packing.first(mu, bits & 0xFFFF))
            second.append(packing.second(nu, bits >> 16))
        directions, first, second = (
            jax.tree.unflatten(tree, leaves) for leaves in (directions, first, second)
        )
        return directions, AdamState(count, first, second)

    return optax.GradientTransformation(init, update)


def to_bfloat16(x: Array, uniform: Array) -> Array:
    """The bfloat16 below or above x, so that the mean over `uniform` is x."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32) + uniform
    cut = words & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)


def quantise_first(x: Array, uniform: Array) -> Quantised | Array:
    """A first moment in eight bits; as it is where it is small."""
    if x.size < SMALL:
        return x
    level, scales = _levels(x, uniform, FIRST)
    return Quantised((jnp.sign(x) * level).astype(jnp.int8), scales)


def quantise_second(x: Array, uniform: Array) -> Quantised | Array:
    """A second moment, x ≥ 0, in eight bits; as it is where it is small."""
    if x.size < SMALL:
        return x
    level, scales = _levels(x, uniform, SECOND)
    level = jnp.where(x > 0, jnp.maximum(level, 1.0), 0.0)
    return Quantised(level.astype(jnp.uint8), scales)


def dequantise(stored: Quantised | Array) -> Array:
    """What is stored, as float32."""
    if not isinstance(stored, Quantised):
        return stored.astype(jnp.float32)
    codes, count = stored.codes, FIRST if stored.codes.dtype == jnp.int8 else SECOND
    level = codes.astype(jnp.float32)
    return jnp.sign(level) * _magnitude(jnp.abs(level), count) * _spread(stored.scales, codes.shape)


def _levels(x: Array, uniform: Array, count: int) -> tuple[Array, Array]:
    """Levels from 0 to `count` as float32 in x's shape, rounded at random, and the scales."""
    scales = jnp.max(_blocks(jnp.abs(x)), axis=-1)
    scale = _spread(scales, x.shape)
    share = jnp.where(scale > 0, jnp.abs(x) / jnp.where(scale > 0, scale, 1.0), 0.0)
    below = jnp.floor(count + jnp.log(share) / math.log(RATIO))
    below = jnp.clip(below, 0, count - 1)
    low, high = _magnitude(below, count), _magnitude(below + 1, count)
    chance = (share - low) / (high - low)
    return below + ((uniform.astype(jnp.float32) + 0.5) / 2**16 < chance), scales


def _magnitude(level: Array, count: int) -> Array:
    """Level → share of the scale: 0, then RATIO^(level − count)."""
    return jnp.where(level > 0, jnp.exp((level - count) * math.log(RATIO)), 0.0)


def _parts(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Into how many parts each axis is cut before blocks are laid, so that none crosses a cut.

    Cut is every axis that `state_sharding` would split over 2, 4 or 8 devices of fsdp, which need
    not be one axis: of (1024, 5462) two take the second, four and eight the first. The axis of the
    largest count is cut at every index, where that leaves no short blocks: so other counts that
    split it have whole blocks too.
    """
    parts, longest = [1] * len(shape), int(np.argmax(shape))
    for count in (2, 4, 8):
        fits = [size if size % count == 0 else 0 for size in shape]
        if any(fits):
            longest = int(np.argmax(fits))
            parts[longest] = count
    others = math.prod(parts) // parts[longest]
    if math.prod(shape) // shape[longest] // others >= BLOCK:
        parts[longest] = shape[longest]
    return tuple(parts)


def _blocks(x: Array) -> Array:
    """(…) → (*parts, blocks, BLOCK), zeros where the last block of a part is shorter.

    The axes of the parts stay apart, so that who splits one of them moves nothing.
    """
    parts, axes = _parts(x.shape), range(x.ndim)
    cut = [n for size, part in zip(x.shape, parts, strict=True) for n in (part, size // part)]
    order = [2 * axis for axis in axes] + [2 * axis + 1 for axis in axes]
    rows = x.reshape(cut).transpose(order).reshape(*parts, -1)
    rows = jnp.pad(rows, [(0, 0)] * x.ndim + [(0, -rows.shape[-1] % BLOCK)])
    return rows.reshape(*parts, -1, BLOCK)


def _spread(scales: Array, shape: tuple[int, ...]) -> Array:
    """Each entry's scale: (*parts, blocks) → `shape`."""
    parts, axes = _parts(shape), range(len(shape))
    inner = [size // part for size, part in zip(shape, parts, strict=True)]
    rows = jnp.repeat(scales, BLOCK, axis=-1)[..., : math.prod(inner)]
    order = [n for axis in axes for n in (axis, len(shape) + axis)]
    return rows.reshape(*parts, *inner).transpose(order).reshape(shape)


def _plain(x: Array, uniform: Array) -> Array:
    return x


EIGHT_BITS = Packing(quantise_first, quantise_second, dequantise)
PACKINGS = {
    "float32": Packing(_plain, _plain, dequantise),
    "bfloat16": Packing(to_bfloat16, to_bfloat16, dequantise),
}
