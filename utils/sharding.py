"""The device mesh, and where each array lives.

The batch is split over both axes, `data` and `fsdp`; parameters, EMA and optimizer state over
`fsdp` alone (ZeRO, arXiv 1910.02054; FSDP, 2304.11277). A step crosses between devices in
`mean_gradient` and nowhere else: parameters are gathered, gradients are summed, samples stay.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from utils.cli import UserError

AXES = ("data", "fsdp")
Number = TypeVar("Number", int, float)
SMALLEST = 2**16  # elements; splitting smaller arrays costs more than it saves


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """Returns a mesh with the axes data and fsdp; −1 means all devices that remain.

    Where the devices are of several slices, which a data-centre network joins (DCN), `data` runs
    over the slices and `fsdp` stays within one: gradients cross the slow network once a step,
    parameters never.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is no multiple of
        the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 2, devices=devices)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} is no multiple of the {slices} slices: --mesh.data={slices}, or "
            f"--mesh.data=-1 --mesh.fsdp={len(devices) // slices}"
        )
    within = (sizes[0] // slices, sizes[1])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_sizes(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """The sizes of the mesh's axes, −1 filled in.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        rest = sizes[1 - sizes.index(-1)]
        sizes[sizes.index(-1)] = devices // rest if rest > 0 else 0
    if min(sizes) < 1 or sizes[0] * sizes[1] != devices:
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not make {devices} devices: "
            "choose sizes whose product is that, or -1 for one of them"
        )
    return sizes[0], sizes[1]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


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


def mean_gradient(gradient: Callable, mesh: Mesh) -> Callable:
    """Returns (params, batch, *rest) → (gradients, metrics), over the mesh.

    Each device calls `gradient(params, its samples, *rest)`, with the parameters whole, as if it
    were alone: what it does there can move nothing between devices. The gradients that come back
    lie as the parameters do.

    Args:
      gradient: returns gradients of a mean over its samples, and metrics, which are added up.
    """

    def over_the_mesh(params: Any, batch: dict, *rest: Any) -> tuple[Any, Any]:
        specs = jax.tree.map(lambda place: place.spec, state_sharding(mesh, params))

        def of_one_device(params: Any, batch: dict, *rest: Any) -> tuple[Any, Any]:
            grads, metrics = gradient(jax.tree.map(_gathered, params, specs), batch, *rest)
            grads = jax.tree.map(_summed, grads, specs)
            return jax.tree.map(lambda g: g / mesh.size, grads), jax.lax.psum(metrics, AXES)

        return jax.shard_map(
            of_one_device,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(AXES), *[PartitionSpec()] * len(rest)),
            out_specs=(specs, PartitionSpec()),
            check_vma=False,  # it would add sums of its own, and these here are all there are
        )(params, batch, *rest)

    return over_the_mesh


def _gathered(part: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The whole of an array from the parts over `fsdp`."""
    if "fsdp" not in spec:
        return part
    return jax.lax.all_gather(part, "fsdp", axis=spec.index("fsdp"), tiled=True)


def _summed(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over devices of a whole gradient: this device's part of it."""
    if "fsdp" not in spec:
        return jax.lax.psum(gradient, AXES)
    axis = spec.index("fsdp")
    part = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True)
    return jax.lax.psum(part, "data")


def born_sharded(init: Callable[..., Any], mesh: Mesh, *inputs: Any) -> Any:
    """Runs `init(*inputs)` so that no device ever holds more than its share of the result."""
    places = state_sharding(mesh, jax.eval_shape(init, *inputs))
    return jax.jit(init, out_shardings=places)(*inputs)


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


def agreed(value: Number) -> Number:
    """What process 0 says, on every process; all processes call it alike."""
    if jax.process_count() == 1:
        return value
    kind = np.float32 if isinstance(value, float) else np.int32
    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value, kind)))


def gathered(value: int) -> list[int]:
    """What each process says, by its number, on every process; all processes call it alike."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.asarray(value, np.int32)).tolist()


def anywhere(flag: bool) -> bool:
    """Whether any process says so, on every process; all processes call it alike."""
    return any(gathered(int(flag)))
