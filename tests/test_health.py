"""Updates that are not finite, gradients that jump, data that does not come."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipelines import build
from pipelines.train import train
from tests.test_train import saved, small_config
from utils.checkpoint import Checkpoints
from utils.cli import UserError
from utils.health import Spikes, Watchdog, describe
from utils.sharding import born_sharded, make_mesh
from utils.step import TRAINING, init_state, make_step, stream

pytestmark = pytest.mark.usefixtures("standard_promotion")


def planted(bad):
    """Returns MeanFlow's objective with a loss of NaN at the steps for which `bad(step)` is true.

    It is traced once and knows no step, but the key that it gets is a function of the step.
    """

    def make(config, num_classes, **options):
        good = build.mean_flow_objective(config, num_classes, **options)
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


def test_one_update_that_is_not_finite_is_left_out_and_counted(tmp_path, capsys):
    train(tiny(), str(tmp_path), planted(lambda step: step == 5))
    assert [lines(tmp_path)[step]["skipped"] for step in range(1, 9)] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert "step 5 is left out: loss nan" in capsys.readouterr().err
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (4, 8)
    assert all(np.isfinite(leaf).all() for leaf in saved(tmp_path, 8).values())
    assert int(saved(tmp_path, 8)["['train']['step']"]) == 8


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


def test_many_in_a_row_stop_with_a_report_and_the_checkpoint_intact(tmp_path):
    train(tiny(max_steps=4), str(tmp_path), planted(lambda step: False))
    kept = saved(tmp_path, 4)
    config = tiny(max_steps=40, skip_limit=3, save_interval=100)
    with pytest.raises(UserError, match="3 steps in a row up to 9 were not finite"):
        train(config, str(tmp_path), planted(lambda step: step > 6))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (4,)
    for name, leaf in saved(tmp_path, 4).items():
        np.testing.assert_array_equal(leaf, kept[name], err_msg=name)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 9 and report["in_a_row"] == 3 and report["loss"] == "nan"
    assert report["samples_consumed_before"] == 8 * 32
    assert "patch.kernel" in report["gradients_not_finite"]
    # What was wrong is mended: the same command goes on.
    train(tiny(max_steps=8), str(tmp_path), planted(lambda step: False))


def test_a_report_names_the_samples_that_are_not_finite():
    x = jnp.zeros((4, 3)).at[2, 1].set(jnp.inf)
    values = {"loss": float("inf"), "grad_norm": 1.0}
    report = describe(5, 4, values, np.array([1.0, np.nan]), ["['a']", "['b']"], x)
    assert report["samples_not_finite"] == [18] and report["gradients_not_finite"] == ["['b']"]
    whole = describe(5, 4, values, np.ones(2), ["a", "b"], jnp.zeros((4, 3), jnp.uint8))
    assert whole["samples_not_finite"] == [] == whole["gradients_not_finite"]


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
    from utils import data

    whole = data.batches

    def slow(*args, **options):
        for number, batch in enumerate(whole(*args, **options)):
            time.sleep(0.6 * (number == 3))
            yield batch

    monkeypatch.setattr(data, "batches", slow)
    train(tiny(max_steps=4, stall=0.2), str(tmp_path), planted(lambda step: False))
    assert "has had no data for" in capsys.readouterr().err
