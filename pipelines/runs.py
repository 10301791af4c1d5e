"""Runs as an evaluation meets them: by name, their checkpoints and averages loaded when used."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from etils import epath

from pipelines.flow import FlowPipeline
from pipelines.stored import WEIGHTS, average_name, saved_checkpoints
from utils import files
from utils.averages import POSTHOC, steps_before
from utils.cli import UserError, flatten

# What may change between the parts of a run; everything else makes it another run.
FREE = (
    *(
        "data_dir",
        "autoencoder",
        "init_from",  # of the first step alone
        "cache",
        "max_steps",
        "log_interval",
        "eval_interval",
        "save_interval",
    ),
    *("save_patience", "keep_checkpoints", "keep_best", "best_metric", "skip_limit", "stall"),
    *("accumulation", "optimizer.lr", "optimizer.clip_norm"),  # how a run is gone on with
    *("deterministic", "tensorboard", "model.remat", "model.unroll", "model.attention"),
    *("model.attention_jvp", "mean_flow.derivative"),
    *("mesh.", "sample.", "fid.", "wandb."),
)
LATEST, BEST, ALL = "latest", "best", "all"


def is_free(key: str) -> bool:
    """Whether a key, "optimizer.lr" say, may change between the parts of a run."""
    return key in FREE or key.startswith(tuple(group for group in FREE if group.endswith(".")))


@dataclass
class Run:
    """A run's folder, or an exported model's.

    Attributes:
      name: what tables call it.
      pipeline: config, card and network, around no parameters.
    """

    name: str
    path: epath.Path
    pipeline: FlowPipeline
    _loaded: dict = field(default_factory=dict)  # the last pipeline that was asked for
    _identities: dict = field(default_factory=dict)

    def checkpoints(self, asked: Iterable[str]) -> tuple[int, ...]:
        """The steps that are asked for: numbers, "latest", "best" or "all".

        Raises:
          UserError: one that is not there.
        """
        steps, best = self._steps()
        known: dict[str, tuple[int, ...]] = {str(step): (step,) for step in steps}
        known |= {LATEST: steps[-1:], ALL: steps} | ({} if best is None else {BEST: (best,)})
        for word in asked:
            if word == BEST and best is None:
                raise UserError(f"{self.path} has no best checkpoint: train with --best_metric")
            if word not in known:
                there = ", ".join(map(str, steps))
                raise UserError(f"{self.path} has no checkpoint {word}: there are {there}, or all")
        return tuple(sorted({step for word in asked for step in known[word]}))

    def average(self, asked: str) -> str:
        """The name of the average that is asked for, as `average_name` has it.

        Raises:
          UserError: there is none of that name.
        """
        if self._exported and asked:
            raise UserError(f"{self.path} was exported and holds one average: leave --ema out")
        return average_name(self.path, self.pipeline.config, asked)

    def load(self, step: int, ema: str) -> FlowPipeline:
        """The pipeline around a checkpoint's parameters; nothing is compiled again."""
        if (step, ema) not in self._loaded:
            self._loaded.clear()  # before the next is read: memory holds one
            at = (None, "") if self._exported else (step, ema)
            self._loaded[step, ema] = self.pipeline.load(self.path, step=at[0], ema=at[1])
        return self._loaded[step, ema]

    def identity(self, step: int, ema: str = "") -> str:
        """Names exactly the weights at a step and all of the config that samples depend on.

        Args:
          ema: the average's name; of one that is made of snapshots, those are of the identity.
        """
        key = step, ema.startswith(POSTHOC)
        if key not in self._identities:
            self._identities[key] = self._identity(*key)
        return self._identities[key]

    def _identity(self, step: int, posthoc: bool) -> str:
        config = flatten(self.pipeline.config)
        groups = tuple(key for key in FREE if key.endswith("."))
        kept = {k: v for k, v in config.items() if k not in FREE and not k.startswith(groups)}
        stamp = self._stamp(step)
        card = {k: self.pipeline.card.get(k) for k in ("dataset", "autoencoder", "shape")}
        made_of = [steps_before(self.path, step)] if posthoc else []
        text = json.dumps([kept, card, stamp, *made_of], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def _exported(self) -> bool:
        return (self.path / WEIGHTS).exists()

    def _steps(self) -> tuple[tuple[int, ...], int | None]:
        """All steps, and the best of them where there is one."""
        if self._exported:
            return (int(self.pipeline.card.get("train_steps") or 0),), None
        with saved_checkpoints(self.path) as checkpoints:
            return checkpoints.steps, checkpoints.best

    def _stamp(self, step: int) -> str:
        """What no other weights have: a checkpoint's times of writing, a file's content."""
        if not self._exported:
            # Copied with the checkpoint, and another one for a run that was trained anew.
            return (self.path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").read_text()
        with (self.path / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load_runs(folders: Iterable[str], autoencoder: str = "") -> dict[str, Run]:
    """The runs in `folders`, by the names of `run_names`; no parameters are read yet.

    Args:
      autoencoder: of runs on latents; empty: the one that each names.
    Raises:
      UserError: a folder that holds no run, or two of one name.
    """
    names = run_names(folders).items()
    runs = {name: Run(name, path, FlowPipeline.describe(path, autoencoder)) for name, path in names}
    for run in runs.values():
        _ = run.pipeline.autoencoder  # a missing one is told before anything is computed
    return runs


def run_names(folders: Iterable[str]) -> dict[str, epath.Path]:
    """Names runs by their folders, and by the folders above too where these are alike.

    Raises:
      UserError: runs that would still be of one name.
    """
    paths = list(dict.fromkeys(_resolved(folder) for folder in folders))
    short = [path.name for path in paths]
    full = ["_".join(path.parts[-2:]) for path in paths]
    names = [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"runs of one name cannot share a table: {', '.join(full)}; rename one")
    return dict(zip(names, paths, strict=True))


def _resolved(folder: str) -> epath.Path:
    """One path for a folder, whatever links lead there."""
    path = files.place(folder)
    return path if files.in_bucket(path) else epath.Path(pathlib.Path(path).resolve())
