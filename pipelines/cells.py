"""The rows of a sweep on disk: a file per cell, written at once when the cell is done."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.stored import write_json
from utils import files
from utils.cli import UserError


class Row(NamedTuple):
    """One number, and all that is needed to know what it is; None where it does not apply."""

    run: str
    objective: str | None
    train_steps: int | None  # of the checkpoint
    ema: str | None
    sampler: str | None
    grid: str | None  # of times
    steps: int | None
    nfe: int | None  # network calls per sample
    sampling_guidance: float | None
    guidance_interval: str | None
    trained_guidance: float | None  # ω′ = ω / (1 − κ); 1: none
    train_images: int | None
    train_flops: float | None
    metric: str
    features: str | None
    resize: str | None  # tf, clean or pytorch
    value: float
    deviation: float | None
    deviation_of: str | None
    num_samples: int
    labels: str | None
    seed: int | None
    protocol: str
    reference: str
    reference_fingerprint: str
    commit: str | None

    @classmethod
    def of(cls, **known: Any) -> "Row":
        """A row of what is known."""
        return cls(**{**dict.fromkeys(cls._fields), **known})


class Cells:
    """The cells of a sweep's folder.

    A cell's file holds rows by what was measured, so that metrics can be added; pictures or points
    of it lie beside, for grids.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens the folder, which is made when the first cell is written."""
        self.folder = pathlib.Path(folder)

    def rows(self, name: str) -> dict[str, list[Row]]:
        """What was measured of a cell; nothing where the cell is not there.

        Raises:
          UserError: the file is damaged.
        """
        path = self._json(name)
        try:
            found = json.loads(path.read_text())
            return {key: [Row.of(**row) for row in rows] for key, rows in found["rows"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}): remove it, to measure it again"
            ) from error

    def samples(self, name: str) -> np.ndarray:
        """The samples kept of a cell, for grids."""
        with np.load(self._npz(name), allow_pickle=False) as file:
            return file["samples"]

    def whole(self, name: str, wanted: Iterable[str]) -> bool:
        """Whether all that is wanted of a cell of samples was measured."""
        return set(wanted) <= self.rows(name).keys() and self._npz(name).exists()

    def work(self, name: str) -> pathlib.Path:
        """The folder that the measurement of a cell goes on with when it was interrupted."""
        return self.folder / "work" / name

    def clear(self, name: str) -> None:
        """Removes what only an unfinished cell needs."""
        shutil.rmtree(self.work(name), ignore_errors=True)

    def write(
        self,
        name: str,
        about: dict[str, Any],
        rows: dict[str, list[Row]],
        samples: np.ndarray | None = None,
    ) -> None:
        """Adds rows to a cell; who calls it holds the claim on the cell."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if samples is not None:
            files.write(self._npz(name), lambda file: np.savez_compressed(file, samples=samples))
        together = self.rows(name) | rows
        write_json(
            self._json(name),
            {"about": about, "rows": {k: [r._asdict() for r in v] for k, v in together.items()}},
        )

    def _json(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.json"

    def _npz(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.npz"


def name_of(words: Sequence[str], identity: dict[str, Any]) -> str:
    """A file name that a reader understands, and that no other identity has."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return "_".join([*filter(None, words), digest])
