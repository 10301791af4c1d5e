"""What the training scripts share: config → data, network, objective → `fit`."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flows.consistency import self_consistency
from flows.path import interpolate
from pipelines import build
from pipelines.flow import FlowPipeline, read_json, trained_card, write_json
from utils import data, flops
from utils.cli import UserError, flatten
from utils.figures import grid
from utils.log import Logger
from utils.sharding import make_mesh
from utils.train import EVALUATION, TrainState, check_batch, fit, stream

# What may change between the parts of a run; everything else makes it another run.
FREE = (
    *("data_dir", "max_steps", "log_interval", "eval_interval", "save_interval"),
    *("keep_checkpoints", "tensorboard", "model.remat", "model.unroll"),
    *("mesh.", "sample.", "wandb."),
)


def train(config: ConfigDict, workdir: str, make_objective: Callable) -> TrainState:
    """Trains the config's network, or goes on where `workdir` stopped.

    Args:
      workdir: the run's folder; empty: runs/DATASET/OBJECTIVE.
      make_objective: (config, num_classes) → objective, bound to its options.
    Raises:
      UserError: bad options, missing data, or a workdir that holds another run.
    """
    build.check_ranges(config)
    dataset = data.load(config)
    objective = make_objective(config, dataset.num_classes)
    if config.objective not in ("", objective.func.__name__):
        raise UserError(f"objective={config.objective!r} is set by the script: leave it out")
    config.objective = objective.func.__name__
    path = pathlib.Path(workdir or f"runs/{config.dataset_name}/{config.objective}")
    network = build.network(config, dataset.shape, dataset.num_classes)
    encode = build.autoencoder(config, dataset.shape).sample
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch(config, mesh)
    check_workdir(path, config, dataset.identity)
    card = make_card(config, dataset, network, objective)
    write_json(path / "config.json", config.to_dict())
    write_json(path / "card.json", card)
    return fit(
        config,
        network.apply,
        objective,
        mesh=mesh,
        init=network.init,
        batches=functools.partial(batches, config, dataset),
        encode=encode,
        evaluate=Evaluate(config, card, dataset),
        workdir=path,
    )


def batches(config: ConfigDict, dataset: data.Dataset, start_step: int) -> Iterator[dict]:
    """This host's share of the training batches, from step `start_step` on."""
    return data.batches(
        dataset.train,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        flip=config.flip,
        shard=(jax.process_index(), jax.process_count()),
    )


class Evaluate:
    """Draws a grid per step count from the same noise, and measures self-consistency."""

    def __init__(self, config: ConfigDict, card: dict[str, Any], dataset: data.Dataset):
        """Keeps the pipeline, so that it compiles once."""
        self.config, self.card = config, card
        self.pipeline = FlowPipeline.build(config, card)
        self.decay = str(config.ema.decay)
        source = dataset.heldout if len(dataset.heldout) else dataset.train
        held = data.arrays(source, range(min(256, len(source))))
        self.held = {k: jnp.asarray(v) for k, v in held.items()}
        self.consistency = jax.jit(self._consistency)

    def __call__(self, state: TrainState, logger: Logger) -> None:
        """Writes pictures and scalars of the averaged parameters."""
        step, params = int(state.step), state.ema[self.decay]
        for steps in self.config.sample.steps:
            logger.picture(step, f"steps_{steps}", grid(self._pictures(params, steps)))
        if self.config.objective == "mean_flow":
            logger.scalars(step, {"self_consistency": float(self.consistency(params))})

    def _pictures(self, params: Any, steps: int) -> np.ndarray:
        count, classes = self.config.sample.num, self.card["num_classes"]
        labels = np.arange(count) % max(classes, 1)
        scale = self.config.sample.guidance
        return self.pipeline.with_params(params)(labels, steps=steps, guidance=scale)

    def _consistency(self, params: Any) -> jax.Array:
        """The mean self-consistency at three ordered times on each held-out sample."""
        key = stream(self.config.seed, EVALUATION)
        noise_key, time_key, encode_key = jax.random.split(key, 3)
        n = self.held["label"].shape[0]
        encoder = build.autoencoder(self.config, self.pipeline.shape)
        x = encoder.sample(self.held["x"], jax.random.split(encode_key, n))
        r, s, t = jnp.sort(jax.random.uniform(time_key, (3, n)), axis=0)
        z = interpolate(x, jax.random.normal(noise_key, x.shape), t)
        velocity = functools.partial(self._velocity, params)
        return jnp.mean(self_consistency(velocity, z, r, s, t))

    def _velocity(self, params: Any, z: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
        return self.pipeline.network.apply(params, z, r, t, self.held["label"], None)


def make_card(
    config: ConfigDict, dataset: data.Dataset, network: build.Network, objective: Callable
) -> dict[str, Any]:
    """What is trained, for whoever meets the folder later; `trained_card` says how much."""
    params = jax.eval_shape(network.init, jax.random.key(0))
    card = {
        "dataset": dataset.identity,
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes,
        "parameters": build.count_parameters(params),
        "flops_per_step": step_flops(config, dataset, objective),
    }
    return card | trained_card(config, card, 0)


def step_flops(config: ConfigDict, dataset: data.Dataset, objective: Callable) -> int:
    """Model FLOPs of one training step: the gradient of the objective, without recomputation."""
    plain = config.copy_and_resolve_references()
    plain.model.remat = False
    network = build.network(plain, dataset.shape, dataset.num_classes)
    n = config.batch_size
    batch = {
        "x": jax.ShapeDtypeStruct((n, *dataset.shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32),
        "position": jax.ShapeDtypeStruct((n,), jnp.int32),
    }
    params = jax.eval_shape(network.init, jax.random.key(0))
    gradient = jax.grad(functools.partial(objective, network.apply), has_aux=True)
    return flops.count(gradient, params, batch, jax.random.key(0))


def check_workdir(path: pathlib.Path, config: ConfigDict, dataset: str) -> None:
    """Raises UserError where `path` holds checkpoints of another config or of other data."""
    if path.is_file():
        raise UserError(f"{path} is a file: name a folder with --workdir")
    if not any((path / "checkpoints").glob("[0-9]*")):
        return
    old = flatten(ConfigDict(read_json(path / "config.json")))
    new = flatten(ConfigDict(json.loads(json.dumps(config.to_dict()))))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    free = FREE if config.optimizer.schedule == "constant" else tuple(set(FREE) - {"max_steps"})
    changed = [k for k in changed if not k.startswith(free)]
    if changed:
        was = ", ".join(f"{k}={old.get(k)} (now {new.get(k)})" for k in changed[:3])
        raise UserError(
            f"{path} holds another run, with {was}: give the same options to continue it, "
            "or another --workdir"
        )
    trained_on = read_json(path / "card.json").get("dataset")
    if trained_on != dataset:
        raise UserError(
            f"{path} holds a run on {trained_on}, the data here is {dataset}: see --data_dir, "
            "or name another --workdir"
        )
