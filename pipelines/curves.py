"""What runs logged while they were trained, over their steps, and when they reached a level."""

import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipelines.stored import read_json
from utils import files
from utils.cli import UserError
from utils.figures import Curve, Panel, save_logs

DEFAULT = ("loss", "error", "velocity_error")


class Options(NamedTuple):
    """What is to be drawn; the flags of scripts/curves.py.

    Attributes:
      workdir: A run's folder or gs://BUCKET/FOLDER; give the flag once per run.
      metrics: Names in metrics.jsonl, by commas, a panel each; also how they begin, as fid_quick
        for fid_quick_2000/1_step. By default loss, error, velocity_error and every distance.
      levels: Of the last metric, by commas: the table says when each run was first there.
      out: The picture.
    """

    workdir: Sequence[str] = ()
    metrics: tuple[str, ...] = ()
    levels: tuple[float, ...] = ()
    out: str = "runs/curves.png"


class Log(NamedTuple):
    """What a run logged.

    Attributes:
      values: by metric, steps and values in order.
      flops: of one training step; 0 where it is not known.
      before: steps and FLOPs of the training that it began with (`init_from`).
    """

    name: str
    values: dict[str, list[tuple[int, float]]]
    flops: float
    before: tuple[int, float]


def draw(options: Options) -> str:
    """Writes the picture, and returns the table of levels in Markdown; "" without levels.

    Raises:
      UserError: no run, a folder without a log, or a metric that no run logged.
    """
    if not options.workdir:
        raise UserError("which runs? --workdir=runs/... once per run")
    files.check_local(out=options.out)
    logs = [read(folder) for folder in dict.fromkeys(options.workdir)]
    metrics = chosen(logs, options.metrics)
    lines = {f"{level:g}": level for level in options.levels}
    panels = [
        Panel(metric, _curves(logs, metric), lines if metric == metrics[-1] else {})
        for metric in metrics
    ]
    save_logs(options.out, panels)
    return table(logs, metrics[-1], options.levels) if options.levels else ""


def _curves(logs: Sequence[Log], metric: str) -> list[Curve]:
    return [
        Curve(log.name, *zip(*log.values[metric], strict=True))
        for log in logs
        if metric in log.values
    ]


def read(folder: str | os.PathLike) -> Log:
    """The log of a run; where a step was logged twice, after a restart, the last one counts.

    Raises:
      UserError: no such folder, or nothing in it.
    """
    path = files.place(folder)
    card = read_json(path / "card.json")
    try:
        lines = (path / "metrics.jsonl").read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} has no metrics.jsonl: name a run that was trained") from error
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in _values(line).items():
            found.setdefault(name, {})[int(_values(line)["step"])] = value
    values = {name: sorted(at.items()) for name, at in found.items()}
    origin = card.get("initialised_from") or {}
    before = (origin.get("train_steps", 0), origin.get("train_flops", 0.0))
    return Log(path.name, values, card.get("flops_per_step") or 0.0, before)


def _values(line: str) -> dict[str, Any]:
    """The finite numbers of a line; of half a line, which a kill leaves, nothing."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
    return numbers if "step" in numbers else {}


def chosen(logs: Sequence[Log], asked: Sequence[str]) -> list[str]:
    """The metrics that are asked for, by their whole names.

    Raises:
      UserError: one that no run logged.
    """
    known = list(dict.fromkeys(name for log in logs for name in log.values if name != "step"))
    asked = asked or [name for name in known if name in DEFAULT or "_quick_" in name]
    names: list[str] = []
    for word in asked:
        found = [word] if word in known else [name for name in known if name.startswith(word)]
        if not found:
            raise UserError(f"--metrics={word}: the runs logged {', '.join(known)}")
        names += found
    return list(dict.fromkeys(names))


def table(logs: Sequence[Log], metric: str, levels: Sequence[float]) -> str:
    """When each run was first at a level or below, in steps and FLOPs; in brackets all of them."""
    head = [f"first `{metric}` of at most", *(log.name for log in logs)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for level in levels:
        cells = [f"{level:g}", *(_first(log, metric, level) for log in logs)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first(log: Log, metric: str, level: float) -> str:
    steps = [step for step, value in log.values.get(metric, []) if value <= level]
    if not steps:
        return "not reached"
    told = f"step {steps[0]:,}, {steps[0] * log.flops:.2g} FLOPs"
    if not log.before[0]:
        return told
    whole = steps[0] * log.flops + log.before[1]
    return f"{told} ({steps[0] + log.before[0]:,}, {whole:.2g} with what it began from)"
