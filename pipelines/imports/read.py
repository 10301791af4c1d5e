"""Checkpoint files of others → tensors by name, without the names of what wraps them.

`.safetensors`; PyTorch's `.pt`, `.pth`, `.bin` and `.ckpt`, of which tensors alone are read; what
`flax.training.checkpoints` wrote, a msgpack file or an orbax folder; jax-flow's pickles.
"""

import argparse
import math
import mmap
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
import safetensors.numpy
from flax import serialization
from flax.traverse_util import flatten_dict

from pipelines.imports import pickles
from utils.cli import UserError

# The trees of a checkpoint: averaged parameters, and the parameters themselves.
AVERAGED = ("ema", "ema_params", "model_eps", "model_ema", "ema_state_dict", "ema_model")
PLAIN = ("model", "params", "state_dict", "model_state_dict")
WRAPPERS = ("params", "net", "state_dict", "module", "_orig_mod", "model")  # of a tree's content
BESIDE = ("opt", "opt_state", "optimizer", "args", "step", "steps", "epoch", "config", "_timestamp")
NO_EMA = "none"
# Tensors' bytes to those of files: tensors may share some, and folders of orbax are compressed.
SHARED, PACKED = 4, 100
INDEX = (".safetensors.index.json", ".bin.index.json")

Tensors = dict[str, np.ndarray]


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
      tensors: arrays of floating-point numbers by name, of the file's types: of what a hostile file
        says to be large, nothing is computed before names and shapes are compared.
      tree: the key of the tree they are from; "" where the file holds one alone.
      config: what the file says beside them, numbers and words: jax-flow's config, the options of
        PyTorch's training.
    """

    tensors: Tensors
    tree: str
    config: Mapping[str, Any]


def read(path: pathlib.Path, form: str, ema: str = "") -> Checkpoint:
    """Reads a checkpoint.

    Args:
      form: of `formats.FORMATS`; says which kinds of file may be meant.
      ema: which tree: "" averaged parameters where there are any, "none" the parameters themselves,
        else its key in the file.
    Raises:
      UserError: no such file, none of a known kind, damaged, or without that tree.
    """
    if not path.exists():
        raise UserError(f"--checkpoint={path}: there is no such file or folder")
    if path.suffix == ".safetensors":
        found = _grouped(_safetensors(path))
    elif form == "meanflow":
        found = _flax(path, ema)
    elif form == "jax_flow":
        found = pickles.load(_only_file(path))
    elif path.is_dir():
        raise UserError(f"--checkpoint={path} is a folder: name the file in it")
    else:
        found = _torch(path)
    tree, key = _tree(path, _by_words(path, found), ema)
    config = found.get("args", found.get("config"))
    told = config.items() if isinstance(config, dict) else ()
    plain = {name: value for name, value in told if isinstance(value, bool | int | float | str)}
    return Checkpoint(_tensors(path, _unwrapped(path, tree)), key, plain)


def _by_words(path: pathlib.Path, tree: Any) -> dict[str, Any]:
    """The tree itself.

    Raises:
      UserError: it is no dict, or one with other keys than words.
    """
    if not (isinstance(tree, dict) and all(isinstance(key, str) for key in tree)):
        raise UserError(f"{path} holds no tensors by name: name a checkpoint")
    return tree


def _only_file(path: pathlib.Path) -> pathlib.Path:
    """The file itself, or that of jax-flow's folder: on disks it makes FILE/FILE.tmp."""
    if not path.is_dir():
        return path
    held = sorted(place for place in path.iterdir() if place.is_file())
    if len(held) != 1:
        raise UserError(f"--checkpoint={path} is a folder of {len(held)} files: name the file")
    return held[0]


def _tree(path: pathlib.Path, found: dict, ema: str) -> tuple[dict, str]:
    """The tree that is asked for, and its key."""
    trees = [key for key, value in found.items() if isinstance(value, dict) and key not in BESIDE]
    order = AVERAGED + PLAIN if ema == "" else PLAIN if ema == NO_EMA else (ema,)
    for key in order:
        if key in trees:
            return found[key], key
    averages = [key for key in trees if key in AVERAGED]
    if ema not in ("", NO_EMA) or averages:
        there = ", ".join(trees) or "one tree without a name"
        raise UserError(f"{path} has no tree for --ema={ema}: it holds {there}")
    return found, ""


def _unwrapped(path: pathlib.Path, tree: dict) -> dict:
    """A tree without what only wraps it, as "module." and {"params": …} do."""
    while True:
        _by_words(path, tree)
        names = {name.partition(".")[0] for name in tree} - set(BESIDE)
        if len(names) != 1 or not names <= set(WRAPPERS):
            return tree
        name = names.pop()
        if name in tree:
            if not isinstance(tree[name], dict):
                return tree
            tree = tree[name]
        else:
            tree = {key[len(name) + 1 :]: value for key, value in tree.items() if "." in key}


def _tensors(path: pathlib.Path, tree: dict) -> Tensors:
    """The tree's arrays by dotted names."""
    try:
        flat = flatten_dict(tree)
    except (TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} holds no tensors by name: name a checkpoint") from error
    tensors: Tensors = {}
    for keys, value in flat.items():
        name = ".".join(map(str, keys))
        if not (isinstance(value, np.ndarray) and _is_floating(value.dtype)):
            raise UserError(f"{path}: {name[:80]} is no tensor of floating-point numbers")
        if name in tensors:
            raise UserError(f"{path} holds two tensors of the name {name[:80]}: it is damaged")
        tensors[name] = value
    if not tensors:
        raise UserError(f"{path} holds no tensors: name a checkpoint")
    _check_bytes(path, sum(value.nbytes for value in tensors.values()))
    return tensors


def _is_floating(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def _check_bytes(path: pathlib.Path, total: int) -> None:
    """Raises UserError where a file says to hold far more numbers than it does.

    The arrays of a few bytes may be views of the same ones, or repeat one number.
    """
    files = [path] if path.is_file() else [place for place in path.rglob("*") if place.is_file()]
    most = (SHARED if path.is_file() else PACKED) * sum(file.stat().st_size for file in files)
    if total > most:
        raise UserError(
            f"{path} is refused: it says to hold {total:,} bytes of numbers, and does not"
        )


def _safetensors(path: pathlib.Path) -> Tensors:
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # the library raises its own kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error


def _grouped(flat: Tensors) -> dict[str, Any]:
    """{"ema.a": …, "model.a": …} as {"ema": {"a": …}, …}; other names stay as they are."""
    first = {name.partition(".")[0] for name in flat}
    if not first <= {*AVERAGED, *PLAIN}:
        return dict(flat)
    grouped: dict[str, Any] = {key: {} for key in sorted(first)}
    for name, value in flat.items():
        key, _, rest = name.partition(".")
        grouped[key][rest] = value
    return grouped


# PyTorch


def _torch(path: pathlib.Path) -> Any:
    """A file of PyTorch, of which tensors, containers and the options beside them are read."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is PyTorch's, which is not installed: pip install torch, or give a "
            ".safetensors file"
        ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # options, as DiT saves them
            # Today's files are archives, of which pages are read as they are used.
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        # torch's own words propose to read it all the same.
        named = re.search(r"unsupported global:? (\S+)", str(error), re.IGNORECASE)
        why = f"refused, it holds more than tensors: it asks for {named[1][:100]}" if named else ""
        raise UserError(f"{path} is {why or 'no checkpoint of PyTorch: name one'}") from error
    except Exception as error:  # a damaged file raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}): copy it again") from error
    try:
        return _numpy(found)
    except pickles.Refused as error:
        raise UserError(f"{path} is refused: {error}") from error


def _numpy(value: Any, depth: int = 0, seen: list[int] | None = None) -> Any:
    """Tensors as arrays, which share their memory, in dicts of dicts; what else there is stays."""
    seen = [0] if seen is None else seen
    seen[0] += 1
    if depth > pickles.DEEPEST or seen[0] > pickles.MOST:  # it can twice hold what twice holds …
        raise pickles.Refused("it holds itself, or too much")
    if isinstance(value, Mapping):
        kept = {k: _numpy(item, depth + 1, seen) for k, item in value.items() if k not in BESIDE}
        args = value.get("args")
        return kept | ({"args": vars(args)} if isinstance(args, argparse.Namespace) else {})
    return _array(value) if hasattr(value, "detach") else value


def _array(tensor: Any) -> np.ndarray | None:
    """A tensor's numbers where they lie; None for one that has none in rows: sparse, or meta."""
    import torch

    try:
        if tensor.dtype == torch.bfloat16:  # which numpy has not
            return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()
    except (TypeError, RuntimeError, NotImplementedError):
        return None


# Flax


def _flax(path: pathlib.Path, ema: str) -> dict[str, Any]:
    """What `flax.training.checkpoints` wrote: a file, an orbax folder, or the newest of a folder's.

    Trees that are not asked for are passed over: Adam's state is twice the network.
    """
    if path.is_dir() and not _is_orbax(path):
        from flax.training import checkpoints  # which warns that TensorFlow is not there

        newest = checkpoints.latest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path} holds no checkpoint_N: name the file or folder of one")
        path = pathlib.Path(newest)
    try:
        return _folder(path, ema) if path.is_dir() else _msgpack(path, ema)
    except UserError:
        raise
    except Exception as error:  # both libraries raise what they like for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no whole checkpoint of flax ({reason})") from error


def _is_orbax(path: pathlib.Path) -> bool:
    return any(
        (path / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA", "checkpoint")
    )


def _wanted(keys: list[str], ema: str) -> list[str]:
    """The keys of the trees to be read; those that are passed over are known by name alone."""
    order = AVERAGED + PLAIN if ema == "" else PLAIN if ema == NO_EMA else (ema,)
    return next(([key] for key in order if key in keys), [k for k in keys if k not in BESIDE])


def _msgpack(path: pathlib.Path, ema: str) -> dict[str, Any]:
    """The trees that are asked for, of a file of `flax.serialization`."""
    places = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        unpacker = msgpack.Unpacker(data, raw=False, strict_map_key=False, max_buffer_size=2**32)
        for _ in range(unpacker.read_map_header()):
            key, begin = str(unpacker.unpack()), unpacker.tell()
            unpacker.skip()
            places[key] = (begin, unpacker.tell())
        wanted = _wanted(list(places), ema)
        return {key: serialization.msgpack_restore(data[slice(*places[key])]) for key in wanted}


def _folder(path: pathlib.Path, ema: str) -> dict[str, Any]:
    """The trees that are asked for, of a folder of orbax.

    Until 2024 flax had all arrays of a host put into one msgpack file of it.
    """
    packed = path / "checkpoint"
    if packed.is_file() and not (path / "_METADATA").exists():
        found = _msgpack(packed, ema)
        if not any(isinstance(leaf, str) for leaf in flatten_dict(found).values()):
            return found  # else words say which file of the folder holds an array
    return _orbax(path, ema)


def _orbax(path: pathlib.Path, ema: str) -> dict[str, Any]:
    """The trees that are asked for, of a folder of orbax, as host arrays of whatever mesh."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path.absolute()).item_metadata.tree
        keys = _wanted(list(tree), ema)
        item = {key: tree[key] for key in keys}
        sizes = [
            math.prod(leaf.shape) * np.dtype(leaf.dtype or np.float32).itemsize
            for leaf in jax.tree.leaves(item)
            if getattr(leaf, "shape", None) is not None
        ]
        _check_bytes(path, sum(sizes))
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        return checkpointer.restore(
            path.absolute(),
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True),
        )
