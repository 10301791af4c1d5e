"""What a sweep found, as files for people and for scripts: tables, pictures, CSV and JSON."""

import csv
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from pipelines.cells import Row
from pipelines.plan import FEW, Plan
from pipelines.sweep import COLUMNS, Cell, Section
from utils import figures
from utils.log import log_table

OBJECTIVES = {
    "flow_matching": "flow matching",
    "mean_flow": "MeanFlow",
    "improved_mean_flow": "improved MeanFlow",
    "alpha_flow": "α-Flow",
    "shortcut": "shortcut",
    "consistency": "consistency",
}
VERSIONS = ("jax", "flax", "numpy", "pillow")
# What sets the lines of a table apart: a column where it differs, or always where it is named.
LINE = (
    *("run", "objective", "train_steps", "ema", "sampler", "grid", "trained_guidance"),
    *("sampling_guidance", "guidance_interval", "train_images", "train_flops"),
)
ALWAYS = (
    "run",
    "objective",
    "trained_guidance",
    "sampling_guidance",
    "train_images",
    "train_flops",
)
HEADS = {
    "ema": "EMA",
    "trained_guidance": "ω′ trained",
    "sampling_guidance": "ω sampling",
    "guidance_interval": "guided at t",
    "train_steps": "step",
    "train_images": "samples seen",
    "train_flops": "training FLOPs",
}
METRICS = {
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "is": "IS ↑",
    "kid": "KID ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "nearest_train_distance": "nearest",
}
READING = {
    "fid": "Lower is better. Draws of the reference say what samples that cannot be told from it "
    "score at the same N; differences below that mean nothing. Fewer pictures score higher.",
    "nearest_train_distance": "Samples much nearer to the training pictures than the held-out "
    "split is are copies: the run memorises.",
    "sliced_wasserstein": "Lower is better. A perfect sampler scores what training points score.",
}


def write(sections: Sequence[Section], plan: Plan) -> str:
    """Writes results.md, .csv, .json, .png and samples*.png into `plan.out`; returns the tables.

    Files of the same names from an earlier call are replaced at the end: all are written apart,
    then moved to their places.
    """
    out = pathlib.Path(plan.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for section in sections for row in _all_rows(section)]
    text = "\n".join(_tables(section) for section in sections)
    with tempfile.TemporaryDirectory(prefix=".part", dir=out) as name:
        stage = pathlib.Path(name)
        _write_csv(stage / "results.csv", rows)
        _write_json(stage / "results.json", rows, plan)
        (stage / "results.md").write_text(text, encoding="utf-8")
        drawn = [section for section in sections if section.cells]
        if drawn:
            panels = [panel for section in drawn for panel in _panels(section)]
            figures.save_curves(stage / "results.png", panels, ylabel=_main(drawn[0])[0].metric)
            _draw_samples(stage, drawn)
        if plan.wandb:
            pictures = sorted(stage.glob("*.png"))
            log_table(out, plan.wandb, Row._fields, rows, pictures)
        for file in stage.iterdir():
            os.replace(file, out / file.name)
    return text


def _all_rows(section: Section) -> list[Row]:
    return [row for cell in section.cells for row in section.rows[cell]] + section.real


def _write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)  # None is written as nothing


def _write_json(path: pathlib.Path, rows: Sequence[Row], plan: Plan) -> None:
    value = {
        "rows": [row._asdict() for row in rows],
        "plan": plan._asdict(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    path.write_text(json.dumps(value, indent=2))


# Tables.


class Protocol(NamedTuple):
    """What numbers must share to stand in one table."""

    features: str | None
    resize: str | None
    protocol: str
    reference: str


def _protocols(rows: Sequence[Row]) -> dict[Protocol, list[Row]]:
    """The rows by protocol, in order; the metric of a table by step count is its first."""
    found: dict[Protocol, list[Row]] = {}
    for row in rows:
        key = Protocol(row.features, row.resize, row.protocol, row.reference)
        found.setdefault(key, []).append(row)
    return found


def _main(section: Section) -> list[Row]:
    """The rows of the section's first metric and protocol."""
    rows = _all_rows(section)
    first = rows[0]
    return [r for r in rows if (r.metric, r.protocol) == (first.metric, first.protocol)]


def _tables(section: Section) -> str:
    tables = [
        _protocol_tables(section, protocol, rows)
        for protocol, rows in _protocols(_all_rows(section)).items()
    ]
    return "\n".join([*tables, *(f"Warning: {words}.\n" for words in section.warnings)])


def _protocol_tables(section: Section, protocol: Protocol, rows: list[Row]) -> str:
    """A table by step count of the first metric, one of all metrics, and what they were made by."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    sampled = [row for row in rows if row.steps is not None]
    name = ", ".join(filter(None, (protocol.features, protocol.resize)))
    first = [row for row in sampled if row.metric == metrics[0]]
    parts = [f"## {metrics[0]}{f' ({name})' if name else ''}\n"]
    if first:
        parts += [_by_steps(first)]
    real = [row for row in rows if row.steps is None and row.metric == metrics[0]]
    if len(metrics) > 1 or not first:
        parts += [_by_metric(rows, metrics)]
    elif real:
        head = ["real data", "N", metrics[0]]
        parts += [_table(head, [[r.run, f"{r.num_samples:,}", _number(r)] for r in real])]
    parts += [_stated(protocol, rows)]
    return "\n".join(parts)


def _stated(protocol: Protocol, rows: list[Row]) -> str:
    """The protocol in words, and how to read the numbers."""
    samples = [row for row in rows if row.steps is not None] or rows
    counts = sorted({row.num_samples for row in samples})
    seeds = sorted({row.seed for row in samples if row.seed is not None})
    labels = sorted({row.labels for row in samples if row.labels})
    told = [f"N = {', '.join(f'{n:,}' for n in counts)} samples per cell"]
    told += [f"seed {', '.join(map(str, seeds))}"] if seeds else []
    told += [f"labels {labels[0]}"] if labels else []
    for name, words in (("sampler", "sampler"), ("ema", "EMA"), ("train_steps", "step")):
        values = sorted({str(getattr(row, name)) for row in samples if getattr(row, name)})
        told += [f"{words} {', '.join(values)}"] if values else []
    text = f"{', '.join(told)}. Protocol: {protocol.protocol}. Reference: {protocol.reference}.\n"
    spreads = sorted({row.deviation_of for row in samples if row.deviation_of})
    spreads = [f"{len(seeds)} seeds"] if len(seeds) > 1 else spreads
    text += f"± is one standard deviation over: {', '.join(spreads)}.\n" if spreads else ""
    if protocol.features and min(counts) < FEW:
        text += f"Below {FEW:,} samples these are glances at few pictures, not the usual 50,000.\n"
    metric = rows[0].metric
    reading = READING.get("fid" if metric.startswith("fd_") else metric, "")
    return f"{text}{reading}\n"


def _by_steps(rows: list[Row]) -> str:
    """A line per way of sampling, a column per step count; several seeds give their mean."""
    columns = _columns(rows)
    lines: dict[tuple, dict[int, list[Row]]] = {}
    for row in rows:
        line = lines.setdefault(tuple(_cell(row, c) for c in columns), {})
        line.setdefault(row.steps or 0, []).append(row)
    steps = sorted({row.steps or 0 for row in rows})
    body = [
        [*line, *(_mean(found[s]) if s in found else "" for s in steps)]
        for line, found in lines.items()
    ]
    return _table([*(HEADS.get(c, c) for c in columns), *map(_steps, steps)], body)


def _by_metric(rows: list[Row], metrics: list[str]) -> str:
    """A line per cell, a column per metric, as papers have it."""
    columns = [c for c in _columns(rows) if c not in ("train_images", "train_flops")]
    place = [*columns, "steps", "nfe"] if any(r.steps for r in rows) else ["run"]
    lines: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        key = (*(_cell(row, c) for c in place), f"{row.num_samples:,}")
        lines.setdefault(key, {}).setdefault(row.metric, []).append(row)
    heads = [*(HEADS.get(c, c.upper() if c == "nfe" else c) for c in place), "N"]
    body = [
        [*line, *(_mean(found[m]) if m in found else "" for m in metrics)]
        for line, found in lines.items()
    ]
    return _table([*heads, *(METRICS.get(m, f"{m} ↓") for m in metrics)], body)


def _columns(rows: list[Row]) -> list[str]:
    """The columns that tell lines apart, and those that a reader always wants."""
    sampled = [row for row in rows if row.steps is not None]
    runs = [[r for r in sampled if r.run == run] for run in dict.fromkeys(r.run for r in sampled)]
    differ = [c for c in LINE if any(len({getattr(r, c) for r in run}) > 1 for run in runs)]
    wanted = [c for c in LINE if c in differ or c in ALWAYS] if sampled else ["run"]
    return wanted


def _cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    if value is None:
        return ""
    if column in ("trained_guidance", "sampling_guidance"):
        return "none" if value == 1 else f"{value:g}"
    if column == "objective":
        return OBJECTIVES.get(value, value)
    if column == "train_flops":
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _mean(rows: list[Row]) -> str:
    """One number, or the mean and deviation over seeds."""
    if len(rows) == 1:
        return _number(rows[0])
    values = [row.value for row in rows]
    return f"{_short(float(np.mean(values)))} ± {_short(float(np.std(values, ddof=1)), 2)}"


def _number(row: Row) -> str:
    spread = f" ± {_short(row.deviation, 2)}" if row.deviation is not None else ""
    return f"{_short(row.value)}{spread}"


def _short(value: float, digits: int = 3) -> str:
    """Two decimals, as papers have it, and more where the value is small."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.{digits}g}"


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in body)


# Drawings.


def _lines(section: Section) -> Iterator[tuple[str, list[Cell]]]:
    """Yields each line of the table: what to call it, and its cells of the first seed."""
    objectives = {row.run: row.objective or "" for row in _main(section)}
    alike = [objectives[run] for run in dict.fromkeys(cell.run for cell in section.cells)]
    found: dict[Cell, list[Cell]] = {}
    for cell in section.cells:
        if cell.seed == section.cells[0].seed:
            found.setdefault(cell._replace(steps=0), []).append(cell)
    for line, cells in found.items():
        objective = objectives[line.run]
        name = OBJECTIVES.get(objective, objective)
        name += f" ({line.run})" if alike.count(objective) > 1 else ""
        yield ", ".join([name, *_differences(section, line)]), cells


def _differences(section: Section, line: Cell) -> list[str]:
    """What else a legend must say: only what differs between the lines."""
    words = {
        "checkpoint": f"step {line.checkpoint:,}",
        "ema": f"EMA {line.ema}",
        "sampler": line.sampler,
        "grid": line.grid,
        "guidance": f"ω = {line.guidance:g}",
        "interval": f"t in {line.interval[0]:g}…{line.interval[1]:g}",
    }
    several = {
        name: {getattr(cell, name) for cell in section.cells if cell.run == line.run}
        for name in words
    }
    return [text for name, text in words.items() if len(several[name]) > 1]


def _value(section: Section, cell: Cell, first: Row) -> tuple[float, float]:
    """The metric and protocol of `first`: the mean over seeds, and a deviation or 0."""
    found = [
        row
        for other in section.cells
        if other._replace(seed=0) == cell._replace(seed=0)
        for row in section.rows[other]
        if (row.metric, row.protocol) == (first.metric, first.protocol)
    ]
    values = [row.value for row in found]
    spread = float(np.std(values, ddof=1)) if len(found) > 1 else found[0].deviation or 0.0
    return float(np.mean(values)), spread


def _panels(section: Section) -> list[figures.Panel]:
    """A panel per protocol: its first metric by step count."""
    panels = []
    protocols = _protocols([r for r in _all_rows(section) if r.features or r.steps])
    shown = [rows for rows in protocols.values() if rows[0].metric != "nearest_train_distance"]
    for rows in shown or list(protocols.values()):
        first = rows[0]
        curves = [
            figures.Curve(
                name,
                [cell.steps for cell in cells],
                *zip(*(_value(section, cell, first) for cell in cells), strict=True),
            )
            for name, cells in _lines(section)
        ]
        real = [r for r in section.real if (r.metric, r.protocol) == (first.metric, first.protocol)]
        # Fewer pictures score higher: a line of few beside curves of many would mislead.
        real = [r for r in _first_of_each(real) if r.num_samples >= first.num_samples]
        lines = {f"{r.run}, N = {r.num_samples:,}": r.value for r in real}
        several = f", {first.features} {first.resize or ''}" if len(shown) > 1 else ""
        panels.append(figures.Panel(section.title + several, curves, lines))
    return panels


def _first_of_each(rows: list[Row]) -> list[Row]:
    return list({row.run: row for row in reversed(rows)}.values())[::-1]


def _draw_samples(folder: pathlib.Path, sections: Sequence[Section]) -> None:
    if sections[0].target is None:
        _draw_pictures(folder, sections[0])
    else:
        _draw_points(folder / "samples.png", sections)


def _draw_pictures(folder: pathlib.Path, section: Section) -> None:
    """One grid per cell, and the left half of each side by side, all from the same noise."""
    tiles, names, half = [], [], COLUMNS // 2
    for name, cells in _lines(section):
        for cell in cells:
            words = [cell.run, str(cell.steps), *_differences_short(section, cell)]
            path = folder / f"samples_{'_'.join(words)}.png"
            figures.save_grid(path, section.samples[cell], COLUMNS)
        left = np.arange(len(section.samples[cells[0]])) % COLUMNS < half
        grids = [figures.grid(section.samples[cell][left], half) for cell in cells]
        tiles.append([_tile(section, *pair) for pair in zip(cells, grids, strict=True)])
        names.append(name)
    figures.save_mosaic(folder / "samples.png", tiles, names)


def _differences_short(section: Section, cell: Cell) -> list[str]:
    """The same of one cell, for file names."""
    words: dict[str, Any] = {
        "checkpoint": cell.checkpoint,
        "ema": f"ema{cell.ema}",
        "sampler": cell.sampler,
        "grid": cell.grid,
        "guidance": f"g{cell.guidance:g}",
        "interval": f"t{cell.interval[0]:g}-{cell.interval[1]:g}",
    }
    return [
        str(text)
        for name, text in words.items()
        if len({getattr(c, name) for c in section.cells if c.run == cell.run}) > 1
    ]


def _tile(section: Section, cell: Cell, content: np.ndarray, name: str = "") -> figures.Tile:
    first = _main(section)[0]
    caption = f"{first.metric} {_short(_value(section, cell, first)[0])}"
    return figures.Tile(name + _steps(cell.steps), content, caption)


def _draw_points(path: pathlib.Path, sections: Sequence[Section]) -> None:
    """A row per data set: the target, then each run at the fewest and at the most steps."""
    tiles = []
    for section in sections:
        assert section.target is not None
        real = section.real[0]
        row = [figures.Tile("target", section.target, f"{real.run} {_short(real.value)}")]
        for name, cells in _lines(section):
            for cell in dict.fromkeys((cells[0], cells[-1])):
                row.append(_tile(section, cell, section.samples[cell], f"{name}, "))
        tiles.append(row)
    figures.save_mosaic(path, tiles, [section.title for section in sections])
