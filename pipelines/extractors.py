"""Extractors by name: what a Fréchet distance is measured with, weights included.

An extractor owns all between uint8 pictures and features: the resize, the range and the network.
Its fingerprint says which numbers may be compared: those of the same one.

Weights are read from .safetensors or .npz. A .pth is a pickle, and reading one runs what it says:
`scripts/convert_inception.py` converts it once, with torch allowing tensors only.
"""

import dataclasses
import hashlib
import http.client
import importlib.util
import os
import pathlib
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from models import dinov2, inception, mobilenet
from pipelines.pretrained import DAMAGE, FLOATS, PICKLES
from utils import files
from utils.cli import UserError
from utils.log import progress
from utils.sources import check_packed

# Of each extractor its protocols, the first by default.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "inception": ("tf", "clean", "pytorch"),
    "mobilenet": ("clean",),
    "dinov2": ("clean",),
}
# The weights that every published FID is measured with, ported from TensorFlow's graph of 2015 by
# pytorch-fid; torch-fidelity's file has the same content and checksum.
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
MEGABYTES = 96
INCEPTION_FILE = "inception_fid.safetensors"  # in the cache
DINOV2 = "facebook/dinov2-large"  # of Stein et al. 2023
DINOV2_FILE = "model.safetensors"
CONVERTER = "python scripts/convert_inception.py"
TABLES = (".safetensors", ".npz")  # what weights are read from
RESIZES = {
    "tf": "TF1 bilinear",
    "clean": "Pillow's antialiased bicubic",
    "pytorch": "half-pixel bilinear",
}


class Extractor(NamedTuple):
    """A network of features with its resize, its range and its weights.

    name: "inception", "mobilenet" or "dinov2", or of one that is made elsewhere.
    protocol: "tf", "clean" or "pytorch": the resize and range before the network.
    words: one phrase for a reader: network, resize, range and the weights' fingerprint.
    fingerprint: 12 hex digits of the weights, the name and the protocol.
    apply: uint8 pictures (n, H, W, 1 or 3) → {"pool": (n, d), …}, float32; grey is taken as RGB. A
      pytree, so that the weights are an argument of whatever is compiled around it.
    widths: what it gives, and how many of each: {"pool": d, …}.
    """

    name: str
    protocol: str
    words: str
    fingerprint: str
    apply: jax.tree_util.Partial
    widths: Mapping[str, int]


def load(
    name: str, protocol: str = "", weights: str = "", cache_dir: str | os.PathLike = "runs/cache"
) -> Extractor:
    """Loads an extractor.

    Args:
      name: one of PROTOCOLS.
      protocol: one of PROTOCOLS[name]; empty: the first.
      weights: a .safetensors or .npz file; for dinov2 also a folder or a name on the hub. Empty:
        Inception's from `cache_dir`, where they are downloaded to, and facebook/dinov2-large.
      cache_dir: where downloaded weights are kept.

    Raises:
      UserError: no such extractor, protocol, file or name on the hub; a file that is damaged, a
        pickle or of other tensors; no network, or no torch, to download with.
    """
    if name not in PROTOCOLS:
        raise UserError(f"no extractor {name!r}: there are {', '.join(PROTOCOLS)}")
    protocol = protocol or PROTOCOLS[name][0]
    if protocol not in PROTOCOLS[name]:
        raise UserError(f"{name} has no protocol {protocol!r}, only {', '.join(PROTOCOLS[name])}")
    path = _find(name, weights, pathlib.Path(cache_dir))
    tensors = _read(path)
    try:
        network, params = _network(name, tensors)
    except ValueError as error:
        raise UserError(f"{path} does not hold the weights of {name}: {error}") from error
    digest = _digest(name, params)
    fingerprint = hashlib.blake2b(f"{name} {protocol} {digest}".encode(), digest_size=6).hexdigest()
    features = _Features(network, _PREPARE[name][protocol])
    apply = jax.tree_util.Partial(features, jax.tree.map(jnp.asarray, params))
    words = f"{_described(name, protocol, network)}, weights {digest}"
    outputs = jax.eval_shape(apply, jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8))
    widths = {part: leaf.shape[1] for part, leaf in outputs.items()}
    return Extractor(name, protocol, words, fingerprint, apply, widths)


_PREPARE: dict[str, dict[str, Callable]] = {
    "inception": inception.PROTOCOLS,
    "mobilenet": mobilenet.PROTOCOLS,
    "dinov2": dinov2.PROTOCOLS,
}
VITS = {384: "S", 768: "B", 1024: "L", 1536: "G"}  # width → size


def _described(name: str, protocol: str, network: nn.Module) -> str:
    """Network, resize and range, for a reader."""
    resize = RESIZES[protocol]
    if name == "inception":
        span = "x/127.5 − 1" if protocol == "pytorch" else "(x − 128)/128"
        return f"Inception v3 of 2015 (1008 classes), {resize} to {inception.SIDE}, {span}"
    if name == "mobilenet":
        return f"MobileNet v1 at width 0.75, {resize} to {mobilenet.SIZE}, x/127.5 − 1"
    width = getattr(network, "width", 0)
    size = f"ViT-{VITS[width]}/14" if width in VITS else f"of width {width}"
    return f"DINOv2 {size}, {resize} to {dinov2.SIZE}, ImageNet's mean and deviation"


@dataclasses.dataclass(frozen=True)
class _Features:
    """Params and pictures → features; equal, for `jit`, where network and protocol are."""

    network: nn.Module
    prepare: Callable

    def __call__(self, params: Any, pictures: Any) -> dict[str, jax.Array]:
        x = jnp.asarray(pictures)
        x = jnp.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
        features: Any = self.network.apply({"params": params}, self.prepare(x))
        return features


def _network(name: str, tensors: dict[str, np.ndarray]) -> tuple[nn.Module, dict]:
    if name == "dinov2":
        return dinov2.network_of(tensors), dinov2.params_of(tensors)
    if name == "mobilenet":
        return mobilenet.MobileNet(), mobilenet.params_of(tensors)
    return inception.Inception(), inception.params_of(tensors)


def _digest(name: str, params: dict) -> str:
    """12 hex digits of the parameters: the same for any file that holds the same numbers."""
    digest: Any = hashlib.blake2b(name.encode(), digest_size=6)
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32))
    return digest.hexdigest()


# Files


def _find(name: str, weights: str, cache_dir: pathlib.Path) -> pathlib.Path:
    """The file with the weights, downloaded where that can be done."""
    if not weights and name == "inception":
        return _inception_file(cache_dir)
    if not weights and name == "mobilenet":
        raise UserError("mobilenet needs --weights=FILE, Keras' MobileNet v1 0.75 as npz")
    path = pathlib.Path(weights or DINOV2).expanduser()
    if name == "dinov2" and path.is_dir():
        path /= DINOV2_FILE
    if name == "dinov2" and not path.exists():
        return _hub_file(weights or DINOV2)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: --weights takes a .safetensors or .npz file of {name}")
    return path


def _hub_file(name: str) -> pathlib.Path:
    """The weights of a name on the hub, from its cache or the network."""
    mend = f"give --weights a {DINOV2_FILE}, or a name on the hub such as {DINOV2}"
    a_file = name.endswith((*TABLES, *PICKLES))
    if a_file or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"{name} does not exist: {mend}")
    from huggingface_hub import hf_hub_download

    try:
        return pathlib.Path(hf_hub_download(name, DINOV2_FILE))
    except Exception as error:  # its own, of the network, of the cache
        raise UserError(f"{name}: not a file, nor from the hub ({_line(error)}): {mend}") from error


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file, floats as float32."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, and reading one runs what it says: convert it once with "
            f"`{CONVERTER} --file={path}` (needs torch)"
        )
    if path.suffix not in TABLES:
        raise UserError(f"{path}: weights are read from .safetensors or .npz")
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.numpy.load_file(path)
        else:
            check_packed(path)
            with np.load(path, allow_pickle=False) as file:
                tensors = {name: file[name] for name in file.files}
    except DAMAGE as error:
        raise UserError(f"{path} is cut short or damaged ({_line(error)}): fetch it again") from (
            error
        )
    return {name: a.astype(np.float32) if _floats(a) else a for name, a in tensors.items()}


def _floats(array: np.ndarray) -> bool:
    return array.dtype.name in FLOATS


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


# Inception's weights, downloaded and converted


def _inception_file(cache_dir: pathlib.Path) -> pathlib.Path:
    """The converted weights in the cache; process 0 of several fetches them for all."""
    path = cache_dir / INCEPTION_FILE
    if jax.process_count() > 1:
        try:
            if jax.process_index() == 0 and not path.exists():
                _fetch(path)
        finally:  # where it failed, the others find out by themselves
            multihost_utils.sync_global_devices("weights of Inception")
    if not path.exists():  # also on a host whose cache is its own
        _fetch(path)
    return path


def _fetch(path: pathlib.Path) -> None:
    """Downloads the .pth, and converts it to `path`."""
    mend = (
        f"fetch {URL} anywhere, run `{CONVERTER} --file=...pth --out=FILE.safetensors` where torch "
        "is, and give --weights=FILE.safetensors"
    )
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"no {path}, and no torch to make it (pip install torch): or {mend}")
    part = _beside(path, ".pth")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(part)
        if (found := checksum(part)) != SHA256:
            raise UserError(f"what came has sha256 {found[:12]}…, not {SHA256[:12]}…")
        convert(part, path)
    except (OSError, http.client.HTTPException, UserError) as error:
        raise UserError(f"no {path}, and fetching it failed ({_line(error)}): {mend}") from error
    finally:
        part.unlink(missing_ok=True)


def _download(to: pathlib.Path) -> None:
    with (
        urllib.request.urlopen(URL, timeout=60) as response,
        to.open("wb") as file,
        progress(0, MEGABYTES, "MB", "weights of Inception") as bar,
    ):
        while chunk := response.read(1_000_000):
            file.write(chunk)
            bar.update()


def checksum(path: pathlib.Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(source: pathlib.Path, to: pathlib.Path) -> None:
    """A .pth's tensors → .safetensors, same names; torch is told to read tensors only.

    Raises:
      UserError: no torch, no such file, or not a dict of tensors.
    """
    if not source.is_file():
        raise UserError(f"{source} does not exist: give the .pth, for example from {URL}")
    try:
        import torch
    except ImportError as error:
        raise UserError("a .pth is read with torch: pip install torch") from error
    try:
        state: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # its own, of zipfile, of pickle
        raise UserError(f"{source}: torch reads no tensors from it ({_line(error)})") from error
    named = isinstance(state, Mapping) and len(state) > 0
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{source} is not a dict of tensors by name, as a state_dict is")
    arrays = {name: _array(tensor) for name, tensor in state.items()}
    files.write(to, safetensors.numpy.save(arrays))  # save_file makes what only the owner reads


def _array(tensor: Any) -> np.ndarray:
    """A torch tensor as a contiguous array; numpy has no bfloat16 of its own."""
    floats = tensor.is_floating_point() and tensor.element_size() < 4
    return np.asarray((tensor.float() if floats else tensor).numpy(), order="C")


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """A name for what is being written, which no other process takes."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{suffix}")
