"""What the training scripts share: config → data, network, objective → `fit`."""

import functools
import json
import os
import secrets
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flows.consistency import self_consistency
from flows.path import interpolate
from models.autoencoder import Autoencoder
from pipelines import build, initial, objectives
from pipelines.flow import FlowPipeline, consistent
from pipelines.quick import QuickDistance
from pipelines.runs import is_free
from pipelines.stored import read_config, read_json, trained_card, write_json
from utils import data, files, flops
from utils.cli import UserError, absolute, flatten
from utils.compilation import Ahead
from utils.feed import feed
from utils.figures import grid
from utils.hosts import Preemption
from utils.log import Logger
from utils.sharding import (
    abstract_state,
    agreed,
    anywhere,
    batch_sharding,
    make_mesh,
    replicated,
)
from utils.step import EVALUATION, TrainState, init_state, make_step, stream
from utils.train import check_batch, fit


def train(config: ConfigDict, workdir: str, make_objective: Callable) -> TrainState:
    """Trains the config's network, or goes on where `workdir` stopped.

    Args:
      workdir: the run's folder, or gs://BUCKET/FOLDER; empty: runs/DATASET/OBJECTIVE.
      make_objective: (config, num_classes, local) → objective, bound to its options; local is the
        number of samples that a device has in a microbatch.
    Raises:
      UserError: bad options, missing data, or a workdir that holds another run.
      Preempted: it was asked to stop, and has saved.
    """
    build.check_ranges(config)
    if config.deterministic:
        be_deterministic()
    with Preemption() as preemption:  # from here on, before data is loaded and a step compiled
        return _train(config, workdir, make_objective, preemption)


def _train(
    config: ConfigDict, workdir: str, make_objective: Callable, preemption: Preemption
) -> TrainState:
    files.check_local(data_dir=config.data_dir, autoencoder=config.autoencoder)
    files.reach(files.place(workdir))
    dataset = load(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch(config, mesh)
    local = config.batch_size // mesh.size // config.accumulation
    objective = make_objective(config, dataset.num_classes, local=local)
    check_objective(config, objective.func.__name__)
    config.objective = objective.func.__name__
    check_best(config)
    for key in ("data_dir", "autoencoder", "init_from"):
        config[key] = absolute(config[key])  # who reads the run may stand in another folder
    path = files.place(workdir or f"runs/{config.dataset_name}/{config.objective}")
    check_alike({"workdir": str(path), "data": dataset.identity, **flatten(config)})
    codec = build.autoencoder(config, dataset.shape, dataset.autoencoder)
    shape = build.latent_shape(codec, dataset.shape)
    network = build.network(config, shape, dataset.num_classes)
    objective = objectives.with_forward(objective, network)
    options = {key: config[key] for key in ("cache", "batch_size", "seed", "flip")}
    batches = feed(dataset.train, mesh, **options)
    check_workdir(path, config, dataset.identity, dataset.num_classes)
    begin, origin = initial.first(config, network, path, anywhere(has_checkpoints(path)))
    card = make_card(config, dataset, shape, network, objective) | origin
    pipeline = FlowPipeline.build(config, card, autoencoder=codec)
    pipeline.check(1, "", [config.sample.guidance])
    evaluate = Evaluate(pipeline, dataset, mesh)  # before anything is written: it may lack weights
    write_json(path / "config.json", config.to_dict())
    write_json(path / "card.json", {k: v for k, v in card.items() if not k.startswith("train_")})
    check_shared(path)
    step = Ahead(make_step(config, network.apply, objective, codec.sample, mesh))
    # While checkpoints are read, parameters initialised and a cache filled; not before, since GPUs
    # choose kernels by their speed, and were busy with references.
    if jax.process_index() == 0:
        print("compiling the step", file=sys.stderr)
    step.prepare(*abstract_arguments(config, dataset, network, mesh))
    state = fit(
        config,
        step,
        mesh=mesh,
        init=network.init,
        begin=begin,
        batches=batches,
        evaluate=evaluate,
        preemption=preemption,
        workdir=path,
    )
    write_json(path / "card.json", card | trained_card(config, card, int(state.step)))
    if jax.process_index() == 0:
        print(
            f"{path} is trained; python sample.py --workdir={path} draws from it", file=sys.stderr
        )
    return state


def load(config: ConfigDict) -> data.Dataset:
    """The data set, without labels where all are left out: model.class_dropout_prob = 1."""
    dataset = data.load(config)
    if config.model.class_dropout_prob == 1:
        return dataset._replace(num_classes=0, classes=())
    return dataset


def abstract_arguments(
    config: ConfigDict, dataset: data.Dataset, network: build.Network, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes, types and places of the state and of a batch, as the step gets them."""
    state = abstract_state(lambda: init_state(config, network.init), mesh)
    x, n = dataset.train[0]["x"], config.batch_size
    parts = {"x": (x.shape, x.dtype), "label": ((), np.int32), "position": ((), np.int32)}
    place = batch_sharding(mesh)
    return state, {
        name: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=place)
        for name, (shape, dtype) in parts.items()
    }


class Evaluate:
    """Draws a grid per step count from the same noise, and measures what is asked for."""

    def __init__(self, pipeline: FlowPipeline, dataset: data.Dataset, mesh: Mesh):
        """Keeps the pipeline, so that it compiles once; `mesh` is where the parameters lie."""
        self.pipeline, self.config = pipeline, pipeline.config
        self.decay = str(self.config.ema.decay)
        source = dataset.heldout if len(dataset.heldout) else dataset.train
        held = data.arrays(source, range(min(256, len(source))))
        evenly = len(held["label"]) % mesh.size == 0
        self.held = jax.device_put(held, batch_sharding(mesh) if evenly else replicated(mesh))
        self.codec = jax.device_put(pipeline.autoencoder, replicated(mesh))
        self.consistency = jax.jit(self._consistency)
        self.distance = QuickDistance(pipeline, dataset) if self.config.fid.num else None

    def __call__(self, state: TrainState, logger: Logger) -> dict[str, float]:
        """Writes pictures and scalars of the averaged parameters; returns the scalars.

        Process 0 has all of them.
        """
        step, params = int(state.step), state.ema[self.decay]
        for steps in self.config.sample.steps:
            logger.picture(step, f"steps_{steps}", grid(self._pictures(params, steps)))
        metrics: dict[str, float] = {}
        if consistent(self.config):
            metrics["self_consistency"] = float(self.consistency(params, self.codec, self.held))
        if self.distance:
            metrics |= self.distance(params)
        if metrics:
            logger.scalars(step, metrics)
        return metrics

    def _pictures(self, params: Any, steps: int) -> np.ndarray:
        count, classes = self.config.sample.num, self.pipeline.num_classes
        labels = np.arange(count) % max(classes, 1)
        scale = self.config.sample.guidance
        return self.pipeline.with_params(params)(labels, steps=steps, guidance=scale)

    def _consistency(self, params: Any, codec: Autoencoder, held: dict) -> jax.Array:
        """The mean self-consistency at three ordered times on each held-out sample."""
        key = stream(self.config.seed, EVALUATION)
        noise_key, time_key, encode_key = jax.random.split(key, 3)
        n = held["label"].shape[0]
        x = codec.sample(held["x"], jax.random.split(encode_key, n))
        r, s, t = jnp.sort(jax.random.uniform(time_key, (3, n)), axis=0)
        z = interpolate(x, jax.random.normal(noise_key, x.shape), t)

        def velocity(z: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
            return self.pipeline.network.apply(params, z, r, t, held["label"], None)

        return jnp.mean(self_consistency(velocity, z, r, s, t))


def check_objective(config: ConfigDict, name: str) -> None:
    """Raises UserError where the config names an objective that the script does not have."""
    if config.objective not in ("", name):
        raise UserError(
            f"objective={config.objective!r} is not of this script: train_flow.py has "
            f"flow_matching, train_meanflow.py {', '.join(objectives.AVERAGES)}"
        )


def check_best(config: ConfigDict) -> None:
    """Raises UserError where no evaluation of this run can give `best_metric`."""
    given = ["self_consistency"] if consistent(config) else []
    quick = f"_quick_{config.fid.num}/"
    if config.fid.num:
        given += [f"fid{quick}1_step and the like"]
    name = config.best_metric
    if name and name not in given and not (config.fid.num and quick in name):
        offers = " or ".join(given) or "none; --fid.num=2000 makes it give fid_quick_2000/1_step"
        raise UserError(f"best_metric={name!r}: an evaluation of this run gives {offers}")


def check_alike(options: dict[str, Any]) -> None:
    """Raises UserError, on all processes, where they were given different options or data.

    Where the data lies may differ.
    """
    if jax.process_count() == 1:
        return
    options = options | {"init_from": bool(options.get("init_from"))}
    names = sorted(options.keys() - {"data_dir", "autoencoder"})
    words = [json.dumps(options[name], default=str).encode() for name in names]
    sums = np.array([zlib.crc32(word) for word in words], np.uint32)
    given = multihost_utils.process_allgather(sums)
    if other := [name for name, row in zip(names, given.T, strict=True) if len(set(row)) > 1]:
        mine = ", ".join(f"--{name}={options[name]}" for name in other[:3])
        raise UserError(
            f"the processes have different options, here {mine}: give all of them the same"
        )
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices", file=sys.stderr)


def check_shared(path: epath.Path) -> None:
    """Raises UserError, on all processes, where they do not all see the same folder."""
    if jax.process_count() == 1:
        return
    token = path / f".seen_by_all_{agreed(secrets.randbits(30))}"
    if jax.process_index() == 0:
        files.write(token, "")
    agreed(0)  # all wait until it is there
    missing = anywhere(not token.exists())
    if jax.process_index() == 0:
        token.unlink()
    if missing:
        raise UserError(
            f"--workdir={path} is another folder on another host: name one that all hosts see, on "
            "a shared disk or gs://BUCKET/FOLDER"
        )


def be_deterministic() -> None:
    """Keeps GPUs from adding in any order, and from choosing kernels by their speed of the day.

    To be called before a device is touched; CPUs and TPUs are deterministic as they are.
    """
    flags = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def make_card(
    config: ConfigDict,
    dataset: data.Dataset,
    shape: tuple[int, ...],
    network: build.Network,
    objective: Callable,
) -> dict[str, Any]:
    """What is trained, for whoever meets the folder later; `trained_card` says how much.

    Args:
      shape: of what the network sees.
    """
    params = jax.eval_shape(network.init, jax.random.key(0))
    card: dict[str, Any] = {
        "dataset": dataset.identity,
        "autoencoder": dataset.autoencoder,
        "pictures": dataset.origin,
        "shape": list(shape),
        "num_classes": dataset.num_classes,
        "parameters": build.count_parameters(params),
        "flops_per_step": step_flops(config, shape, dataset.num_classes, objective),
    }
    if dataset.classes:
        card["class_names"] = list(dataset.classes)
    return card | trained_card(config, card, 0)


def step_flops(
    config: ConfigDict, shape: tuple[int, ...], num_classes: int, objective: Callable
) -> int:
    """Model FLOPs of one training step: the gradient of the objective, without recomputation.

    Attention counts as XLA computes it, whichever kernel does.
    """
    plain = config.copy_and_resolve_references()
    plain.model.update({"remat": "none", "attention": "xla", "attention_jvp": "xla"})
    network = build.network(plain, shape, num_classes)
    objective = objectives.with_forward(objective, network)
    n = config.batch_size
    batch = {
        "x": jax.ShapeDtypeStruct((n, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32),
        "position": jax.ShapeDtypeStruct((n,), jnp.int32),
        "step": jax.ShapeDtypeStruct((n,), jnp.int32),
    }
    params = jax.eval_shape(network.init, jax.random.key(0))
    gradient = jax.grad(functools.partial(objective, network.apply), has_aux=True)
    return flops.count(gradient, params, batch, jax.random.key(0))


def has_checkpoints(path: epath.Path) -> bool:
    """Whether a run's folder holds checkpoints, whole or not."""
    return any(name[0].isdigit() for name in files.names(path / "checkpoints"))


def check_workdir(
    path: epath.Path, config: ConfigDict, dataset: str, num_classes: int | None = None
) -> None:
    """Raises UserError where `path` holds checkpoints of another config or of other data.

    Args:
      num_classes: of the labels, where it is known.
    """
    if path.is_file():
        raise UserError(f"{path} is a file: name a folder with --workdir")
    if not has_checkpoints(path):
        return
    old, new = (
        flatten(ConfigDict(json.loads(json.dumps(of.to_dict()))))
        for of in (read_config(path / "config.json"), config)
    )
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    steady = config.optimizer.schedule == "constant"
    changed = [k for k in changed if not is_free(k) or (k == "max_steps" and not steady)]
    first = [k for k in ("objective", "dataset_name", "model.name") if k in changed]
    changed = [*first, *(k for k in changed if k not in first)]
    if changed:
        was = ", ".join(f"{k}={old.get(k)} (now {new.get(k)})" for k in changed[:3])
        was += f", and {len(changed) - 3} others" if len(changed) > 3 else ""
        raise UserError(
            f"{path} holds another run, with {was}: give the same options to continue it, "
            "or another --workdir"
        )
    card = read_json(path / "card.json")
    trained_on = card.get("dataset")
    if num_classes not in (None, card.get("num_classes")):
        raise UserError(
            f"{path} holds a run of {card.get('num_classes')} classes, here are {num_classes}: see "
            "--data_dir, or name another --workdir"
        )
    if trained_on != dataset:
        raise UserError(
            f"{path} holds a run on {trained_on}, the data here is {dataset}: see --data_dir, "
            "or name another --workdir"
        )
