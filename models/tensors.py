"""Tensors of a file compared with those that a network needs."""

from collections.abc import Mapping

import numpy as np


def check(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless `tensors` has exactly the names of `shapes`, in those shapes.

    The message says how many tensors are missing, unknown or of another shape, and names the first.
    """
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    found = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    complaints = [
        f"{len(names)} of {len(shapes)} tensors {kind} (first {names[0]})"
        if kind != "unknown"
        else f"{len(names)} unknown (first {names[0]})"
        for kind, names in found.items()
        if names
    ]
    if complaints:
        raise ValueError(", ".join(complaints))
