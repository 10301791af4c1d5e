"""The device mesh, and where each array lives.

The batch is split over both axes, `data` and `fsdp`; parameters, EMA and optimizer state over
`fsdp` alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from utils.cli import UserError

SMALLEST = 2**16  # elements; splitting smaller arrays costs more than it saves


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """Returns a mesh with the axes data and fsdp; −1 means all devices that remain.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        rest = sizes[1 - sizes.index(-1)]
        sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
    if min(sizes) < 1 or sizes[0] * sizes[1] != len(devices):
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not make {len(devices)} devices: "
            "choose sizes whose product is that, or -1 for one of them"
        )
    return jax.make_mesh(sizes, ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, abstract: Any) -> Any:
    """Shards each large array along its longest axis that fsdp divides; the rest is replicated."""

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        fits = [size if size % mesh.shape["fsdp"] == 0 else 0 for size in leaf.shape]
        if mesh.shape["fsdp"] == 1 or leaf.size < SMALLEST or not any(fits):
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * int(np.argmax(fits)), "fsdp"))

    return jax.tree.map(rule, abstract)


def born_sharded(init: Callable[[], Any], mesh: Mesh) -> Any:
    """Runs `init()` so that no device ever holds more than its share of the result."""
    return jax.jit(init, out_shardings=state_sharding(mesh, jax.eval_shape(init)))()


def abstract_state(init: Callable[[], Any], mesh: Mesh) -> Any:
    """The shapes, types and shardings of `born_sharded`'s result, without computing it."""
    abstract = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        state_sharding(mesh, abstract),
    )


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Joins the hosts' local batches into arrays over the whole mesh."""
    place = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}


def fetch(tree: Any) -> Any:
    """The arrays as numpy, whole, on every process; all processes call it alike."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def agreed(value: int) -> int:
    """What process 0 says, on every process; all processes call it alike."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))
