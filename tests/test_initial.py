"""Training begun from a model that is there: its velocity stays, and resuming needs no source."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from pipelines import build, initial, objectives
from pipelines.flow import FlowPipeline
from pipelines.train import train
from tests.conftest import thorough
from utils.cli import UserError
from utils.sharding import born_sharded, make_mesh
from utils.step import init_state

LABELS = np.array([0, 3, 9, 10])


def config_of(**model):
    config = digits.get_config()
    config.model.update({"depth": 1, "hidden_size": 16, "num_heads": 2, **model})
    config.update({"batch_size": 16, "max_steps": 2, "log_interval": 1, "eval_interval": 100})
    config.sample.update({"num": 8, "steps": (1,)})
    return config


def random_pipeline(path, objective="flow_matching", num_classes=10, **model):
    """A network whose every parameter counts, as a folder."""
    config = config_of(**model)
    config.objective = objective
    card = {"shape": [8, 8, 1], "num_classes": num_classes, "train_steps": 5, "train_flops": 7.0}
    pipeline = FlowPipeline.build(config, card)
    params = pipeline.network.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda a: 0.3 * jax.random.normal(next(keys), a.shape), params)
    pipeline.with_params(params).save_pretrained(path)
    return FlowPipeline.from_pretrained(path)


def begun(path, num_classes=10, objective="mean_flow", **model):
    """The pipeline that training from `path` would start with."""
    config = config_of(**model)
    config.update({"init_from": str(path), "objective": objective})
    network = build.network(config, (8, 8, 1), num_classes)
    init, card = initial.begin(config, network)
    state = born_sharded(functools.partial(init_state, config), make_mesh(), init)
    average = state.ema[str(config.ema.decay)]
    jax.tree.map(np.testing.assert_array_equal, average, state.params)
    built = FlowPipeline.build(config, {"shape": [8, 8, 1], "num_classes": num_classes}, average)
    return built, card["initialised_from"]


def inputs(n=4):
    z = np.random.default_rng(0).standard_normal((n, 8, 8, 1), np.float32)
    t = np.linspace(0.2, 1, n, dtype=np.float32)
    return z, t


@pytest.mark.parametrize("source", ["t", "t,t-r"])
@pytest.mark.parametrize("wanted", ["t,t-r", "t,r"])
def test_a_flow_keeps_its_velocity_for_every_r(tmp_path, source, wanted):
    """u(z, t, t) is what it was, and u(z, r, t) too: what is told of r has no effect yet."""
    theirs = random_pipeline(tmp_path / "flow", time_inputs=source)
    ours, card = begun(tmp_path / "flow", time_inputs=wanted)
    z, t = inputs()
    expected = theirs.velocity(z, t, t, LABELS)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(ours.velocity(z, t, t, LABELS), expected, atol=3e-5)
    np.testing.assert_allclose(ours.velocity(z, 0 * t, t, LABELS), expected, atol=3e-5)
    assert card == {"path": str(tmp_path / "flow"), "train_steps": 5, "train_flops": 7.0}


def test_what_is_told_of_r_can_be_learnt(tmp_path):
    """Its first layer is not zero: the gradient reaches its last one."""
    random_pipeline(tmp_path / "flow", time_inputs="t")
    ours, _ = begun(tmp_path / "flow")
    z, t = (jnp.asarray(a) for a in inputs())

    def loss(params):
        u = ours.network.apply(params, z, t / 2, t, jnp.asarray(LABELS, jnp.int32), None)
        return jnp.sum((u - 1) ** 2)

    grads = jax.grad(loss)(ours.params)["condition"]["time_t-r"]
    assert np.abs(grads["out"]["kernel"]).max() > 1e-3
    assert np.abs(grads["in"]["kernel"]).max() == 0  # as out is zero; the next step reaches it


def test_mean_flow_goes_on_as_it_is(tmp_path):
    theirs = random_pipeline(tmp_path / "mean", "mean_flow")
    ours, _ = begun(tmp_path / "mean")
    z, t = inputs()
    np.testing.assert_allclose(
        ours.velocity(z, t / 3, t, LABELS), theirs.velocity(z, t / 3, t, LABELS), atol=3e-5
    )
    assert np.abs(theirs.velocity(z, t / 3, t) - theirs.velocity(z, t, t)).max() > 0.1


@pytest.mark.parametrize("classes", [0, 3])
def test_other_labels_start_as_the_null_label(tmp_path, classes, capsys):
    theirs = random_pipeline(tmp_path / "flow")
    ours, _ = begun(tmp_path / "flow", num_classes=classes)
    z, t = inputs()
    labels = np.arange(4) % (classes + 1)
    found = ours.velocity(z, t, t, labels)
    np.testing.assert_allclose(found, theirs.velocity(z, t, t), atol=3e-5)
    assert "labels are others" in capsys.readouterr().err


ROPE = {"positions": "rope", "norm": "rms", "mlp": "swiglu", "qk_norm": True}
CHANGES = [  # of the network that is there, and of the one that begins as it
    (ROPE, ROPE | {"guidance_inputs": True, "velocity_head": 1}),
    ({"guidance_inputs": True, "velocity_head": 1}, {}),
    ({"conditioning": "tokens"}, {"conditioning": "tokens", "velocity_head": 1}),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_what_a_network_gains_or_loses_changes_no_velocity(tmp_path, before, after):
    """A second head says at first what the first says; guidance, told or no more, is none."""
    theirs = random_pipeline(tmp_path / "flow", **before)
    ours, _ = begun(tmp_path / "flow", **after)
    z, t = inputs()
    expected = theirs.velocity(z, t, t, LABELS)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(ours.velocity(z, t / 2, t, LABELS), expected, atol=5e-5)
    apply = ours.network.heads or ours.network.apply
    label = jnp.asarray(LABELS, jnp.int32)
    told = (jnp.tile(jnp.array([[4.0, 0.2, 0.7]]), (4, 1)),) if ours.network.told else ()
    found = apply(ours.params, jnp.asarray(z), jnp.asarray(t), jnp.asarray(t), label, None, *told)
    for u in jax.tree.leaves(found):
        np.testing.assert_allclose(u, expected, atol=5e-5)


def test_what_is_told_by_tokens_stays(tmp_path):
    random_pipeline(tmp_path / "flow", conditioning="tokens")
    for other, told in (
        ({"time_inputs": "t-r"}, "--model.time_inputs=t,t-r"),
        ({"guidance_inputs": True}, "--model.guidance_inputs=False"),
    ):
        with pytest.raises(UserError, match=told):
            begun(tmp_path / "flow", conditioning="tokens", **other)
    with pytest.raises(UserError, match="must both have labels"):
        begun(tmp_path / "flow", num_classes=0, conditioning="tokens")


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"num_heads": 4}, "--model.num_heads=2"),
        ({"hidden_size": 32}, "has model.hidden_size=16, .* give --model.hidden_size=16"),
        ({"depth": 2}, "give --model.depth=1"),
        ({"mlp_ratio": 2.0}, "is another network"),
        ({"time_scale": 2.0}, "--model.time_scale=1.0"),
        ({"time_inputs": "t-r"}, "--model.time_inputs with t"),
        *(({key: value}, f"--model.{key}=") for key, value in ROPE.items()),
        ({"conditioning": "tokens"}, "--model.conditioning=adaln"),
    ],
)
def test_another_network_is_refused_in_one_line(tmp_path, model, told):
    random_pipeline(tmp_path / "flow")
    with pytest.raises(UserError, match=told):
        begun(tmp_path / "flow", **model)


@thorough
def test_a_run_that_was_begun_so_goes_on_without_its_source(tmp_path, standard_promotion):
    theirs = random_pipeline(tmp_path / "flow", time_inputs="t")
    config = config_of()
    config.update({"init_from": str(tmp_path / "flow"), "save_interval": 1, "max_steps": 1})
    config.optimizer.lr = 1e-9
    train(
        config.copy_and_resolve_references(), str(tmp_path / "run"), objectives.mean_flow_objective
    )
    run = FlowPipeline.from_pretrained(tmp_path / "run")
    z, t = inputs()
    np.testing.assert_allclose(run.velocity(z, t, t), theirs.velocity(z, t, t), atol=1e-4)
    assert run.card["initialised_from"]["train_flops"] == 7.0
    # A first save that was killed leaves no checkpoint: the run begins from the flow once more.
    done = tmp_path / "run/checkpoints/1"
    done.rename(done.with_name("1.orbax-checkpoint-tmp"))
    bare = config.copy_and_resolve_references()
    bare.init_from = ""
    with pytest.raises(UserError, match="holds no whole checkpoint: give --init_from="):
        train(bare, str(tmp_path / "run"), objectives.mean_flow_objective)
    again = config.copy_and_resolve_references()
    train(again, str(tmp_path / "run"), objectives.mean_flow_objective)
    run = FlowPipeline.from_pretrained(tmp_path / "run")
    np.testing.assert_allclose(run.velocity(z, t, t), theirs.velocity(z, t, t), atol=1e-4)
    # With a checkpoint it needs its source no more.
    shutil.rmtree(tmp_path / "flow")
    bare.max_steps = 2
    train(bare, str(tmp_path / "run"), objectives.mean_flow_objective)
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert card["initialised_from"]["train_steps"] == 5
