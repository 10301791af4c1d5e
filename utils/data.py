"""Data sets, and endless host-local batches of them.

`load` gives the training part and the held-out part of the data set a config names; the split is
fixed and knows no seed. `batches` gives batch number `step` as a function of (seed, step), for any
number of hosts. New data set: a function config → Dataset in `LOADERS`.
"""

import difflib
import functools
import importlib.util
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from utils import shards, tfds
from utils.cli import UserError
from utils.pictures import open_pictures
from utils.sources import (
    ArraySource,
    Pictures,
    PictureSource,
    Source,
    check_packed,
    check_size,
    fingerprint,
)
from utils.toys import TOYS

_DAMAGE = (OSError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error)  # what damage raises
_ORDER, _FLIP = 1, 2  # set the random streams of one seed apart
_TOY_POINTS, _TOY_HELDOUT, _TOY_VERSION = 100_000, 20_000, 1


class Dataset(NamedTuple):
    """What there is to train on, and what is kept from it."""

    name: str
    train: Source
    heldout: Source  # not trained on; may be empty
    num_classes: int  # 0: no labels; those that items may have mean nothing
    shape: tuple[
        int, ...
    ]  # (H, W, C), uint8; (2,), float32; or what the autoencoder's moments have
    fingerprint: str  # names exactly this data and split, the same on every machine
    autoencoder: str = ""  # fingerprint of what made these moments; empty: no moments
    origin: dict | None = None  # of moments: what `load_pictures` needs to find their pictures
    classes: tuple[str, ...] = ()  # their names; empty: not known, or no labels

    @property
    def identity(self) -> str:
        """Name and fingerprint, as a run's card records them."""
        return f"{self.name} {self.fingerprint}"


def load(config: ConfigDict) -> Dataset:
    """Returns the data set `config.dataset_name`, by data_dir, image_size and holdout.

    Raises:
      UserError: an unknown name, or data that is missing, unreadable or of another size.
    """
    name = config.dataset_name
    if name not in LOADERS:
        near = difflib.get_close_matches(name, LOADERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LOADERS)}"
        raise UserError(f"unknown dataset_name {name!r}: {hint}")
    if not 0 <= config.holdout < 1:
        raise UserError(f"holdout is a share in [0, 1), not {config.holdout}: give --holdout=0.1")
    return _latents(config) if config.use_stable_vae else LOADERS[name](config)


def load_pictures(config: ConfigDict, origin: dict | None, data_dir: str = "") -> Dataset:
    """Returns the pictures that samples of a run are compared with, split as the run's data was.

    Args:
      config: the run's.
      origin: of a run on latents, `Dataset.origin`; None: it was trained on pictures or points.
      data_dir: where they lie now; empty: where they were.

    Raises:
      UserError: as `load`.
    """
    if origin:
        source = {**origin["source"], **({"source": data_dir} if data_dir else {})}
        pictures = open_pictures(**source, dataset_name=config.dataset_name)
        left_out = np.isin(pictures.keys, np.array(origin["skipped"], np.uint64))
        kept = np.flatnonzero(~left_out & (np.arange(len(left_out)) < origin["count"]))
        return _of_pictures(config, pictures, kept, origin["image_size"])
    if data_dir:
        config = config.copy_and_resolve_references()
        config.data_dir = data_dir
    return load(config)


# Batches.


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    flip: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields host-local batches for ever, from batch number `start_step` on.

    Each epoch has every item once, in an order of its own; a batch may reach over the end of one.
    Batch `step` is a function of (seed, step), so that resuming needs the step alone. Host h of H,
    `shard=(h, H)`, gets the h-th of H equal runs of places in the global batch.

    Returns:
      An iterator of {'x': (batch_size // H, …), 'label': int32, 'position': int32, the place in the
      global batch}. With `flip`, half of the pictures are mirrored left to right.

    Raises:
      UserError: no items, a negative seed, points to flip, or hosts that do not divide the batch.
    """
    import grain  # here, so that evaluation does without it

    check(source, batch_size=batch_size, seed=seed, flip=flip, hosts=shard[1])

    def batch(step: int) -> dict[str, np.ndarray]:
        local = batch_size // shard[1]
        positions = np.arange(shard[0] * local, (shard[0] + 1) * local)
        mirrored = None
        if flip:
            coins = np.random.default_rng((seed, _FLIP, step)).random(batch_size)
            mirrored = coins[positions] < 0.5
        items = source.gather(_order(len(source), batch_size, seed, step)[positions], mirrored)
        return {**items, "position": positions.astype(np.int32)}

    # Whole batches are grain's items: single ones cost it some 40 µs each under Python's lock, a
    # step's time for small pictures. One thread fetches ahead; pictures are decoded by more.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    iterator = iter(grain.MapDataset.range(sys.maxsize).map(batch).to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def check(source: Source, *, batch_size: int, seed: int, flip: bool, hosts: int = 1) -> None:
    """Raises UserError where `batches` of these options cannot be made."""
    if not len(source):
        raise UserError("no items to make batches of: see --data_dir and --holdout")
    if batch_size < 1 or batch_size % hosts:
        near = max(1, round(batch_size / hosts)) * hosts
        raise UserError(
            f"batch_size {batch_size} cannot be shared by {hosts} hosts: give --batch_size={near}"
        )
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give --seed=0 or above")
    if flip and source[0]["x"].ndim != 3:
        raise UserError("points have no left and right: give --flip=False")
    if flip:
        source.gather([0], np.ones(1, bool))  # moments without the mirrored side say so


def _order(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns which of the `n` items make global batch `step`."""
    epoch, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    return np.concatenate([_permutation(n, seed, e)[place[epoch == e]] for e in np.unique(epoch)])


@functools.lru_cache(maxsize=4)  # all steps of an epoch share it
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, int(epoch))).permutation(n)


# For evaluation.


def arrays(source: Source, indices: Sequence[int] | np.ndarray | None = None) -> dict:
    """Stacks the items at `indices`, by default all: {'x': (n, …), 'label': int32 (n,)}."""
    return source.gather(range(len(source)) if indices is None else indices)


def chunks(source: Source, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields all items in order, stacked `size` at a time; the last chunk may be smaller."""
    for start in range(0, len(source), size):
        yield source.gather(range(start, min(start + size, len(source))))


# Data sets in memory.

Arrays = tuple[np.ndarray, np.ndarray]  # x (n, …), label (n,)


def _digits(config: ConfigDict) -> Dataset:
    """1797 digits of 8 × 8 pixels, which come with scikit-learn.

    As its `load_digits` reads them, but to import scikit-learn for it would take seconds.
    """
    package = pathlib.Path(str(importlib.util.find_spec("sklearn").origin)).parent  # type: ignore[union-attr]
    rows = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    x = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    target = rows[:, -1].astype(np.int64)
    _as_it_is(config, x)
    # RandomState: its stream is frozen for good, so that no NumPy changes the split.
    order = np.random.RandomState(0).permutation(len(x))
    held = round(config.holdout * len(x))
    heldout, train = np.sort(order[:held]), np.sort(order[held:])
    return _in_memory("digits", (x[train], target[train]), (x[heldout], target[heldout]), 10)


def _mnist(config: ConfigDict) -> Dataset:
    """MNIST; its test split is held out."""
    folder, file = _mnist_places(config.data_dir)
    train, test = _mnist_npz(file) if file.is_file() else _mnist_tfds(folder)
    _as_it_is(config, train[0])
    return _in_memory("mnist", train, test, 10)


def _mnist_places(data_dir: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the TFDS folder and the .npz file to look for, of which the file is preferred."""
    if data_dir:
        place = pathlib.Path(data_dir).expanduser()
        return place, place if place.is_file() else place / "mnist.npz"
    return tfds.root(), pathlib.Path("data/mnist.npz")


def _mnist_npz(file: pathlib.Path) -> list[Arrays]:
    names = [f"{split}_{part}" for split in ("train", "test") for part in ("images", "labels")]
    keras = ["x_train", "y_train", "x_test", "y_test"]
    try:
        check_packed(file)
        with np.load(file, allow_pickle=False) as data:
            x, y, x_test, y_test = (data[k] for k in (names if names[0] in data else keras))
    except (*_DAMAGE, KeyError, TypeError) as error:
        wanted = ", ".join(names)
        raise UserError(f"{file} is no .npz with {wanted} ({error}): see --data_dir") from error
    return [(x.reshape(-1, 28, 28, 1), y), (x_test.reshape(-1, 28, 28, 1), y_test)]


def _mnist_tfds(folder: pathlib.Path) -> list[Arrays]:
    """Reads MNIST as TFDS prepared it, without TensorFlow."""
    version = tfds.find_name("mnist", folder)
    if not version:
        raise UserError(
            f"no MNIST in {folder}: give --data_dir=mnist.npz (train_images, train_labels, "
            "test_images, test_labels) or a TFDS folder with mnist as array_record"
        )
    splits = [tfds.open_records(version, split, decode=True)[1] for split in ("train", "test")]
    items = [split.__getitems__(range(len(split))) for split in splits]
    return [
        (np.stack([i["image"] for i in split]), np.array([i["label"] for i in split]))
        for split in items
    ]


def _in_memory(name: str, train: Arrays, heldout: Arrays, num_classes: int) -> Dataset:
    kept, held = (
        ArraySource(np.ascontiguousarray(x, np.uint8), np.asarray(label, np.int32))
        for x, label in (train, heldout)
    )
    content = [part for s in (kept, held) for part in (str(s.x.shape), s.x, s.label)]
    return Dataset(
        name,
        kept,
        held,
        num_classes,
        kept.x.shape[1:],
        fingerprint(*content),
        classes=tuple(map(str, range(num_classes))),
    )


def _toy(config: ConfigDict) -> Dataset:
    name = config.dataset_name
    if config.image_size:
        raise UserError(f"{name} has points, not pictures: leave --image_size=0")

    def points(seed: int, n: int) -> ArraySource:
        x = TOYS[name](np.random.default_rng(seed), n)
        return ArraySource(x, np.zeros(n, np.int32))

    # Named by recipe: sine and cosine differ between machines in the last bit.
    recipe = f"{name} {_TOY_POINTS} {_TOY_HELDOUT} version {_TOY_VERSION}"
    train, heldout = points(0, _TOY_POINTS), points(1, _TOY_HELDOUT)
    return Dataset(name, train, heldout, 0, (2,), fingerprint(recipe))


def _as_it_is(config: ConfigDict, x: np.ndarray) -> None:
    if config.image_size not in (0, x.shape[1]):
        name, side = config.dataset_name, x.shape[1]
        raise UserError(f"{name} is {side} × {side} pixels: give --image_size={side} or leave it")


# Encoded pictures.


def _folder(config: ConfigDict) -> Dataset:
    """Pictures of any kind and size; without image_size, of the first one's."""
    return _pictures(config, config.image_size)


def _cifar10(config: ConfigDict) -> Dataset:
    """CIFAR-10's training split, or pictures of its size."""
    return _pictures(config, config.image_size or 32)


def _at_256(config: ConfigDict) -> Dataset:
    """ImageNet or CelebA-HQ, at 256 × 256 pixels unless image_size says otherwise."""
    return _pictures(config, config.image_size or 256)


def _pictures(config: ConfigDict, size: int) -> Dataset:
    """What `open_pictures` finds in data_dir."""
    pictures = open_pictures(config.data_dir, dataset_name=config.dataset_name)
    size = size or pictures.size or _side(pictures)
    return _of_pictures(config, pictures, np.arange(len(pictures.keys)), size)


def _of_pictures(config: ConfigDict, pictures: Pictures, kept: np.ndarray, size: int) -> Dataset:
    """The pictures `kept`, held out by a hash of names: new pictures move no old one."""
    pictures.check_size(size)
    keys = pictures.keys[kept]
    held = _held(keys, config.holdout)
    return Dataset(
        config.dataset_name,
        PictureSource(pictures, kept[~held], size),
        PictureSource(pictures, kept[held], size),
        pictures.num_classes,
        (size, size, 3),
        _fingerprint(pictures.fingerprint, keys, size, config.holdout),
        classes=pictures.classes,
    )


def _fingerprint(pictures: str, keys: np.ndarray, size: int, holdout: float) -> str:
    """Names pictures of a source, whether they lie there as files, as shards or as latents."""
    return fingerprint(pictures, keys.astype("<u8"), f"{size} {float(holdout)}")


def _held(keys: np.ndarray, holdout: float) -> np.ndarray:
    return keys / 2.0**64 < holdout


def _side(pictures: Pictures) -> int:
    width, height = pictures.picture(0)[0].size
    if width != height:
        raise UserError(
            f"{pictures.name(0)} is {width} × {height} pixels: give --image_size=SIDE to crop to"
        )
    return width


# What prepare_data.py wrote.


def _latents(config: ConfigDict) -> Dataset:
    """An autoencoder's moments, split as their pictures are.

    Raises:
      UserError: data_dir holds none, or others.
    """
    if not config.data_dir or not shards.is_prepared(config.data_dir):
        lacks = f"{config.data_dir} holds no latents" if config.data_dir else "no --data_dir given"
        raise UserError(
            f"{lacks}: write latents with prepare_data.py --source=... --autoencoder=... "
            "--out=FOLDER and give --data_dir=FOLDER, or train on pixels with --use_stable_vae=0"
        )
    source = shards.MomentsSource(config.data_dir)
    card = source.card
    shards.check_name(config.data_dir, card, config.dataset_name)
    size = card.image_size
    check_size(config.data_dir, size, config.image_size or size)
    held = _held(source.keys, config.holdout)
    pictures = _fingerprint(card.source_fingerprint, source.keys, size, config.holdout)
    origin = {
        "identity": f"{config.dataset_name} {pictures}",
        "source": card.source,
        "image_size": size,
        "count": card.source_count,
        "skipped": list(card.skipped_keys),
    }
    return Dataset(
        config.dataset_name,
        source.subset(np.flatnonzero(~held)),
        source.subset(np.flatnonzero(held)),
        card.num_classes,
        card.shape,
        fingerprint(card.content, str(float(config.holdout))),
        autoencoder=card.autoencoder["fingerprint"] if card.autoencoder else "",
        origin=origin,
        classes=card.classes,
    )


LOADERS: dict[str, Callable[[ConfigDict], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "folder": _folder,
    "cifar10": _cifar10,
    "imagenet256": _at_256,
    "celebahq256": _at_256,
    **dict.fromkeys(TOYS, _toy),
}
