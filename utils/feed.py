"""Training batches as global arrays, from disk, from the host's memory or from the devices'.

Where the items are kept changes no batch: all three give the same ones, on any number of devices
and hosts. Memory is asked for before it is filled.
"""

import collections
import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from utils import data
from utils.cli import UserError
from utils.log import progress
from utils.sharding import batch_sharding, to_global
from utils.sources import ArraySource, Source

CACHES = ("disk", "host", "device")
CHUNK = 1024  # items read at a time while a cache is filled
SPARE = 0.9  # share of the memory that a cache may take

Batches = Callable[[int], Iterator[dict[str, Array]]]


def feed(
    source: Source, mesh: Mesh, *, cache: str, batch_size: int, seed: int, flip: bool
) -> Batches:
    """Returns start step → endless batches {x, label, position} over the mesh.

    Args:
      source: this host can read all of it.
      cache: disk reads items as they are needed; host reads all into memory first, once per host;
        device spreads all over the devices' memory, so that a step asks the host for numbers alone.
      batch_size: over all devices and hosts. One batch is on its way while another is used.
    Raises:
      UserError: another cache, items that cannot be batched or mirrored so; on the first batch, a
        cache that does not fit.
    """
    if cache not in CACHES:
        raise UserError(f"cache={cache!r}: one of {', '.join(CACHES)}")
    hosts = jax.process_count()
    data.check(source, batch_size=batch_size, seed=seed, flip=flip, hosts=hosts)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "flip": flip,
        "shard": (jax.process_index(), hosts),
    }

    @functools.cache  # one cache, however often batches are asked for
    def kept() -> Any:
        return on_devices(source, mesh, flip) if cache == "device" else in_memory(source, flip)

    def from_step(start: int) -> Iterator[dict[str, Array]]:
        if cache == "device":
            lookup = kept()
            numbers = data.batches(_Numbers(source), start_step=start, **options)
            yield from ahead(lookup(to_global(mesh, batch)) for batch in numbers)
        items = kept() if cache == "host" else source
        host = data.batches(items, start_step=start, **options)
        yield from ahead(to_global(mesh, batch) for batch in host)

    return from_step


def ahead(batches: Iterator[dict], count: int = 1) -> Iterator[dict]:
    """Keeps `count` batches on their way to the devices while another is used."""
    waiting: collections.deque = collections.deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > count:
            yield waiting.popleft()


# In the host's memory.


class Sided(ArraySource):
    """Items in memory with both sides of each: `x` (n, 2, …), as it is and mirrored."""

    def gather(self, indices, mirrored=None) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        side = np.zeros(len(indices), int) if mirrored is None else np.asarray(mirrored, int)
        return {"x": self.x[indices, side], "label": self.label[indices]}

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index, 0], "label": int(self.label[index])}


def in_memory(source: Source, flip: bool) -> Source:
    """Reads everything; mirrored items too, where they are not the mirror image of their array.

    Raises:
      UserError: it does not fit into this machine's memory.
    """
    if isinstance(source, ArraySource):
        return source
    shape, dtype = _stored(source, flip)
    _check_fits("host", shape, dtype, _free_memory())
    x, label = np.empty(shape, dtype), np.empty(shape[0], np.int32)
    with progress(0, len(source), "item", "into the host's memory") as bar:
        for start in range(0, len(source), CHUNK):
            rows = range(start, min(start + CHUNK, len(source)))
            x[start : rows.stop], label[start : rows.stop] = _read(source, rows, shape[1])
            bar.update(len(rows))
    return Sided(x, label) if shape[1] == 2 else ArraySource(x[:, 0], label)


def _stored(source: Source, flip: bool) -> tuple[tuple[int, ...], np.dtype]:
    """The shape (n, sides, …) and type of all items: moments have two sides, pixels are mirrored.

    Raises:
      UserError: no items.
    """
    if not len(source):
        raise UserError("no items to keep in memory: see --data_dir and --holdout")
    first = source[0]["x"]
    sides = 2 if flip and getattr(source, "sides", 1) == 2 else 1
    return (len(source), sides, *first.shape), first.dtype


def _read(source: Source, rows: range, sides: int) -> tuple[np.ndarray, np.ndarray]:
    """Items (m, sides, …) and labels (m,)."""
    both = None, np.ones(len(rows), bool)
    parts = [source.gather(rows, mirrored) for mirrored in both[:sides]]
    return np.stack([part["x"] for part in parts], axis=1), parts[0]["label"]


def _free_memory() -> float:
    """Bytes that this process may still take: of the machine, or of its container (cgroup 2)."""
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit
        group = pathlib.Path("/sys/fs/cgroup")
        used, most = (int((group / f"memory.{name}").read_text()) for name in ("current", "max"))
        free = min(free, most - used)
    return free


def _check_fits(cache: str, shape: tuple[int, ...], dtype: np.dtype, memory: float) -> None:
    need = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if need > SPARE * memory:
        smaller = "--cache=disk" if cache == "host" else "--cache=host or --cache=disk"
        raise UserError(
            f"cache={cache} needs {need / 1e9:.1f} GB of memory and there are {memory / 1e9:.1f}: "
            f"give {smaller}"
        )


# On the devices.


class _Numbers:
    """Stands for a source: items are their own numbers."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return self.source[index]

    def gather(self, indices, mirrored=None) -> dict[str, np.ndarray]:
        side = np.zeros(len(indices), bool) if mirrored is None else np.asarray(mirrored, bool)
        return {"row": np.asarray(indices, np.int32), "mirrored": side}


def on_devices(source: Source, mesh: Mesh, flip: bool) -> Callable[[dict], dict[str, Array]]:
    """Spreads all items over the devices; returns {row, mirrored, position} → a batch of them.

    Each device holds an equal run of the items. A batch is put together by one sum over devices, of
    a batch's size: every device gives the rows it holds and zeros for the others.

    Raises:
      UserError: the devices have too little memory.
    """
    shape, dtype = _stored(source, flip)
    limits = [device.memory_stats() for device in mesh.local_devices]
    if all(limits):
        free = min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in limits)
        _check_fits("device", shape, dtype, free * mesh.size)
    else:  # of CPUs, which share the host's
        _check_fits("device", shape, dtype, _free_memory() * jax.process_count())
    items = _spread(source, mesh, shape, dtype)
    mirrors = flip and shape[1] == 1  # pixels

    def lookup(items: dict, batch: dict) -> dict[str, Array]:
        rows = _rows(mesh)(items, batch["row"])
        x = rows["x"]
        if mirrors:
            x = jnp.concatenate([x, x[:, :, :, ::-1]], axis=1)
        x = jax.vmap(lambda sides, i: sides[i])(x, batch["mirrored"].astype(jnp.int32))
        return {"x": x, "label": rows["label"], "position": batch["position"]}

    return functools.partial(jax.jit(lookup), items)


def _rows(mesh: Mesh) -> Callable[[dict, Array], dict[str, Array]]:
    """Returns (items spread over the mesh, rows (n,)) → those items, spread as a batch."""
    spec, axes = batch_sharding(mesh).spec, mesh.axis_names

    def local(items: dict, rows: Array) -> dict[str, Array]:
        rows = jax.lax.all_gather(rows, axes, tiled=True)

        def take(held: Array) -> Array:
            place = rows - jax.lax.axis_index(axes) * held.shape[0]
            here = (place >= 0) & (place < held.shape[0])
            taken = held[jnp.where(here, place, 0)]
            zero = jnp.zeros((), held.dtype)
            taken = jnp.where(here.reshape(-1, *[1] * (held.ndim - 1)), taken, zero)
            return jax.lax.psum_scatter(taken, axes, tiled=True)

        return jax.tree.map(take, items)

    return jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec)


def _spread(source: Source, mesh: Mesh, shape: tuple[int, ...], dtype: np.dtype) -> dict:
    """{'x': (n, sides, …), 'label': (n,)}, filled up with zeros for devices to share evenly.

    The host holds CHUNK items at a time.
    """
    count = shape[0] + -shape[0] % mesh.size
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    parts = []
    with progress(0, len(source), "item", "into the devices' memory") as bar:
        for device, index in place.addressable_devices_indices_map((count,)).items():
            first = (index and index[0].start) or 0
            rows = range(first, min(first + count // mesh.size, shape[0]))
            zeros = jnp.zeros((count // mesh.size, *shape[1:]), dtype, device=device)
            held = zeros, jnp.zeros(count // mesh.size, jnp.int32, device=device)
            for start in range(rows.start, rows.stop, CHUNK):
                part = range(start, min(start + CHUNK, rows.stop))
                held = _written(held, _read(source, part, shape[1]), start - first)
                bar.update(len(part))
            parts.append(held)

    def whole(arrays: Sequence[Array]) -> Array:
        global_shape = (count, *arrays[0].shape[1:])
        return jax.make_array_from_single_device_arrays(global_shape, place, list(arrays))

    x, label = map(whole, zip(*parts, strict=True))
    return {"x": x, "label": label}


@functools.partial(jax.jit, donate_argnums=0)
def _written(held: tuple, part: tuple, start: int) -> tuple:
    """Writes the rows of `part` into those of `held` from `start` on."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return jax.tree.map(write, held, part)
