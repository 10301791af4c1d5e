"""Sampling again at each key, with a model that stays compiled."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TextIO

from pipelines import sampling_files
from pipelines.plan import MOST_STEPS
from pipelines.sampling import Drawn, Job, draw_all
from utils import figures
from utils.terminal import keys

HELP = "space next seed · r again · 1-9 steps · + - twice, half as many · s save · q quit"
NAME = "watch.png"  # replaced each time: most viewers show the new one by themselves
_LARGEST_SEED = 2**31 - 1


class Shown(NamedTuple):
    """What stands in the picture."""

    job: Job
    drawn: list[Drawn]


def watch(
    job: Job, stream: TextIO | None = None, tell: Callable[[str], None] | None = None
) -> None:
    """Draws, and again at each key, until q, the end of input or an interruption.

    Args:
      stream: where keys come from, by default standard input; where it is no terminal, lines.
      tell: takes a line on what was done; by default it is printed.
    Raises:
      UserError: samples that are not finite, or a missing autoencoder.
    """
    tell = tell or (lambda line: print(line, flush=True))
    try:
        with keys(stream or sys.stdin) as pressed:
            tell(HELP)
            shown = show(job, tell)
            for key in pressed:
                if key == "q":
                    return
                shown = react(key, shown, tell)
    except KeyboardInterrupt:
        tell("")


def react(key: str, shown: Shown, tell: Callable[[str], None]) -> Shown:
    """What a key does; an unknown one tells which there are."""
    job = shown.job
    if key == "s":
        for line in sampling_files.write(job, shown.drawn):
            tell(line)
        return shown
    if key == "":
        return show(newest(job._replace(seed=min(job.seed + 1, _LARGEST_SEED)), tell), tell)
    if key == "r":
        return show(newest(job, tell), tell)
    if key in ("+", "-", "=") or key.isdecimal():
        steps = _steps(job, key)
        if steps is None:
            tell(f"{job.sampler} and this grid have their own steps")
            return shown
        return show(newest(job._replace(steps=steps), tell), tell)
    tell(HELP)
    return shown


def _steps(job: Job, key: str) -> tuple[int, ...] | None:
    """The step counts that a key asks for; None where they cannot be chosen."""
    if not job.steps or not isinstance(job.grid, str):
        return None
    if key.isdecimal():
        return (min(max(int(key), 1), MOST_STEPS),)
    changed = (n // 2 if key == "-" else 2 * n for n in job.steps)  # "=": + without shift
    return tuple(dict.fromkeys(min(max(n, 1), MOST_STEPS) for n in changed))


def newest(job: Job, tell: Callable[[str], None]) -> Job:
    """The job with the run's newest checkpoint, where it is to be the latest one."""
    if job.exported or job.options.checkpoint != "latest":
        return job
    (step,) = job.run.checkpoints(["latest"])
    if step == job.checkpoint:
        return job
    tell(f"checkpoint {step}")
    return job._replace(pipeline=job.run.load(step, job.ema), checkpoint=step)


def show(job: Job, tell: Callable[[str], None]) -> Shown:
    """Draws, writes the grid to `NAME` in the job's folder, and tells so."""
    begun = time.perf_counter()
    drawn = list(draw_all(job))
    seconds = time.perf_counter() - begun
    path = job.out / NAME
    text = sampling_files.about(job, drawn)
    figures.save_png(path, sampling_files.sheet(job, drawn), text)
    steps = f"steps {text['steps']}, " if job.steps else ""
    calls = f"network calls {text['network_calls']}"
    tell(f"{path}: seed {job.seed}, {steps}{calls}, {seconds:.2f} s")
    return Shown(job, drawn)
