"""Updates that are not finite, gradients that jump, data that does not come."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import toy
from pipelines import build, objectives
from pipelines.train import train
from tests.test_train import saved, small_config
from utils import data
from utils.checkpoint import Checkpoints
from utils.cli import UserError
from utils.health import Spikes, Watchdog, describe, not_finite
from utils.sharding import born_sharded, make_mesh
from utils.step import TRAINING, init_state, make_step, stream

pytestmark = pytest.mark.usefixtures("standard_promotion")


def planted(bad):
    """Returns MeanFlow's objective with a loss of NaN at the steps for which `bad(step)` is true.

    It is traced once and knows no step, but the key that it gets is a function of the step.
    """

    def make(config, num_classes, **options):
        good = objectives.mean_flow_objective(config, num_classes, **options)
        steps = [step for step in range(1, config.max_steps + 1) if bad(step)]
        training = stream(config.seed, TRAINING)
        keys = [jax.random.split(jax.random.fold_in(training, step - 1))[1] for step in steps]

        def mean_flow(network, params, batch, key):
            loss, metrics = good(network, params, batch, key)
            matches = [(jax.random.key_data(k) == jax.random.key_data(key)).all() for k in keys]
            return jnp.where(jnp.array([False, *matches]).any(), jnp.nan, 1.0) * loss, metrics

        return functools.partial(mean_flow)

    return make


def tiny(**changes):
    options = {"max_steps": 8, "save_interval": 4, "eval_interval": 1000, "log_interval": 1}
    config = small_config(**(options | changes))
    config.model.depth = 1
    return config


def lines(workdir) -> dict[int, dict]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in found if "error" in line or "skipped" in line}


def test_a_step_left_out_changes_the_step_number_alone():
    config = tiny(**{"optimizer.warmup_steps": 0})
    network = build.network(config, (8, 8, 1), 10)
    mesh = make_mesh()
    step = make_step(
        config,
        network.apply,
        planted(lambda step: step == 1)(config, 10),
        lambda x, keys: x.astype(jnp.float32) / 255,
        mesh,
    )
    state = born_sharded(lambda: init_state(config, network.init), mesh)
    before = jax.device_get(state)
    batch = {
        "x": jnp.ones((32, 8, 8, 1), jnp.uint8),
        "label": jnp.zeros(32, jnp.int32),
        "position": jnp.arange(32),
    }
    after, metrics = step(state, batch)
    assert metrics["skipped"] == 1 and after.step == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if a is not before.step:
            np.testing.assert_array_equal(a, b)
    moved, metrics = step(after, batch)
    assert metrics["skipped"] == 0 and moved.step == 2
    kernels = [np.asarray(s.params["head"]["out"]["kernel"]) for s in (before, moved)]
    assert (kernels[0] != kernels[1]).any()


def test_a_report_names_what_is_not_finite():
    values = {"loss": float("inf"), "grad_norm": 1.0}
    report = describe(5, 4, values, np.array([1.0, np.nan]), ["a", "b"])
    assert report["gradients_not_finite"] == ["b"] and report["samples_consumed_before"] == 16
    x, position = jnp.zeros((4, 3)).at[2, 1].set(jnp.inf), jnp.array([2, 3, 0, 1])
    assert not_finite({"x": x, "position": position}) == [0]  # its place, wherever its row lies
    assert not_finite({"x": jnp.zeros((4, 3), jnp.uint8), "position": position}) == []


def damaged(steps, places=(3, 5)):
    """Returns `data.batches` with items that are NaN, in the batches of `steps` and at `places`."""
    whole = data.batches

    def batches(*args, start_step=0, **options):
        given = whole(*args, start_step=start_step, **options)
        for number, batch in enumerate(given, start=start_step + 1):
            x = batch["x"].copy()
            x[[list(batch["position"]).index(p) for p in places if p in batch["position"]]] = np.nan
            yield {**batch, "x": x if number in steps else batch["x"]}

    return batches


def points(**changes):
    """A small run on points, which are stored as floats."""
    config = toy.get_config("two_moons")
    config.update({"max_steps": 8, "save_interval": 4, "eval_interval": 1000, "log_interval": 1})
    config.update({"batch_size": 16, **changes})
    config.model.update({"depth": 1, "hidden_size": 16})
    config.optimizer.update({"warmup_steps": 0})
    config.sample.update({"steps": (1,), "num": 4})
    return config


def test_a_batch_with_nan_costs_its_own_update(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "batches", damaged({5}))
    train(points(), str(tmp_path), objectives.mean_flow_objective)
    assert [lines(tmp_path)[step]["skipped"] for step in range(1, 9)] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert "step 5 is left out: loss nan" in capsys.readouterr().err
    assert all(np.isfinite(leaf).all() for leaf in saved(tmp_path, 8).values())


def test_batches_with_nan_from_a_step_on_stop_with_the_samples_named(tmp_path, monkeypatch):
    objective = objectives.mean_flow_objective
    config = points(max_steps=12, skip_limit=3, save_interval=1, keep_checkpoints=2)
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", damaged(range(7, 99)))
        with pytest.raises(UserError, match=r"3 steps in a row up to 9 .*samples \[131, 133\]"):
            train(config, str(tmp_path), objective)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["samples_not_finite"] == [8 * 16 + 3, 8 * 16 + 5]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (5, 6)  # none was rotated away by those that followed
    # The data is mended: the same command goes on, and gives what it would have given.
    train(points(max_steps=12), str(tmp_path), objective)
    train(points(max_steps=12), str(tmp_path / "whole"), objective)
    a, b = saved(tmp_path, 12), saved(tmp_path / "whole", 12)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_spike_stands_out_from_the_recent_norms():
    spikes = Spikes()
    assert spikes.add(1e9) == {}  # nothing to compare with yet
    assert all(spikes.add(1.0 + 0.1 * (i % 2)) == {} for i in range(30))
    assert spikes.add(4.9) == {}
    found = spikes.add(6.0)
    assert found["grad_norm_spike"] == 6.0 and 1.0 <= found["grad_norm_median"] <= 1.1
    assert spikes.add(float("inf"))["grad_norm_spike"] == float("inf")
    assert all(spikes.add(6.0) for _ in range(10))  # the median moves slowly
    assert not [spikes.add(6.0) for _ in range(100)][-1]


@pytest.mark.parametrize(("waits", "told"), [(0.5, True), (0.0, False)])
def test_the_watchdog_tells_what_takes_long(waits, told, capsys):
    with Watchdog(0.1) as watchdog:
        for _ in range(3):
            with watchdog.watch("step 7 has had no data"):
                time.sleep(waits / 3 if not told else waits)
    assert ("step 7 has had no data for 0 s" in capsys.readouterr().err) == told


def test_a_run_whose_data_stalls_says_so(tmp_path, monkeypatch, capsys):
    whole = data.batches

    def slow(*args, **options):
        for number, batch in enumerate(whole(*args, **options)):
            time.sleep(0.6 * (number == 3))
            yield batch

    monkeypatch.setattr(data, "batches", slow)
    train(points(max_steps=4, stall=0.2), str(tmp_path), objectives.flow_objective)
    assert "has had no data for" in capsys.readouterr().err
