"""Finished pictures, as tools exchange them: a folder or .zip of files, or an .npz with arr_0.

The .npz is what guided-diffusion's evaluator reads and its sampling script writes (Dhariwal and
Nichol, arXiv:2105.05233, evaluations/README.md): `arr_0`, uint8 (n, H, W, 3), and perhaps labels
`arr_1`. Pictures are taken as they are: whoever made them has cropped and rounded them.
"""

import contextlib
import functools
import hashlib
import math
import os
import pathlib
import re
import secrets
import shutil
import struct
import types
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, NamedTuple, Self

import numpy as np
from PIL import Image

from utils import shards
from utils.cli import UserError
from utils.pictures import open_pictures
from utils.sources import (
    ArraySource,
    CorruptPicture,
    Pictures,
    PictureSource,
    Source,
    check_packed,
    fingerprint,
)

_MEMBER = "arr_0.npy"
# Level 1 writes 256 × 256 faces four times as fast as the usual 6, and files 5 % larger.
_PNG_LEVEL = 1
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of what follows


class Samples(NamedTuple):
    """Pictures of one size at random access."""

    source: Source  # 'x' uint8 (H, W, 3) in 0…255, grey repeated; every label is 0
    shape: tuple[int, int, int]  # (H, W, 3)
    words: str  # for a reader: how many, of which size, from where
    fingerprint: str  # 12 hexadecimal digits: of these pictures, wherever they lie


def open_samples(path: str | os.PathLike, size: int = 0) -> Samples:
    """Opens the pictures of a folder, a .zip or an .npz; all but deflated arrays stay on disk.

    Args:
      path: picture files of any names in a folder or a .zip; pictures that TFDS or prepare_data.py
        wrote; or an .npz whose `arr_0` is uint8 (n, H, W, 3), or (n, H, W, 1) for grey.
      size: 0: pictures as they are, which are all of the first one's size. Else: the side in pixels
        to which each file is cropped as by ADM, for photographs as a reference.

    Raises:
      UserError: there is nothing, it is damaged or of another kind or size; on access too, where
        one picture is. A stored array is not compared with its checksum.
    """
    place = pathlib.Path(path).expanduser()
    if not place.exists():
        raise UserError(
            f"{path} is not there: give a folder or .zip of pictures, or an .npz with arr_0"
        )
    if _is_npz(place):
        return _open_npz(place, size)
    pictures = _open_files(place)
    count = len(pictures.keys)
    size = size or pictures.size  # those of prepare_data.py are cropped, and known as the source's
    if size:
        pictures.check_size(size)
        source: Source = PictureSource(pictures, np.arange(count), size)
        shape, crop = (size, size, 3), f", {shards.CROP}"
        name = fingerprint(pictures.fingerprint, crop, str(size))
    else:
        first, _ = _told(pictures, 0)
        shape, crop, name = (first.height, first.width, 3), "", pictures.fingerprint
        source = _WholePictures(pictures, shape)
    if not shards.is_prepared(place):
        name = fingerprint(name, _contents(pictures))
    return Samples(source, shape, _words(count, shape, place) + crop, name)


def _contents(pictures: Pictures) -> str:
    """A digest of all files: others of the same names and sizes, as .bmp has, are other pictures.

    It reads all there is once, which takes a small part of the time that features take.
    """

    def digest(index: int) -> bytes:
        return hashlib.blake2b(pictures.read(index)[0], digest_size=16).digest()

    whole = b"".join(_threads().map(digest, range(len(pictures.keys))))
    return hashlib.blake2b(whole, digest_size=16).hexdigest()


def _words(count: int, shape: Sequence[int], place: pathlib.Path) -> str:
    return f"{count} pictures of {_size(shape)} pixels in {place}"


def _size(shape: Sequence[int]) -> str:
    """Width × height, as people say it, of an array's (H, W, …)."""
    return f"{shape[1]} × {shape[0]}"


# Picture files.


def _open_files(place: pathlib.Path) -> Pictures:
    """Lists pictures without regard to what their folders mean, which these labels do not."""
    if shards.is_prepared(place):
        pictures = shards.open_shards(place, shards.read_card(place).dataset_name)
    else:
        pictures = open_pictures(str(place), dataset_name="celebahq256")
    return pictures._replace(read=lambda index: (pictures.read(index)[0], 0), num_classes=0)


def _told(pictures: Pictures, index: int) -> tuple[Image.Image, int]:
    try:
        return pictures.picture(index)
    except CorruptPicture as error:
        raise CorruptPicture(f"{error}: make it again, or remove it") from error


@dataclass(frozen=True, eq=False)
class _WholePictures:
    """Pictures decoded to RGB each time they are asked for, all of one size."""

    pictures: Pictures
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.pictures.keys)

    def __getitem__(self, index: int) -> dict:
        picture, _ = _told(self.pictures, index)
        x = np.asarray(picture)
        if x.shape != self.shape:
            first = f"{self.pictures.name(0)} {_size(self.shape)}"
            raise UserError(
                f"{self.pictures.where}/{self.pictures.name(index)} has {_size(x.shape)} pixels, "
                f"{first}: give --image_size=SIZE to crop all of them to one size"
            )
        return {"x": x, "label": 0}

    def gather(
        self, indices: Sequence[int] | np.ndarray, mirrored: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        x = np.empty((len(indices), *self.shape), np.uint8)
        for row, item in enumerate(_threads().map(self.__getitem__, map(int, indices))):
            x[row] = item["x"]
        if mirrored is not None:
            x[mirrored] = x[mirrored, :, ::-1]
        return {"x": x, "label": np.zeros(len(indices), np.int32)}


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Pillow decodes and encodes without Python's lock."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="samples")


# The array of an .npz.


def _is_npz(place: pathlib.Path) -> bool:
    if place.is_dir():
        return False
    if place.suffix == ".npz":
        return True
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(place) as archive:
        return _MEMBER in archive.namelist()
    return False


def _open_npz(place: pathlib.Path, size: int) -> Samples:
    array, name = _read_array(place)
    dtype, dims = array.dtype, array.shape
    channels = dims[-1] if len(dims) == 4 else 0
    if dtype != np.uint8 or channels not in (1, 3) or 0 in dims:
        raise UserError(
            f"arr_0 of {place} is {dtype} {dims}: give pictures as uint8 (n, H, W, 3) with values "
            "0…255"
        )
    shape = (dims[1], dims[2], 3)
    if size and shape[:2] != (size, size):
        raise UserError(
            f"{place} holds pictures of {_size(shape)} pixels, not {size} × {size}: leave "
            "--image_size out, or give the picture files, which can be cropped"
        )
    source: Source = _StoredPictures(place, array) if isinstance(array, _Stored) else _held(array)
    return Samples(source, shape, _words(len(source), shape, place), name)


def _held(array: np.ndarray) -> ArraySource:
    """An array in memory as a source; of one channel, the view gives three on indexing."""
    x = np.broadcast_to(array, (*array.shape[:3], 3))
    return ArraySource(x, np.zeros(len(x), np.int32))


class _Stored(NamedTuple):
    """An array that lies in a file as it is, in C order."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class _StoredPictures:
    """Pictures read from their places in a file each time they are asked for.

    A memory map would do, but what was read through it counts as the process's memory.
    """

    place: pathlib.Path
    array: _Stored  # uint8 (n, H, W, 1 or 3)

    def __len__(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, index: int) -> dict:
        return {"x": self.gather([index])["x"][0], "label": 0}

    def gather(
        self, indices: Sequence[int] | np.ndarray, mirrored: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        x = np.empty((len(indices), *self.array.shape[1:]), np.uint8)
        bytes_each = math.prod(self.array.shape[1:])
        with self.place.open("rb", buffering=0) as file:
            for row, index in enumerate(np.arange(len(self))[np.asarray(indices, np.int64)]):
                file.seek(self.array.offset + int(index) * bytes_each)
                if file.readinto(x[row].data) != bytes_each:
                    raise UserError(f"{self.place} was cut short while it was read: make it again")
        if mirrored is not None:
            x[mirrored] = x[mirrored, :, ::-1]
        x = np.repeat(x, 3 // x.shape[-1], axis=-1)
        return {"x": x, "label": np.zeros(len(x), np.int32)}


def _read_array(place: pathlib.Path) -> tuple[np.ndarray | _Stored, str]:
    """The array `arr_0`, left in the file where it is stored as it is, and its fingerprint."""
    try:
        with zipfile.ZipFile(place) as archive:
            if _MEMBER not in archive.namelist():
                there = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise UserError(
                    f"{place} holds no pictures, arr_0, but {there or 'nothing'}: statistics can "
                    "only be the --reference"
                )
            info = archive.getinfo(_MEMBER)
            stored = _find(place, archive, info)
        if stored:
            array: np.ndarray | _Stored = stored
        else:
            check_packed(place)
            with np.load(place, allow_pickle=False) as arrays:
                array = arrays["arr_0"]
    except (
        *(ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError),
        MemoryError,  # of a header that claims more than there is
    ) as error:
        raise UserError(
            f"{place} cannot be read ({error}): fetch it or make it again, as np.savez writes it"
        ) from error
    return array, fingerprint(f"{_MEMBER} {info.CRC:08x} {info.file_size}")


def _find(place: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Stored | None:
    """Where the array of a member begins; None where it is packed, or in Fortran's order."""
    with archive.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(member) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    if fortran or dtype.hasobject:
        return None
    if info.file_size != header + math.prod(shape) * dtype.itemsize:
        raise ValueError("arr_0 is not as long as its header says")
    with place.open("rb") as file:
        file.seek(info.header_offset)
        _, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    offset = info.header_offset + _LOCAL_HEADER.size + sum(lengths) + header
    return _Stored(offset, shape, dtype)


# Writers.


class _Writer:
    """A context that takes `total` pictures in order and leaves all of them, or nothing.

    What is written lies beside its place under a hidden name, and is renamed at the end; of a
    killed process it stays there, and is removed by a writer to the same folder an hour later.
    """

    def __init__(self, path: str | os.PathLike, total: int) -> None:
        self.path, self.total, self.count = pathlib.Path(path).expanduser(), total, 0
        self._part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")

    def __enter__(self) -> Self:
        self._check_place()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shards.remove_leftovers(self.path.parent)
        try:
            self._open()
        except BaseException:
            self._discard()
            raise
        return self

    def add(self, pictures: np.ndarray) -> None:
        """Writes the next pictures, uint8 (n, H, W, C) in 0…255 with C 1 or 3; n may be 0.

        Raises:
          ValueError: another dtype or shape, or more than `total` in all.
          OSError: the disk is full.
        """
        pictures = np.asarray(pictures)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
            raise ValueError(f"{pictures.dtype} {pictures.shape} is not uint8 (n, H, W, 1 or 3)")
        if self.count + len(pictures) > self.total:
            raise ValueError(f"{self.count} + {len(pictures)} pictures are more than {self.total}")
        self._write(pictures)
        self.count += len(pictures)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            self._close()
            if kind is None and self.count != self.total:
                raise ValueError(f"{self.count} pictures of {self.total}: {self.path} is not made")
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _check_place(self) -> None:
        raise NotImplementedError

    def _open(self) -> None:
        raise NotImplementedError

    def _write(self, pictures: np.ndarray) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        """Ends the file, whole or not."""

    def _publish(self) -> None:
        self._part.replace(self.path)

    def _discard(self) -> None:
        """Removes what was not published."""
        self._part.unlink(missing_ok=True)


class PngFolder(_Writer):
    """Writes FOLDER/000000.png and so on; see `_Writer.add`. Grey pictures make grey files.

    A folder that holds nothing else than such files is replaced.

    Raises:
      UserError: on entering, where the folder holds other things.
      ValueError: on leaving, where fewer than `total` pictures were added; the folder is not made.
    """

    def _check_place(self) -> None:
        self.path = self.path.resolve()  # where it is a link, its target is replaced
        self._part = self.path.with_name(self._part.name)
        if not self.path.exists():
            return
        numbered = re.compile(r"\d{6,}\.png")
        if not self.path.is_dir() or not all(map(numbered.fullmatch, os.listdir(self.path))):
            raise UserError(
                f"{self.path} is there and not a folder of samples alone: name a new folder"
            )

    def _open(self) -> None:
        self._part.mkdir()

    def _write(self, pictures: np.ndarray) -> None:
        def save(item: tuple[int, np.ndarray]) -> None:
            index, x = item
            picture = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
            path = self._part / f"{index:06d}.png"
            picture.save(path, format="png", compress_level=_PNG_LEVEL)

        list(_threads().map(save, enumerate(pictures, self.count)))

    def _publish(self) -> None:
        old = self._part.with_suffix(".old.part")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(old)
        self._part.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _discard(self) -> None:
        shutil.rmtree(self._part, ignore_errors=True)


class NpzFile(_Writer):
    """Writes an .npz whose `arr_0` is uint8 (total, H, W, 3), a batch at a time; see `_Writer.add`.

    The array is stored, not deflated, as np.savez does; it is never in memory as a whole. Grey is
    repeated. A file that is there is replaced.

    Args:
      path: of the file.
      total: how many pictures it will hold.
      shape: (H, W, C) of each.

    Raises:
      UserError: on entering, where `path` is a folder.
      ValueError: on adding pictures of another shape; on leaving, where fewer than `total` pictures
        were added; the file is not made.
    """

    def __init__(self, path: str | os.PathLike, total: int, shape: tuple[int, int, int]) -> None:
        super().__init__(path, total)
        self.shape = shape
        self._member: IO[bytes] | None = None

    def _check_place(self) -> None:
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder: name a file, as {self.path}/samples.npz")

    def _open(self) -> None:
        self._archive = zipfile.ZipFile(self._part, "w")
        info = zipfile.ZipInfo(_MEMBER)  # without today's date: the same pictures, the same bytes
        self._member = self._archive.open(info, "w", force_zip64=True)
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
            "fortran_order": False,
            "shape": (self.total, *self.shape[:2], 3),
        }
        np.lib.format.write_array_header_1_0(self._member, header)

    def _write(self, pictures: np.ndarray) -> None:
        if pictures.shape[1:] != self.shape:
            raise ValueError(f"pictures are {pictures.shape[1:]}, not {self.shape}")
        assert self._member
        three = np.broadcast_to(pictures, (*pictures.shape[:3], 3))
        self._member.write(np.ascontiguousarray(three).data)

    def _close(self) -> None:
        if self._member:
            self._member.close()
        self._archive.close()
