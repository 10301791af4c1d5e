"""Runs as an evaluation meets them: checkpoints, averages, and what names their samples."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import digits
from pipelines import objectives, runs, train
from pipelines.flow import FlowPipeline
from utils.cli import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """Three steps of training, saved at each, with a quick distance at the end."""
    config = digits.get_config()
    config.model.update({"depth": 1, "hidden_size": 16, "num_heads": 2, "unroll": 1})
    config.update({"batch_size": 16, "max_steps": 3, "save_interval": 1, "keep_checkpoints": 3})
    config.update({"log_interval": 1, "eval_interval": 3})
    config.optimizer.update({"lr": 0.01, "warmup_steps": 0})
    config.ema.update({"decay": 0.9, "start_step": 0})
    config.sample.update({"steps": (1,), "num": 4})
    config.fid.update({"num": 40, "steps": (1, 2), "features": "classifier"})
    config.update({"best_metric": "fd_classifier_quick_40/1_step"})
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.chdir(tmp_path_factory.mktemp("cwd"))  # the cache lies below
        train.train(config, str(path), objectives.flow_objective)
    return path


@pytest.fixture(scope="module")
def run(workdir) -> runs.Run:
    return runs.load_runs([str(workdir)])[workdir.name]


def flat(pipeline: FlowPipeline) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(pipeline.params)])


def test_a_quick_distance_is_logged_under_a_name_that_says_so(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if any("quick" in key for key in line)]
    assert found.pop("step") == 3
    assert set(found) == {"fd_classifier_quick_40/1_step", "fd_classifier_quick_40/2_steps"}
    assert min(found.values()) > 1  # three steps of training draw noise


def test_checkpoints_are_asked_for_by_step_or_word(run):
    assert run.checkpoints(["latest"]) == (3,)
    assert run.checkpoints(["all"]) == (1, 2, 3)
    assert run.checkpoints(["2", "latest"]) == (2, 3)
    assert run.checkpoints(["best"]) == (3,)  # the only one that was evaluated
    with pytest.raises(UserError, match="no checkpoint 7: there are 1, 2, 3, or all"):
        run.checkpoints(["7"])


def test_averages_are_asked_for_by_decay_and_the_parameters_by_none(run):
    own = str(run.pipeline.config.ema.decay)
    assert [run.average(word) for word in ("", own, "none")] == [own, own, "none"]
    with pytest.raises(UserError, match=f"no average of decay 0.5: there are {own}, none"):
        run.average("0.5")
    averaged, raw = (flat(run.load(3, ema)) for ema in (own, "none"))
    earlier = flat(run.load(2, own))
    assert np.abs(averaged - raw).max() > 1e-3
    assert np.abs(averaged - earlier).max() > 1e-4
    # The average after a step: d · the one before + (1 − d) · the parameters.
    decay = run.pipeline.config.ema.decay
    np.testing.assert_allclose(averaged, decay * earlier + (1 - decay) * raw, atol=1e-6)


def test_a_checkpoint_knows_how_much_training_it_has_seen(run):
    seen = [run.load(step, run.average("")).card["train_images"] for step in (1, 3)]
    assert seen == [16, 48]


def test_every_checkpoint_has_an_identity_that_moves_with_it(run, workdir, tmp_path):
    names = {run.identity(step) for step in (1, 2, 3)}
    assert len(names) == 3
    moved = shutil.copytree(workdir, tmp_path / "moved")
    again = runs.load_runs([str(moved)])["moved"]
    assert again.identity(3) == run.identity(3)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"max_steps": 99}))
    assert runs.load_runs([str(moved)])["moved"].identity(3) == run.identity(3)
    config["model"]["num_heads"] = 4  # the same shapes, other samples
    (moved / "config.json").write_text(json.dumps(config))
    assert runs.load_runs([str(moved)])["moved"].identity(3) != run.identity(3)
    stamp = moved / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    stamp.write_text(stamp.read_text().replace("48", "49"))
    (moved / "config.json").write_text((workdir / "config.json").read_text())
    assert runs.load_runs([str(moved)])["moved"].identity(3) != run.identity(3)


def test_an_exported_model_holds_one_step_and_one_average(run, tmp_path):
    own = run.average("")
    run.load(3, own).save_pretrained(tmp_path / "model")
    exported = runs.load_runs([str(tmp_path / "model")])["model"]
    assert exported.checkpoints(["latest"]) == exported.checkpoints(["all"]) == (3,)
    np.testing.assert_array_equal(
        flat(exported.load(3, exported.average(""))), flat(run.load(3, own))
    )
    with pytest.raises(UserError, match="leave --ema out"):
        exported.average("none")
    with pytest.raises(UserError, match="no checkpoint 2"):
        exported.checkpoints(["2"])
    with pytest.raises(UserError, match="was exported: it holds one step, 3"):
        FlowPipeline.from_pretrained(tmp_path / "model", step=2)
