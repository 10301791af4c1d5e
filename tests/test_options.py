"""Every option trains, and options that make no sense together are told so in one line.

A run is 200 steps of a tiny network on the embedded digits, by the functions of the pipeline. What
takes time is compiling, so that the runs of `TOGETHER` have an option of each kind at once; with
THOROUGH=1 each has a run of its own, and all run on eight devices too.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base, digits, toy
from pipelines import build, objectives
from pipelines.flow import FlowPipeline
from tests.conftest import THOROUGH
from utils import averages, data
from utils.cli import UserError
from utils.sharding import born_sharded, make_mesh, to_global
from utils.step import init_state, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS, BATCH = 200, 32
DIT = {"model.depth": 1, "model.hidden_size": 16, "model.patch_size": 4, "model.num_heads": 2}
UNET = {
    "model.name": "unet",
    "model.depth": 1,
    "model.hidden_size": 8,
    "model.channel_multipliers": (1, 1),
    "model.unroll": 1,
}
DATA = {"model.prediction": "data"}
SECOND = {"objective": "improved_mean_flow", "model.depth": 2, "model.velocity_head": 1}
TOLD = {
    "objective": "improved_mean_flow",
    "model.guidance_inputs": True,
    "improved_mean_flow.omega_max": 4.0,
}
# α falls within the run; the error at r = t, against v, has no α in it.
FALLING = {"transition": (50, 150)}


def falling(name: str, **more) -> dict:
    values = {**FALLING, **more}
    return {"objective": name, **{f"{name}.{key}": value for key, value in values.items()}}


OPTIONS = {
    "flow_matching": {"objective": "flow_matching"},
    "mean_flow": {"objective": "mean_flow"},
    "alpha_flow falling": falling("alpha_flow", omega=0.5, kappa=0.5),
    "shortcut": {"objective": "shortcut", "shortcut.interval_share": 0.25},
    "consistency falling": falling("consistency", interval_share=0.5),
    "data": DATA,
    "time range": {"mean_flow.time_range": (0.05, 0.95)},
    "unet": UNET,
    "unet fir": UNET | {"model.resample": "fir"},
    "unet attention": UNET | {"model.attention_resolutions": (8,), "model.num_heads": 2},
    "rope": {"model.positions": "rope"},
    "swiglu": {"model.mlp": "swiglu"},
    "rms": {"model.norm": "rms"},
    "qk_norm": {"model.qk_norm": True},
    "tokens": {"model.conditioning": "tokens"},
    "second head": SECOND,
    "told guidance": TOLD,
    "dropout": {"model.dropout": 0.1, "model.class_dropout_prob": 0.2},
    "muon": {"optimizer.name": "muon"},
    "adamw8bit": {"optimizer.name": "adamw8bit", "model.hidden_size": 32},
    "bfloat16 moments": {"optimizer.moments": "bfloat16"},
    "cosine": {"optimizer.schedule": "cosine"},
    "wsd": {"optimizer.schedule": "wsd", "optimizer.decay_steps": 50},
    "ema interval": {"ema.interval": 5},
    "ema also": {"ema.also": (0.9, 0.999)},
    "ema posthoc": {"ema.posthoc": (0.05, 0.1), "ema.snapshot_interval": 100},
}
TOGETHER = [
    ("mean_flow", "dropout", "bfloat16 moments", "time range", "ema also"),
    ("alpha_flow falling", "swiglu", "rms", "cosine", "ema interval"),
    ("shortcut", "data", "adamw8bit", "wsd"),
    ("second head", "told guidance", "tokens", "rope", "qk_norm", "muon", "ema posthoc"),
    ("flow_matching", "unet", "unet fir", "unet attention", "data"),
    ("consistency falling", "data"),
]
ON_EIGHT = TOGETHER[:1]  # 8 bits and U-Nets take minutes, since two cores are all eight devices
if THOROUGH:
    OPTIONS["improved_mean_flow"] = {"objective": "improved_mean_flow"}  # without a second head
OBJECTIVES = [name for name in OPTIONS if "objective" in OPTIONS[name]]
if THOROUGH:
    TOGETHER += [(name,) for name in OPTIONS] + [(name, "data") for name in OBJECTIVES]
    ON_EIGHT = TOGETHER
RUNS = [*itertools.product(dict.fromkeys(TOGETHER), [1]), *itertools.product(ON_EIGHT, [8])]


def small_config(names: tuple[str, ...]) -> ConfigDict:
    config = digits.get_config()
    flat = {
        "batch_size": BATCH,
        "max_steps": STEPS,
        "optimizer.lr": 4e-3,
        "optimizer.warmup_steps": 10,
    }
    for changes in (flat, DIT, *(OPTIONS[name] for name in names)):
        config.update_from_flattened_dict(changes)
    if config.model.name == "unet":
        config.model.update({"patch_size": None})
    config.objective = config.objective or "mean_flow"
    build.check_ranges(config)
    return config


def bound(config: ConfigDict, dataset, network, local: int):
    flow = config.objective == "flow_matching"
    of = objectives.flow_objective if flow else objectives.average_objective
    return objectives.with_forward(of(config, dataset.num_classes, local), network)


@functools.cache
def trained(names: tuple[str, ...], devices: int):
    """What is to fall, (STEPS,), and the state at the end."""
    config = small_config(names)
    dataset = data.load(config)
    network = build.network(config, dataset.shape, dataset.num_classes)
    objective = bound(config, dataset, network, BATCH // devices)
    mesh = make_mesh(-1, 1, jax.devices()[:devices])
    encode = build.autoencoder(config, dataset.shape).sample
    step = make_step(config, network.apply, objective, encode, mesh)
    state = born_sharded(lambda: init_state(config, network.init), mesh)
    batches = data.batches(dataset.train, batch_size=BATCH, seed=0)
    found = []
    for _ in range(STEPS):
        state, metrics = step(state, to_global(mesh, next(batches)))
        found.append(metrics)
    found = jax.device_get(found)
    assert not any(metrics["skipped"] for metrics in found)
    name = "velocity_error" if any("falling" in name for name in names) else "error"
    return np.array([metrics[name] for metrics in found]), jax.device_get(state), config


def test_the_runs_have_every_option():
    assert {name for names in TOGETHER for name in names} == set(OPTIONS)


@pytest.mark.parametrize(("names", "devices"), RUNS, ids=str)
def test_two_hundred_steps_and_the_error_falls(names, devices):
    errors, state, config = trained(names, devices)
    first, last = errors[:20].mean(), errors[-20:].mean()
    assert last < 0.9 * first
    assert set(state.ema) == set(averages.names(config.ema))
    moved = [np.abs(a - b).max() for average in state.ema.values() for a, b in
             zip(jax.tree.leaves(average), jax.tree.leaves(state.params), strict=True)]  # fmt: skip
    assert np.isfinite(moved).all() and max(moved) > 0


@pytest.mark.parametrize("names", ON_EIGHT, ids=str)
def test_eight_devices_take_the_first_steps_of_one(names):
    """The same random numbers and sums in another order, until rounding has grown."""
    one, eight = trained(names, 1)[0], trained(names, 8)[0]
    np.testing.assert_allclose(eight[:5], one[:5], rtol=1e-3)


# What makes no sense.


NONSENSE = {
    "second head, MeanFlow": (
        {"objective": "mean_flow", "model.velocity_head": 1},
        "model.velocity_head is for --objective=improved_mean_flow",
    ),
    "second head, flow matching": (
        {"objective": "flow_matching", "model.velocity_head": 1},
        "flow_matching does not teach it",
    ),
    "second head, shortcut": (
        {"objective": "shortcut", "model.velocity_head": 1},
        "shortcut does not teach it",
    ),
    "second head deeper than the network": (
        {**SECOND, "model.velocity_head": 3},
        "give --model.velocity_head from 0 to 2",
    ),
    "told guidance, α-Flow": (
        {"objective": "alpha_flow", "model.guidance_inputs": True},
        "model.guidance_inputs is for --objective=improved_mean_flow",
    ),
    "told guidance, consistency": (
        {"objective": "consistency", "model.guidance_inputs": True},
        "consistency does not teach it",
    ),
    "told of no guidance": ({**TOLD, "improved_mean_flow.omega_max": 1.0}, "or neither"),
    "guidance not told": ({**TOLD, "model.guidance_inputs": False}, "or neither"),
    "guidance without a null label": (
        {**TOLD, "model.class_dropout_prob": 0.0},
        "--model.class_dropout_prob=0.1",
    ),
    "guidance without labels": ({**TOLD, "model.class_dropout_prob": 1.0}, "needs labels"),
    "α-Flow's guidance without a null label": (
        {"objective": "alpha_flow", "alpha_flow.omega": 2.0, "model.class_dropout_prob": 0.0},
        "--model.class_dropout_prob=0.1",
    ),
    "largest scale below 1": ({**TOLD, "improved_mean_flow.omega_max": 0.5}, "from 1 to 1000"),
    "no transition": (
        {"objective": "alpha_flow", "alpha_flow.transition": (9, 9)},
        "give --alpha_flow.transition=0,9",
    ),
    "no transition, consistency": (
        {"objective": "consistency", "consistency.transition": (9, 9)},
        "give --consistency.transition=0,9",
    ),
    "transition backwards": (
        {"objective": "alpha_flow", "alpha_flow.transition": (9, 5)},
        "the lower first",
    ),
    "clamps that meet": ({"alpha_flow.clamp": 0.5}, "give --alpha_flow.clamp from 0 to 0.49"),
    "no levels": ({"shortcut.levels": 0}, "give --shortcut.levels from 1 to 20"),
    "half a level": ({"shortcut.clip": -1.0}, "give --shortcut.clip from 0"),
    "times reversed": ({"mean_flow.time_range": (0.9, 0.1)}, "the lower first"),
    "times beyond": ({"flow_matching.time_range": (0.0, 1.5)}, "two numbers from 0 to 1"),
    "averages of noise": (
        {"objective": "shortcut", "model.prediction": "noise"},
        "noise says nothing of r < t",
    ),
    "one time": ({"objective": "alpha_flow", "model.time_inputs": "t"}, "two times"),
    "a flow told t − r": ({"objective": "flow_matching", "model.time_inputs": "t-r"}, "always 0"),
    "odd heads": (
        {"model.positions": "rope", "model.hidden_size": 20, "model.num_heads": 2},
        "model.positions=rope needs heads of a multiple of 4",
    ),
    "U-Net with rope": ({**UNET, "model.positions": "rope"}, "is for model.name=dit"),
    "U-Net with a second head": (
        {**UNET, "objective": "improved_mean_flow", "model.velocity_head": 1},
        "is for model.name=dit",
    ),
    "U-Net of noise": (
        {**UNET, "objective": "flow_matching", "model.prediction": "noise"},
        "is for model.name=dit",
    ),
    "U-Net halved too often": ({**UNET, "model.channel_multipliers": (1, 1, 1, 1, 1)}, "8"),
    "DiT with a U-Net's filter": ({"model.resample": "fir"}, "is for model.name=unet"),
    "attention where there is no map": ({**UNET, "model.attention_resolutions": (5,)}, "5"),
    "unknown MLP": ({"model.mlp": "relu"}, "give --model.mlp=gelu or swiglu"),
    "unknown norm": ({"model.norm": "batch"}, "give --model.norm=layer or rms"),
    "wsd without decay": (
        {"optimizer.schedule": "wsd"},
        "give --optimizer.decay_steps=40 or the like",
    ),
    "wsd that is all decay": (
        {"optimizer.schedule": "wsd", "optimizer.decay_steps": STEPS},
        "are more than max_steps=200",
    ),
    "decay without wsd": ({"optimizer.decay_steps": 5}, "is for --optimizer.schedule=wsd"),
    "8 bits and 16": (
        {"optimizer.name": "adamw8bit", "optimizer.moments": "bfloat16"},
        "leave it out with adamw8bit",
    ),
    "unknown optimizer": ({"optimizer.name": "lion"}, "adamw8bit or muon"),
    "an average twice": ({"ema.also": (0.99,)}, "twice"),
    "snapshots of nothing": ({"ema.snapshot_interval": 10}, "--ema.posthoc=0.05,0.1"),
    "width": ({"ema.posthoc": (0.9,)}, "ema.posthoc=(0.9,)"),
    "an unknown objective": ({"objective": "rectified"}, "give --objective=mean_flow or"),
}


def made(config: ConfigDict) -> FlowPipeline:
    """What a training script checks before anything is computed, in its order."""
    build.check_ranges(config)
    dataset = data.load(config)
    of = objectives.average_objective
    if config.objective == "flow_matching":
        of = objectives.flow_objective
    of(config, dataset.num_classes, BATCH)
    build.network(config, dataset.shape, dataset.num_classes)
    card = {"shape": list(dataset.shape), "num_classes": dataset.num_classes}
    return FlowPipeline.build(config, card)


def changed(changes: dict) -> ConfigDict:
    config = small_config(())
    if changes.get("model.name") == "unet":
        config.model.update({"patch_size": None})
    config.update_from_flattened_dict(changes)
    return config


def told_in_one_line(error: pytest.ExceptionInfo, words: str) -> None:
    assert words in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(("changes", "words"), NONSENSE.values(), ids=NONSENSE)
def test_what_makes_no_sense_is_told_in_one_line(changes, words):
    with pytest.raises(UserError) as error:
        made(changed(changes))
    told_in_one_line(error, words)


def test_points_know_nothing_of_pictures_options():
    for changes in ({"model.positions": "rope"}, {"model.resample": "fir"}, {"model.name": "unet"}):
        config = toy.get_config("checkerboard")
        config.update_from_flattened_dict(changes)
        with pytest.raises(UserError) as error:
            made(config)
        told_in_one_line(error, "model.")


def test_every_option_makes_sense_on_its_own():
    """So that what the table above refuses is refused for what it says."""
    for names in ((), *((name,) for name in OPTIONS)):
        made(small_config(names))


SAMPLED = {  # objective, steps, sampler, guidance, and what is told; "" where it is right
    "meanflow of consistency": ("consistency", 2, "meanflow", 1.0, "use consistency"),
    "meanflow of consistency, once": ("consistency", 1, "meanflow", 1.0, ""),
    "consistency in steps": ("consistency", 4, "consistency", 1.0, ""),
    "consistency of a flow": ("flow_matching", 4, "consistency", 1.0, "use euler"),
    "consistency of MeanFlow": ("mean_flow", 4, "consistency", 1.0, ""),
    "more than it was told": ("told", 1, "meanflow", 5.0, "scales from 1 to 4"),
    "less than it was told": ("told", 1, "meanflow", 0.5, "scales from 1 to 4"),
    "what it was told": ("told", 1, "meanflow", 4.0, ""),
}


@pytest.mark.parametrize(
    ("name", "steps", "sampler", "scale", "words"), SAMPLED.values(), ids=SAMPLED
)
def test_samplers_that_a_network_was_not_taught_for(name, steps, sampler, scale, words):
    config = changed(TOLD if name == "told" else {"objective": name})
    pipeline = made(config)
    if not words:
        assert pipeline.check(steps, sampler, [scale]) == sampler
        return
    with pytest.raises(UserError) as error:
        pipeline.check(steps, sampler, [scale])
    told_in_one_line(error, words)


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_stochastic", "dopri5"])
def test_consistency_training_teaches_no_velocity_of_the_flow(sampler):
    """With every sample at r = 0 < t, u at r = t is what nothing was said about."""
    config = changed({"objective": "consistency"})
    assert config.consistency.interval_share == base.get_config().consistency.interval_share == 1
    with pytest.raises(UserError):
        made(config).check(8, sampler, [1.0])


def test_told_guidance_is_one_call_per_step():
    pipeline = made(changed(TOLD))
    assert pipeline.network_calls(8, 3.0, (0.2, 0.9)) == 8
    plain = made(changed({"objective": "improved_mean_flow"}))
    assert plain.network_calls(8, 3.0) == 16
