"""Scalars, pictures and progress. Process 0 writes, the others keep silent.

JSON lines (`metrics.jsonl`) and PNG (`samples/`) always; wandb and TensorBoard when asked.
"""

import contextlib
import json
import os
import pathlib
import secrets
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from utils import files
from utils.cli import UserError
from utils.figures import save_png


class Logger:
    """Writes a run's scalars and pictures; use it as a context."""

    def __init__(self, workdir: str | os.PathLike, config: ConfigDict, start_step: int = 0):
        """Opens the logs; lines of steps after `start_step`, from a run cut short, are dropped.

        Raises:
          UserError: wandb or tensorboardX was asked for and is not installed, or has no key.
        """
        self.workdir, self.writes = files.place(workdir), jax.process_index() == 0
        self._failed = False
        self.wandb = self.tensorboard = None
        if not self.writes:
            return
        (self.workdir / "samples").mkdir(parents=True, exist_ok=True)
        self.path = self.workdir / "metrics.jsonl"
        self._lines = _truncate(self.path, start_step)
        if config.wandb.mode != "disabled":
            self.wandb = _open_wandb(self.workdir, config)
        if config.tensorboard:
            self.tensorboard = _open_tensorboard(self.workdir)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_) -> None:
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of scalars; values that are not finite are written as null."""
        if not self.writes:
            return
        finite = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
        with self._lost_if_full():
            self._write(json.dumps({"step": step, **finite}) + "\n")
            self._failed = False
        if self.wandb:
            self.wandb.log(finite, step=step)
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def _write(self, line: str) -> None:
        if files.in_bucket(self.path):  # where nothing can be appended to
            self._lines.append(line)
            files.write(self.path, "".join(self._lines))
            return
        # After a line that was cut, when a disk was full, a new one.
        start = "\n" if self._failed else ""
        with self.path.open("a") as file:
            file.write(start + line)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an uint8 picture (height, width, channels) to samples/NAME_STEP.png."""
        if not self.writes:
            return
        path = self.workdir / "samples" / f"{name}_{step:07d}.png"
        with self._lost_if_full():
            save_png(path, image)
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(image)}, step=step)
        if self.tensorboard:
            self.tensorboard.add_image(name, image, step, dataformats="HWC")

    @contextlib.contextmanager
    def _lost_if_full(self) -> Iterator[None]:
        """Training goes on where a log cannot be written; a warning says so once."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                print(f"warning: logs are being lost: {error}", file=sys.stderr)
            self._failed = True


def progress(start: int, total: int, unit: str, name: str) -> tqdm:
    """A progress bar with rate and time left, on standard error, on process 0."""
    return tqdm(
        initial=start,
        total=total,
        unit=unit,
        desc=name,
        dynamic_ncols=True,
        disable=jax.process_index() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log file needs few lines
    )


def log_table(
    folder: pathlib.Path,
    mode: str,
    columns: Sequence[str],
    rows: Sequence[Sequence],
    pictures: Sequence[pathlib.Path],
) -> None:
    """Logs a table, and pictures by their names, to wandb.

    Args:
      folder: keeps wandb's own files, and the id of the run that a later call goes on with.
      mode: online or offline.

    Raises:
      UserError: wandb is not installed, or has no key.
    """
    settings = {"wandb": {"mode": mode, "project": "flow", "name": folder.name}}
    logged = _open_wandb(folder, ConfigDict(settings))
    import wandb

    logged.log({"results": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
    logged.log({path.stem: wandb.Image(str(path)) for path in pictures})
    logged.finish()


def _truncate(path: epath.Path, last_step: int) -> list[str]:
    """Drops the lines after `last_step`, and those cut in their middle; returns the others."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= last_step]
    files.write(path, "".join(kept))
    return kept


def _step_of(line: str) -> float:
    """The step that a line is of; of one that was cut, infinity."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _open_wandb(workdir: os.PathLike, config: ConfigDict):
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb is not installed: pip install wandb, or --wandb.mode=disabled"
        ) from error
    try:
        return wandb.init(
            dir=None if files.in_bucket(workdir) else str(workdir),  # its own files
            mode=config.wandb.mode,
            project=config.wandb.project,
            name=config.wandb.name or None,
            id=_wandb_id(epath.Path(workdir)),
            resume="allow",
            config=config.to_dict(),
        )
    except wandb.Error as error:
        raise UserError(f"wandb: {error}; --wandb.mode=offline needs no account") from error


def _wandb_id(workdir: epath.Path) -> str:
    """The run's id, made once and kept with the run, so that a resumed run goes on there too."""
    path = workdir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def _open_tensorboard(workdir: epath.Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboardX is not installed: pip install tensorboardX") from error
    return SummaryWriter(str(workdir / "tensorboard"))
