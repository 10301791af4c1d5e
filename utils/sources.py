"""Random access to items: arrays in memory, and encoded pictures that are decoded when asked for.

A `Source` has a length and gives item i as {'x', 'label'}; `gather` stacks many. `x` is a uint8
picture (H, W, C) in 0…255 or a float32 point (2,). Where encoded pictures lie, `Pictures` hides:
`utils.pictures` opens folders and zips, `utils.tfds` what TensorFlow Datasets prepared.
"""

import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.cli import UserError


class Source(Protocol):
    """Items at random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """Item `index`: {'x': uint8 (H, W, C) or float32 (2,), 'label': int}."""

    def gather(
        self, indices: Sequence[int] | np.ndarray, mirrored: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Items stacked into fresh arrays: {'x': (n, …), 'label': int32 (n,)}; n may be 0.

        Where `mirrored`, bool (n,), is true, left and right of the picture change places.
        """


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Items in memory: `x` (n, …) and `label` (n,) int32."""

    x: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "label": int(self.label[index])}

    def gather(
        self, indices: Sequence[int] | np.ndarray, mirrored: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        x = self.x[indices]
        _mirror(x, mirrored)
        return {"x": x, "label": self.label[indices]}


def _mirror(x: np.ndarray, mirrored: np.ndarray | None) -> None:
    """Turns the chosen pictures of `x`, (n, H, W, C), left to right, in place."""
    if mirrored is not None:
        x[mirrored] = x[mirrored, :, ::-1]


LARGEST = 8192  # pixels of a side that pictures are cropped to: 200 MB each
# What is decoded, by its content. Pillow knows more kinds: of .eps it runs the program inside.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
PACKED = 100  # times its size that an archive of arrays may unpack to; noise and pictures reach 5
_ROOM = 2**26  # bytes that anything may unpack to


class Pictures(NamedTuple):
    """Encoded pictures at random access, wherever they lie."""

    where: str  # the folder or file, for messages
    keys: np.ndarray  # uint64 (n,): `key` of each name, which decides what is held out
    name: Callable[[int], str]  # for messages
    read: Callable[[int], tuple[bytes, int]]  # a file's content and label, from any thread
    num_classes: int  # 0: no labels, every label is 0
    fingerprint: str  # names exactly these pictures, before any split or crop
    size: int = 0  # pixels of a side that they are cropped to already; 0: they come as they are
    classes: tuple[str, ...] = ()  # their names; empty: not known, or no labels

    def check_size(self, size: int) -> None:
        """Raises UserError where they are cropped to another size already, or cannot be."""
        if size > LARGEST:
            raise UserError(f"--image_size={size}: pixels to crop pictures to, {LARGEST} at most")
        if self.size:
            check_size(self.where, self.size, size)

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """Picture `index` in RGB, of any size, and its label.

        Raises:
          CorruptPicture: it cannot be decoded.
          UserError: it cannot be read.
        """
        encoded, label = self.read(index)
        return decode(encoded, f"{self.where}/{self.name(index)}"), label


def check_size(where: str, prepared: int, asked: int) -> None:
    """Raises UserError where what was prepared at one size is asked for at another."""
    if prepared != asked:
        raise UserError(
            f"{where} was prepared at {prepared} pixels, not {asked}: "
            f"give --image_size={prepared}, or prepare it again"
        )


class CorruptPicture(UserError):
    """One picture of many cannot be decoded; the message names it."""


def decode(encoded: bytes, name: str) -> Image.Image:
    """Decodes a picture file to RGB; its orientation tag is ignored, as by published statistics.

    Raises:
      CorruptPicture: the content is no whole picture; `name` is what the message calls it.
    """
    try:
        return _rgb(Image.open(io.BytesIO(encoded), formats=FORMATS))
    except Exception as error:  # Pillow's decoders and zlib raise errors of many kinds
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its content is of no known kind" if unknown else error
        raise CorruptPicture(f"{name} is no readable picture: {reason}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    """Pillow's own conversion cuts what is above 255 off; grey of 16 bits is scaled here.

    Raises:
      ValueError: values of no known range, or a shape that has no centre square to speak of.
    """
    if max(picture.size) > 64 * min(picture.size):
        raise ValueError(f"{picture.width} × {picture.height} pixels have no centre to crop")
    if picture.mode == "F":
        raise ValueError("its values are floating-point, of unknown range")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    return picture.convert("RGB")


def key(name: str) -> int:
    """Returns a number in [0, 2**64) that is a function of the name alone (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest())


def fingerprint(*content: str | np.ndarray) -> str:
    """Returns 12 hexadecimal digits that name the content."""
    digest = hashlib.blake2b(digest_size=6)
    for part in content:
        if isinstance(part, str):  # perhaps a file's name, in which any bytes can stand
            digest.update(part.encode(errors="surrogateescape"))
        else:
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def check_packed(path: str | os.PathLike) -> None:
    """Looks at an .npz or .zip before it is unpacked.

    Raises:
      UserError: it is a zip bomb, of more than `PACKED` times its size.
      zipfile.BadZipFile, ValueError: it is no whole archive.
    """
    with zipfile.ZipFile(path) as archive:
        total = sum(info.file_size for info in archive.infolist())
    if total > max(_ROOM, PACKED * os.path.getsize(path)):
        raise UserError(
            f"{path} would unpack to {total / 1e9:.1f} GB from {os.path.getsize(path) / 1e6:.1f} "
            "MB, as no real data does: fetch it from somebody else"
        )


@dataclass(frozen=True, eq=False)
class PictureSource:
    """Some of the pictures, decoded to RGB and cropped to a square each time they are asked for.

    Raises:
      CorruptPicture: on access, where one cannot be decoded.
    """

    pictures: Pictures
    indices: np.ndarray  # int64 (n,), into `pictures`
    size: int  # pixels of a side

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        try:
            picture, label = self.pictures.picture(int(self.indices[index]))
        except CorruptPicture as error:
            raise CorruptPicture(
                f"{error}: remove it, or leave it out with prepare_data.py --autoencoder=none "
                "--skip_corrupt and train on what that writes"
            ) from error
        return {"x": np.asarray(centre_crop(picture, self.size)), "label": label}

    def gather(
        self, indices: Sequence[int] | np.ndarray, mirrored: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        x = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        label = np.empty(len(indices), np.int32)
        for row, item in enumerate(_threads().map(self.__getitem__, indices)):
            x[row], label[row] = item["x"], item["label"]
        _mirror(x, mirrored)
        return {"x": x, "label": label}


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
