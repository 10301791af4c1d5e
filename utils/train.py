"""The training loop: TrainState, one step, and `fit`.

The objective arrives as an argument: nothing here knows what is learned. Everything random is a
function of (seed, step, position in the global batch), so a run does not depend on devices, hosts,
accumulation or interruptions.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from utils.checkpoint import Checkpoints
from utils.cli import UserError
from utils.log import Logger, progress
from utils.sharding import abstract_state, batch_sharding, born_sharded

INITIALISATION, TRAINING, SAMPLING, EVALUATION = range(4)  # streams of one seed

Objective = Callable[[Callable, Any, dict, Array], tuple[Array, dict]]
Evaluation = Callable[["TrainState", Logger], None]


@flax.struct.dataclass
class TrainState:
    """What a run is at a step: arrays only."""

    step: Array  # () int32, steps done
    params: Any
    ema: dict[str, Any]  # {name: averaged parameters}
    opt_state: Any


def stream(seed: int | Array, number: int) -> Array:
    """The key of one of a seed's streams; they never meet."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with warm-up, schedule and clipping, from `config.optimizer` and `config.max_steps`."""
    o = config.optimizer
    if o.schedule == "constant":
        # A warm-up of no steps stays at its first value, 0, in optax.
        start = 0.0 if o.warmup_steps else o.lr
        schedule = optax.warmup_constant_schedule(start, o.lr, o.warmup_steps)
    elif o.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, o.lr, o.warmup_steps, config.max_steps)
    else:
        raise UserError(f"optimizer.schedule={o.schedule!r}: constant or cosine")
    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
    adamw = optax.adamw(schedule, o.beta1, o.beta2, weight_decay=o.weight_decay)
    return optax.chain(clip, adamw), schedule


def init_state(config: ConfigDict, init: Callable[[Array], Any]) -> TrainState:
    """The state before the first step; `init(key)` makes the parameters."""
    optimizer, _ = make_optimizer(config)
    params = init(stream(config.seed, INITIALISATION))
    ema = {str(config.ema.decay): params}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_step(
    config: ConfigDict, network: Callable, objective: Objective, encode: Callable, mesh: Mesh
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Returns the jitted step (state, batch) → (state, metrics); the state given is used up.

    Args:
      encode: (moments, keys (n,)) → x.
    """
    optimizer, schedule = make_optimizer(config)

    def loss(params: Any, batch: dict, key: Array):
        encode_key, key = jax.random.split(key)
        keys = jax.vmap(lambda i: jax.random.fold_in(encode_key, i))(batch["position"])
        return objective(network, params, {**batch, "x": encode(batch["x"], keys)}, key)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(stream(config.seed, TRAINING), state.step)
        gradient = jax.grad(lambda p, b: _with_loss(loss(p, b, key)), has_aux=True)
        parts = microbatches(batch, config.accumulation, mesh)
        grads, metrics = accumulate(gradient, state.params, parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, state.step, config.ema.start_step)
        metrics = {name: total / count for name, (total, count) in metrics.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["lr"] = jnp.asarray(schedule(state.step))
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def _with_loss(result: tuple[Array, dict]) -> tuple[Array, dict]:
    loss, metrics = result
    return loss, {**metrics, "loss": (loss, jnp.ones_like(loss))}


def microbatches(batch: dict, count: int, mesh: Mesh) -> dict:
    """(B, ...) → (count, B / count, ...), each device keeping the samples it has."""
    devices = mesh.size

    def split(a: Array) -> Array:
        a = a.reshape(devices, count, -1, *a.shape[1:])
        a = jnp.swapaxes(a, 0, 1).reshape(count, -1, *a.shape[3:])
        spec = jax.sharding.PartitionSpec(None, *batch_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(a, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(split, batch)


def accumulate(gradient: Callable, params: Any, parts: dict) -> tuple[Any, dict]:
    """The mean gradient and the added metrics over microbatches, one at a time."""
    count = jax.tree.leaves(parts)[0].shape[0]
    if count == 1:
        return gradient(params, jax.tree.map(lambda a: a[0], parts))
    abstract = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)

    def add(sums: tuple, part: dict) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, gradient(params, part)), None

    grads, metrics = jax.lax.scan(add, zeros, parts)[0]
    return jax.tree.map(lambda g: g / count, grads), metrics


def update_ema(ema: dict[str, Any], params: Any, step: Array, start_step: int) -> dict[str, Any]:
    """average ← d · average + (1 − d) · params, after the update; a copy before `start_step`."""

    def update(decay: float, average: Any) -> Any:
        d = jnp.where(step < start_step, 0.0, decay)
        return jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)

    return {name: update(float(name), average) for name, average in ema.items()}


def fit(
    config: ConfigDict,
    network: Callable,
    objective: Objective,
    *,
    mesh: Mesh,
    init: Callable[[Array], Any],
    batches: Callable[[int], Iterator[dict[str, Array]]],
    encode: Callable,
    evaluate: Evaluation,
    workdir: str | os.PathLike,
) -> TrainState:
    """Trains until `config.max_steps`, continuing from the newest checkpoint in `workdir`.

    Args:
      network: (params, z, r, t, label, dropout_keys) → u.
      mesh: the devices, `make_mesh`.
      init: key → parameters.
      batches: start step → endless batches {x, label, position} over the mesh, `utils.feed.feed`.
      encode: (moments, keys) → x.
      evaluate: (state, logger), called every `config.eval_interval` steps and at the end.
    Raises:
      UserError: a damaged checkpoint, a loss that is not finite.
    """
    step = make_step(config, network, objective, encode, mesh)
    with Checkpoints(workdir, config.keep_checkpoints) as checkpoints:
        state = start(config, init, mesh, checkpoints)
        first = int(state.step) + 1
        data = batches(first - 1)
        with Logger(workdir, config, first - 1) as logger, Meter(config, first - 1) as meter:
            for number in range(first, config.max_steps + 1):
                with meter.waiting():
                    batch = next(data)
                state, metrics = step(state, batch)
                meter.add(number, metrics)
                last = number == config.max_steps
                if last or number % config.log_interval == 0:
                    logger.scalars(number, meter.flush())
                if last or number % config.save_interval == 0:
                    meter.settle()  # what is not finite is never saved
                    position = {"samples_consumed": number * config.batch_size}
                    checkpoints.save(number, checkpoint_parts(state), **position)
                if last or number % config.eval_interval == 0:
                    evaluate(state, logger)
    return state


def start(
    config: ConfigDict, init: Callable[[Array], Any], mesh: Mesh, checkpoints: Checkpoints
) -> TrainState:
    """The state of the newest checkpoint, else a fresh one."""
    if checkpoints.latest is None:
        return born_sharded(lambda: init_state(config, init), mesh)
    abstract = abstract_state(lambda: init_state(config, init), mesh)
    parts = checkpoints.restore(checkpoint_parts(abstract))
    return TrainState(ema=parts["ema"], **parts["train"])


def checkpoint_parts(state: TrainState) -> dict[str, Any]:
    """The state as a checkpoint holds it: the averages apart, so that they can be read alone."""
    train = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return {"ema": state.ema, "train": train}


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where the batch does not split evenly."""
    parts = mesh.size * config.accumulation
    if config.accumulation < 1 or config.batch_size < 1 or config.batch_size % parts:
        raise UserError(
            f"batch_size={config.batch_size} must be a positive multiple of devices x accumulation "
            f"= {mesh.size} x {config.accumulation}: give --batch_size={max(parts, 1)} or more"
        )


class Meter:
    """The metrics of the steps since the last flush, and the progress bar; use it as a context.

    A step's metrics are fetched once the next step is dispatched: the device does not wait for the
    host, and the host runs at most one step ahead.
    """

    def __init__(self, config: ConfigDict, done: int):
        """Starts with `done` of `config.max_steps` steps done."""
        self._bar = progress(done, config.max_steps, "step", config.objective or "train")
        self._rows: list[dict[str, float]] = []
        self._pending: tuple[int, dict] | None = None
        self._waited, self._since = 0.0, time.monotonic()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, number: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of step `number`, which may still be running."""
        self.settle()
        self._pending = (number, metrics)
        self._bar.update()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data, where the devices had nothing else to do.

        That is so where the last step added is done by the end of it; it is counted whole, though
        the step may have ended in between.
        """
        start = time.monotonic()
        yield
        if not self._pending or all(metric.is_ready() for metric in self._pending[1].values()):
            self._waited += time.monotonic() - start

    def settle(self) -> None:
        """Waits for the last step added.

        Raises:
          UserError: its loss or gradient is not finite.
        """
        if self._pending:
            number, metrics = self._pending
            self._pending = None
            values = {name: float(v) for name, v in jax.device_get(metrics).items()}
            check_finite(number, values)
            self._rows.append(values)

    def flush(self) -> dict[str, float]:
        """Returns the mean of each metric since the last flush, with two about time.

        steps_per_second, and data_wait: the share of all time, at most, that the devices waited for
        data.
        """
        self.settle()
        now = time.monotonic()
        passed, self._since = now - self._since, now
        waited, self._waited = self._waited / passed, 0.0
        rows, self._rows = self._rows, []
        means = {name: _finite_mean([row[name] for row in rows]) for name in rows[-1]}
        means = {name: mean for name, mean in means.items() if np.isfinite(mean)}
        self._bar.set_postfix_str(f"error {means['error']:.4f}")
        return means | {"data_wait": waited, "steps_per_second": len(rows) / passed}


def check_finite(number: int, values: dict[str, float]) -> None:
    """Raises UserError where a step's loss or gradient is not finite."""
    if not np.isfinite([values["loss"], values["grad_norm"]]).all():
        raise UserError(
            f"step {number} has loss {values['loss']:g}, gradient norm {values['grad_norm']:g}: "
            "lower --optimizer.lr or set --optimizer.clip_norm=1; the last checkpoint is intact"
        )


def _finite_mean(values: list[float]) -> float:
    """The mean over steps that have the metric: a bin of t − r can be empty in a small batch."""
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")
