"""What a sweep found, as files for people: CSV, Markdown tables and pictures."""

import csv
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.sweep import COLUMNS, Cell, Row, Section
from utils import data, figures

OBJECTIVES = {"flow_matching": "flow matching", "mean_flow": "MeanFlow"}
RUN_COLUMNS = ("run", "objective", "ω′ trained", "ω sampling", "samples seen", "training FLOPs")
READING = {
    "fd": "lower is better. Samples that cannot be told from training pictures score what the "
    "bootstrap draws score at the same N, and differences below that mean nothing. Fewer pictures "
    "score higher: compare the held-out split with draws of its own N.",
    "nearest": "samples much nearer to the training pictures than the held-out split is are "
    "copies: the run memorises.",
    "sliced": "lower is better. A perfect sampler scores what training points score.",
}


def write(sections: Sequence[Section], out: str | os.PathLike) -> str:
    """Writes results.csv, results.md, results.png and samples*.png; returns the text of the table.

    Files of the same names from an earlier call are replaced at the end: all are written apart,
    then moved to their places.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for section in sections for row in section.rows]
    text = _report(rows)
    with tempfile.TemporaryDirectory(prefix=".part", dir=out) as name:
        stage = pathlib.Path(name)
        _write_csv(stage / "results.csv", rows)
        (stage / "results.md").write_text(text, encoding="utf-8")
        panels = [_panel(section) for section in sections]
        figures.save_curves(stage / "results.png", panels, ylabel=rows[0].metric)
        if len(sections[0].group.dataset.shape) == 1:
            _draw_points(stage / "samples.png", sections)
        else:
            _draw_pictures(stage, sections[0])
        for file in stage.iterdir():
            os.replace(file, out / file.name)
    return text


def _write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)  # None is written as nothing


def _report(rows: Sequence[Row]) -> str:
    metrics = dict.fromkeys(row.metric for row in rows)
    return "\n".join(_metric_report([r for r in rows if r.metric == m]) for m in metrics)


def _metric_report(rows: Sequence[Row]) -> str:
    """One metric's tables: a line per run with a column per step count, then real data."""
    first = rows[0]
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        if row.steps is not None:
            line = lines.setdefault((row.run, row.sampling_guidance), _run_columns(row))
            line.append(_short(row.value))
    steps = dict.fromkeys(_steps(row.steps) for row in rows if row.steps is not None)
    real = [
        [row.run, f"{row.num_samples:,}", row.reference, _short(row.value)]
        for row in rows
        if row.steps is None
    ]
    return f"""## {first.metric} by sampling steps

N = {first.num_samples:,} samples per cell, seed {first.seed}. Protocol: {first.protocol}.

{_table([*RUN_COLUMNS, *steps], list(lines.values()))}
{_table(["real data", "N", "reference", first.metric], real)}
How to read: {READING[first.metric.split("_")[0]]}
"""


def _run_columns(row: Row) -> list[str]:
    scales = (row.trained_guidance, row.sampling_guidance)
    guidance = ["none" if scale == 1 else f"{scale:g}" for scale in scales]
    objective = OBJECTIVES.get(row.objective, row.objective)
    return [row.run, objective, *guidance, f"{row.train_images:,}", f"{row.train_flops:.2g}"]


def _short(value: float) -> str:
    return f"{value:.3g}"


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in body)


# Drawings.


def _lines(section: Section) -> Iterator[tuple[str, list[Cell]]]:
    """Yields each line of the table: what to call it, and its cells."""
    runs, plan = section.group.runs, section.group.plan
    alike = [pipeline.config.objective for pipeline in runs.values()]
    for (run, pipeline), guidance in itertools.product(runs.items(), plan.guidance):
        cells = [Cell(run, guidance, steps) for steps in plan.steps]
        name = OBJECTIVES.get(pipeline.config.objective, pipeline.config.objective)
        name += f" ({run})" if alike.count(pipeline.config.objective) > 1 else ""
        yield name + (f", ω = {guidance:g}" if len(plan.guidance) > 1 else ""), cells


def _panel(section: Section) -> figures.Panel:
    steps, values = section.group.plan.steps, section.values
    curves = [
        figures.Curve(name, steps, [values[cell] for cell in cells])
        for name, cells in _lines(section)
    ]
    # Not the draws at the held-out split's own N: two lines are enough.
    lines = {f"{row.run}, N = {row.num_samples:,}": row.value for row in section.real[:2]}
    return figures.Panel(section.group.dataset.name, curves, lines)


def _draw_pictures(folder: pathlib.Path, section: Section) -> None:
    """One grid per cell, and the left half of each side by side, all from the same noise."""
    tiles, names, half = [], [], COLUMNS // 2
    several = len(section.group.plan.guidance) > 1
    for name, cells in _lines(section):
        for cell in cells:
            guidance = f"_g{cell.guidance:g}" if several else ""
            path = folder / f"samples_{cell.run}_{cell.steps}{guidance}.png"
            figures.save_grid(path, section.samples[cell], COLUMNS)
        left = np.arange(len(section.samples[cells[0]])) % COLUMNS < half
        grids = [figures.grid(section.samples[cell][left], half) for cell in cells]
        tiles.append([_tile(section, *pair) for pair in zip(cells, grids, strict=True)])
        names.append(name)
    figures.save_mosaic(folder / "samples.png", tiles, names)


def _tile(section: Section, cell: Cell, content: np.ndarray, name: str = "") -> figures.Tile:
    caption = f"{section.rows[0].metric} {_short(section.values[cell])}"
    return figures.Tile(name + _steps(cell.steps), content, caption)


def _draw_points(path: pathlib.Path, sections: Sequence[Section]) -> None:
    """A row per data set: the target, then each run at the fewest and at the most steps."""
    tiles = []
    for section in sections:
        group, real = section.group, section.real[0]
        target = data.arrays(group.dataset.heldout, range(group.plan.num_samples))["x"]
        row = [figures.Tile("target", target, f"{real.run} {_short(real.value)}")]
        for name, cells in _lines(section):
            for cell in dict.fromkeys((cells[0], cells[-1])):
                row.append(_tile(section, cell, section.samples[cell], f"{name}, "))
        tiles.append(row)
    figures.save_mosaic(path, tiles, [section.group.dataset.name for section in sections])
