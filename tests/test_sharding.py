"""Training over a mesh: the same numbers on every mesh, and a share of the state per device."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import digits, imagenet256
from pipelines import build, objectives
from tests.conftest import THOROUGH
from utils import data, sharding
from utils.cli import UserError
from utils.sharding import (
    abstract_state,
    born_sharded,
    make_mesh,
    mean_gradient,
    state_sharding,
    to_global,
)
from utils.step import init_state, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
OBJECTIVES = {
    "flow_matching": objectives.flow_objective,
    "mean_flow": objectives.mean_flow_objective,
}
MESHES = [(n // fsdp, fsdp) for n in (2, 4, 8) for fsdp in (1, 2, 4, 8) if fsdp <= n]
FIFTY = [("mean_flow", (2, 4))]
if THOROUGH:  # minutes
    FIFTY = list(itertools.product(OBJECTIVES, MESHES))
STEPS = 50


# Theorems about numbers.


def relative_distance(a, b) -> float:
    """‖a − b‖ / ‖b‖ over all leaves."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def fifty_steps(objective: str, mesh_data: int, fsdp: int) -> tuple[np.ndarray, dict]:
    """Raw error and velocity error (STEPS, 2) of a guided run, and the parameters after it."""
    config = digits.get_config()
    config.batch_size = 32
    config.model.update({"depth": 2, "hidden_size": 32, "num_heads": 2})
    config.mean_flow.update({"omega": 0.5, "kappa": 0.5})
    dataset = data.load(config)
    network = build.network(config, dataset.shape, dataset.num_classes)
    mesh = make_mesh(mesh_data, fsdp, jax.devices()[: mesh_data * fsdp])
    bound = OBJECTIVES[objective](config, 10, local=config.batch_size // mesh.size)
    encode = build.autoencoder(config, dataset.shape).sample
    state = jax.jit(lambda: init_state(config, network.init))()
    state = jax.device_put(state, state_sharding(mesh, state))
    batches = data.batches(dataset.train, batch_size=config.batch_size, seed=0)
    batch = to_global(mesh, next(batches))
    step = make_step(config, network.apply, bound, encode, mesh).lower(state, batch)
    step = step.compile({"xla_backend_optimization_level": "0"})  # half the time of the default
    found = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        batch = to_global(mesh, next(batches))
        found.append([float(metrics[name]) for name in ("error", "velocity_error")])
    return np.array(found), jax.device_get(state.params)


@pytest.mark.parametrize(("objective", "mesh"), FIFTY, ids=str)
def test_fifty_steps_on_a_mesh_are_those_of_one_device(objective, mesh, monkeypatch):
    """Each device has 4 samples or more; sums in another order are all that differs."""
    monkeypatch.setattr(sharding, "SMALLEST", 1)
    errors, params = fifty_steps(objective, 1, 1)
    found, others = fifty_steps(objective, *mesh)
    np.testing.assert_allclose(found, errors, rtol=1e-5)
    assert relative_distance(others, params) < 1e-4
    assert errors[-1, 0] < errors[0, 0]  # the steps led somewhere


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_mean_gradient_is_the_gradient_of_the_mean(mesh, monkeypatch):
    """Without rounding: integers in float32, for leaves that are split and for one that is not."""
    monkeypatch.setattr(sharding, "SMALLEST", 16)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.integers(-8, 8, size=size), jnp.float32) for name, size in
              (("w", (16, 8)), ("b", (8,)))}  # fmt: skip
    batch = {"x": jnp.asarray(rng.integers(-8, 8, size=(16, 16)), jnp.float32)}

    def gradient(params, batch, scale):
        def loss(p):
            return scale * jnp.mean(jnp.sum(jnp.square(batch["x"] @ p["w"] + p["b"][None]), axis=1))

        return jax.grad(loss)(params), jnp.sum(batch["x"])

    devices = make_mesh(*mesh, jax.devices()[: mesh[0] * mesh[1]])
    found, total = jax.jit(mean_gradient(gradient, devices))(params, batch, 2.0)
    expected, _ = gradient(params, batch, 2.0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert total == np.sum(batch["x"])


# Theorems about bytes.


@functools.cache
def xl2() -> tuple[ConfigDict, build.Network]:
    """The largest recipe."""
    config = imagenet256.get_config("meanflow_xl2")
    return config, build.network(config, (32, 32, 4), 1000)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_bytes_per_device_of_xl2_fall_as_one_over_fsdp(fsdp):
    """Of what is split exactly; what is not is below 1 % of the state."""
    config, network = xl2()
    mesh = make_mesh(-1, fsdp)
    state = abstract_state(lambda: init_state(config, network.init), mesh)
    for part in (state.params, state.ema, state.opt_state):
        whole = own = kept = 0
        for leaf in jax.tree.leaves(part):
            split = "fsdp" in leaf.sharding.spec
            size = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            whole, own = whole + leaf.size * leaf.dtype.itemsize, own + size
            kept += 0 if split else size
        if fsdp > 1:
            assert (own - kept) * fsdp == whole - kept
            assert kept < 0.01 * whole
        else:
            assert own == whole


def test_a_new_state_lies_where_the_old_one_lay(monkeypatch):
    """Arrays as they are: what each device holds is its share, before and after a step."""
    monkeypatch.setattr(sharding, "SMALLEST", 1)
    config = digits.get_config()
    config.batch_size = 8
    config.model.update({"depth": 1, "hidden_size": 32, "num_heads": 2})
    network = build.network(config, (8, 8, 1), 10)
    mesh = make_mesh(2, 4)
    state = born_sharded(lambda: init_state(config, network.init), mesh)
    places = jax.tree.map(lambda a: a.sharding.spec, state)
    encode = build.autoencoder(config, (8, 8, 1)).sample
    batch = {"x": np.zeros((8, 8, 8, 1), np.uint8), "label": np.zeros(8, np.int32)}
    batch["position"] = np.arange(8, dtype=np.int32)
    step = make_step(config, network.apply, objectives.flow_objective(config, 10), encode, mesh)
    state, _ = step(state, to_global(mesh, batch))
    assert jax.tree.map(lambda a: a.sharding.spec, state) == places
    for leaf in jax.tree.leaves(state):
        share = 4 if "fsdp" in leaf.sharding.spec else 1
        assert {s.data.size * share for s in leaf.addressable_shards} == {leaf.size}


# Meshes of several slices.


def fake_devices(slices: int, each: int) -> list:
    """Stands in for the devices of several TPU slices of a row of chips each."""
    return [
        SimpleNamespace(
            id=s * each + i, slice_index=s, process_index=s, coords=(i, 0, 0), core_on_chip=0,
            platform="tpu", device_kind="TPU v5 lite",
        )
        for s in range(slices)
        for i in range(each)
    ]  # fmt: skip


def test_parameters_stay_within_a_slice():
    """The network between slices carries sums of gradients over `data`, no parameters."""
    grids = []

    def remember(grid, *_, **__):
        grids.append(grid)
        return grid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "Mesh", remember)
        make_mesh(-1, 4, fake_devices(slices=2, each=8))
    (grid,) = grids
    assert grid.shape == (4, 4)
    for row in grid:
        assert len({device.slice_index for device in row}) == 1
    assert {device.slice_index for device in grid[:, 0]} == {0, 1}


def test_slices_that_do_not_fit_say_so():
    with pytest.raises(UserError, match=r"mesh\.data=1 is no multiple of the 2 slices"):
        make_mesh(1, 16, fake_devices(slices=2, each=8))


def test_one_slice_is_an_ordinary_mesh():
    mesh = make_mesh(2, 4)
    assert isinstance(mesh, Mesh)
    assert mesh.shape == {"data": 2, "fsdp": 4}
