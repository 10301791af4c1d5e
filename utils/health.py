"""Signs that a run is not well: gradients that jump, updates left out, data that does not come."""

import collections
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from utils.sharding import fetch

SPIKE = 5.0  # times the median of the recent gradient norms
RECENT = 100  # steps


class Spikes:
    """Tells which gradient norms stand out from those before."""

    def __init__(self):
        """Starts with no norms."""
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)

    def add(self, norm: float) -> dict[str, float]:
        """Takes a step's norm; returns what to log, empty unless it is a spike.

        A spike is SPIKE times the median of the last RECENT finite norms, of which there must be a
        quarter of that number.
        """
        recent = list(self._recent)
        if np.isfinite(norm):
            self._recent.append(norm)
        if len(recent) < RECENT // 4 or not norm > SPIKE * statistics.median(recent):
            return {}
        return {"grad_norm_spike": norm, "grad_norm_median": statistics.median(recent)}


class Watchdog:
    """Says so in a line, again and again, while something takes long; use it as a context."""

    def __init__(self, seconds: float):
        """Lines come after `seconds`, twice that, and so on."""
        self._seconds = seconds
        self._watched: tuple[str, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Watches what happens inside; `what` is what the line says."""
        self._watched = what, time.monotonic()
        try:
            yield
        finally:
            self._watched = None

    def _run(self) -> None:
        told, last = 0, None
        while not self._stop.wait(self._seconds / 8):
            watched = self._watched
            if watched is not last:
                told, last = 0, watched
            if watched is None:
                continue
            passed = time.monotonic() - watched[1]
            if passed > (told + 1) * self._seconds:
                told = int(passed / self._seconds)
                print(f"warning: {_who()}{watched[0]} for {passed:.0f} s", file=sys.stderr)


def _who() -> str:
    return f"host {jax.process_index()}: " if jax.process_count() > 1 else ""


def describe(
    step: int,
    batch_size: int,
    values: dict[str, float],
    norms: np.ndarray,
    names: list[str],
) -> dict[str, Any]:
    """What was not finite in a step, for whoever looks for the reason.

    Args:
      norms: (leaves,) of the gradient, by leaf of the parameters; names: those leaves'.
    """
    bad = np.flatnonzero(~np.isfinite(norms))
    return {
        "step": step,
        "loss": repr(values["loss"]),
        "grad_norm": repr(values["grad_norm"]),
        "gradients_not_finite": [names[i] for i in bad],
        "samples_consumed_before": (step - 1) * batch_size,
    }


def not_finite(batch: dict[str, jax.Array]) -> list[int]:
    """The places in the global batch of items that are not finite; whole numbers are."""
    x = batch["x"]
    if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        return []
    finite = jax.jit(lambda x: jax.numpy.isfinite(x).all(axis=range(1, x.ndim)))(x)
    rows, position = fetch((finite, batch["position"]))
    return sorted(np.asarray(position)[~np.asarray(rows)].tolist())
