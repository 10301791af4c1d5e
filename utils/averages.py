"""Averages of the parameters over training: exponential ones, and those chosen afterwards.

`TrainState.ema` has them by name. "0.999" is exponential of that decay per update. "power_0.05" is
a power-function average (EDM2, arXiv 2312.02696, section 3 and appendix C): after update t each
parameter is a ← β a + (1 − β) θ with β = (1 − 1 / t)^(γ + 1), so that a weighs θ(τ) by

  p(τ) = (γ + 1) τ^γ / t^(γ + 1),  0 ≤ τ ≤ t,

exactly: what came of update s by the integral of p from s − 1 to s. Its width, the standard
deviation of τ / t, is σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)): 0.05 has γ = 17, 0.1 has γ = 7.

Snapshots of them, in `averages/STEP.safetensors` of the run's folder, let any other width be had
afterwards: the combination of snapshots whose profile is nearest to the wanted one in the square
mean, by the closed form of the profiles' products. "posthoc_0.1" asks for it.

t counts updates: a step that is left out changes neither parameters nor averages, and no t.
"""

import json
import math
import os
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
FARTHEST = 0.1  # of a profile from the wanted one, as a share of it, to stand for it
COUNTED = "averaged"  # in a checkpoint's metadata: t
FOLDER, SUFFIX = "averages", ".safetensors"
LONGEST_HEADER = 2**25  # bytes


def names(ema: ConfigDict) -> tuple[str, ...]:
    """The averages that a run keeps, by its `config.ema`; its own first."""
    decays = [str(decay) for decay in (ema.decay, *ema.also)]
    return (*decays, *(f"{POWER}{width}" for width in ema.posthoc))


def check(config: ConfigDict) -> None:
    """Raises UserError where the averages of a config are none, twice there, or not to be had."""
    ema = config.ema
    for key, (low, high) in {"also": (0, 0.9999999), "posthoc": WIDTHS}.items():
        good = isinstance(ema[key], tuple) and all(
            type(value) in (int, float) and low <= value <= high for value in ema[key]
        )
        if not good:
            raise UserError(f"ema.{key}={ema[key]}: numbers from {low} to {high}, by commas")
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

    Exponential: average ← d · average + (1 − d) · params; a copy before `start_step`. Every
    `interval` updates; others leave all as they are.

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
    """The combination of profiles (n,) that is nearest to one profile.

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
    found = np.linalg.lstsq(gram, right, rcond=1e-14)[0]
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
    held = {name: fetch(averages[name]) for name in names(ema) if name.startswith(POWER)}
    if jax.process_index() != 0:
        return
    flat = {k: np.ascontiguousarray(v, np.float32) for k, v in _flat(held).items()}
    path = files.place(workdir) / FOLDER / f"{step:09d}{SUFFIX}"
    try:
        files.write(path, safetensors.numpy.save(flat, {"updates": str(updates)}))
    except OSError as error:
        print(f"warning: {path} could not be written ({error})", file=sys.stderr)


def counted(ema: ConfigDict, updates: int) -> int:
    """t: how often the averages have been updated after so many updates of the parameters."""
    return updates // ema.interval


def snapshots(workdir: epath.Path) -> list[Snapshot]:
    """The snapshots in a run's folder, oldest first.

    Raises:
      UserError: a file that is none.
    """
    folder = workdir / FOLDER
    found = [n.removesuffix(SUFFIX) for n in files.names(folder) if n.endswith(SUFFIX)]
    paths = {int(name): folder / f"{name}{SUFFIX}" for name in found if name.isdecimal()}
    return [Snapshot(step, _updates_of(path), path) for step, path in sorted(paths.items())]


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
    known = [name for name in names(ema) if name.startswith(POWER)]
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
    rows = weights.reshape(len(lengths), len(known))
    for row, source in zip(rows, [*before, None], strict=True):
        held = _flat(jax.device_get(own)) if source is None else _read(source.path)
        for weight, name in zip(row, known, strict=True):
            for leaf, like in flatten_dict(own[name], sep=".").items():
                value = _entry(held, f"{name}/{leaf}", like.shape, source)
                total[leaf] = total.get(leaf, 0.0) + weight * value.astype(np.float64)
    return unflatten_dict({k: v.astype(np.float32) for k, v in total.items()}, sep=".")


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


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(path.read_bytes())
    except Exception as error:  # the library raises its own kinds for a damaged file
        raise _damaged(path, error) from error


def _entry(
    held: dict[str, np.ndarray], name: str, shape: tuple[int, ...], source: Snapshot | None
) -> np.ndarray:
    if name not in held or held[name].shape != shape:
        assert source is not None
        raise _damaged(source.path, f"no {name} of shape {shape}")
    return held[name]


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
