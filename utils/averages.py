"""Averages of the parameters over training: exponential ones, and those chosen afterwards.

`TrainState.ema` has them by name. "0.999" is exponential of that decay per update. "power_0.05" is
a power-function average (EDM2, arXiv 2312.02696, section 3 and appendix C): after update t each
parameter is a ← β a + (1 − β) θ with β = (1 − 1 / t)^(γ + 1), so that a weighs θ(τ) by

  p(τ) = (γ + 1) τ^γ / t^(γ + 1),  0 ≤ τ ≤ t,

exactly: what came of update s by the integral of p from s − 1 to s. Its width, the standard
deviation of τ / t, is σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)): 0.05 has γ = 17, 0.1 has γ = 7.

Snapshots of them, in `averages/STEP.safetensors` of the run's folder, let any other width be had
afterwards: the combination of snapshots whose profile is nearest to the wanted one in the square
mean among the combinations whose weights sum to 1, by the closed form of the profiles' products.
"posthoc_0.1" asks for it.

t counts updates: a step that is left out changes neither parameters nor averages, and no t.
Profiles begin with the run: `ema.start_step` is for exponential averages alone.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from ml_collections import ConfigDict

from utils import files
from utils.cli import UserError
from utils.sharding import fetch

POWER, POSTHOC = "power_", "posthoc_"
WIDTHS = (0.005, 0.28)  # of power-function averages; equal weights have 1 / √12 = 0.289
FARTHEST = 0.03  # of a profile from the wanted one, as a share of it, to stand for it
NEGLIGIBLE = 1e-6  # sum of weights, whatever their signs, that may be left out
MOST = 20  # averages of a kind
GIGABYTE = 10**9
COUNTED = "averaged"  # in a checkpoint's metadata: t
FOLDER, SUFFIX = "averages", ".safetensors"
ASIDE = "averages_before"  # the folder for those of an earlier run
LONGEST_HEADER = 2**25  # bytes


def names(ema: ConfigDict) -> tuple[str, ...]:
    """The averages that a run keeps, by its `config.ema`; its own first."""
    decays = [str(decay) for decay in (ema.decay, *ema.also)]
    return (*decays, *(f"{POWER}{width}" for width in ema.posthoc))


def powers(ema: ConfigDict) -> list[str]:
    """Those that are power-function averages."""
    return [name for name in names(ema) if name.startswith(POWER)]


def check(config: ConfigDict) -> None:
    """Raises UserError where the averages of a config are none, twice there, or not to be had."""
    ema = config.ema
    lists = {"also": (0, 0.9999999, "0.999,0.99999"), "posthoc": (*WIDTHS, "0.05,0.1")}
    for key, (low, high, given) in lists.items():
        few = isinstance(ema[key], tuple) and len(ema[key]) <= MOST
        # NaN fails too.
        if not few or not all(type(x) in (int, float) and low <= x <= high for x in ema[key]):
            raise UserError(
                f"ema.{key}={str(ema[key])[:60]}: up to {MOST} numbers from {low} to {high}, by "
                f"commas: give --ema.{key}={given} or the like"
            )
    known = names(ema)
    for name in known:
        if known.count(name) > 1:
            raise UserError(f"ema keeps the average {name} twice: give each once")
    if ema.snapshot_interval and not ema.posthoc:
        raise UserError(
            f"ema.snapshot_interval={ema.snapshot_interval} saves averages of --ema.posthoc: give "
            "--ema.posthoc=0.05,0.1, or leave it out"
        )
    if ema.snapshot_interval % ema.interval:
        raise UserError(
            f"ema.snapshot_interval={ema.snapshot_interval} must be a multiple of "
            f"ema.interval={ema.interval}"
        )


def begin(ema: ConfigDict, params: Any) -> dict[str, Any]:
    """The averages before the first update."""
    return dict.fromkeys(names(ema), params)


def update(
    ema: ConfigDict, averages: dict[str, Any], params: Any, step: Array, updates: Array
) -> dict[str, Any]:
    """The averages after an update that gave `params`.

    Exponential: average ← d · average + (1 − d) · params; a copy before `start_step`, of which
    power-function averages take no notice. Every `interval` updates; others leave all as they are.

    Args:
      step: () int32, steps before this one; updates: () int32, updates, this one included.
    """
    due = updates % ema.interval == 0

    def exponential(decay: float, average: Any) -> Any:
        d = jnp.where(step < ema.start_step, 0.0, decay)
        d = d if ema.interval == 1 else jnp.where(due, d, 1.0)
        return jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)

    def power(width: float, average: Any) -> Any:
        share = jnp.where(due, _share(exponent(width), updates // ema.interval), 0.0)
        return jax.tree.map(lambda a, p: a + share * (p - a), average, params)

    return {
        name: power(float(name.removeprefix(POWER)), average)
        if name.startswith(POWER)
        else exponential(float(name), average)
        for name, average in averages.items()
    }


def _share(gamma: float, count: Array) -> Array:
    """1 − (1 − 1 / t)^(γ + 1), also where t is so large that float32 has no 1 − 1 / t."""
    t = jnp.maximum(count, 1).astype(jnp.float32)
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / t))


# Profiles.


def exponent(width: float) -> float:
    """γ of the power-function average whose relative width is σ_rel, within WIDTHS."""
    inverse = float(width) ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def products(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """∫ p_a p_b of the profiles a = (t, γ) and b, float64, broadcast.

    It is (γ_a + 1)(γ_b + 1) min(t)^(γ_a + γ_b + 1) / ((γ_a + γ_b + 1) t_a^(γ_a + 1) t_b^(γ_b + 1)),
    here by ratios of t, which do not overflow.
    """
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (t_a / t_b) ** power / np.maximum(t_a, t_b)


def solve(
    lengths: np.ndarray, gammas: np.ndarray, length: float, gamma: float
) -> tuple[np.ndarray, float]:
    """The combination of profiles (n,) that is nearest to one profile, its weights summing to 1.

    Every profile has the mass 1: with other sums, parameters would be shrunken or stretched.

    Returns:
      The weights (n,) float64, and the distance as a share of the profile wanted.
    """
    lengths, gammas = (np.asarray(a, np.float64) for a in (lengths, gammas))
    each = lengths, gammas
    norms = np.sqrt(products(each, each))
    gram = products((lengths[:, None], gammas[:, None]), (lengths[None], gammas[None]))
    whole = np.array([length], np.float64), np.array([gamma], np.float64)
    right, square = products(each, whole) / norms, float(products(whole, whole)[0])
    gram /= norms[:, None] * norms[None]
    # Of what `found` can be, a point with Σ found / norms = 1 and all directions that keep the sum.
    basis = np.linalg.qr((1 / norms)[:, None], mode="complete")[0]
    point, free = (1 / norms) / np.sum(norms**-2), basis[:, 1:]
    steps = np.linalg.lstsq(free.T @ gram @ free, free.T @ (right - gram @ point), rcond=1e-14)[0]
    found = point + free @ steps
    rest = (square - 2 * found @ right + found @ gram @ found) / square
    return found / norms, math.sqrt(max(rest, 0.0))


# Snapshots.


class Snapshot(NamedTuple):
    """A file of averages."""

    step: int
    updates: int  # t
    path: epath.Path


def save_snapshot(
    workdir: str | os.PathLike, ema: ConfigDict, averages: dict[str, Any], step: int, updates: int
) -> None:
    """Writes the power-function averages after `step`, all processes calling it alike.

    A file that cannot be written is reported: the rest serve without it.

    Args:
      updates: t, as `counted` has it; at 0 there is nothing to save.
    """
    if not updates:
        return
    flat = {}
    for name, leaf in _flat({name: averages[name] for name in powers(ema)}).items():
        whole = fetch(leaf)
        if jax.process_index() == 0:  # the others drop it at once
            flat[name] = np.ascontiguousarray(whole, np.float32)
    if jax.process_index() != 0:
        return
    path = files.place(workdir) / FOLDER / f"{step:09d}{SUFFIX}"
    try:
        files.write(path, safetensors.numpy.save(flat, {"updates": str(updates)}))
    except OSError as error:
        print(f"warning: {path} could not be written ({error})", file=sys.stderr)


def make_way(workdir: str | os.PathLike, done: int) -> None:
    """Sees, as training begins, that every snapshot in the folder is of this run; process 0 acts.

    A run that begins sets all of them aside, whole: they are of another that lay there. One that is
    gone on with drops those of steps after `done`, which it will write again.

    Raises:
      UserError: they cannot be moved.
    """
    folder = files.place(workdir) / FOLDER
    if jax.process_index() != 0:
        return
    later = {step: path for step, path in _files(folder).items() if step > done}
    try:
        if done:
            for path in later.values():
                path.unlink()
        elif later:
            place = folder.with_name(ASIDE)
            while place.exists():
                place = place.with_name(place.name + "_")
            files.move(folder, place)
            print(
                f"warning: {folder} held snapshots of a run without a checkpoint: moved to {place}",
                file=sys.stderr,
            )
    except Exception as error:  # of many kinds, in a bucket
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder} is of an earlier run ({reason}): move it away") from error


def tell_size(config: ConfigDict, averages: dict[str, Any]) -> None:
    """Says, where it is much, what a run's snapshots take, or that there will be none."""
    if not config.ema.posthoc or jax.process_index() != 0:
        return
    if not config.ema.snapshot_interval:
        print(
            f"warning: no snapshots are saved, so --ema={POSTHOC}WIDTH can never be made: add "
            f"--ema.snapshot_interval=1000; --ema={powers(config.ema)[0]} is kept without",
            file=sys.stderr,
        )
        return
    held = [averages[name] for name in powers(config.ema)]
    one = sum(4 * leaf.size for leaf in jax.tree.leaves(held)) / GIGABYTE
    count = config.max_steps // config.ema.snapshot_interval
    if count * one > 1:
        print(
            f"{count:,} snapshots of averages will take {count * one:,.1f} GB in all, one "
            f"{one:,.2f} GB; a longer --ema.snapshot_interval takes less",
            file=sys.stderr,
        )


def counted(ema: ConfigDict, updates: int) -> int:
    """t: how often the averages have been updated after so many updates of the parameters."""
    return updates // ema.interval


def snapshots(workdir: epath.Path) -> list[Snapshot]:
    """The snapshots in a run's folder, oldest first.

    Raises:
      UserError: a file that is none.
    """
    found = sorted(_files(workdir / FOLDER).items())
    return [Snapshot(step, _updates_of(path), path) for step, path in found]


def steps_before(workdir: epath.Path, step: int) -> list[int]:
    """The steps of the snapshots that an average at a checkpoint can be made of, oldest first."""
    return sorted(there for there in _files(workdir / FOLDER) if there < step)


def reconstruct(
    workdir: epath.Path, ema: ConfigDict, asked: str, step: int, updates: int, own: dict[str, Any]
) -> Any:
    """The average of another width at a checkpoint, from snapshots before it and its own.

    Args:
      asked: "posthoc_" and σ_rel.
      step: of the checkpoint; updates: t there.
      own: the checkpoint's power-function averages by name.
    Returns:
      A tree as those of `own`, numpy float32.
    Raises:
      UserError: the snapshots do not reach that width, or are damaged.
    """
    width = width_of(asked)
    known = powers(ema)
    before = [s for s in snapshots(workdir) if s.step < step and s.updates < updates]
    before = list({s.updates: s for s in before}.values())  # of steps left out there may be two
    gammas = np.array([exponent(float(name.removeprefix(POWER))) for name in known])
    lengths = np.array([*(s.updates for s in before), updates], np.float64)
    pairs = np.repeat(lengths, len(known)), np.tile(gammas, len(lengths))
    weights, far = solve(*pairs, updates, exponent(width))
    if far > FARTHEST:
        there = ", ".join(name.removeprefix(POWER) for name in known)
        raise UserError(
            f"{workdir} cannot have {asked} at step {step}: {len(before)} snapshots before it of "
            f"widths {there} leave an error of {far:.0%} of its profile; nearer widths or later "
            "steps are better, and more snapshots (--ema.snapshot_interval)"
        )
    total: dict[str, np.ndarray] = {}
    shapes = {name: leaf.shape for name, leaf in _flat(own).items()}
    rows = _without_negligible(weights).reshape(len(lengths), len(known))
    for row, source in zip(rows, [*before, None], strict=True):
        of = {name: weight for name, weight in zip(known, row, strict=True) if weight}
        wanted = {name: shape for name, shape in shapes.items() if name.partition("/")[0] in of}
        held = _read(source.path, wanted) if source else _flat(jax.device_get(own)).items()
        for name, value in held:
            average, _, leaf = name.partition("/")
            if average in of:
                total[leaf] = total.get(leaf, 0.0) + of[average] * value.astype(np.float64)
    return unflatten_dict({k: v.astype(np.float32) for k, v in total.items()}, sep=".")


def _without_negligible(weights: np.ndarray) -> np.ndarray:
    """Zeros for the smallest weights, those that add up to less than NEGLIGIBLE."""
    order = np.argsort(np.abs(weights))
    small = order[np.cumsum(np.abs(weights[order])) < NEGLIGIBLE]
    kept = weights.copy()
    kept[small] = 0.0
    return kept


def width_of(asked: str) -> float:
    """σ_rel of "posthoc_σ_rel".

    Raises:
      UserError: it is no number within WIDTHS.
    """
    try:
        width = float(asked.removeprefix(POSTHOC))
    except ValueError:
        width = math.nan
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        raise UserError(f"--ema={asked}: {POSTHOC} and a width from {WIDTHS[0]} to {WIDTHS[1]}")
    return width


def _flat(held: dict[str, Any]) -> dict[str, np.ndarray]:
    """{"power_0.05/blocks.mlp.in.kernel": array}."""
    return {
        f"{name}/{leaf}": value
        for name, tree in held.items()
        for leaf, value in flatten_dict(tree, sep=".").items()
    }


def _files(folder: epath.Path) -> dict[int, epath.Path]:
    """The snapshots in a folder by their steps."""
    found = [n.removesuffix(SUFFIX) for n in files.names(folder) if n.endswith(SUFFIX)]
    return {int(name): folder / f"{name}{SUFFIX}" for name in found if name.isdecimal()}


def _read(path: epath.Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a snapshot by name; on this machine one after the other, from a bucket whole."""
    if not shapes:
        return
    try:
        with contextlib.ExitStack() as stack:
            if files.in_bucket(path):
                get = safetensors.numpy.load(path.read_bytes()).__getitem__
            else:
                opened = safetensors.safe_open(os.fspath(path), framework="numpy")
                get = stack.enter_context(opened).get_tensor
            for name, shape in shapes.items():
                value = get(name)
                if value.shape != shape:
                    raise ValueError(f"no {name} of shape {shape}")
                yield name, value
    except Exception as error:  # the library raises its own kinds for a damaged file
        raise _damaged(path, error) from error


def _updates_of(path: epath.Path) -> int:
    """t of a snapshot, from the head of its file alone."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"a head of {length} bytes")
            updates = int(json.loads(file.read(length))["__metadata__"]["updates"])
        if not 0 < updates < 2**31:
            raise ValueError(f"{updates} updates")
        return updates
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: epath.Path, error: Any) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"{path} is no snapshot ({reason}): move it away, the others serve without it")
