"""Folders that prepare_data.py writes: a card, shards of records, and an index over them.

`Card` says what a folder holds, `MomentsSource` reads an autoencoder's moments at random access,
`open_shards` gives back encoded pictures. Shards are ArrayRecord files with one record a group,
uncompressed: moments are noise to a compressor, and zstd saved 8 % and halved the speed.

Measured on 2 cores with the files in the page cache, 32 × 32 × 8 float16 (16.4 KB) at random in
batches of 256: 57,000 items a second from 5 shards of 4096 records, 48,000 from 313 shards of 64
and 58,000 from 1250 of 16, where hardly two items of a batch share a shard. One thread alone reads
68,000, but a cold or distant disk wants several; the library's own ArrayRecordDataSource, which
starts a pool of threads for every batch, reads 10,000 to 17,000. So the number of shards costs
nothing but open files, and `shard_size_for` keeps to 512.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import secrets
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from utils.cli import UserError
from utils.sources import Pictures

FORMAT = 1  # of the folder; a reader of another one refuses it
CROP = "ADM centre crop"
DTYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(jnp.bfloat16)}  # of moments
INDEX = np.dtype([("key", "<u8"), ("label", "<i4")])
AGAIN = "run the same prepare_data.py command again"

_PICTURE = struct.Struct("<Qi")  # key and label, before an encoded picture
_MOST_SHARDS, _SMALLEST_SHARD = 512, 64
_MANY_SHARDS = 10_000_000  # more than any folder holds
_AUTOENCODER = {"name", "fingerprint", "compute_dtype"}  # what a card says of it
_THREADS = 8
_STALE = 3600  # seconds without a write after which a temporary file is nobody's
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access


@dataclasses.dataclass(frozen=True)
class Card:
    """What a prepared folder holds, as card.json says it."""

    kind: str  # "moments" or "pictures"
    dataset_name: str  # what folders meant as labels: folder, imagenet256 or celebahq256
    source: dict[str, str]  # source, data_dir and split as they were given
    source_fingerprint: str
    source_count: int  # pictures that were to be prepared, of which some may be skipped
    num_classes: int  # 0: no labels
    image_size: int  # pixels of a side
    crop: str
    autoencoder: dict[str, str] | None  # name, fingerprint and compute_dtype
    dtype: str  # float16, bfloat16 or, of pictures, uint8
    shape: tuple[int, ...]  # (h, w, c) of one moments array or picture
    flipped: bool  # whether the mirrored picture's moments are there too
    shard_size: int  # pictures of the source that a shard stands for
    shards: int
    versions: dict[str, str]  # package → version
    complete: bool = False
    count: int = 0  # records; this and what follows is known once it is complete
    skipped: tuple[str, ...] = ()  # names of corrupt pictures that were left out
    skipped_keys: tuple[int, ...] = ()
    content: str = ""  # 12 hexadecimal digits of blake2b over all records in order
    mean: tuple[float, ...] = ()  # per channel, of the unscaled latents (the posterior's mean)
    std: tuple[float, ...] = ()
    classes: tuple[
        str, ...
    ] = ()  # their names; empty: not known, as in older folders, or no labels

    @property
    def record(self) -> np.dtype:
        """The packed record of moments; bfloat16 lies in it as it is."""
        sides = 2 if self.flipped else 1
        return np.dtype(
            [
                ("key", "<u8"),
                ("label", "<i4"),
                ("moments", DTYPES[self.dtype], (sides, *self.shape)),
            ]
        )

    def expected(self, shard: int) -> int:
        """How many pictures of the source shard number `shard` stands for."""
        return min(self.shard_size, self.source_count - shard * self.shard_size)


def shard_size_for(count: int) -> int:
    """Returns how many of `count` pictures go into a shard: a power of two, at most 512 shards.

    Small shards make what an interruption costs small; ImageNet's 1,281,167 pictures make 313.
    """
    return max(_SMALLEST_SHARD, 1 << math.ceil(math.log2(max(1, count / _MOST_SHARDS))))


def shard_path(folder: str | os.PathLike, card: Card, shard: int) -> pathlib.Path:
    """Where shard number `shard` lies."""
    return pathlib.Path(folder) / f"shard-{shard:05d}-of-{card.shards:05d}.array_record"


def missing_shards(folder: str | os.PathLike, card: Card) -> list[int]:
    """The numbers of the shards that are not there yet."""
    there = set(os.listdir(folder))
    return [k for k in range(card.shards) if shard_path(folder, card, k).name not in there]


# The card and the index.


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether `folder` is one that prepare_data.py wrote, or is writing."""
    return bool(folder) and (pathlib.Path(folder).expanduser() / "card.json").is_file()


def read_card(folder: str | os.PathLike, complete: bool = True) -> Card:
    """Reads OUT/card.json.

    Args:
      folder: what prepare_data.py wrote.
      complete: whether an unfinished folder is refused.

    Raises:
      UserError: no card, one of another format, or an unfinished folder.
    """
    path = pathlib.Path(folder).expanduser() / "card.json"
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        if fields.pop("format", FORMAT) != FORMAT:
            raise UserError(f"{path} is of another format: prepare the data anew into a new folder")
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        card = Card(**fields)
        _check_card(card)
    except FileNotFoundError as error:
        lacks = f"has no {path.name}" if path.parent.is_dir() else "is not there"
        raise UserError(
            f"{folder} {lacks}: give a folder that prepare_data.py --out=FOLDER wrote"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no card of prepare_data.py ({error}): give a folder that it wrote"
        ) from error
    if complete and not card.complete:
        there = card.shards - len(missing_shards(path.parent, card))
        raise UserError(
            f"{folder} is unfinished: {there} of {card.shards} shards are there: {AGAIN}, "
            "without --share or with each share"
        )
    return card


def _check_card(card: Card) -> None:
    """Raises ValueError where a card says what prepare_data.py would not: anybody can write one."""
    words: tuple = (card.dataset_name, card.source_fingerprint, card.crop, card.content)
    words += card.classes
    pairs = [card.source, card.versions, card.autoencoder or {}]
    words += tuple(word for pair in pairs for item in pair.items() for word in item)
    counts = (card.source_count, card.num_classes, card.count, *card.skipped_keys)
    sizes = (card.image_size, card.shard_size, *card.shape)
    right = {
        "kind": card.kind in ("moments", "pictures"),
        "dtype": card.dtype in (DTYPES if card.kind == "moments" else ("uint8",)),
        "source": set(card.source) == {"source", "data_dir", "split"},
        "autoencoder": set(card.autoencoder or _AUTOENCODER) >= _AUTOENCODER,
        "shape": len(card.shape) == 3 and math.prod(card.shape) < 2**31,
        "words": all(isinstance(word, str) for word in (*words, *card.skipped)),
        "counts": all(type(n) is int and 0 <= n < 2**64 for n in counts),
        "sizes": all(type(n) is int and 0 < n < 2**31 for n in sizes),
        "shards": 0 <= card.shards < _MANY_SHARDS
        and 0 <= card.shards * card.shard_size - card.source_count < max(card.shard_size, 1),
        "flags": {type(card.flipped), type(card.complete)} == {bool},
        "classes": len(card.classes) in (0, card.num_classes),
    }
    for what, holds in right.items():
        if not holds:
            raise ValueError(f"its {what} cannot be")


def write_card(folder: str | os.PathLike, card: Card) -> None:
    """Writes OUT/card.json; an older one is replaced at once."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(card)}, indent=2, ensure_ascii=False)
    with _beside(pathlib.Path(folder) / "card.json") as part:
        # Bytes in a name that are no text are escaped, as JSON reads them.
        part.write_text(text + "\n", errors="backslashreplace")


def write_index(folder: str | os.PathLike, index: np.ndarray) -> None:
    """Writes OUT/index.npy, `INDEX` (n,): key and label of all records in order."""
    with _beside(pathlib.Path(folder) / "index.npy") as part, part.open("wb") as file:
        np.save(file, index.astype(INDEX))


def _read_index(folder: pathlib.Path, card: Card) -> np.ndarray:
    try:
        index = np.load(folder / "index.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # of a header that claims more
        raise UserError(f"{folder}/index.npy cannot be read ({error}): {AGAIN}") from error
    array = isinstance(index, np.ndarray)  # and no archive of several
    if not array or index.dtype != INDEX or index.shape != (card.count,):
        raise UserError(f"{folder}/index.npy is not the card's: {AGAIN}")
    labels = index["label"]
    if len(index) and not 0 <= labels.min() <= labels.max() < max(card.num_classes, 1):
        raise UserError(f"{folder}/index.npy has labels that its card has not: {AGAIN}")
    return index


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary name beside `path`, renamed to it where all went well."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    try:
        part.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else another process wrote the same, and tidied up
            raise


def remove_leftovers(folder: str | os.PathLike, older_than: float = _STALE) -> None:
    """Removes temporary files of killed processes: those not written to for so many seconds."""
    for path in pathlib.Path(folder).glob(".*.part"):
        try:
            if time.time() - path.stat().st_mtime <= older_than:
                continue
            if path.is_dir():  # of an autoencoder
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except FileNotFoundError:  # renamed or removed by another process
            continue


# Writing and reading a shard.


def pack(record: np.dtype, key: np.ndarray, label: np.ndarray, moments: np.ndarray) -> list[bytes]:
    """Makes records of `Card.record` from key (n,), label (n,) and moments (n, sides, h, w, c)."""
    rows = np.empty(len(key), record)
    rows["key"], rows["label"], rows["moments"] = key, label, moments
    return [row.tobytes() for row in rows]


def pack_picture(key: int, label: int, encoded: bytes) -> bytes:
    """Makes the record of one encoded picture."""
    return _PICTURE.pack(key, label) + encoded


def heads(records: Sequence[bytes]) -> np.ndarray:
    """Key and label of records of either kind, `INDEX` (n,)."""
    return np.frombuffer(b"".join(record[: INDEX.itemsize] for record in records), INDEX)


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """Writes a shard under a temporary name and renames it: it is there whole or not at all.

    Raises:
      UserError: it cannot be written, as where the disk is full.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with _beside(path) as part:
        with _told(path):
            writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        for record in records:
            with _told(path):
                writer.write(record)
        with _told(path):  # the last buffer is written here, and errors of all others told
            writer.close()


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # the library's errors are RuntimeErrors
        reason = str(error).partition(";")[0]
        raise UserError(
            f"{path} cannot be written ({reason}): what is finished stays; mend it and {AGAIN}"
        ) from error


class Shard:
    """One shard at random access; may be read from several threads.

    Raises:
      UserError: the file is missing or damaged; records are checked against their hashes.
    """

    def __init__(self, path: pathlib.Path):
        from array_record.python.array_record_module import ArrayRecordReader

        self.path = path
        if not path.is_file():
            raise UserError(f"{path} is missing: {AGAIN}")
        try:
            self._reader = ArrayRecordReader(str(path), options=_OPTIONS)
        except RuntimeError as error:
            raise self._damaged(str(error)) from error
        if not self._reader.ok():
            raise self._damaged("no whole ArrayRecord file")

    def __len__(self) -> int:
        return self._reader.num_records()

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The records at `indices`."""
        try:
            return self._reader.read(list(indices))
        except RuntimeError as error:
            raise self._damaged(str(error).partition(";")[0]) from error

    def chunks(self, size: int = 256) -> Iterator[list[bytes]]:
        """All records in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(range(start, min(start + size, len(self))))

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is damaged ({reason}): delete it and {AGAIN}")


class _Records:
    """All records of a complete folder, by their place in the index."""

    def __init__(self, folder: pathlib.Path, card: Card):
        _allow_open_files(card.shards)
        paths = [shard_path(folder, card, k) for k in range(card.shards)]
        self.shards = list(_threads().map(Shard, paths))
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        if (count := int(self.ends[-1])) != card.count:
            raise UserError(
                f"{folder} has {count} records where its card says {card.count}: {AGAIN}"
            )

    def read(self, indices: np.ndarray) -> list[bytes]:
        """The records at `indices`, which ascend."""
        parts = [part for part in np.array_split(indices, _THREADS) if len(part)]
        return [record for part in _threads().map(self._read, parts) for record in part]

    def _read(self, indices: np.ndarray) -> list[bytes]:
        shards = np.searchsorted(self.ends, indices, side="right")
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(indices)]
        records: list[bytes] = []
        for start, end in itertools.pairwise(bounds):
            shard = self.shards[shards[start]]
            first = self.ends[shards[start]] - len(shard)
            records += shard.read((indices[start:end] - first).tolist())
        return records


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Threads shared by all readers: a disk over the network answers late, but to many at once."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")


def _allow_open_files(shards: int) -> None:
    """Raises the soft limit of open files, often 256 or 1024, to what the shards need."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(f"{shards} shards need `ulimit -n` {wanted}, which is {hard} here")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# What training reads.


class MomentsSource:
    """A Source over a complete folder of moments, at random access from disk.

    Items are {'x': (h, w, c) float16 or bfloat16, what `Autoencoder.moments` gave, 'label': int}.
    May be read from several threads.

    Attributes:
      card: the folder's card.
      keys: uint64 (n,), blake2b-64 of the picture's name. label: int32 (n,).

    Raises:
      UserError: no such folder, an unfinished one, one of pictures, or, on access too, a damaged
        shard.
    """

    def __init__(self, folder: str | os.PathLike, indices: np.ndarray | None = None):
        """Opens the folder; `indices` int64 (m,) leaves only these records, in this order."""
        self.folder = pathlib.Path(folder).expanduser()
        self.card = read_card(self.folder)
        if self.card.kind != "moments":
            raise UserError(f"{folder} holds pictures, not latents: train with --use_stable_vae=0")
        index = _read_index(self.folder, self.card)
        self._records = _Records(self.folder, self.card)
        self._take(index, np.arange(len(index)) if indices is None else indices)

    def _take(self, index: np.ndarray, rows: np.ndarray) -> None:
        self._index, self._rows = index, np.asarray(rows, np.int64)
        self.keys = index["key"][self._rows].astype(np.uint64)
        self.label = index["label"][self._rows].astype(np.int32)

    def subset(self, indices: np.ndarray) -> "MomentsSource":
        """The items at `indices`, over the same open files."""
        part = object.__new__(MomentsSource)
        part.folder, part.card, part._records = self.folder, self.card, self._records
        part._take(self._index, self._rows[indices])
        return part

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sides(self) -> int:
        """2 where `gather` can give mirrored items, else 1."""
        return 2 if self.card.flipped else 1

    def __getitem__(self, index: int) -> dict:
        item = self.gather([index])
        return {"x": item["x"][0], "label": int(item["label"][0])}

    def gather(
        self, indices: Sequence[int] | np.ndarray, mirrored: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Items stacked: {'x': (n, h, w, c) float16 or bfloat16, 'label': int32 (n,)}.

        Args:
          indices: (n,), which; n may be 0.
          mirrored: bool (n,), whose mirrored picture's moments are meant; None: of none.

        Raises:
          UserError: a damaged shard, or mirrored ones asked for and not there.
        """
        if mirrored is not None and not self.card.flipped:
            raise UserError(
                f"{self.folder} has no mirrored moments: prepare it with --flip, or train with "
                "--flip=False"
            )
        rows = self._rows[np.asarray(indices, np.int64)]
        order = np.argsort(rows, kind="stable")
        read = self._records.read(rows[order])
        if any(len(record) != self.card.record.itemsize for record in read):
            raise UserError(f"{self.folder} has records of another length than its card: {AGAIN}")
        records = np.frombuffer(b"".join(read), self.card.record)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        side = 0 if mirrored is None else np.asarray(mirrored).astype(np.int64)
        return {
            "x": records["moments"][place, side],
            "label": records["label"][place].astype(np.int32),
        }


def check_name(folder: str | os.PathLike, card: Card, dataset_name: str) -> None:
    """Raises UserError where labels were read as another data set's."""
    if card.dataset_name != dataset_name:
        raise UserError(
            f"{folder} was prepared with --dataset_name={card.dataset_name}, which decides its "
            f"labels: prepare it with --dataset_name={dataset_name}, or train with "
            f"--dataset_name={card.dataset_name}"
        )


def open_shards(folder: str | os.PathLike, dataset_name: str) -> Pictures:
    """Gives back the encoded pictures of a folder that was prepared with --autoencoder=none.

    Raises:
      UserError: no such folder, an unfinished one, one of moments, or, on access too, a damaged
        shard.
    """
    folder = pathlib.Path(folder).expanduser()
    card = read_card(folder)
    if card.kind != "pictures":
        raise UserError(
            f"{folder} holds an autoencoder's moments, not pictures: give the pictures' folder, or "
            "train on it with --use_stable_vae=1"
        )
    check_name(folder, card, dataset_name)
    index, records = _read_index(folder, card), _Records(folder, card)

    def read(item: int) -> tuple[bytes, int]:
        (record,) = records.read(np.array([item]))
        if len(record) < _PICTURE.size:
            raise UserError(f"{folder} has a record that is no picture, item {item}: {AGAIN}")
        return record[_PICTURE.size :], _PICTURE.unpack_from(record)[1]

    return Pictures(
        where=str(folder),
        keys=index["key"].astype(np.uint64),
        name=functools.partial("item {}".format),
        read=read,
        num_classes=card.num_classes,
        fingerprint=card.source_fingerprint,  # at this size they are the source's pictures
        size=card.image_size,
        classes=card.classes,
    )
