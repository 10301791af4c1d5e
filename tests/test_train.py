"""The loop's invariances: devices, rematerialisation, accumulation, interruption, averages."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import digits
from pipelines import build, objectives
from pipelines.train import train
from tests.conftest import thorough
from utils import data, sharding
from utils.checkpoint import Checkpoints
from utils.cli import UserError
from utils.optimizers import make_optimizer
from utils.sharding import born_sharded, make_mesh, state_sharding, to_global
from utils.step import init_state, make_step
from utils.train import Meter, check_batch

pytestmark = pytest.mark.usefixtures("standard_promotion")
OBJECTIVES = {
    "flow_matching": objectives.flow_objective,
    "mean_flow": objectives.mean_flow_objective,
}


def small_config(**changes) -> ConfigDict:
    """A tiny DiT on digits, with dropout and guidance on."""
    config = digits.get_config()
    config.batch_size = 32
    config.max_steps = 20
    config.model.update({"depth": 2, "hidden_size": 32, "num_heads": 2, "dropout": 0.1})
    config.mean_flow.update({"omega": 1.0, "kappa": 0.5})
    config.optimizer.update({"warmup_steps": 5})
    config.sample.update({"steps": (1,), "num": 4})
    config.update_from_flattened_dict(changes)
    return config


@functools.cache
def twenty_steps(objective: str, devices: int, remat="none", accumulation=1, fsdp=1):
    """Raw errors of 20 steps, and the parameters after them."""
    config = small_config(**{"model.remat": remat, "accumulation": accumulation})
    dataset = data.load(config)
    network = build.network(config, dataset.shape, dataset.num_classes)
    mesh = make_mesh(-1, fsdp, jax.devices()[:devices])
    encode = build.autoencoder(config, dataset.shape).sample
    step = make_step(config, network.apply, OBJECTIVES[objective](config, 10), encode, mesh)
    state = born_sharded(lambda: init_state(config, network.init), mesh)
    batches = data.batches(dataset.train, batch_size=config.batch_size, seed=config.seed)
    errors = []
    for _ in range(20):
        state, metrics = step(state, to_global(mesh, next(batches)))
        errors.append(float(metrics["error"]))
    return np.array(errors), jax.device_get(state.params)


def relative_distance(a, b) -> float:
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("objective", "other"),
    [
        pytest.param("flow_matching", {"devices": 1, "remat": "full"}, marks=thorough),
        pytest.param("mean_flow", {"devices": 1, "accumulation": 4}, marks=thorough),
        ("mean_flow", {"devices": 8, "remat": "full", "accumulation": 4, "fsdp": 4}),
    ],
    ids=str,
)
def test_twenty_steps_do_not_depend_on_how_they_are_computed(objective, other, monkeypatch):
    """tests/test_sharding.py has the devices alone."""
    monkeypatch.setattr(sharding, "SMALLEST", 1)  # so that fsdp splits even these arrays
    errors, params = twenty_steps(objective, 1)
    other_errors, other_params = twenty_steps(objective, **other)
    np.testing.assert_allclose(other_errors, errors, rtol=1e-5)
    assert relative_distance(other_params, params) < 1e-4
    assert errors[-1] < 0.99 * errors[0]  # it learns: the errors are of twenty different networks


def saved(workdir, step: int) -> dict:
    """The arrays of a checkpoint, by path."""
    with Checkpoints(workdir) as checkpoints:
        parts = checkpoints._orbax.load_checkpointables(step)
    leaves = jax.tree_util.tree_flatten_with_path(parts)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def run(workdir, steps: int, seen: list | None = None):
    """Trains to `steps`; `seen` collects the batches, of which one more is fetched than used."""
    config = small_config(max_steps=steps, save_interval=20, eval_interval=1000, log_interval=10)
    config.model.depth = 1
    if seen is None:
        return train(config, str(workdir), objectives.mean_flow_objective)
    spied = data.batches

    def spy(*args, **kwargs):
        for batch in spied(*args, **kwargs):
            seen.append(batch)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "batches", spy)
        return train(config, str(workdir), objectives.mean_flow_objective)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    whole, parts = [], []
    run(tmp_path / "whole", 40, whole)
    run(tmp_path / "parts", 20, parts)
    run(tmp_path / "parts", 40, parts)
    assert len(whole) == 41 and len(parts) == 21 + 21
    for a, b in zip(whole, parts[:20] + parts[21:], strict=True):
        for name in ("x", "label", "position"):
            np.testing.assert_array_equal(a[name], b[name])
    a, b = saved(tmp_path / "whole", 40), saved(tmp_path / "parts", 40)
    assert a.keys() == b.keys() and len(a) > 40
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    kernel = f"['ema']['{small_config().ema.decay}']['patch']['kernel']"
    assert np.linalg.norm(saved(tmp_path / "parts", 20)[kernel] - a[kernel]) > 0
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["step"] for line in lines if "error" in json.loads(line)]
    assert logged == [10, 20, 30, 40]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(tmp_path, 20)
    before = (tmp_path / "metrics.jsonl").read_text()
    run(tmp_path, 20)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_lines_of_lost_steps_are_dropped_on_resume(tmp_path):
    run(tmp_path, 20)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "error": 1.0}\n{"step": 3')  # a run killed in mid-line
    run(tmp_path, 40)
    steps = [json.loads(s)["step"] for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(30) == 1


def test_a_workdir_with_another_config_is_refused_and_kept(tmp_path):
    run(tmp_path, 20)
    before = (tmp_path / "config.json").read_text()
    config = small_config(max_steps=40)
    with pytest.raises(UserError, match=r"another run, with .*model.depth=1 \(now 2\)"):
        train(config, str(tmp_path), objectives.mean_flow_objective)
    with pytest.raises(UserError, match="another run, with objective=mean_flow"):
        train(small_config(max_steps=40), str(tmp_path), objectives.flow_objective)
    assert (tmp_path / "config.json").read_text() == before


def test_a_workdir_with_other_data_is_refused(tmp_path):
    run(tmp_path, 20)
    config = small_config(max_steps=40, save_interval=20, eval_interval=1000, log_interval=10)
    config.model.depth = 1
    with pytest.MonkeyPatch.context() as patch:
        other = data.load(config)._replace(fingerprint="0123456789ab")
        patch.setattr(data, "load", lambda config: other)
        with pytest.raises(UserError, match="the data here is digits 0123456789ab"):
            train(config, str(tmp_path), objectives.mean_flow_objective)


def test_a_run_that_saved_nothing_does_not_lock_its_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"flip": true}')
    run(tmp_path, 20)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 20


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.0, 0.5, 1.0, 1.0, 1.0]), ("cosine", [0.0, 0.5, 1.0, 0.5, 0.0])],
)
def test_learning_rate_schedules(schedule, expected):
    config = small_config(**{"optimizer.lr": 1.0, "optimizer.schedule": schedule, "max_steps": 30})
    config.optimizer.warmup_steps = 10
    rate = make_optimizer(config)[1]
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 20, 30)], expected, atol=1e-6)


def test_clipping_bounds_the_gradient():
    config = small_config(**{"optimizer.clip_norm": 1.0, "optimizer.warmup_steps": 0})
    clipped, plain = make_optimizer(config)[0], optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.0)
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([30.0, 40.0])}
    state = clipped.update(grads, clipped.init(params), params)[1]
    same = plain.update({"w": jnp.array([0.6, 0.8])}, plain.init(params), params)[1]
    np.testing.assert_allclose(state[1][0].mu["w"], same[0].mu["w"], rtol=1e-6)


def test_mesh_and_batch_that_do_not_fit_say_so():
    with pytest.raises(UserError, match="does not make 8 devices"):
        make_mesh(3, 2)
    config = small_config(batch_size=36)
    with pytest.raises(UserError, match=r"batch_size=36 must be a positive multiple .* 8 x 1"):
        check_batch(config, make_mesh())


def test_large_arrays_are_split_over_fsdp():
    mesh = make_mesh(2, 4)
    tree = {
        "large": jnp.zeros((512, 256)),
        "small": jnp.zeros((8, 4)),
        "odd": jnp.zeros((333, 777)),
    }
    spec = {k: s.spec for k, s in state_sharding(mesh, tree).items()}
    assert spec["large"] == jax.sharding.PartitionSpec("fsdp")
    assert spec["small"] == spec["odd"] == jax.sharding.PartitionSpec()
    born = born_sharded(lambda: tree, mesh)
    assert born["large"].addressable_shards[0].data.shape == (128, 256)


def test_the_host_runs_at_most_one_step_ahead():
    """A step's metrics are read when the next one is added, not at once and not later."""
    reads = []

    class Metric:
        def __init__(self, number):
            self.number = number

        def __float__(self):
            reads.append(self.number)
            return 1.0

    with Meter(small_config(), 0) as meter:
        for number in (1, 2, 3):
            names = {n: Metric(number) for n in ("loss", "grad_norm", "error", "skipped")}
            meter.add(number, names | {"leaf_norms": np.ones(2)})
            assert set(reads) == set(range(1, number))


class Pending(float):
    """A metric of a step that is done, or not."""

    def __new__(cls, done: bool):
        metric = super().__new__(cls, 1.0)
        metric.is_ready = lambda: done
        return metric


@pytest.mark.parametrize(("done", "low", "high"), [(True, 0.5, 1.0), (False, 0.0, 0.0)])
def test_waiting_for_data_counts_where_the_devices_have_nothing_to_do(done, low, high):
    with Meter(small_config(), 0) as meter:
        names = ("loss", "grad_norm", "error", "skipped", "leaf_norms")
        meter.add(1, {name: Pending(done) for name in names})
        with meter.waiting(2):
            time.sleep(0.1)
        assert low <= meter.flush()["data_wait"] <= high


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_learning_rate_is_reached_with_and_without_warm_up(schedule, warmup):
    changes = {"schedule": schedule, "warmup_steps": warmup, "lr": 0.01}
    config = small_config(**{f"optimizer.{key}": value for key, value in changes.items()})
    rate = make_optimizer(config)[1]
    assert float(rate(0)) == pytest.approx(0 if warmup else 0.01)
    assert float(rate(warmup)) == pytest.approx(0.01)
    end = 0.01 if schedule == "constant" else 0.0
    assert float(rate(config.max_steps)) == pytest.approx(end, abs=1e-9)


@thorough
def test_an_evaluation_takes_parameters_from_a_mesh_in_any_order(tmp_path, monkeypatch):
    """A TPU slice's devices lie in another order in a mesh of 4 × 4 than in one of 16 × 1."""

    def turned(data=-1, fsdp=1, devices=None):
        return make_mesh(2, 4, jax.devices()[::-1])

    monkeypatch.setattr("pipelines.train.make_mesh", turned)
    monkeypatch.setattr(sharding, "SMALLEST", 1)
    run(tmp_path, 20)
    lines = [json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["self_consistency"] > 0
    assert (tmp_path / "samples" / "steps_1_0000020.png").exists()
