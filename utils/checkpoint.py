"""Checkpoints of a run: saved in the background, several kept, restored onto any mesh.

A checkpoint is a dict of named parts (arrays in trees); a part can be read alone, as sampling reads
the averaged parameters and leaves the optimizer's state. Its metadata records the data position and
a checksum of every array, so that what is damaged on disk is never taken for what was saved.
"""

import contextlib
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax import Array
from orbax.checkpoint import v1 as ocp

from utils import files
from utils.cli import UserError
from utils.hosts import Again, Preempted
from utils.sharding import agreed, anywhere, gathered

CHECKSUMS = "checksums"
DAMAGED = "damaged"  # the folder beside `checkpoints` for those that cannot be read

_failed: list[str] = []  # why the save on its way fails, once orbax logs it


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Keeps orbax's lines from the log, and notes the failure of a save in the background.

    On several processes orbax raises that error when all of them have met, which they do not where
    one has failed: after 20 minutes. Its log has it at once.
    """
    if "orbax" not in record.pathname:
        return True
    if record.pathname.endswith("async_checkpointer.py") and record.exc_info:
        _failed.append(_reason(record.exc_info[1] or "unknown"))
    return False


# Of what orbax raises it logs the traceback too, and asyncio what it left undone; we say it once.
for name in ("absl", "root"):
    logging.getLogger(name).addFilter(_not_of_orbax)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
warnings.filterwarnings("ignore", "Sharding info not provided", UserWarning)


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`; use it as a context, which waits for saves."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep: int | None = None,
        keep_best: int = 0,
        patience: float = float("inf"),
    ):
        """Opens the folder, making it if needed; nothing is deleted unless `keep` says so.

        Args:
          workdir: a folder, or gs://BUCKET/FOLDER, that all processes share.
          keep: the newest ones to keep.
          keep_best: those with the lowest score, kept beside them.
          patience: seconds after a failed save within which one must succeed, or `save` raises.
        """
        self.path = files.place(workdir) / "checkpoints"
        self._keep, self._keep_best = keep, keep_best
        self._patience, self._failing_since = patience, float("inf")
        self._saving: tuple[int, Any] | None = None  # a step and its save on the way
        try:
            self._orbax = self._open()
        except Exception as error:  # of many kinds
            if not keep or not self._set_unlisted_aside():
                where = f"the checkpoints in {self.path} cannot be listed"
                raise UserError(f"{where}: {_reason(error)}") from error
            self._orbax = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        kept = ocp.training.preservation_policies
        preserve: Any = kept.PreserveAll()
        if self._keep:
            best = kept.BestN(
                get_metric_fn=lambda metrics: metrics["score"],
                reverse=True,  # the last are kept, the lowest are last
                n=self._keep_best,
                keep_checkpoints_without_metrics=False,
            )
            preserve = kept.AnyPreservationPolicy([kept.LatestN(self._keep), best])
        return ocp.training.Checkpointer(
            self.path,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=preserve,
            cleanup_tmp_directories=self._keep is not None,  # of saves that were killed
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind not in (None, Preempted) and jax.process_count() > 1:
            return  # the others may wait for us elsewhere, and we for them here
        try:
            self.settle()  # Again passes by: closing would wait for the others
        except UserError:  # the error on its way tells more
            if kind is None:
                raise
        with contextlib.suppress(Exception):  # what `settle` has told
            self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self.steps[-1] if self.steps else None

    @property
    def steps(self) -> tuple[int, ...]:
        """All steps saved, oldest first."""
        return tuple(sorted(saved.step for saved in self._orbax.checkpoints))

    @property
    def best(self) -> int | None:
        """The step with the lowest score, or None where none has a score."""
        scored = [(c.metrics["score"], c.step) for c in self._orbax.checkpoints if c.metrics]
        return min(scored)[1] if scored else None

    def save(
        self, step: int, parts: dict[str, Any], score: float | None = None, **metadata: Any
    ) -> None:
        """Saves in the background; the arrays may be used up as soon as this returns.

        A save that fails, then or in the background, is reported and costs that checkpoint alone.

        Args:
          score: what `keep_best` goes by; lower is better.
          metadata: what JSON can hold.
        Raises:
          UserError: no save has succeeded for `patience` seconds.
        """
        self.settle()
        if step in self.steps:
            return
        metadata[CHECKSUMS] = checksums(parts)
        metrics = None if score is None else {"score": score}
        _failed.clear()
        try:
            response = self._orbax.save_checkpointables_async(
                step, parts, metrics=metrics, custom_metadata=metadata
            )
            self._saving = step, response
        except Exception as error:  # orbax raises many kinds where a disk fails it
            self._saving = step, error

    def save_now(self, step: int, parts: dict[str, Any], *score: float | None, **metadata) -> None:
        """Saves and waits for it; a save that fails is tried once more.

        Raises:
          UserError: it failed again.
        """
        for _ in range(2):
            self.save(step, parts, *score, **metadata)
            reason = self.settle()
            if not reason:
                return
        raise UserError(
            f"checkpoint {step} could not be saved ({reason}): mend that; the same command goes on "
            + (f"from step {self.latest}" if self.steps else "from the start")
        )

    def settle(self) -> str:
        """Waits for the save on its way; returns why it failed, or an empty string.

        Raises:
          UserError: no save has succeeded for `patience` seconds.
          Again: it failed on some processes and not on all.
        """
        if self._saving is None:
            return ""
        (step, response), self._saving = self._saving, None
        reason = _outcome(step, response)
        if not reason:
            self._failing_since = float("inf")
            return ""
        self._failing_since = min(self._failing_since, time.monotonic())
        self._report(f"checkpoint {step} could not be saved ({reason})")
        with contextlib.suppress(Exception):  # the same once more
            self._orbax.close()
        self._orbax = self._open()  # removes what is half written
        if time.monotonic() - self._failing_since > self._patience:
            last = f"the last is of step {self.latest}" if self.steps else "there is none yet"
            raise UserError(
                f"no checkpoint could be saved for {self._patience / 3600:g} hours ({reason}), "
                f"{last}: mend that, and the same command goes on from there"
            )
        return reason

    def restore(self, parts: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """Returns the named parts of `step` (default: the newest); all processes call it alike.

        Args:
          parts: {name: tree of `jax.ShapeDtypeStruct`}, whose shardings say where arrays go. A part
            may be given by some of its entries: the others are not read.
        Raises:
          UserError: there is no such checkpoint, or it is damaged or of another network.
        """
        step = self.latest if step is None else step
        reason, loaded, stored = "", None, None
        try:
            with _alone():
                loaded = self._orbax.load_checkpointables(step, parts)
                stored = self._orbax.checkpointables_metadata(step).custom_metadata
        except Exception as error:  # orbax raises many kinds for a damaged folder
            reason = _reason(error)
        if anywhere(bool(reason)):  # before all of them compute checksums together
            reason = reason or "on another host"
        else:
            try:
                check(stored, loaded or {})
                return loaded or {}
            except (ValueError, KeyError, TypeError) as error:
                reason = _reason(error)
        _collect()
        raise UserError(
            f"checkpoint {self.path / str(step)} cannot be read ({reason}): "
            "if it is damaged, move that folder away to go back to the checkpoint before it"
        )

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step; empty where that is lost."""
        try:
            stored = self._orbax.checkpointables_metadata(step).custom_metadata
        except Exception:  # orbax raises many kinds for a damaged folder
            return {}
        return stored if isinstance(stored, dict) else {}

    def restore_newest(self, parts: dict[str, Any]) -> dict[str, Any]:
        """`restore` of the newest checkpoint that is whole; newer ones are moved to `damaged`.

        Raises:
          UserError: none can be read; all stay where they are.
        """
        damaged: dict[int, UserError] = {}
        for step in reversed(self.steps):
            try:
                loaded = self.restore(parts, step)
            except UserError as error:
                damaged[step] = error
                continue
            for bad in damaged:
                self._set_aside(bad)
            if damaged:
                self._orbax.reload()
                self._report(f"going on from checkpoint {step}")
            return loaded
        newest = max(damaged)
        if len(damaged) == 1:
            raise damaged[newest]
        reason = str(damaged[newest]).partition(": if it")[0]
        raise UserError(
            f"none of {len(damaged)} checkpoints can be read: {reason}; put back a copy of one, or "
            "name another --workdir"
        )

    def _set_unlisted_aside(self) -> bool:
        """Moves those away that keep all from being listed; says whether there were any."""
        found = [int(name) for name in files.names(self.path) if name.isdigit()]
        unlisted = [step for step in found if not _listed(self.path / str(step))]
        for step in unlisted:
            self._set_aside(step)
        return bool(unlisted)

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint out of the way of a new one of that step."""
        place = self.path.parent / DAMAGED / f"{step}"
        if jax.process_index() == 0:
            while place.exists():
                place = place.with_name(place.name + "_")
            files.move(self.path / str(step), place)
        agreed(step)  # all wait for the move
        self._report(f"checkpoint {step} is damaged: moved to {place}")

    def _report(self, line: str) -> None:
        if jax.process_index() == 0:
            print(f"warning: {line}", file=sys.stderr)


def checksums(parts: dict[str, Any]) -> dict[str, dict[str, int]]:
    """{part: {path of a leaf: a number that its values and their places give}}.

    The same for the same array on any mesh: Σᵢ (2i + 1) wᵢ modulo 2³², i the place in row-major
    order and wᵢ the bits of the value. One changed value always changes it.
    """
    sums = jax.device_get({name: _sums(part) for name, part in parts.items()})
    return {
        name: {path: int(number) for path, number in named_leaves(part)}
        for name, part in sums.items()
    }


def check(stored: Any, parts: dict[str, Any]) -> None:
    """Raises ValueError where arrays are not those that were saved.

    Args:
      stored: the checkpoint's metadata; checkpoints made before there were checksums pass.
    """
    if not isinstance(stored, dict) or not stored:
        raise ValueError("its metadata is lost")
    for name, found in checksums(parts).items() if CHECKSUMS in stored else ():
        for path, number in found.items():
            if stored[CHECKSUMS][name][path] != number:
                raise ValueError(f"{name}.{path} is not what was saved")


@jax.jit
def _sums(tree: Any) -> Any:
    def of(a: Array) -> Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(a, unsigned).astype(jnp.uint32)
        place, stride = jnp.zeros(a.shape, jnp.uint32), 1
        for axis in reversed(range(a.ndim)):
            along = jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
            place, stride = place + along * jnp.uint32(stride % 2**32), stride * a.shape[axis]
        return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(of, tree)


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a tree, as ("blocks.mlp.in.kernel", array)."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _listed(path: epath.Path) -> bool:
    """Whether a checkpoint's metadata can be read, and its score where it has one."""
    scores = path / "metrics" / "metrics"
    try:
        with _alone():
            ocp.checkpointables_metadata(path)
        return not scores.exists() or isinstance(json.loads(scores.read_text()), dict)
    except Exception:  # of many kinds
        return False


PENDING, DONE, FAILED = range(3)  # how a save stands on one process
GRACE = 5  # seconds after which a save that failed on one process fails on all, or will not


def _outcome(step: int, response: Any) -> str:
    """Waits for a save on all processes; why it failed, or an empty string.

    Raises:
      Again: it failed on some processes and not on all, where the others would wait for long.
    """
    grace = GRACE
    while True:
        state, reason = _state(response)
        states = gathered(state)
        if all(state == DONE for state in states):
            return ""
        if all(state == FAILED for state in states):
            return reason
        grace -= FAILED in states
        if not grace:
            reason = reason or f"on host {states.index(FAILED)}"
            raise Again(
                f"checkpoint {step} could not be saved ({reason}): the same command goes on"
            )


def _state(response: Any) -> tuple[int, str]:
    """How a save stands after a second at most, where others may wait for us; and why it failed."""
    if isinstance(response, Exception):
        return FAILED, _reason(response)
    try:
        response.result(timeout=1.0 if jax.process_count() > 1 else None)
        return DONE, ""
    except TimeoutError:
        return (FAILED, _failed[-1]) if _failed else (PENDING, "")
    except Exception as error:  # orbax raises many kinds where a disk fails it
        return FAILED, _reason(error)


def _reason(error: BaseException | str) -> str:
    """One short line; of a failed write, the system's own words."""
    line = str(error).partition("\n")[0] or type(error).__name__
    for told in ("No space left on device", "Permission denied", "Disk quota exceeded"):
        if told in line:
            return told
    return line[:120]


def _collect() -> None:
    """Collects the coroutines that a failed read leaves behind, which would complain by and by."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook


def _alone() -> ocp.Context:
    """Each process reads for itself, so that none waits for one that failed; some entries do."""
    me = jax.process_index()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if jax.process_count() > 1:
        context.multiprocessing_options.primary_host = me
        context.multiprocessing_options.active_processes = {me}
        context.multiprocessing_options.barrier_sync_key_prefix = f"reads_{me}"
    return context
