"""FlowPipeline: what it draws is a function of (seed, index), and folders hold all of it."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import digits
from pipelines import flow
from pipelines.flow import FlowPipeline
from utils import sharding
from utils.cli import UserError


@functools.cache
def pipeline(objective: str = "mean_flow", classes: int = 10) -> FlowPipeline:
    """A small network with no weight left at zero."""
    config = digits.get_config()
    config.objective = objective
    config.model.update({"depth": 1, "hidden_size": 32, "num_heads": 2, "unroll": 1})
    card = {"shape": [8, 8, 1], "num_classes": classes, "flops_per_step": 1, "train_steps": 5}
    built = FlowPipeline.build(config, card)
    shapes = jax.eval_shape(built.network.init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return built.with_params(jax.tree.unflatten(tree, drawn))


LABELS = np.arange(13, dtype=np.int32) % 10


def test_pictures_do_not_depend_on_batches_or_devices(monkeypatch):
    whole = pipeline()(LABELS, steps=2, seed=3)
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(flow, "make_mesh", lambda: one_device)
    alone = pipeline()(LABELS, steps=2, seed=3)
    assert np.abs(whole.astype(int) - alone).max() <= 1  # rounding of the last bit at most
    monkeypatch.undo()
    assert whole.shape == (13, 8, 8, 1) and whole.dtype == np.uint8
    order = np.array([11, 2, 7])
    parts = pipeline()(LABELS[order], steps=2, seed=3, indices=order)
    assert np.abs(whole[order].astype(int) - parts).max() <= 1  # rounding of the last bit at most
    assert np.abs(whole[0].astype(int) - whole[10]).mean() > 5  # the same label, another index
    assert np.abs(whole.astype(int) - pipeline()(LABELS, steps=2, seed=4)).mean() > 5


def test_every_step_count_draws_other_pictures():
    drawn = [pipeline("flow_matching")(LABELS, steps=n).astype(int) for n in (1, 2, 4, 8)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.abs(a - b).max() > 2


def test_the_two_objectives_ask_the_network_for_different_velocities():
    average = pipeline()(LABELS, steps=2)
    config, card = pipeline("flow_matching").config, pipeline().card
    euler = FlowPipeline.build(config, card, pipeline().params)(LABELS, steps=2)
    assert np.abs(average.astype(int) - euler).max() > 2


def test_guidance_changes_pictures_and_its_calls_are_counted():
    plain, guided = (pipeline()(LABELS, steps=2, guidance=g) for g in (1.0, 4.0))
    assert np.abs(plain.astype(int) - guided).max() > 2
    assert pipeline().network_calls(8) == 8
    assert pipeline().network_calls(8, 4.0) == 16
    assert pipeline().network_calls(8, 4.0, (0.5, 1.0)) == 13
    assert (
        pipeline().network_calls(8, 4.0, (0.5, 1.0), "heun") == 16 + 5 + 4
    )  # 4 ends at 0.5 or above


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 0), ("float16", 3)])
def test_saved_and_loaded(tmp_path, dtype, apart):
    pipeline().save_pretrained(tmp_path / "model", dtype)
    loaded = FlowPipeline.from_pretrained(tmp_path / "model")
    a, b = (p(LABELS, steps=1).astype(int) for p in (pipeline(), loaded))
    assert np.abs(a - b).max() <= apart
    assert loaded.card == pipeline().card
    with pytest.raises(UserError, match="exists: name another folder"):
        pipeline().save_pretrained(tmp_path / "model")


def test_a_folder_serves_on_other_machines_than_it_was_trained_on(tmp_path):
    """Kernels of a TPU or GPU in its config, and `remat` as older versions wrote it."""
    pipeline().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"] |= {"attention": "splash", "attention_jvp": "fused", "remat": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = FlowPipeline.from_pretrained(tmp_path)
    assert loaded.config.model.remat == "full"
    difference = loaded(LABELS).astype(int) - pipeline()(LABELS)
    assert np.abs(difference).max() <= 1


def test_a_folder_that_cannot_serve_says_why(tmp_path):
    with pytest.raises(UserError, match="no run and no exported model"):
        FlowPipeline.from_pretrained(tmp_path / "nowhere")
    pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file(tensors | {"more": np.zeros(3)}, weights)
    with pytest.raises(UserError, match=r"1 tensors differ, first more: the network has None"):
        FlowPipeline.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        FlowPipeline.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        FlowPipeline.from_pretrained(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps(pipeline().card)[:-5])
    with pytest.raises(UserError, match="is not JSON"):
        FlowPipeline.from_pretrained(tmp_path)
    (tmp_path / "card.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        FlowPipeline.from_pretrained(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(UserError, match="lacks keys"):
        FlowPipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"modle": 3}')
    with pytest.raises(UserError, match="no config of this version"):
        FlowPipeline.from_pretrained(tmp_path)


def test_samples_that_are_not_finite_are_no_pictures():
    params = jax.tree.map(lambda a: a * jax.numpy.nan, pipeline().params)
    with pytest.raises(UserError, match="13 of 13 samples are not finite"):
        pipeline().with_params(params)(LABELS)


def test_bad_calls_say_so():
    with pytest.raises(UserError, match="steps=0: a whole number, at least 1"):
        pipeline()(LABELS, steps=0)
    with pytest.raises(UserError, match="no sampler 'eulr': there are meanflow, euler, heun"):
        pipeline()(LABELS, sampler="eulr")
    with pytest.raises(UserError, match="needs average velocities"):
        pipeline("flow_matching")(LABELS, sampler="meanflow")
    with pytest.raises(UserError, match="knows no labels"):
        pipeline(classes=0)(LABELS, guidance=2.0)
