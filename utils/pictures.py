"""Opens collections of encoded pictures: a folder, a .zip, or what TFDS or prepare_data.py made.

`open_pictures` tells the kinds apart. What the folders around picture files mean as labels, the
name of the data set decides.
"""

import os
import pathlib
import posixpath
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from utils import shards, tfds
from utils.classes import imagenet, readable
from utils.cli import UserError
from utils.sources import CorruptPicture, Pictures, fingerprint, key

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LARGEST_FILE = 2**28  # bytes of an encoded picture in a .zip
# What TFDS calls a data set of ours; the first that is there is taken.
TFDS_NAMES = {
    "imagenet256": ("imagenet2012",),
    "celebahq256": ("celebahq256", "celeb_a_hq/256"),
    "cifar10": ("cifar10",),
}


def open_pictures(
    source: str, *, dataset_name: str = "folder", data_dir: str = "", split: str = "train"
) -> Pictures:
    """Opens the encoded pictures of `source` without reading them.

    Args:
      source: a folder or a .zip of picture files; a folder that TFDS prepared (one version, the
        folder of a data set's versions, or of all data sets); or a TFDS name, as 'imagenet2012' or
        'celeb_a_hq/256', looked for under `data_dir`, by default $TFDS_DATA_DIR or
        ~/tensorflow_datasets; or pictures that prepare_data.py wrote. Empty: the TFDS names of
        `dataset_name`.
      dataset_name: 'folder', 'imagenet256', 'celebahq256' or 'cifar10': what the labels are.
      split: of a TFDS data set. Picture files have none but 'train'.

    Raises:
      UserError: there is no such thing, it holds no pictures, or it cannot be read.
    """
    names = TFDS_NAMES.get(dataset_name, ())
    path = pathlib.Path(source).expanduser() if source else None
    if path and shards.is_prepared(path):
        return shards.open_shards(path, dataset_name)
    if path and path.exists():
        version = _version_in(path, names)
    else:
        version = _version_of(source, names, data_dir, dataset_name)
    if version:
        return tfds.open_version(version, split, labelled=dataset_name != "celebahq256")
    assert path
    if split != "train":
        raise UserError(f"{path} has no split {split}: give the folder of that split instead")
    return _with_labels(_open_files(path), LABELS[dataset_name])


def _version_in(path: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """The TFDS data that is, or under one of `names` is in, a folder; None where there is none."""
    found = (tfds.find_name(name, path) for name in names)
    return next(filter(None, found), None) or tfds.find(path)


def _version_of(
    source: str, names: Sequence[str], data_dir: str, dataset_name: str
) -> pathlib.Path:
    """The TFDS data named `source`, or else of the first of `names` that is there."""
    place = tfds.root(data_dir)
    names = (source,) if source else names
    for version in (tfds.find_name(name, place) for name in names):
        if version:
            return version
    mend = "give a folder or .zip of pictures (--data_dir to train, --source to prepare)"
    for how in filter(None, (tfds.how_to_make(name, place) for name in names)):
        mend = f"{mend}; or {how}"
    if source:
        raise UserError(
            f"{source} is no folder, no .zip and no TFDS data set under {place}: {mend}"
        )
    missing = f"; {place} has no {' or '.join(names)}" if names else ""
    raise UserError(f"{dataset_name} needs a place{missing}: {mend}")


# Picture files.


class Files(NamedTuple):
    """The picture files under a folder or in a .zip; hidden files and other kinds are left out."""

    where: str
    sizes: dict[str, int]  # name relative to the folder or .zip, with forward slashes → bytes
    read: Callable[[str], bytes]  # may be called from several threads


def _open_files(path: pathlib.Path) -> Files:
    """Lists the pictures of a folder or of a .zip, which is read in place."""
    files = _open_folder(path) if path.is_dir() else _open_zip(path)
    if not files.sizes and path.is_dir() and (names := tfds.names_in(path)):
        raise UserError(f"{path} holds TFDS data: give one of {', '.join(names)} in it")
    if not files.sizes:
        raise UserError(f"{path} holds no pictures ({' '.join(sorted(SUFFIXES))})")
    return files


def _open_folder(root: pathlib.Path) -> Files:
    sizes = {}
    above: dict[str, frozenset[str]] = {}  # folder → where it and those around it really lie
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not _hidden(name)]
        real, around = os.path.realpath(folder), above.get(os.path.dirname(folder), frozenset())
        if real in around:
            raise UserError(f"{folder} is a link to a folder around it: remove that link")
        above[folder] = around | {real}
        prefix = pathlib.Path(folder).relative_to(root).as_posix()
        for file in filter(_is_picture, files):
            name = posixpath.normpath(f"{prefix}/{file}")
            sizes[name] = _size_of(os.path.join(folder, file))
    return Files(str(root), sizes, lambda name: (root / name).read_bytes())


def _size_of(path: str) -> int:
    """Bytes of a regular file; others, as a pipe or /dev/zero, may never end."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} is a link to nothing ({error.strerror}): remove it") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file: remove it")
    return status.st_size


def _open_zip(path: pathlib.Path) -> Files:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # of names, of numbers
        raise UserError(
            f"{path} is no whole .zip ({error}): give a folder or a .zip, or fetch it again"
        ) from error
    lock = threading.Lock()  # ZipFile counts its open members without one

    def read(name: str) -> bytes:
        if sizes[name] > LARGEST_FILE:
            size = f"{sizes[name] / 1e9:.1f} GB"
            raise CorruptPicture(f"{path}/{name} is no readable picture: it would unpack to {size}")
        if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path}/{name} is packed in a rare way: unpack the .zip")
        try:
            with lock:
                return archive.read(name)
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in a rare way
            raise UserError(f"{path}/{name} cannot be read ({error}): unpack the .zip") from error

    sizes = {file.filename: file.file_size for file in archive.infolist()}
    return Files(str(path), {name: sizes[name] for name in sizes if _is_picture(name)}, read)


def _is_picture(name: str) -> bool:
    suffix = posixpath.splitext(name)[1].lower()
    return suffix in SUFFIXES and not any(_hidden(part) for part in name.split("/"))


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


# Labels of picture files.

Labels = tuple[np.ndarray, tuple[str, ...]]  # int32 (n,), and the classes' names, none for none


def _with_labels(files: Files, law: Callable[[Sequence[str]], Labels]) -> Pictures:
    """Names pictures below the folders that all share, in sorted order, with labels by `law`."""
    paths = sorted(files.sizes)
    names = _below_common_folder(paths)
    labels, classes = law(names)

    def read(index: int) -> tuple[bytes, int]:
        try:
            return files.read(paths[index]), int(labels[index])
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:  # one member of an archive
            raise CorruptPicture(
                f"{files.where}/{paths[index]} is no readable picture: {error}"
            ) from error

    table = zip(names, (files.sizes[path] for path in paths), labels, strict=True)
    return Pictures(
        where=files.where,
        keys=np.array([key(name) for name in names], np.uint64),
        name=paths.__getitem__,
        read=read,
        num_classes=len(classes),
        fingerprint=fingerprint("\n".join(" ".join(map(str, row)) for row in table)),
        classes=readable(classes),
    )


def _below_common_folder(paths: Sequence[str]) -> list[str]:
    """Cuts the folders off that all files share, as around a folder put into a .zip."""
    paths = [path.lstrip("/") for path in paths]  # any name can stand in a .zip
    common = posixpath.commonpath({posixpath.dirname(path) for path in paths})
    return [path[len(common) :].lstrip("/") for path in paths]


def _labels_by_folder(names: Sequence[str]) -> Labels:
    """Classes are the sorted top folders; pictures without folders have no labels."""
    folders = _top_folders(names)
    classes = {folder: index for index, folder in enumerate(sorted(set(folders)))}
    if list(classes) == [""]:
        return _no_labels(names)
    if "" in classes:
        loose = names[folders.index("")]
        raise UserError(f"{loose} lies beside class folders: put it into one")
    if set(classes) <= {"train", "val", "valid", "validation", "test"}:
        raise UserError(f"the folder holds {' and '.join(classes)}: give one of these instead")
    return np.array([classes[folder] for folder in folders], np.int32), tuple(classes)


def _labels_of_imagenet(names: Sequence[str]) -> Labels:
    """Folders that are all numbers below 1000 are class indices, though some may be missing."""
    folders = _top_folders(names)
    if all(folder.isdecimal() and int(folder) < 1000 for folder in set(folders)):
        return np.array([int(folder) for folder in folders], np.int32), imagenet()
    return _labels_by_folder(names)


def _no_labels(names: Sequence[str]) -> Labels:
    """None, as for CelebA-HQ: what folders some copies have is not used."""
    return np.zeros(len(names), np.int32), ()


def _top_folders(names: Sequence[str]) -> list[str]:
    return [name.partition("/")[0] if "/" in name else "" for name in names]


LABELS: dict[str, Callable[[Sequence[str]], Labels]] = {
    "folder": _labels_by_folder,
    "cifar10": _labels_by_folder,
    "imagenet256": _labels_of_imagenet,
    "celebahq256": _no_labels,
}
