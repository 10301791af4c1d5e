"""What sampling writes: a labelled grid, pictures one by one, and in each how it was made.

A PNG holds its settings as text: `exiftool FILE`, `identify -verbose FILE` or Pillow's
`Image.open(FILE).text` show them. Its "command" makes the same picture again, from the folder in
which it was called.
"""

import hashlib
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flows.samplers import ADAPTIVE
from pipelines.sampling import (
    NO_CLASS,
    RANDOM,
    TOLERANCE,
    Drawn,
    Job,
    Sampling,
    counted,
    usual_num,
)
from utils import figures

SHOWN = 100  # pictures of a grid at most; all are written one by one
ROWS = 16  # of step counts side by side


def write(job: Job, drawn: Sequence[Drawn]) -> list[str]:
    """Writes a grid, and pictures one by one into a folder beside it; or a figure of points.

    Returns:
      What was written, in words.
    """
    path = job.out / f"{stem(job)}.png"
    figures.save_png(path, sheet(job, drawn), about(job, drawn))
    if job.points:
        return [f"{path}: {counted(job.total, 'point')}"]
    folder = job.out / stem(job)
    labels = job.labels

    def save(item: tuple[Drawn, int]) -> None:
        each, place = item
        name = _file_name(job.options.first + place, job.name_of(labels[place]))
        name += f"_steps{each.steps}" if len(drawn) > 1 else ""
        figures.save_png(folder / f"{name}.png", each.samples[place], about(job, [each], place))

    with ThreadPoolExecutor(8) as threads:  # Pillow encodes without Python's lock
        list(threads.map(save, itertools.product(drawn, range(job.total))))
    shown = _shown(job, len(drawn))
    part = f" (the first {shown} of {job.total})" if shown < job.total else ""
    singles = counted(job.total * len(drawn), "single picture")
    return [f"{path}: the grid{part}", f"{folder}: {singles}"]


def _shown(job: Job, counts: int) -> int:
    """How many samples a grid of so many step counts shows."""
    return min(job.total, SHOWN if counts == 1 else ROWS)


def sheet(job: Job, drawn: Sequence[Drawn]) -> np.ndarray:
    """The labelled grid: step counts as columns where there are several, else labels."""
    if job.points:
        heads = [counted(each.steps, "step") if each.steps else ADAPTIVE for each in drawn]
        tiles = [figures.Tile(h, d.samples) for h, d in zip(heads, drawn, strict=True)]
        return figures.mosaic([tiles], limits=drawn[-1].samples)
    shown = _shown(job, len(drawn))
    words = [job.name_of(label) for label in job.labels[:shown]]
    if len(drawn) == 1:
        columns = len(job.words) if 1 < len(job.words) <= 10 and job.num > 1 else None
        return figures.labelled(drawn[0].samples[:shown], words, columns)
    pictures = np.stack([each.samples[:shown] for each in drawn], axis=1)
    heads = [counted(each.steps, "step") for each in drawn]
    flat = pictures.reshape(-1, *pictures.shape[2:])
    return figures.labelled(flat, [w for w in words for _ in drawn], len(drawn), heads)


def stem(job: Job) -> str:
    """The name of what is written: other settings have another.

    Where a word of it can stand for several settings, as "5_labels" does, eight digits of a hash of
    them all follow.
    """
    options = job.options
    labels, exact = _labels(job)
    parts = [] if job.exported else [f"at{job.checkpoint}"]
    parts += [f"ema_{options.ema}"] if options.ema else []
    parts += [labels] if labels else []
    parts += [f"num{job.num}"] if job.num != usual_num(options, job.points) else []
    parts += [f"steps{'_'.join(map(str, job.steps))}"] if job.steps else []
    parts += [job.sampler] if job.sampler != job.pipeline.check(1, "", []) else []
    parts += [f"tolerance{options.tolerance:.9g}"] if options.tolerance != TOLERANCE else []
    if job.grid != "uniform":
        times = () if isinstance(job.grid, str) else job.grid
        parts.append("times" + "_".join(f"{t:g}" for t in times) if times else str(job.grid))
        exact &= all(float(f"{t:g}") == t for t in times)
    if options.guidance != 1:
        parts.append(f"guidance{options.guidance:.9g}")
        parts += [options.guidance_interval.replace(":", "_")] if job.interval != (0, 1) else []
    parts += [f"seed{job.seed}"] + ([f"from{options.first}"] if options.first else [])
    seconds = options.video_seconds
    parts += [f"{seconds:.9g}s"] if options.video and seconds != Sampling().video_seconds else []
    whole = "_".join(parts)
    name = _short(whole, 140)
    if exact and name == whole and not options.autoencoder:
        return name
    settings = {**job.settings, "autoencoder": options.autoencoder, "labels": job.words}
    told = repr((whole, sorted(settings.items())))
    return f"{name}_{hashlib.sha256(told.encode(errors='replace')).hexdigest()[:8]}"


def _labels(job: Job) -> tuple[str, bool]:
    """The labels asked for as part of a file's name, and whether it can mean no others."""
    if not (job.names and job.options.labels):
        return "", True
    if len(job.words) > 3:
        return f"{len(job.words)}_labels", False
    # Some file systems keep no case apart.
    known = Counter(_slug(name).casefold() for name in ("random", *job.names, "no class"))
    asked = ["random" if label == RANDOM else job.name_of(label) for label in job.words]
    slugs = [_slug(name) for name in asked]
    return "+".join(slugs), all(slug and known[slug.casefold()] == 1 for slug in slugs)


def _file_name(index: int, name: str) -> str:
    return f"{index:05d}" + (f"_{_slug(name)}" if name else "")


def _slug(name: str) -> str:
    """A name as part of a file's."""
    return _short(re.sub(r"[^\w.-]+", "_", name).strip("_."), 60)


def _short(name: str, most: int) -> str:
    """The beginning of a name: file systems take 255 bytes."""
    return name.encode()[:most].decode(errors="ignore")


def about(job: Job, drawn: Sequence[Drawn], place: int | None = None) -> dict[str, str]:
    """What a file says of itself: every setting, and the command that makes it again.

    Args:
      place: of the one picture among the job's; None: of all.
    """
    options = job.options
    calls = [d.calls if place is None else d.calls[place : place + 1] for d in drawn]
    ends = (("" if a == b else f"{a}-") + f"{b}" for a, b in ((c.min(), c.max()) for c in calls))
    grid = job.grid if isinstance(job.grid, str) else ",".join(f"{t:.9g}" for t in job.grid)
    facts = {
        "Software": "sample.py",
        "model": options.workdir,
        "objective": str(job.pipeline.config.objective),
        "checkpoint": str(job.checkpoint),
        "ema": job.ema,
        "seed": str(job.seed),
        "steps": ",".join(str(d.steps) for d in drawn) if job.steps else "adaptive",
        "sampler": job.sampler,
        "grid": grid if job.steps else "adaptive",
        "guidance": f"{options.guidance:.9g}",
        "guidance_interval": options.guidance_interval,
        "network_calls": ",".join(ends),
    }
    facts |= {} if job.steps else {"tolerance": f"{options.tolerance:g}"}
    if place is not None:
        facts["index"] = str(job.options.first + place)
        if job.names:
            label = job.label_of(place)
            facts |= {"label": str(label), "class": job.name_of(label)}
    facts["command"] = command(job, [d.steps for d in drawn], place)
    # A folder's name can hold bytes that are no text.
    return {key: value.encode(errors="replace").decode() for key, value in facts.items()}


def command(job: Job, steps: Sequence[int], place: int | None = None) -> str:
    """The command line that makes samples again: all of a job, or the one at a place."""
    options = job.options
    changed: dict[str, Any] = {
        "seed": job.seed,
        "sampler": job.sampler,
        "checkpoint": options.checkpoint if job.exported else str(job.checkpoint),
        "steps": tuple(steps) if job.steps and isinstance(job.grid, str) else (),
        "num": job.num,
    }
    changed |= {"out": "", "watch": False, "batch_size": Sampling().batch_size}
    if place is not None:
        label = job.label_of(place)
        word = NO_CLASS if label == len(job.names) else str(label)
        changed |= {"labels": (word,) if job.names else (), "num": 1}
        changed["first"] = job.options.first + place
    asked, usual = options._replace(**changed), Sampling()
    words = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in asked._asdict().items()
        if value != getattr(usual, name)
    ]
    return shlex.join(["python", "sample.py", *words])
