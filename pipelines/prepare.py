"""Pictures → shards of an autoencoder's moments, or of cropped pictures; `utils/shards.py` reads
them.

The pictures of a source, in its order, are cut into shards of fixed size. A shard is there whole or
not at all, so that an interruption costs one shard and loses or doubles nothing, and any number of
processes can each make a part of them. Batches never reach over shards: what is computed together
does not depend on interruptions, nor does any bit of the result while machine, batch size and
versions stay the same.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from models.autoencoder import Autoencoder
from pipelines.pretrained import Pretrained, copy_autoencoder, load_autoencoder
from utils import shards
from utils.cli import UserError, absolute
from utils.fid import FeatureStats
from utils.log import progress
from utils.pictures import open_pictures
from utils.sharding import agreed, batch_sharding, make_mesh, replicated
from utils.shards import Card
from utils.sources import CorruptPicture, Pictures, centre_crop, decode

PACKAGES = ("jax", "flax", "numpy", "pillow", "array_record")  # whose versions the card tells
CHOICES = {
    "dataset_name": ("", "folder", "imagenet256", "celebahq256"),
    "dtype": ("float16", "bfloat16"),
    "compute_dtype": ("float32", "bfloat16"),
}
_AHEAD = 2  # batches that are read and decoded while one is encoded
_LOOK = 1.0  # seconds between looks at what other processes have finished
_PER_DEVICE = {"cpu": 4}  # pictures per device and call
_PER_ACCELERATOR = 32


class Plan(NamedTuple):
    """What is to be made; its fields are flags of prepare_data.py.

    Attributes:
      source: A folder or .zip of pictures, a TFDS folder or name, or pictures that were prepared.
      out: The folder to write.
      autoencoder: A folder with diffusers' config.json and .safetensors (or TAESD's own pair of
        files), a name on the hub, or none, which keeps pictures.
      dataset_name: What the source's folders mean as labels: folder, imagenet256 or celebahq256; by
        default what the name of the source says.
      data_dir: The folder of TFDS data sets, if not the usual one.
      split: Of a TFDS data set.
      image_size: Pixels of a side, which pictures are cropped to.
      dtype: Of the moments, as stored: float16 or bfloat16.
      flip: Stores the mirrored pictures' moments too.
      compute_dtype: Of the autoencoder: float32 or bfloat16.
      batch_size: Pictures at a time over all local devices; 0: by their number.
      shard_size: Pictures of a shard; 0: by the number of pictures.
      share: I/N: makes the shards k with k % N = I; each of N hosts or processes needs its own.
        Processes that JAX joins, by --coordinator or by themselves, share without it.
      num: Only the first so many, of one class where sorted so; 0: all.
      skip_corrupt: Leaves out pictures that cannot be read, and says so.
    """

    source: str
    out: str
    autoencoder: str = "stabilityai/sd-vae-ft-mse"
    dataset_name: str = ""
    data_dir: str = ""
    split: str = "train"
    image_size: int = 256
    dtype: str = "float16"
    flip: bool = False
    compute_dtype: str = "float32"
    batch_size: int = 0
    shard_size: int = 0
    share: str = ""
    num: int = 0
    skip_corrupt: bool = False


class Work(NamedTuple):
    """A plan with what it names opened."""

    plan: Plan
    pictures: Pictures
    pretrained: Pretrained | None  # None: pictures are kept as pictures
    card: Card


def prepare(plan: Plan) -> str:
    """Makes the shards of this process's share that are not there yet; returns what there is now.

    The process that finds all shards there reads them once and completes the folder. Of processes
    that JAX joins, number 0 begins and completes it, and the others wait for that.

    Raises:
      UserError: a plan that cannot be carried out, one that differs from what `plan.out` was begun
        with, a corrupt picture, moments that are not finite, or a disk that is full.
    """
    for key, words in CHOICES.items():
        if getattr(plan, key) not in words:
            raise UserError(f"--{key}={getattr(plan, key)}: {' or '.join(filter(None, words))}")
    share, of = _share(plan.share)
    work = open_work(plan)
    out = pathlib.Path(plan.out).expanduser()
    card = _begin_together(out, work)
    shards.remove_leftovers(out)
    todo = [k for k in shards.missing_shards(out, card) if k % of == share]
    if todo and card.complete:  # somebody took a shard away
        shards.write_card(out, work.card)
    mine = sum(card.expected(k) for k in range(share, card.shards, of))
    done = mine - sum(map(card.expected, todo))
    with progress(done, mine, "picture", "prepare") as bar:
        parts = _ticked(_records(work, todo), bar)
        for shard in todo:
            shards.write_shard(shards.shard_path(out, card, shard), _of_one_shard(parts))
    if jax.process_count() > 1:
        _wait_for_others(out, card)
    missing = shards.missing_shards(out, card)
    if missing:
        there = f"{card.shards - len(missing)} of {card.shards} shards are there"
        return f"share {share}/{of} of {out} is done; {there}, the other shares make the rest"
    return told(out, complete(out, work))


def _begin_together(out: pathlib.Path, work: Work) -> Card:
    """`_begin`, on process 0 first; the others find its card."""
    if jax.process_index() == 0:
        card = _begin(out, work)
        agreed(0)
        return card
    agreed(0)
    if not (out / "card.json").is_file():
        raise UserError(
            f"{out} is not the folder that process 0 has begun: name one that all hosts share"
        )
    return _begin(out, work)


def _wait_for_others(out: pathlib.Path, card: Card) -> None:
    """Waits until process 0 can complete the folder; elsewhere, until it has."""
    while shards.missing_shards(out, card):
        time.sleep(_LOOK)
    while jax.process_index() and not shards.read_card(out, complete=False).complete:
        time.sleep(_LOOK)


def told(out: pathlib.Path, card: Card) -> str:
    """Says in a line what a complete folder holds."""
    size = sum(shards.shard_path(out, card, k).stat().st_size for k in range(card.shards))
    skipped = f", {len(card.skipped)} corrupt ones left out" if card.skipped else ""
    return (
        f"{out} is complete: {card.count} pictures{skipped}, {card.shards} shards, "
        f"{size / 1e6:.1f} MB, content {card.content}"
    )


# What is asked for.


def open_work(plan: Plan) -> Work:
    """Opens the pictures and the autoencoder, and writes down what is to be made.

    Raises:
      UserError: they cannot be opened, or do not go together with the plan.
    """
    if not plan.source or not plan.out:
        raise UserError("give --source=FOLDER_OR_ZIP_OR_TFDS_NAME and --out=FOLDER")
    if plan.image_size < 1 or plan.num < 0 or plan.shard_size < 0 or plan.batch_size < 0:
        raise UserError("give --image_size=1 or more; num, shard_size and batch_size are 0 or more")
    name = plan.dataset_name or dataset_name_of(plan.source)
    place = {"data_dir": plan.data_dir, "split": plan.split}
    pictures = open_pictures(plan.source, dataset_name=name, **place)
    pictures.check_size(plan.image_size)
    if len(np.unique(pictures.keys)) < len(pictures.keys):
        raise UserError(f"{pictures.where} has two pictures of one name: rename one")
    pretrained = None
    if plan.autoencoder != "none":
        pretrained = load_autoencoder(plan.autoencoder, dtype=plan.compute_dtype)
    elif plan.flip:
        raise UserError("pictures are mirrored when they are read: leave --flip out")
    return Work(plan, pictures, pretrained, _card(plan, name, pictures, pretrained))


def dataset_name_of(source: str) -> str:
    """Which labels a source has when nobody says: TFDS names and prepared folders tell."""
    if shards.is_prepared(source):
        return shards.read_card(source, complete=False).dataset_name
    words = set(re.split(r"[/\\:]", source))
    if "imagenet2012" in words:
        return "imagenet256"
    return "celebahq256" if words & {"celeb_a_hq", "celebahq256"} else "folder"


def _card(plan: Plan, name: str, pictures: Pictures, pretrained: Pretrained | None) -> Card:
    size, count = plan.image_size, min(plan.num or len(pictures.keys), len(pictures.keys))
    shard_size = plan.shard_size or shards.shard_size_for(count)
    shape, dtype, autoencoder = (size, size, 3), "uint8", None
    if pretrained is not None:
        shape, dtype = latent_shapes(pretrained.autoencoder, size)[0], plan.dtype
        autoencoder = {
            "name": plan.autoencoder,
            "fingerprint": pretrained.fingerprint,
            "compute_dtype": plan.compute_dtype,
        }
    return Card(
        kind="moments" if pretrained else "pictures",
        dataset_name=name,
        source={
            "source": absolute(plan.source),
            "data_dir": absolute(plan.data_dir),
            "split": plan.split,
        },
        source_fingerprint=pictures.fingerprint,
        source_count=count,
        num_classes=pictures.num_classes,
        image_size=size,
        crop=shards.CROP,
        autoencoder=autoencoder,
        dtype=dtype,
        shape=shape,
        flipped=plan.flip,
        shard_size=shard_size,
        shards=-(-count // shard_size),
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        classes=pictures.classes,
    )


def latent_shapes(autoencoder: Autoencoder, size: int) -> tuple[tuple, tuple]:
    """The shapes (h, w, c) of one picture's moments and of its latents.

    Raises:
      UserError: the autoencoder does not give back pictures of `size` pixels a side.
    """
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    try:
        moments = jax.eval_shape(
            autoencoder.moments, jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        )
        x = jax.eval_shape(autoencoder.sample, moments, key)
        side = jax.eval_shape(autoencoder.decode, x).shape[1]
    except (ValueError, TypeError, ZeroDivisionError):  # too small for its layers
        side = 0
    if side != size:
        raise UserError(
            f"image_size {size} does not fit the autoencoder: give --image_size=256, or another "
            "multiple of its factor, mostly 8"
        )
    return moments.shape[1:], x.shape[1:]


def _share(text: str) -> tuple[int, int]:
    """Which shards this process makes: those with k % N == I."""
    if not text:
        return jax.process_index(), jax.process_count()
    if jax.process_count() > 1:
        raise UserError(f"--share={text}: joined processes share by themselves, leave it out")
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    share, of = map(int, found.groups()) if found else (0, 0)
    if share >= of:
        raise UserError(f"--share={text}: give I/N, as 0/2 and 1/2 for two processes")
    return share, of


# The folder.


def _begin(out: pathlib.Path, work: Work) -> Card:
    """Writes the card and copies the autoencoder, or checks that the work goes on with the same."""
    if out.is_file():
        raise UserError(f"{out} is a file: give a new folder as --out")
    out.mkdir(parents=True, exist_ok=True)
    there = {name for name in os.listdir(out) if not name.startswith(".")}
    if there and "card.json" not in there:
        raise UserError(f"{out} holds something else: give a new folder as --out")
    if not there:  # another process may write its own meanwhile: they are compared below
        shards.write_card(out, work.card)
    card = shards.read_card(out, complete=False)
    _check_same(out, card, work.card)
    if work.pretrained is not None:
        _keep_autoencoder(work.pretrained, out / "autoencoder")
    return card


def _keep_autoencoder(pretrained: Pretrained, copy: pathlib.Path) -> None:
    """Copies the autoencoder beside its moments; a copy of the same numbers is left alone."""
    if not copy.exists():
        copy_autoencoder(pretrained.folder, copy)
    elif load_autoencoder(str(copy)).fingerprint != pretrained.fingerprint:
        raise UserError(f"{copy} is another autoencoder: remove it, and run this command again")


def _check_same(out: pathlib.Path, begun: Card, asked: Card) -> None:
    """Refuses to go on with other options; what stands for a place or a name may differ."""
    if begun.kind == asked.kind == "moments":
        a, b = begun.autoencoder or {}, asked.autoencoder or {}
        if a["fingerprint"] != b["fingerprint"]:
            was, now = (f"{x['name']} ({x['fingerprint']})" for x in (a, b))
            _refuse(out, "autoencoder", was, now)
        if a["compute_dtype"] != b["compute_dtype"]:
            _refuse(out, "compute dtype", a["compute_dtype"], b["compute_dtype"])
    free = {"source", "autoencoder", "versions", "complete", "count", "skipped", "skipped_keys"}
    for field in dataclasses.fields(Card):
        if field.name not in free | {"content", "mean", "std", "classes"}:
            was, now = getattr(begun, field.name), getattr(asked, field.name)
            if was != now:
                _refuse(out, field.name.replace("_", " "), was, now)


def _refuse(out: pathlib.Path, what: str, was: Any, now: Any) -> None:
    raise UserError(f"{out} was begun with {what} {was}, not {now}: give another --out")


# The stream of records.


class Part(NamedTuple):
    """Some consecutive records."""

    records: Sequence[bytes]
    pictures: int  # that they stand for, corrupt ones among them
    last: bool  # of its shard


class _Item(NamedTuple):
    """A picture of the source, ready to be stored."""

    number: int  # in the source
    label: int
    content: Any  # uint8 (H, W, 3), or an encoded picture


class _Batch(NamedTuple):
    """The pictures that go through the encoder together, less the corrupt ones."""

    items: list[_Item]
    pictures: int
    last: bool


def _of_one_shard(parts: Iterator[Part]) -> Iterator[bytes]:
    """The records up to a shard's end, without a look at what follows: that may fail."""
    for part in parts:
        yield from part.records
        if part.last:
            return


def _ticked(parts: Iterable[Part], bar) -> Iterator[Part]:
    for part in parts:
        yield part
        bar.update(part.pictures)


def _records(work: Work, todo: Sequence[int]) -> Iterator[Part]:
    """The records of the shards `todo`, in order."""
    size = batch_size(work.plan.batch_size, work.card.shard_size)
    jobs = [
        (range(start, min(start + size, end)), start + size >= end)
        for shard in todo
        for first, end in [_items_of(work.card, shard)]
        for start in range(first, end, size)
    ]
    if work.pretrained is not None:
        load = functools.partial(_decoded, work.pictures, work.card.image_size)
        batches = _loaded(jobs, load, work.plan.skip_corrupt)
        return _encoded(batches, work.pictures, work.card, work.pretrained.autoencoder, size)
    load = functools.partial(_cropped, work.pictures, work.card.image_size)
    batches = _loaded(jobs, load, work.plan.skip_corrupt)
    return (Part(_as_pictures(work.pictures, b), b.pictures, b.last) for b in batches)


def _items_of(card: Card, shard: int) -> tuple[int, int]:
    first = shard * card.shard_size
    return first, first + card.expected(shard)


def batch_size(wanted: int, shard_size: int) -> int:
    """Pictures per call of the encoder, over all local devices; 0: by their kind and number.

    Raises:
      UserError: the devices cannot share it.
    """
    count = jax.local_device_count()
    if wanted % count:
        near = max(1, round(wanted / count)) * count
        raise UserError(
            f"batch_size {wanted} cannot be shared by {count} devices: give --batch_size={near}"
        )
    each = _PER_DEVICE.get(jax.default_backend(), _PER_ACCELERATOR)
    fitting = -(-shard_size // count) * count  # a shard is the most that there is at once
    return min(wanted or each * count, fitting)


def _loaded(jobs: Sequence, load: Callable[[int], _Item], skip: bool) -> Iterator[_Batch]:
    """Reads pictures on threads, some batches ahead: Pillow decodes without Python's lock."""
    waiting: collections.deque[tuple[list[Future], bool]] = collections.deque()
    pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1), thread_name_prefix="prepare")
    try:
        for rows, last in jobs:
            waiting.append(([pool.submit(load, number) for number in rows], last))
            if len(waiting) > _AHEAD:
                yield _collected(waiting.popleft(), skip)
        while waiting:
            yield _collected(waiting.popleft(), skip)
    finally:
        pool.shutdown(cancel_futures=True)


def _collected(job: tuple[list[Future], bool], skip: bool) -> _Batch:
    (futures, last), items = job, []
    for future in futures:
        try:
            items.append(future.result())
        except CorruptPicture as error:
            if not skip:
                raise UserError(f"{error}: mend it, or leave it out with --skip_corrupt") from error
            tqdm.write(f"left out: {error}", file=sys.stderr)
    return _Batch(items, len(futures), last)


def _decoded(pictures: Pictures, size: int, number: int) -> _Item:
    picture, label = pictures.picture(number)
    return _Item(number, label, np.asarray(centre_crop(picture, size)))


def _cropped(pictures: Pictures, size: int, number: int) -> _Item:
    """The source's own bytes where the crop changes nothing, else PNG, which loses nothing."""
    encoded, label = pictures.read(number)
    picture = decode(encoded, f"{pictures.where}/{pictures.name(number)}")
    if picture.size == (size, size) and Image.open(io.BytesIO(encoded)).mode in ("RGB", "L"):
        return _Item(number, label, encoded)
    file = io.BytesIO()
    centre_crop(picture, size).save(file, format="png")
    return _Item(number, label, file.getvalue())


def _as_pictures(pictures: Pictures, batch: _Batch) -> list[bytes]:
    keys = pictures.keys
    return [shards.pack_picture(int(keys[i]), label, x) for i, label, x in batch.items]


# Encoding.


class Encoded(NamedTuple):
    """What the encoder gives for n pictures."""

    moments: jax.Array  # (n, sides, h, w, c), of the type that is stored
    finite: jax.Array  # bool (n,): as computed
    kept: jax.Array  # bool (n,): as stored


@functools.partial(jax.jit, static_argnames=("dtype", "flip"))
def encode(autoencoder: Autoencoder, pictures: jax.Array, dtype: str, flip: bool) -> Encoded:
    """Returns the moments of uint8 pictures (n, H, W, 3), and of their mirror images, as stored."""
    sides = [autoencoder.moments(pictures)]
    if flip:
        sides.append(autoencoder.moments(pictures[:, :, ::-1]))
    moments = jnp.stack(sides, axis=1)
    stored = moments.astype(shards.DTYPES[dtype])
    axes = tuple(range(1, moments.ndim))
    return Encoded(stored, jnp.isfinite(moments).all(axes), jnp.isfinite(stored).all(axes))


def _encoded(
    batches: Iterable[_Batch], pictures: Pictures, card: Card, autoencoder: Autoencoder, size: int
) -> Iterator[Part]:
    """Encodes on all local devices; a batch is computed while the one before it is stored."""
    mesh = make_mesh(devices=jax.local_devices())
    autoencoder = jax.device_put(autoencoder, replicated(mesh))
    place = batch_sharding(mesh)

    def begin(batch: _Batch) -> Encoded:
        side = card.image_size
        x = np.zeros((size, side, side, 3), np.uint8)  # the last batch of a shard is filled up
        for row, item in zip(x, batch.items, strict=False):
            row[...] = item.content
        return encode(autoencoder, jax.device_put(x, place), card.dtype, card.flipped)

    def end(batch: _Batch, encoded: Encoded) -> Part:
        count = len(batch.items)
        moments, finite, kept = (np.asarray(value)[:count] for value in encoded)
        if not kept.all():
            bad = int(np.flatnonzero(~kept)[0])
            _refuse_moments(pictures, batch.items[bad].number, card.dtype, bool(finite[bad]))
        key = pictures.keys[[item.number for item in batch.items]] if count else np.zeros(0)
        label = np.array([item.label for item in batch.items])
        return Part(shards.pack(card.record, key, label, moments), batch.pictures, batch.last)

    return _one_behind(batches, begin, end)


def _one_behind(
    batches: Iterable[_Batch],
    begin: Callable[[_Batch], Encoded],
    end: Callable[[_Batch, Encoded], Part],
) -> Iterator[Part]:
    """Ends a batch when the next has begun, or when there is none: the devices are never idle."""
    waiting: tuple[_Batch, Encoded] | None = None
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator, None)
        except UserError:  # what came before is whole, and may finish a shard
            if waiting:
                yield end(*waiting)
            raise
        begun = (batch, begin(batch)) if batch else None
        if waiting:
            yield end(*waiting)
        if not begun:
            return
        waiting = begun


def _refuse_moments(pictures: Pictures, index: int, dtype: str, finite: bool) -> None:
    name = f"{pictures.where}/{pictures.name(index)}"
    if finite:
        raise UserError(f"the moments of {name} overflow {dtype}: give --dtype=bfloat16")
    raise UserError(f"the moments of {name} are not finite: see --autoencoder and --compute_dtype")


# Completing the folder.


def complete(out: pathlib.Path, work: Work) -> Card:
    """Reads all records once and writes the index and the completed card.

    Processes that finish together write the same.

    Raises:
      UserError: a shard is damaged, or holds what is not the source's.
    """
    card = shards.read_card(out, complete=False)
    if card.complete and (out / "index.npy").is_file():
        return card
    digest, index, skipped = hashlib.blake2b(digest_size=6), [], []
    channels = latent_channels(work)
    stats = FeatureStats.empty(channels)
    with progress(0, card.source_count, "picture", "check") as bar:
        for k in range(card.shards):
            shard = shards.Shard(shards.shard_path(out, card, k))
            rows = []
            for records in shard.chunks():
                for record in records:
                    digest.update(record)
                rows.append(shards.heads(records))
                if channels:
                    stats = stats.update(_means(card, records, channels))
            shard.close()
            index.append(np.concatenate([np.zeros(0, shards.INDEX), *rows]))
            skipped += _left_out(work.pictures, card, k, index[-1]["key"], shard.path)
            bar.update(card.expected(k))
    heads = np.concatenate(index)
    if not len(heads):
        raise UserError(f"none of the {card.source_count} pictures can be read: see --source")
    shards.write_index(out, heads)
    card = dataclasses.replace(
        card,
        complete=True,
        count=len(heads),
        skipped=tuple(work.pictures.name(number) for number in skipped),
        skipped_keys=tuple(work.pictures.keys[skipped].tolist()) if skipped else (),
        content=digest.hexdigest(),
        mean=tuple(stats.mean.tolist()) if channels else (),
        std=tuple(np.sqrt(np.diag(stats.cov)).tolist()) if channels else (),
    )
    shards.write_card(out, card)
    shards.remove_leftovers(out, older_than=-1)
    return card


def latent_channels(work: Work) -> int:
    """Channels of the latents, which come first in the moments; 0 for pictures."""
    if work.pretrained is None:
        return 0
    return latent_shapes(work.pretrained.autoencoder, work.card.image_size)[1][-1]


def _means(card: Card, records: list[bytes], channels: int) -> np.ndarray:
    """The posterior means (m, channels) of all places of the records; not of mirrored pictures."""
    rows = np.frombuffer(b"".join(records), card.record)
    return rows["moments"][:, 0, ..., :channels].reshape(-1, channels).astype(np.float64)


def _left_out(
    pictures: Pictures, card: Card, shard: int, keys: np.ndarray, path: pathlib.Path
) -> list[int]:
    """The numbers of the pictures that a shard stands for and does not hold.

    Raises:
      UserError: it holds others, or not in the source's order.
    """
    first, end = _items_of(card, shard)
    there = np.isin(pictures.keys[first:end], keys)
    if not np.array_equal(pictures.keys[first:end][there], keys):
        raise UserError(f"{path} is not of {pictures.where}: delete it and {shards.AGAIN}")
    return (first + np.flatnonzero(~there)).tolist()
