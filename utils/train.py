"""The training loop: `fit`.

Nothing here knows what is learned: the step gets its objective as an argument.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from utils import averages, files
from utils.checkpoint import Checkpoints, named_leaves
from utils.cli import UserError
from utils.health import Spikes, Watchdog, describe, not_finite
from utils.hosts import Preempted, Preemption
from utils.log import Logger, progress
from utils.optimizers import updates_before
from utils.sharding import abstract_state, agreed, born_sharded
from utils.step import TrainState, init_state

Evaluation = Callable[[TrainState, Logger], dict[str, float]]


def fit(
    config: ConfigDict,
    step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    *,
    mesh: Mesh,
    init: Callable[[Array], Any],
    begin: Callable[[], Callable] | None = None,
    batches: Callable[[int], Iterator[dict[str, Array]]],
    evaluate: Evaluation,
    preemption: Preemption,
    workdir: str | os.PathLike,
) -> TrainState:
    """Trains until `config.max_steps`, continuing from the newest checkpoint in `workdir`.

    An update whose loss or gradient is not finite is left out, and after `skip_limit` of them in a
    row the run stops. On SIGTERM it saves and stops.

    Args:
      step: `make_step` over `mesh`.
      init: key → parameters.
      begin: gives what makes the parameters of a run that has no checkpoint, a Partial where arrays
        go into them; None: `init`.
      batches: start step → endless batches {x, label, position} over the mesh, `utils.feed.feed`.
      evaluate: (state, logger) → metrics, called every `config.eval_interval` steps and at the end.
      preemption: says whether to stop; entered already.
    Raises:
      UserError: no checkpoint that can be read, none that can be written, updates not finite.
      Preempted: it was asked to stop, and has saved.
    """
    keep = {"keep": config.keep_checkpoints, "keep_best": config.keep_best}
    with Checkpoints(workdir, patience=3600 * config.save_patience, **keep) as checkpoints:
        state = start(config, init, mesh, checkpoints, begin)
        first = int(state.step) + 1
        ready(config, state, workdir)
        if first > config.max_steps:
            return state
        data = batches(first - 1)
        with Logger(workdir, config, first - 1) as logger, Meter(config, first - 1) as meter:
            for number in range(first, config.max_steps + 1):
                with meter.waiting(number):
                    batch = next(data)
                state, metrics = step(state, batch)
                meter.add(number, metrics)
                stop, last = preemption.reached(number), number == config.max_steps
                if last or number % config.log_interval == 0:
                    log(logger, number, meter)
                snapshot(config, state, number, workdir)
                evaluates = last or (number % config.eval_interval == 0 and not stop)
                ranked = evaluates and config.best_metric
                score = agreed_score(config, evaluate(state, logger)) if ranked else None
                if last or stop or ranked or due(config, number, meter):
                    with meter.watching("the save before this one has been running"):
                        save(checkpoints, config, state, number, score, wait=last or stop)
                if evaluates and not ranked:
                    evaluate(state, logger)
                if meter.in_a_row >= config.skip_limit:
                    raise stopped(config, meter, state, batches, workdir)
                if stop and not last:
                    raise Preempted(number)
    return state


def ready(config: ConfigDict, state: TrainState, workdir: str | os.PathLike) -> None:
    """Says where a run goes on, or that it is done; else makes its folder ready for snapshots."""
    done, last = int(state.step), config.max_steps
    if done and jax.process_index() == 0:
        what = "nothing to do below a greater --max_steps" if done >= last else "going on"
        print(f"at step {done:,} of {last:,}: {what}", file=sys.stderr)
    if done < last:
        averages.make_way(workdir, done)
        averages.tell_size(config, state.ema)


def log(logger: Logger, number: int, meter: "Meter") -> None:
    """Writes what has been measured since the last time."""
    means = meter.flush()
    for spike in meter.take_spikes():
        logger.scalars(*spike)
    logger.scalars(number, means)


def due(config: ConfigDict, number: int, meter: "Meter") -> bool:
    """Whether the state after step `number` is to be saved for its number.

    Not where updates are being left out: parameters that give nothing finite may be lost, and older
    checkpoints stay.
    """
    if number % config.save_interval:
        return False
    meter.settle()
    return not meter.in_a_row


def save(
    checkpoints: Checkpoints,
    config: ConfigDict,
    state: TrainState,
    number: int,
    score: float | None,
    *,
    wait: bool,
) -> None:
    """Saves the state after step `number`; with `wait`, until it lies there."""
    position = {"samples_consumed": number * config.batch_size}
    counted = {averages.COUNTED: averages.counted(config.ema, int(updates_before(state.opt_state)))}
    save = checkpoints.save_now if wait else checkpoints.save
    save(number, checkpoint_parts(state), score, **position, **counted)


def snapshot(
    config: ConfigDict, state: TrainState, number: int, workdir: str | os.PathLike
) -> None:
    """Saves the averages that others are made of afterwards, where it is time for it.

    A function of the step: a run that is gone on with writes the same files again.
    """
    if config.ema.snapshot_interval and number % config.ema.snapshot_interval == 0:
        counted = averages.counted(config.ema, int(updates_before(state.opt_state)))
        averages.save_snapshot(workdir, config.ema, state.ema, number, counted)


def start(
    config: ConfigDict,
    init: Callable[[Array], Any],
    mesh: Mesh,
    checkpoints: Checkpoints,
    begin: Callable[[], Callable] | None = None,
) -> TrainState:
    """The state of the newest checkpoint that is whole; a fresh one where there is none at all."""
    if checkpoints.latest is None:
        make = begin() if begin else init
        make = make if isinstance(make, Partial) else Partial(make)
        return born_sharded(partial(init_state, config), mesh, make)
    abstract = abstract_state(lambda: init_state(config, init), mesh)
    parts = checkpoints.restore_newest(checkpoint_parts(abstract))
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
        self.in_a_row = 0  # steps left out up to the last one known
        self.last: tuple[int, dict[str, float], np.ndarray] | None = None  # number, values, norms
        self._bar = progress(done, config.max_steps, "step", config.objective or "train")
        self._rows: list[dict[str, float]] = []
        self._pending: tuple[int, dict] | None = None
        self._waited, self._since = 0.0, time.monotonic()
        self._found: list[tuple[int, dict[str, float]]] = []  # spikes to be logged
        self._watchdog, self._spikes = Watchdog(config.stall), Spikes()

    def __enter__(self) -> "Meter":
        self._watchdog.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._watchdog.__exit__()
        self._bar.close()

    def add(self, number: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of step `number`, which may still be running."""
        self.settle()
        self._pending = (number, metrics)
        self._bar.update()

    @contextlib.contextmanager
    def waiting(self, number: int) -> Iterator[None]:
        """Counts the time inside as waiting for data, where the devices had nothing else to do.

        That is so where the last step added is done by the end of it; it is counted whole, though
        the step may have ended in between.
        """
        start = time.monotonic()
        with self._watchdog.watch(f"step {number} has had no data"):
            yield
        if not self._pending or all(metric.is_ready() for metric in self._pending[1].values()):
            self._waited += time.monotonic() - start

    def settle(self) -> None:
        """Waits for the last step added, and counts the updates left out in a row."""
        if self._pending is None:
            return
        (number, metrics), self._pending = self._pending, None
        with self._watchdog.watch(f"step {number} has been running"):
            fetched = jax.device_get(metrics)
        norms = np.asarray(fetched.pop("leaf_norms"))
        values = {name: float(value) for name, value in fetched.items()}
        self.last = number, values, norms
        self._rows.append(values)
        if values["skipped"]:
            self.in_a_row += 1
            self._tell(f"step {number} is left out: loss {values['loss']:g}, ", values)
            return
        self.in_a_row = 0
        if spike := self._spikes.add(values["grad_norm"]):
            self._found.append((number, spike))
            self._tell(f"step {number} has a spike: ", values)

    def watching(self, what: str) -> contextlib.AbstractContextManager:
        """Says so in a line where what happens inside takes long."""
        return self._watchdog.watch(what)

    def take_spikes(self) -> list[tuple[int, dict[str, float]]]:
        """Returns (step, what to log) of the spikes since the last call."""
        spikes, self._found = self._found, []
        return spikes

    def _tell(self, what: str, values: dict[str, float]) -> None:
        self._bar.write(f"warning: {what}gradient norm {values['grad_norm']:g}", file=sys.stderr)

    def flush(self) -> dict[str, float]:
        """Returns the mean of each metric since the last flush, with three that are none.

        skipped: updates left out since then; steps_per_second; and data_wait: the share of all
        time, at most, that the devices waited for data.
        """
        self.settle()
        now = time.monotonic()
        passed, self._since = now - self._since, now
        waited, self._waited = self._waited / passed, 0.0
        rows, self._rows = self._rows, []
        means = {name: _finite_mean([row[name] for row in rows]) for name in rows[-1]}
        means = {name: mean for name, mean in means.items() if np.isfinite(mean)}
        self._bar.set_postfix_str(f"error {means.get('error', np.nan):.4f}", refresh=False)
        skipped = sum(row["skipped"] for row in rows)
        rates = {"data_wait": waited, "steps_per_second": len(rows) / passed}
        return means | rates | {"skipped": skipped}


def stopped(
    config: ConfigDict,
    meter: "Meter",
    state: TrainState,
    batches: Callable[[int], Iterator[dict[str, Array]]],
    workdir: str | os.PathLike,
) -> UserError:
    """Writes what was not finite to nonfinite.json; returns the error to stop with."""
    assert meter.last is not None
    number, values, norms = meter.last
    names = [name for name, _ in named_leaves(state.params)]
    report = describe(number, config.batch_size, values, norms, names)
    tensors, first = report["gradients_not_finite"], report["samples_consumed_before"]
    samples = [first + place for place in not_finite(next(batches(number - 1)))]
    report |= {"samples_not_finite": samples, "in_a_row": meter.in_a_row}
    place = files.place(workdir) / "nonfinite.json"
    if jax.process_index() == 0:
        files.write(place, json.dumps(report, indent=2))
    where = f"the gradients of {len(tensors)} of {len(names)} tensors" if tensors else "the loss"
    mend = "lower --optimizer.lr, or set --optimizer.clip_norm=1"
    if samples:
        where, mend = f"samples {samples[:3]} of the data", "mend the data"
    return UserError(
        f"{meter.in_a_row} steps in a row up to {number} were not finite ({where}; more in "
        f"{place}): {mend}; the same command then goes on from the last checkpoint, which is as it "
        "was; where that one is no better, move it away for the one before"
    )


def agreed_score(config: ConfigDict, metrics: dict[str, float]) -> float | None:
    """The metric that the best checkpoint has least of, as process 0 has it; None: there is none.

    Raises:
      UserError: this evaluation gives no metric of that name.
    """
    if not config.best_metric:
        return None
    if not agreed(int(config.best_metric in metrics)):
        names = ", ".join(metrics) or "none"
        raise UserError(f"best_metric={config.best_metric}: evaluations give {names}")
    score = agreed(float(metrics.get(config.best_metric, 0.0)))
    return score if np.isfinite(score) else None


def _finite_mean(values: list[float]) -> float:
    """The mean over steps that have the metric: a bin of t − r can be empty in a small batch."""
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")
