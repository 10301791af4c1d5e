"""Files of reference statistics: a mean and a covariance of features, and what they are of.

An `.npz` of plain arrays, as the field's tools exchange them. Names read:

- `mu` (d,), `sigma` (d, d): pytorch-fid, jax-flow, and with `mu_s`, `sigma_s` of the spatial
  features ADM's `guided-diffusion/evaluations` (its pictures, `arr_0`, are left alone);
- `ref_mu`, `ref_sigma`: MeanFlow's JAX code.

Ours are `mu`, `sigma`, `mu_s`, `sigma_s`, so that other tools read them, and `count`, `about`
(JSON) and `features`. The covariance divides by count − 1, as np.cov does.
"""

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils import files
from utils.cli import UserError
from utils.fid import FeatureStats, Gaussian, blocks
from utils.sources import check_packed

NAMES = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
SPATIAL = ("mu_s", "sigma_s")
_MAKE = "python prepare_data.py --statistics makes one"
_ROWS = 4096  # of the features, looked at together
_ASYMMETRY = 1e-4  # of the largest variance: more than float32 sums leave
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError)
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name and its extra field


class Statistics(NamedTuple):
    """What a file of statistics holds."""

    pool: Gaussian
    spatial: Gaussian | None  # of sFID; None: the file has none
    features: np.ndarray | None  # (rows, d) float32, a memory map; what KID and recall need
    # written_by, features (extractor's name), protocol, extractor (fingerprint), pictures (words),
    # pictures_fingerprint, image_size, count; empty: written by another tool.
    about: dict[str, Any]
    fingerprint: str  # 12 hex digits of the numbers, whatever the file is called


def read(path: str | os.PathLike) -> Statistics:
    """Reads a file of statistics, ours or one of the formats above.

    Raises:
      UserError: no such file, no `.npz` or a damaged one, pickled content, no mean and covariance,
        or arrays that cannot be such.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: give a file of statistics; {_MAKE}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no .npz file of statistics, or was cut short; {_MAKE}")
    try:
        check_packed(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _parsed(path, arrays)
    except (ValueError, TypeError, KeyError, EOFError, MemoryError, *_DAMAGED) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds pickled objects, which are not read: save mu and sigma as plain "
                "arrays, with np.savez"
            ) from error
        raise UserError(f"{path} cannot be read ({error}): fetch it or make it again") from error


def write(
    path: str | os.PathLike,
    pool: Gaussian | FeatureStats,
    spatial: Gaussian | FeatureStats | None = None,
    features: np.ndarray | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes statistics that `read` and other tools read; the file is there whole or not at all.

    Args:
      path: ends in .npz by custom; its folder is made.
      features: (rows, d); written from block to block, so that a memory map stays one.
      about: see `Statistics`; plain values. `count` is added.
    """
    arrays: dict[str, Any] = {"mu": pool.mean, "sigma": pool.cov, "count": np.int64(pool.count)}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
    arrays["about"] = np.array(json.dumps({"count": int(pool.count)} | dict(about or {})))
    with files.beside(path) as part:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        if features is not None:
            _append(part, features)


def _append(path: Path, features: np.ndarray) -> None:
    """Adds the features to an `.npz`, stored; np.savez would touch all of a memory map at once."""
    header = {"descr": "<f4", "fortran_order": False, "shape": features.shape}
    with (
        zipfile.ZipFile(path, "a") as archive,
        archive.open("features.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for rows in blocks(features, _ROWS):
            file.write(rows.astype("<f4").tobytes())


# Reading.


def _parsed(path: Path, arrays: Mapping[str, np.ndarray]) -> Statistics:
    names = next((pair for pair in NAMES if set(pair) <= set(arrays)), None)
    if names is None:
        there = ", ".join(arrays) or "nothing"
        raise UserError(f"{path} holds {there}, but no mu and sigma: no statistics; {_MAKE}")
    count = int(arrays["count"]) if "count" in arrays else 0
    pool = _gaussian(path, arrays, names, count)
    spatial = _gaussian(path, arrays, SPATIAL, count) if set(SPATIAL) <= set(arrays) else None
    features = _features(path, arrays, len(pool.mean)) if "features" in arrays else None
    about = json.loads(str(arrays["about"])) if "about" in arrays else {}
    if not isinstance(about, dict):
        raise ValueError("about is no JSON object")
    return Statistics(pool, spatial, features, about, _fingerprint(path, pool, spatial, features))


def _gaussian(
    path: Path, arrays: Mapping[str, np.ndarray], names: tuple[str, str], count: int
) -> Gaussian:
    mean, cov = (arrays[name] for name in names)
    mu, sigma = names
    if mean.ndim != 1 or not len(mean) or cov.shape != 2 * mean.shape:
        raise UserError(
            f"{path}: {mu} of shape {mean.shape} and {sigma} of shape {cov.shape} are no mean (d,) "
            f"and covariance (d, d); {_MAKE}"
        )
    if not all(np.issubdtype(a.dtype, np.floating) for a in (mean, cov)):
        raise UserError(f"{path}: {mu} and {sigma} are {mean.dtype} and {cov.dtype}, not floating")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(f"{path}: {mu} or {sigma} is not finite: fetch it or make it again")
    slack = _ASYMMETRY * np.abs(np.diagonal(cov)).max()
    if np.abs(cov - cov.T).max() > slack or np.diagonal(cov).min() < -slack:
        raise UserError(
            f"{path}: {sigma} is no covariance, not symmetric or with variances below 0: fetch it "
            "or make it again"
        )
    return Gaussian(mean, (cov + cov.T) / 2, count)


def _features(path: Path, arrays: Mapping[str, np.ndarray], dimension: int) -> np.ndarray:
    """The stored features, left in the file where they are stored as they are."""
    found = _mapped(path, "features.npy")
    features = arrays["features"] if found is None else found
    if features.ndim != 2 or features.shape[1] != dimension or features.dtype != np.float32:
        raise UserError(
            f"{path}: features of shape {features.shape} and {features.dtype} are not float32 "
            f"(rows, {dimension}), as mu is: make it again"
        )
    return features


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """A memory map of a zip's array; None where it is packed, empty, or in Fortran's order.

    Only the header in front of a member says where its bytes begin (APPNOTE.TXT, 4.3.7).
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            if info.compress_type != zipfile.ZIP_STORED or version != (1, 0):
                return None
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            begin = file.tell()
    if fortran or dtype.hasobject or 0 in shape:
        return None
    with path.open("rb") as raw:
        raw.seek(info.header_offset + _LOCAL_HEADER - 4)
        lengths = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + _LOCAL_HEADER + sum(lengths) + begin
    return np.memmap(path, dtype, "r", offset, shape)


def _fingerprint(
    path: Path, pool: Gaussian, spatial: Gaussian | None, features: np.ndarray | None
) -> str:
    """Of the numbers, in float64 and float32; looks whether the features are finite on the way."""
    digest = hashlib.sha256()
    for side in (pool, spatial):
        for array in () if side is None else (side.mean, side.cov):
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array, "<f8").tobytes())
    for rows in () if features is None else blocks(features, _ROWS):
        if not np.isfinite(rows).all():
            raise UserError(f"{path}: features are not finite: make it again")
        digest.update(rows.astype("<f4").tobytes())
    return digest.hexdigest()[:12]
