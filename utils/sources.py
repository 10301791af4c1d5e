"""Random access to items, and where they lie: in memory, in a folder of pictures or in a .zip.

A `Source` has a length and gives item i as {'x', 'label'}; `gather` stacks many. `x` is a uint8
picture (H, W, C) in 0…255 or a float32 point (2,).
"""

import functools
import io
import os
import pathlib
import posixpath
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.cli import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Source(Protocol):
    """Items at random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """Item `index`: {'x': uint8 (H, W, C) or float32 (2,), 'label': int}."""

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Items stacked into fresh arrays: {'x': (n, …), 'label': int32 (n,)}; n may be 0."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Items in memory: `x` (n, …) and `label` (n,) int32."""

    x: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "label": int(self.label[index])}

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        return {"x": self.x[indices], "label": self.label[indices]}


class Tree(NamedTuple):
    """The picture files under a folder or in a .zip; hidden files and other kinds are left out."""

    where: str
    sizes: dict[str, int]  # name relative to the tree, with forward slashes → bytes
    read: Callable[[str], bytes]  # may be called from several threads

    def picture(self, name: str) -> Image.Image:
        """Decodes a file to RGB; its orientation tag is ignored, as by those who publish scores."""
        try:
            return Image.open(io.BytesIO(self.read(name))).convert("RGB")
        except Exception as error:  # Pillow's decoders and zlib raise errors of many kinds
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "its content is of no known kind" if unknown else error
            raise UserError(f"{self.where}/{name} is no readable picture: {reason}") from error


def open_tree(path: str | os.PathLike) -> Tree:
    """Lists the pictures of a folder or of a .zip, which is read in place.

    Raises:
      UserError: neither of the two, or without a picture.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        tree = _open_folder(path)
    elif path.is_file():
        tree = _open_zip(path)
    else:
        raise UserError(f"{path} is not there: give --data_dir=FOLDER_OR_ZIP of pictures")
    if not tree.sizes:
        raise UserError(f"{path} holds no pictures ({' '.join(sorted(SUFFIXES))}): see --data_dir")
    return tree


def _open_folder(root: pathlib.Path) -> Tree:
    sizes = {}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not _hidden(name)]
        prefix = pathlib.Path(folder).relative_to(root).as_posix()
        for file in filter(_is_picture, files):
            name = posixpath.normpath(f"{prefix}/{file}")
            sizes[name] = os.path.getsize(os.path.join(folder, file))
    return Tree(str(root), sizes, lambda name: (root / name).read_bytes())


def _open_zip(path: pathlib.Path) -> Tree:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no readable .zip ({error}): see --data_dir") from error
    lock = threading.Lock()  # ZipFile counts its open members without one

    def read(name: str) -> bytes:
        with lock:
            return archive.read(name)

    sizes = {file.filename: file.file_size for file in archive.infolist()}
    return Tree(str(path), {name: sizes[name] for name in sizes if _is_picture(name)}, read)


def _is_picture(name: str) -> bool:
    suffix = posixpath.splitext(name)[1].lower()
    return suffix in SUFFIXES and not any(_hidden(part) for part in name.split("/"))


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


@dataclass(frozen=True, eq=False)
class PictureSource:
    """Picture files, decoded to RGB and cropped to a square each time they are asked for.

    Raises:
      UserError: on access, where a file is no readable picture; it names the file.
    """

    tree: Tree
    names: Sequence[str]
    label: np.ndarray  # int32 (n,)
    size: int  # pixels of a side

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        return {"x": self._picture(index), "label": int(self.label[index])}

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        x = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for row, picture in zip(x, _threads().map(self._picture, indices), strict=True):
            row[...] = picture
        return {"x": x, "label": self.label[indices]}

    def _picture(self, index: int) -> np.ndarray:
        return np.asarray(centre_crop(self.tree.picture(self.names[index]), self.size))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Threads shared by all picture sources: Pillow decodes and resizes without Python's lock."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Returns the centre square of `picture`, resized to `size` pixels a side.

    The crop of ADM (Dhariwal and Nichol, arXiv:2105.05233, guided_diffusion/image_datasets.py), on
    which published ImageNet statistics rest: halved while twice too large, then bicubic.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
