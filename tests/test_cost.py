"""What a step costs beside flow matching's, counted and compiled at published sizes, not run."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from configs import base
from pipelines import build, objectives
from pipelines.train import step_flops

LATENTS = (32, 32, 4)
CLASSES = 1000
OBJECTIVES = {
    "flow_matching": (objectives.flow_objective, {}),
    "mean_flow": (objectives.mean_flow_objective, {}),
    "guided": (objectives.mean_flow_objective, {"omega": 1.0, "kappa": 0.5}),
    "plain": (objectives.mean_flow_objective, {"derivative": "plain"}),
    "plain, guided": (
        objectives.mean_flow_objective,
        {"derivative": "plain", "omega": 1.0, "kappa": 0.5},
    ),
}
SIZES = ("B/4", "B/2", "XL/2")


def configured(size, batch_size, name):
    """A config, and its objective as one device with the whole batch has it."""
    make, changes = OBJECTIVES[name]
    config = base.get_config()
    config.batch_size = batch_size
    config.model.size = size
    config.mean_flow.update(changes)
    return config, make(config, CLASSES, local=batch_size)


def model_flops(size, name):
    config, objective = configured(size, 4, name)
    return step_flops(config, LATENTS, CLASSES, objective)


@pytest.mark.parametrize("size", SIZES)
def test_model_flops_beside_flow_matching(size):
    """At most 1.20, and 1.62 with κ > 0; the plain form's are those of passes of the whole batch,
    4 and 6 for flow matching's 3."""
    flops = {name: model_flops(size, name) for name in OBJECTIVES}
    ratio = {name: count / flops["flow_matching"] for name, count in flops.items()}
    assert 3.5 / 3 <= ratio["mean_flow"] <= 1.20
    assert 4.75 / 3 <= ratio["guided"] <= 1.62
    assert ratio["plain"] == pytest.approx(4 / 3, rel=0.02)
    assert ratio["plain, guided"] == pytest.approx(6 / 3, rel=0.02)


def temporary_bytes(size, batch_size, name):
    """The gradient's temporary memory, compiled for this machine."""
    config, objective = configured(size, batch_size, name)
    network = build.network(config, LATENTS, CLASSES)
    objective = objectives.with_forward(objective, network)
    params = jax.eval_shape(network.init, jax.random.key(0))
    integers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    x = jax.ShapeDtypeStruct((batch_size, *LATENTS), jnp.float32)
    batch = {"x": x, "label": integers, "position": integers}
    gradient = jax.jit(jax.grad(functools.partial(objective, network.apply), has_aux=True))
    quick = {"xla_backend_optimization_level": "0"}  # of the code, not of the plan of memory
    compiled = gradient.lower(params, batch, jax.random.key(0)).compile(quick)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("size", "batch_size"), [("B/4", 32), ("XL/2", 8)])
def test_temporary_memory_beside_flow_matching(size, batch_size):
    """At most 1.10: what is computed apart keeps nothing for the backward pass."""
    flow = temporary_bytes(size, batch_size, "flow_matching")
    config, _ = configured(size, batch_size, "flow_matching")
    sizes = build.dit_sizes(config.model, LATENTS)
    tokens = math.prod(LATENTS[:2]) // sizes["patch_size"] ** 2
    activation = 4 * batch_size * tokens * sizes["hidden_size"]
    assert flow > 4 * sizes["depth"] * activation  # the activations count, not the parameters alone
    assert temporary_bytes(size, batch_size, "guided") <= 1.10 * flow
