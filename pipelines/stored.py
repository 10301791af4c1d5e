"""What a folder of a run, or of an exported model, holds: read, written, and looked at first.

`config.json` (the run's config), `card.json` (what was trained, and how much), and parameters: a
run's `checkpoints/`, or `model.safetensors`.
"""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from configs import base
from pipelines import build, model_card, objectives
from utils import averages, files
from utils.checkpoint import Checkpoints
from utils.cli import UserError, flatten
from utils.sharding import make_mesh, replicated
from utils.sources import LARGEST

WEIGHTS = "model.safetensors"
NO_EMA = "none"  # asks for the parameters themselves, not for an average


def trained_card(config: ConfigDict, card: dict[str, Any], step: int) -> dict[str, Any]:
    """How much training a checkpoint at `step` has seen."""
    return {
        "train_steps": step,
        "train_images": step * config.batch_size,
        "train_flops": step * card["flops_per_step"],
        "trained_guidance": objectives.trained_guidance(config),
    }


def check_described(path: epath.Path, config: ConfigDict, card: dict[str, Any]) -> None:
    """Looks at what a folder says of itself, before anything is built of it.

    Raises:
      UserError: values that no run of this project has.
    """
    model_card.check(card)
    shape, pictures = card["shape"], card.get("pictures")
    counts = (card["num_classes"], card.get("train_steps") or 0, card.get("flops_per_step") or 0)
    right = {
        "shape": isinstance(shape, list)
        and len(shape) in (1, 3)
        and all(type(n) is int and 0 < n <= LARGEST for n in shape),
        "num_classes": type(card["num_classes"]) is int and card["num_classes"] <= 10**6,
        "counts": all(type(n) in (int, float) and 0 <= n < 1e40 for n in counts),
        "pictures": pictures is None or _is_origin(pictures),
        "class_names": len(card.get("class_names") or []) in (0, card["num_classes"]),
    }
    for what, holds in right.items():
        if not holds:
            raise UserError(f"{path / 'card.json'} is none of this project: its {what} cannot be")
    try:
        build.check_ranges(config)
        build.check_patches(config, shape[0] if len(shape) == 3 else 0)
    except UserError as error:
        raise UserError(f"{path / 'config.json'} is none of this project: {error}") from error


def _is_origin(value: Any) -> bool:
    """Whether a value is what `utils.data.Dataset.origin` writes."""
    if not (isinstance(value, dict) and isinstance(value.get("source"), dict)):
        return False
    source, skipped = value["source"], value.get("skipped")
    return (
        set(source) == {"source", "data_dir", "split"}
        and all(isinstance(word, str) for word in (*source.values(), value.get("identity", "")))
        and isinstance(skipped, list)
        and all(type(n) is int and 0 <= n < 2**64 for n in skipped)
        and all(type(value.get(key)) is int for key in ("image_size", "count"))
        and 0 < value["image_size"] <= LARGEST
    )


def read_config(path: epath.Path) -> ConfigDict:
    """Returns a run's config; keys younger than the run have their defaults.

    Raises:
      UserError: there is no such file, or it is no config of this project.
    """
    config = base.get_config()
    try:
        values = flatten(ConfigDict(read_json(path)))
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:  # of its keys
        raise UserError(f"{path} is no config of this version ({error})") from error
    if isinstance(values.get("model.remat"), bool):  # as it was until November 2026
        values["model.remat"] = "full" if values["model.remat"] else "none"
    unknown = sorted(values.keys() - flatten(config).keys())
    if unknown:
        raise UserError(f"{path} is no config of this version: it has no key {unknown[0]}")
    try:
        config.update_from_flattened_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no config of this version ({error})") from error
    return build.without_ignored(config)


def read_json(file: str | os.PathLike) -> dict[str, Any]:
    """Returns what a run's JSON file holds.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    path = epath.Path(file)
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} is no run and no exported model: {_why(path)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore it or train again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: restore it or train again")
    return value


def _why(path: epath.Path) -> str:
    """Why there is no such file of a run, in words that help."""
    folder = path.parent
    if not folder.is_dir():
        return f"it has no {path.name}" if folder.exists() else "there is no such folder"
    if (folder / "model_index.json").exists():
        return (
            "it is a pipeline of diffusers; import_weights.py --format=diffusers "
            f"--checkpoint={folder} --out=FOLDER makes it one"
        )
    inside = sorted(place.parent.name for place in folder.glob("*/config.json"))
    return f"it has no {path.name}" + (f"; in it there are {', '.join(inside)}" if inside else "")


def write_json(path: str | os.PathLike, value: dict) -> None:
    """Writes JSON at once or not at all; process 0 only."""
    if jax.process_index() == 0:
        files.write(path, json.dumps(value, indent=2))


def saved_checkpoints(path: epath.Path) -> Checkpoints:
    """The checkpoints of a run, at least one.

    Raises:
      UserError: there is none.
    """
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} holds no checkpoint yet: train it first, or name another folder")
    checkpoints = Checkpoints(path)
    if checkpoints.latest is None:
        raise UserError(f"{path} holds no checkpoint yet: train it until its first save")
    return checkpoints


def check_exported(path: epath.Path, card: dict[str, Any], step: int | None, ema: str) -> None:
    """Raises UserError where an exported model is asked for a step or average it has not."""
    if step not in (None, card.get("train_steps")) or ema:
        raise UserError(
            f"{path} was exported: it holds one step, {card.get('train_steps')}, and one average; "
            "leave --checkpoint and --ema out, or name the run it was exported from"
        )


def read_parameters(
    checkpoints: Checkpoints, config: ConfigDict, abstract: Any, step: int, ema: str
) -> Any:
    """Averaged parameters, or the parameters themselves, on this process's devices.

    Args:
      ema: as `average_name` knows it.
    Raises:
      UserError: there is nothing of the kind, or it is damaged.
    """
    if step not in checkpoints.steps:
        there = ", ".join(map(str, checkpoints.steps))
        raise UserError(f"{checkpoints.path} has no step {step}: there are {there}")
    here = replicated(make_mesh())
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), abstract)
    if ema == NO_EMA:
        return checkpoints.restore({"train": {"params": wanted}}, step)["train"]["params"]
    name = average_name(checkpoints.path.parent, config, ema)
    if not name.startswith(averages.POSTHOC):
        return checkpoints.restore({"ema": {name: wanted}}, step)["ema"][name]
    powers = dict.fromkeys(averages.powers(config.ema), wanted)
    own = checkpoints.restore({"ema": powers}, step)["ema"]
    count = checkpoints.metadata(step).get(averages.COUNTED)
    if type(count) is not int or count < 1:
        raise UserError(f"{checkpoints.path}: step {step} does not say what its averages are of")
    path = checkpoints.path.parent
    found = averages.reconstruct(path, config.ema, name, step, count, own)
    return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), found, wanted)


def average_name(path: epath.Path, config: ConfigDict, asked: str) -> str:
    """The name of the average that is asked of a run.

    Args:
      asked: a decay, "power_" or "posthoc_" and a width, `NO_EMA`, or empty for the run's own.
    Raises:
      UserError: the run has none of that name.
    """
    known = averages.names(config.ema)
    if asked in ("", NO_EMA, *known):
        return asked or known[0]
    can = bool(config.ema.posthoc and config.ema.snapshot_interval)
    if can and asked.startswith(averages.POSTHOC):
        averages.width_of(asked)
        return asked
    low, high = averages.WIDTHS
    made = [f"{averages.POSTHOC}WIDTH with a width from {low} to {high}"] * can
    there = ", ".join((*known, NO_EMA, *made))
    if asked.startswith(averages.POSTHOC):
        raise UserError(
            f"{path} saved no snapshots to make {asked} of: train with --ema.posthoc=0.05,0.1 "
            f"--ema.snapshot_interval=1000; there are {there}"
        )
    raise UserError(f"{path} holds no average of decay {asked}: there are {there}")


def read_weights(path: epath.Path, abstract: Any) -> Any:
    """The tensors of a safetensors file, as float32, in the shape of `abstract`."""
    try:
        bucket = files.in_bucket(path)
        load = safetensors.numpy.load_file
        flat = safetensors.numpy.load(path.read_bytes()) if bucket else load(path)
    except Exception as error:  # the library raises its own kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error
    wanted = {k: v.shape for k, v in flatten_dict(abstract, sep=".").items()}
    found = {k: v.shape for k, v in flat.items()}
    wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path} does not fit its config.json: {len(wrong)} tensors differ, first {name}: "
            f"the network has {wanted.get(name)}, the file {found.get(name)}"
        )
    return unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}, sep=".")
