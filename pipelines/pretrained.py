"""Autoencoders from files: a folder or a name on the hub → network, parameters, scale.

Formats: diffusers' folder (`config.json` and `diffusion_pytorch_model.safetensors`, also of a whole
pipeline), its Flax files of old (`diffusion_flax_model.msgpack`), and the original TAESD pairs
(`tae*_encoder*` and `tae*_decoder*`, .safetensors or .npz). Every tensor of a file is used. Pickles
are refused: reading one runs what it says.

Tensors are brought to one form, that of `models/autoencoder_kl.py` and `autoencoder_tiny.py`: names
as in "encoder/conv_in/kernel", kernels (height, width, in, out), float32.
"""

import dataclasses
import filecmp
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from models import autoencoder, autoencoder_tiny
from models.autoencoder import Autoencoder, Scale
from models.autoencoder_kl import AutoencoderKL
from models.autoencoder_tiny import AutoencoderTiny
from utils.cli import UserError
from utils.sources import check_packed

CONFIG = "config.json"
SAFETENSORS = "diffusion_pytorch_model.safetensors"
# In the order of preference; the last is what diffusers wrote when it still had Flax.
WEIGHTS = (SAFETENSORS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_flax_model.msgpack")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
KL_SCALING = 0.18215  # of the Stable Diffusion VAE, whose older configs do not say it
FLOATS = ("float16", "bfloat16", "float32", "float64")
DAMAGE = (
    safetensors.SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    MemoryError,  # of a header that claims more than there is
    NotImplementedError,
)


class Pretrained(NamedTuple):
    """An autoencoder and where it came from.

    fingerprint: 12 hex digits of the parameters and the scale: the same in any format, names or
    file type that holds the same numbers.
    """

    autoencoder: Autoencoder
    folder: pathlib.Path
    fingerprint: str


class _Files(NamedTuple):
    """What is read of a folder: config.json (None for the original TAESD) and the weights."""

    folder: pathlib.Path
    config: pathlib.Path | None
    weights: tuple[pathlib.Path, ...]


class _Tensor(NamedTuple):
    """A tensor in our form, read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


_Tensors = dict[str, _Tensor]


def load_autoencoder(name: str, dtype: str = "float32", slice_size: int = 0) -> Pretrained:
    """Loads an autoencoder.

    Args:
      name: a folder, or a name on the hub such as "stabilityai/sd-vae-ft-mse"; a folder wins.
      dtype: of convolutions and attention, "float32" or "bfloat16"; the parameters are float32.
      slice_size: pictures that `decode` holds at once; 0: all.

    Raises:
      UserError: no such folder or name, files missing or damaged, weights that do not fit.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"an autoencoder computes in float32 or bfloat16, not {dtype!r}")
    if slice_size < 0:
        raise UserError(f"slice_size={slice_size}: give 1 or more, or 0 for all pictures at once")
    files = _find(name)
    tensors = _open(files)
    config = {} if files.config is None else _read_config(files.config)
    network = _network(files, config, tensors)
    _check(files, network, tensors)
    tiny = isinstance(network, AutoencoderTiny)
    try:
        scale = Scale.of(config, network.latent_channels, 1.0 if tiny else KL_SCALING)
    except ValueError as error:
        raise UserError(f"{files.config}: {error}") from error
    digest = hashlib.blake2b(digest_size=6)
    digest.update(repr((type(network).__name__, getattr(network, "norm_num_groups", 0))).encode())
    digest.update(scale.shift.tobytes() + scale.factor.tobytes())
    params = _read(files, tensors, digest)
    build = autoencoder.tiny if tiny else autoencoder.kl
    loaded = build(network.clone(dtype=jnp.dtype(dtype)), params, scale, slice_size)
    return Pretrained(loaded, files.folder, digest.hexdigest())


def copy_autoencoder(folder: str | os.PathLike, to: str | os.PathLike) -> None:
    """Copies the files that `load_autoencoder` reads; `to` is then whole, or was never there.

    Where `to` is such a copy already, it is left alone.

    Raises:
      UserError: `folder` is none of an autoencoder, or `to` holds something else.
    """
    files, to = _find(os.fspath(folder)), pathlib.Path(to)
    wanted = [*([files.config] if files.config else []), *files.weights]
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.exists():
        part = pathlib.Path(tempfile.mkdtemp(".part", f".{to.name}.", to.parent))
        try:
            part.chmod(0o777 & ~_umask())  # mkdtemp's is the owner's alone
            for path in wanted:
                shutil.copyfile(path, part / path.name)
            part.rename(to)
        except OSError:
            if not to.exists():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    names = [path.name for path in wanted]
    held = sorted(path.name for path in to.iterdir()) if to.is_dir() else None
    if held != sorted(names) or filecmp.cmpfiles(to, files.folder, names, False)[0] != names:
        raise UserError(f"{to} is there and no copy of {files.folder}: name another, or remove it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Which files


def _find(name: str) -> _Files:
    """The files that `name` stands for."""
    path = pathlib.Path(name).expanduser()
    if not name:
        raise UserError(f"no autoencoder given: a folder with {CONFIG} and {SAFETENSORS}")
    folder = path if path.is_dir() else _download(name)
    if not (folder / CONFIG).is_file() and (folder / "vae" / CONFIG).is_file():
        folder /= "vae"  # of a whole pipeline
    if not (folder / CONFIG).is_file() and (folder / "autoencoder").is_dir():
        folder /= "autoencoder"  # of prepared data, or of an exported model of ours
    if (folder / CONFIG).is_file():
        for weights in WEIGHTS:
            if (folder / weights).is_file():
                return _Files(folder, folder / CONFIG, (folder / weights,))
    else:
        pair = _taesd_pair(folder)
        if pair:
            return _Files(folder, None, pair)
    raise UserError(_not_an_autoencoder(folder))


def _taesd_pair(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The original TAESD files, encoder then decoder; empty where there are none."""
    found = [
        sorted(p for p in folder.glob(f"tae*_{half}*") if p.suffix in (".npz", ".safetensors"))
        for half in ("encoder", "decoder")
    ]
    encoders, decoders = found
    if not encoders and not decoders:
        return ()
    names = ", ".join(path.name for path in encoders + decoders)
    pairs = [(e, d) for e in encoders for d in decoders if _stem(e) == _stem(d)]
    if len(pairs) != 1 or len(encoders + decoders) != 2:
        raise UserError(f"{folder} holds {names}: leave one tae*_encoder* and its tae*_decoder*")
    return pairs[0]


def _stem(path: pathlib.Path) -> str:
    return path.stem.replace("_encoder", "").replace("_decoder", "")


def _not_an_autoencoder(folder: pathlib.Path) -> str:
    """Says what a folder lacks, and what it holds instead."""
    held = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(held[:8]) + (", …" if len(held) > 8 else "") if held else "nothing"
    pickles = [name for name in held if name.endswith(PICKLES)]
    if pickles and CONFIG in held:
        call = f"from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}'"
    elif pickles:
        call = f"from_single_file('{folder / pickles[0]}').save_pretrained('{folder}'"
    if pickles:
        return (
            f"{folder} holds only a pickle, {pickles[0]}, and reading a pickle runs what it says; "
            'if you trust it, convert it once: python -c "from diffusers import AutoencoderKL as '
            f'A; A.{call}, safe_serialization=True)"'
        )
    lacks = f"no {CONFIG}" if CONFIG not in held else f"none of {', '.join(WEIGHTS)}"
    return f"{folder} is no autoencoder, it has {lacks}; it holds {listed}"


def _download(name: str) -> pathlib.Path:
    """The hub's snapshot of `name`: its config and the first of WEIGHTS that it has."""
    both = f"give a folder with {CONFIG} and {SAFETENSORS}, or a name on the hub such as"
    both += " stabilityai/sd-vae-ft-mse, with a network or once downloaded"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"no folder {name}: {both}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"no folder {name}, and pip install huggingface_hub is missing") from error
    for weights in WEIGHTS:
        files = [CONFIG, weights]
        try:
            folder = snapshot_download(name, allow_patterns=files + [f"vae/{f}" for f in files])
        except Exception as error:  # its own, of the network, of the cache
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise UserError(f"no folder {name}, and not from the hub ({reason}): {both}") from error
        if any(pathlib.Path(folder).glob(f"**/{weights}")):
            break
    return pathlib.Path(folder)


# Config → network


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise UserError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object: fetch it again")
    return config


def _network(files: _Files, config: dict[str, Any], tensors: _Tensors) -> nn.Module:
    """The network that a config describes; for the original TAESD, that its tensors do."""
    if files.config is None:
        try:
            return autoencoder_tiny.from_shapes({k: t.shape for k, t in tensors.items()})
        except ValueError as error:
            raise UserError(f"{files.weights[0]}: {error}") from error
    kind = str(config.get("_class_name")).removeprefix("Flax")
    if kind == "AutoencoderKL":
        fields = _fields(files.config, config, AutoencoderKL)
        blocks = len(fields["block_out_channels"])
        _expect(files.config, config, "act_fn", "silu")
        _expect(files.config, config, "down_block_types", ["DownEncoderBlock2D"] * blocks)
        _expect(files.config, config, "up_block_types", ["UpDecoderBlock2D"] * blocks)
        return AutoencoderKL(**fields)
    if kind == "AutoencoderTiny":
        _expect(files.config, config, "act_fn", "relu")
        _expect(files.config, config, "upsample_fn", "nearest")
        _expect(files.config, config, "upsampling_scaling_factor", 2)
        return AutoencoderTiny(
            **_fields(files.config, config, AutoencoderTiny),
            encoder_pools=autoencoder_tiny.pools(tensors, "encoder"),
            decoder_pools=autoencoder_tiny.pools(tensors, "decoder"),
        )
    raise UserError(
        f"{files.config} is of {config.get('_class_name')}: AutoencoderKL and AutoencoderTiny are "
        "what can be loaded"
    )


def _expect(path: pathlib.Path, config: dict[str, Any], key: str, value: Any) -> None:
    """Raises where a config asks for what is not built here."""
    if config.get(key, value) != value:
        raise UserError(f"{path}: {key}={config[key]!r} is not supported, only {value!r}")


def _fields(path: pathlib.Path, config: dict[str, Any], network: type) -> dict[str, Any]:
    """The fields of a network that a config gives, with diffusers' defaults, checked for type."""
    ours = ("dtype", "encoder_pools", "decoder_pools", "parent", "name")
    found: dict[str, Any] = {}
    for field in dataclasses.fields(network):
        if field.name in ours:
            continue
        value = config.get(field.name, field.default)
        numbers = value if isinstance(field.default, tuple) else [value]
        kind = bool if isinstance(field.default, bool) else int
        right = isinstance(numbers, list | tuple) and len(numbers) > 0
        if not (right and all(type(n) is kind and (kind is bool or n > 0) for n in numbers)):
            raise UserError(f"{path}: {field.name}={value!r} is not of the kind {field.default!r}")
        found[field.name] = tuple(numbers) if isinstance(field.default, tuple) else value
    return found


# Weights


def _open(files: _Files) -> _Tensors:
    """All tensors of the files, in our names and shapes, most of them not yet read."""
    if files.config is not None:
        path = files.weights[0]
        return _flax_tensors(path) if path.suffix == ".msgpack" else _torch_tensors(path)
    return _torch_tensors(files.weights[0], "encoder", 0) | _torch_tensors(
        files.weights[1], "decoder", 1
    )


def _torch_tensors(path: pathlib.Path, half: str = "", offset: int = 0) -> _Tensors:
    """Tensors as PyTorch names and lays them out.

    The original TAESD's two halves count layers from `offset` (the decoder's 0 is the clamp).
    """
    raw = _open_npz(path) if path.suffix == ".npz" else _open_safetensors(path)
    tensors: _Tensors = {}
    for name, tensor in raw.items():
        if half:
            first, dot, rest = name.partition(".")
            place = str(int(first) - offset) if first.isdigit() else first
            name = f"{half}.layers.{place}{dot}{rest}"
        tensors |= dict([_from_torch(name, tensor)])
    return tensors


def _open_safetensors(path: pathlib.Path) -> _Tensors:
    try:
        file = safetensors.safe_open(path, "numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except DAMAGE as error:
        raise _damaged(path, error) from error
    return {name: _Tensor(shape, _call(file.get_tensor, name)) for name, shape in shapes.items()}


def _open_npz(path: pathlib.Path) -> _Tensors:
    try:
        check_packed(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except DAMAGE as error:
        raise _damaged(path, error) from error
    return {name: _Tensor(a.shape, _call(np.asarray, a)) for name, a in arrays.items()}


def _flax_tensors(path: pathlib.Path) -> _Tensors:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        flat = flatten_dict(tree.get("params", tree), sep="/")
        arrays = {_attention(name): np.asarray(array) for name, array in flat.items()}
    except (*DAMAGE, AttributeError, TypeError) as error:  # a tree of something else
        raise _damaged(path, error) from error
    tensors: _Tensors = {}
    for name, array in arrays.items():
        array = array[0, 0] if _is_square(name, array.shape) else array
        tensors[name] = _Tensor(array.shape, _call(np.asarray, array))
    return tensors


def _call(function: Callable, argument: Any) -> Callable[[], np.ndarray]:
    return lambda: function(argument)


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0][:200] or type(error).__name__
    return UserError(f"{path} is cut short or damaged ({reason}): fetch it again")


def _from_torch(name: str, tensor: _Tensor) -> tuple[str, _Tensor]:
    """(O, I, h, w) → (h, w, I, O), (O, I) → (I, O); names by rule."""
    name, shape, read = re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/"), *tensor
    base, _, leaf = name.rpartition("/")
    if leaf == "weight":
        name = f"{base}/{'kernel' if len(shape) > 1 else 'scale'}"
    name = _attention(name)
    if _is_square(name, shape):
        return name, _Tensor((shape[1], shape[0]), lambda: read()[:, :, 0, 0].T)
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))
    return name, _Tensor(tuple(shape[i] for i in order), lambda: read().transpose(order))


def _attention(name: str) -> str:
    """Today's names of the attention's parts."""
    for old, new in {"query": "q", "key": "k", "value": "v", "proj_attn": "out_0"}.items():
        name = re.sub(rf"(attentions_\d+)/{old}/", rf"\1/to_{new}/", name)
    return name


def _is_square(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an attention's matrix is written as a 1×1 convolution, as in the oldest files."""
    return "/attentions_" in name and len(shape) == 4


def _check(files: _Files, network: nn.Module, tensors: _Tensors) -> None:
    """Raises unless the tensors are just those of the network."""
    where = files.weights[0] if files.config else files.folder
    widths = getattr(network, "block_out_channels", (1, 1, 1, 1))
    size = 2 ** (len(widths) - 1)
    picture = jnp.zeros((1, size, size, network.in_channels))
    try:
        abstract = jax.eval_shape(network.init, jax.random.key(0), picture)["params"]
    except (ValueError, TypeError) as error:  # sizes that no network has
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{files.config or where} describes no network ({reason})") from error
    wanted = {name: leaf.shape for name, leaf in flatten_dict(abstract, sep="/").items()}
    for problem, names in (
        ("lacks", sorted(wanted.keys() - tensors.keys())),
        ("has left over", sorted(tensors.keys() - wanted.keys())),
    ):
        if names:
            raise UserError(
                f"{where} {problem} {len(names)} of the {len(wanted)} tensors of "
                f"{_described(files, network)}, first {_torch_name(names[0])}"
            )
    latents = next(tensors[name].shape[2] for name in LATENT_IN if name in tensors)
    if latents != network.latent_channels:
        raise UserError(
            f"{files.config}: latent_channels={network.latent_channels}, "
            f"but the weights in {where.name} have {latents}: they belong to another config"
        )
    misfits = sorted(name for name in wanted if wanted[name] != tensors[name].shape)
    if misfits:
        first = misfits[0]
        raise UserError(
            f"{where} does not fit {_described(files, network)}: {len(misfits)} tensors have other "
            f"shapes, first {_torch_name(first)} {tensors[first].shape} instead of {wanted[first]}"
        )


LATENT_IN = ("decoder/conv_in/kernel", "decoder/layers_0/kernel")  # (3, 3, latent channels, width)


def _described(files: _Files, network: nn.Module) -> str:
    kind = type(network).__name__
    return f"the {kind} that {CONFIG} describes" if files.config else f"an {kind}"


def _torch_name(name: str) -> str:
    """The name that a file of today has for a tensor, for messages."""
    name = re.sub(r"/(kernel|scale)$", "/weight", name)
    return re.sub(r"_(\d+)(?=/)", r".\1", name).replace("/", ".")


def _read(files: _Files, tensors: _Tensors, digest: Any) -> dict:
    """The parameters as a tree of float32 arrays on the device, one by one; feeds `digest`."""
    params = {}
    for name in sorted(tensors):
        try:
            raw = tensors.pop(name).read()  # so that no tensor outlives its conversion
        except DAMAGE as error:
            raise _damaged(files.weights[0], error) from error
        if raw.dtype.name not in FLOATS:
            raise UserError(
                f"{files.weights[0]}: {_torch_name(name)} is {raw.dtype}: "
                f"weights are read from {', '.join(FLOATS)}"
            )
        array = np.ascontiguousarray(raw, np.float32)
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array)
        params[name] = jnp.asarray(array)
    return unflatten_dict(params, sep="/")
