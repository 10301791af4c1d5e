"""What a comparison found, as files: a table of recipes by sampling steps, pictures, CSV, JSON."""

import csv
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.stats import rankdata, spearmanr

from pipelines import curves
from pipelines.cells import Row
from pipelines.compare import (
    ROWS,
    Comparison,
    Options,
    Recipe,
    Training,
    commands,
    described,
    listed,
    told,
)
from pipelines.report import VERSIONS
from pipelines.stored import read_json
from pipelines.sweep import COLUMNS
from utils import figures
from utils.cli import UserError

TITLES = {"steps": "equal training steps", "flops": "equal training FLOPs"}
SHOWN = 3  # samples of each class in the picture


class Line(NamedTuple):
    """One number of a comparison: of a recipe, at a budget, at a number of sampling steps.

    Attributes:
      nfe: network calls per sample.
      value: the mean over the training seeds; deviation: their standard deviation, None for one.
    """

    budget: str
    recipe: str
    objective: str
    train_steps: int
    train_images: int
    train_flops: float
    sampling: str  # sampler, and what else sets ways of sampling apart
    steps: int
    nfe: int
    metric: str
    value: float
    deviation: float | None
    seeds: int
    values: tuple[float, ...]  # by training seed
    num_samples: int


def write(comparison: Comparison, options: Options) -> str:
    """Writes results.md, .csv, .json and .png, and samples.png; returns the tables.

    Raises:
      UserError: an evaluation that is not there.
    """
    rows = _rows(comparison)
    found = lines(comparison, rows)
    logged = _logged(comparison)
    orders = [_order(comparison, name, found) for name in comparison.plan.groups]
    orders = [order for order in orders if len(order["values"]) > 1]
    text = "\n".join(_texts(comparison, rows, found, logged, orders))
    out = pathlib.Path(options.out or comparison.workdir)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part", dir=out) as name:
        stage = pathlib.Path(name)
        (stage / "results.md").write_text(text, encoding="utf-8")
        _write_csv(stage / "results.csv", found)
        value = {
            "rows": [line._asdict() for line in found],
            "logged": logged,
            "groups": orders,
            "real": [row._asdict() for _, row in rows if row.steps is None],
            "plan": described(comparison.plan),
            "commands": [told(command) for command in commands(comparison)],
            "commits": sorted({row.commit for _, row in rows if row.commit}),
            "versions": {name: version(name) for name in VERSIONS},
        }
        (stage / "results.json").write_text(json.dumps(value, indent=2))
        figures.save_curves(
            stage / "results.png", list(_panels(comparison, found)), ylabel=found[0].metric
        )
        _draw_samples(stage / "samples.png", comparison)
        for file in stage.iterdir():
            os.replace(file, out / file.name)
    return text


# Numbers.


def _rows(comparison: Comparison) -> list[tuple[int, Row]]:
    """All rows of the evaluations, each with the training step that it belongs to."""
    found = []
    for evaluation in comparison.evaluations:
        path = pathlib.Path(evaluation.out) / ROWS
        found += [(evaluation.step, Row.of(**row)) for row in read_json(path)["rows"]]
    return found


def lines(comparison: Comparison, rows: Sequence[tuple[int, Row]]) -> list[Line]:
    """The mean and spread over training seeds of every recipe, budget, metric and step count."""
    return [
        _line(budget, recipe, sampling, alike)
        for budget in listed(comparison.plan.budgets)
        for recipe in comparison.recipes
        for sampling, alike in _alike(comparison, recipe, recipe.targets[budget], rows)
    ]


def _alike(
    comparison: Comparison, recipe: Recipe, step: int, rows: Sequence[tuple[int, Row]]
) -> Iterator[tuple[str, list[list[Row]]]]:
    """Yields each way of sampling and measuring a recipe at a step: its rows, seed by seed."""
    runs = [pathlib.Path(t.folder).name for t in _trained(comparison, recipe, step)]
    mine = [row for at, row in rows if at == step and row.run in runs and row.steps is not None]
    several = {
        name: len({getattr(row, name) for row in mine}) > 1
        for name in ("ema", "sampler", "grid", "sampling_guidance", "guidance_interval")
    }
    found: dict[tuple, dict[str, list[Row]]] = {}
    for row in mine:
        words = [f"{name} {getattr(row, name)}" for name in several if several[name]]
        key = (", ".join(words) or row.sampler or "", row.metric, row.protocol, row.steps)
        found.setdefault(key, {}).setdefault(row.run, []).append(row)
    for key, by_run in found.items():
        yield key[0], [by_run[run] for run in runs if run in by_run]


def _trained(comparison: Comparison, recipe: Recipe, step: int) -> list[Training]:
    return [
        training
        for training in comparison.trainings
        if training.recipe.name == recipe.name and step in training.stops
    ]


def _line(budget: str, recipe: Recipe, sampling: str, by_seed: list[list[Row]]) -> Line:
    """Each training seed counts once, however many seeds its samples were drawn with."""
    first = by_seed[0][0]
    values = tuple(float(np.mean([row.value for row in rows])) for rows in by_seed)
    return Line(
        budget=budget,
        recipe=recipe.name,
        objective=recipe.objective,
        train_steps=recipe.targets[budget],
        train_images=recipe.targets[budget] * recipe.config.batch_size,
        train_flops=float(recipe.targets[budget] * recipe.flops),
        sampling=sampling,
        steps=first.steps or 0,
        nfe=first.nfe or 0,
        metric=first.metric,
        value=float(np.mean(values)),
        deviation=_deviation(values),
        seeds=len(values),
        values=values,
        num_samples=first.num_samples,
    )


def _write_csv(path: pathlib.Path, found: Sequence[Line]) -> None:
    """The lines, with the values of the seeds separated by spaces."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Line._fields)
        for line in found:
            writer.writerow(line._replace(values=" ".join(map(repr, line.values))))  # type: ignore


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _logged(comparison: Comparison) -> list[dict[str, Any]]:
    """Means of what training logged in its last tenth, at the last step of every run.

    Raises:
      UserError: a metric that a run did not log.
    """
    found = []
    for recipe in comparison.recipes:
        for metric in listed(comparison.plan.logged):
            mine = [t for t in comparison.trainings if t.recipe.name == recipe.name]
            values = [_last_tenth(training, metric) for training in mine]
            facts = {"recipe": recipe.name, "metric": metric, "values": values}
            found.append(facts | {"value": np.mean(values), "deviation": _deviation(values)})
    return found


def _last_tenth(training: Training, metric: str) -> float:
    logged, last = curves.read(training.folder).values, training.stops[-1]
    values = [v for step, v in logged.get(metric, []) if 0.9 * last < step <= last]
    if not values:
        known = ", ".join(logged)
        raise UserError(f"logged={metric}: {training.folder} has in its last tenth only {known}")
    return float(np.mean(values))


def _order(comparison: Comparison, name: str, found: Sequence[Line]) -> dict[str, Any]:
    """A group's own numbers at the fewest sampling steps beside those published, and ρ."""
    group = comparison.plan.groups[name]
    first = [
        line
        for line in found
        if line.steps == min(comparison.plan.steps)
        and (line.budget, line.metric) == (found[0].budget, found[0].metric)
    ]
    mine = {line.recipe: line for line in first}
    members = zip(group.recipes, group.labels, group.published, strict=True)
    kept = [(mine[recipe], *rest) for recipe, *rest in members if recipe in mine]
    ours, published = [line.value for line, *_ in kept], [value for *_, value in kept]
    varied = len(set(ours)) > 1 and len(set(published)) > 1
    return {
        "group": name,
        "title": group.title,
        "labels": [label for _, label, _ in kept],
        "recipes": [line.recipe for line, *_ in kept],
        "train_flops": [line.train_flops for line, *_ in kept],
        "values": ours,
        "deviations": [line.deviation for line, *_ in kept],
        "ranks": rankdata(ours).tolist() if ours else [],
        "published": published,
        "published_ranks": rankdata(published).tolist() if published else [],
        "spearman": float(spearmanr(ours, published).statistic) if varied else None,
    }


# Tables.


def _texts(
    comparison: Comparison,
    rows: Sequence[tuple[int, Row]],
    found: Sequence[Line],
    logged: Sequence[dict[str, Any]],
    orders: Sequence[dict[str, Any]],
) -> Iterator[str]:
    for metric in dict.fromkeys(line.metric for line in found):
        for budget in listed(comparison.plan.budgets):
            chosen = [line for line in found if (line.metric, line.budget) == (metric, budget)]
            yield f"## {metric}, {_title(comparison, budget)}\n\n{_by_steps(chosen)}"
        yield _stated(comparison, [row for _, row in rows if row.metric == metric])
    if logged:
        body = [[entry["recipe"], entry["metric"], _number(entry)] for entry in logged]
        yield "## The last tenth of training\n\n" + _table(["recipe", "metric", "mean"], body)
    for order in orders:
        yield _order_table(order, found[0].metric)


def _title(comparison: Comparison, budget: str) -> str:
    plan = comparison.plan
    if budget == "steps":
        return f"{TITLES[budget]}: {plan.max_steps:,}"
    like = plan.flops_of or comparison.recipes[0].name
    return f"{TITLES[budget]}: those of {plan.max_steps:,} steps of {like}"


def _by_steps(found: Sequence[Line]) -> str:
    """A line per recipe and way of sampling, a column per number of sampling steps."""
    columns = sorted({line.steps for line in found})
    calls = {steps: {line.nfe for line in found if line.steps == steps} for steps in columns}
    heads = [
        f"{s} step{'s' * (s > 1)} (NFE {', '.join(map(str, sorted(calls[s])))})" for s in columns
    ]
    body: dict[tuple[str, str], dict[int, Line]] = {}
    for line in found:
        body.setdefault((line.recipe, line.sampling), {})[line.steps] = line
    return _table(
        ["recipe", "sampler", "training steps", "training FLOPs", "samples seen", *heads],
        [
            [
                *key,
                *_training(next(iter(cells.values()))),
                *(_cell(cells.get(s), len(calls[s]) > 1) for s in columns),
            ]
            for key, cells in body.items()
        ],
    )


def _training(line: Line) -> list[str]:
    return [f"{line.train_steps:,}", f"{line.train_flops:.3g}", f"{line.train_images:,}"]


def _cell(line: Line | None, with_nfe: bool) -> str:
    if line is None:
        return ""
    return _number(line._asdict()) + (f" (NFE {line.nfe})" if with_nfe else "")


def _number(of: dict[str, Any]) -> str:
    spread = "" if of["deviation"] is None else f" ± {of['deviation']:.2g}"
    return f"{of['value']:.4g}{spread}"


def _stated(comparison: Comparison, rows: Sequence[Row]) -> str:
    """The protocol in words, and real data on the same scale."""
    first = next(row for row in rows if row.steps is not None)
    seeds = comparison.plan.seeds
    text = f"Lower is better unless the metric says otherwise. N = {first.num_samples:,} samples"
    text += (
        f" per cell, EMA {first.ema}. Protocol: {first.protocol}. Reference: {first.reference}. "
    )
    many = f"± is one standard deviation over {len(seeds)} seeds of training.\n"
    text += many if len(seeds) > 1 else f"One seed of training, {seeds[0]}.\n"
    real = {(row.run, row.num_samples): row.value for row in rows if row.steps is None}
    return text + "".join(f"- {name}, N = {n:,}: {v:.3g}\n" for (name, n), v in real.items())


def _order_table(order: dict[str, Any], metric: str) -> str:
    keys = ("labels", "train_flops", "values", "deviations", "ranks", "published")
    body = [
        [
            label,
            f"{flops:.3g}",
            _number({"value": value, "deviation": deviation}),
            f"{rank:g}",
            f"{published:g}",
            f"{published_rank:g}",
        ]
        for label, flops, value, deviation, rank, published, published_rank in zip(
            *(order[key] for key in keys), order["published_ranks"], strict=True
        )
    ]
    heads = [order["title"], "training FLOPs", metric, "rank", "published", "rank"]
    rho = "not defined" if order["spearman"] is None else f"{order['spearman']:.2f}"
    return f"## {order['title']}\n\n{_table(heads, body)}\nSpearman's ρ of the two orders: {rho}.\n"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


# Pictures.


def _panels(comparison: Comparison, found: Sequence[Line]) -> Iterator[figures.Panel]:
    """A panel per budget, of the first metric: a curve per recipe, its spread as bars.

    Real data is left to the table: far below, it would leave the curves no room.
    """
    main = [line for line in found if line.metric == found[0].metric]
    for budget in listed(comparison.plan.budgets):
        at = [line for line in main if line.budget == budget]
        for group in comparison.plan.groups.values():  # too many for one pair of axes
            names = dict(zip(group.recipes, group.labels, strict=True))
            if shown := _curves(at, names):
                yield figures.Panel(f"{group.title}, {TITLES[budget]}", shown, {})
        if not comparison.plan.groups:
            yield figures.Panel(TITLES[budget], _curves(at, {}), {})


def _curves(found: Sequence[Line], names: dict[str, str]) -> list[figures.Curve]:
    """A curve per recipe over sampling steps, called as `names` has it; empty: all, by name."""
    drawn: dict[str, list[Line]] = {}
    for line in found:
        if not names or line.recipe in names:
            drawn.setdefault(names.get(line.recipe, line.recipe), []).append(line)
    return [
        figures.Curve(
            name,
            [line.steps for line in of],
            [line.value for line in of],
            [line.deviation or 0.0 for line in of],
        )
        for name, of in drawn.items()
    ]


def _draw_samples(path: pathlib.Path, comparison: Comparison) -> None:
    """A row per recipe at the first budget, of its first seed: few steps to many, same noise."""
    budget, seed = listed(comparison.plan.budgets)[0], comparison.plan.seeds[0]
    steps = sorted(comparison.plan.steps)
    steps = sorted({steps[0], steps[len(steps) // 3], steps[-1]})
    tiles, names = [], []
    for recipe in comparison.recipes:
        step = recipe.targets[budget]
        run = next(t for t in _trained(comparison, recipe, step) if t.seed == seed)
        (out,) = {e.out for e in comparison.evaluations if e.step == step}
        grids = [
            pathlib.Path(out) / f"samples_{pathlib.Path(run.folder).name}_{s}.png" for s in steps
        ]
        if all(grid.exists() for grid in grids):  # points, and sweeps of guidance, have other files
            pairs = zip(steps, grids, strict=True)
            tiles.append([_tile(s, grid) for s, grid in pairs])
            names.append(recipe.name.replace("_", "\n"))
    if tiles:
        figures.save_mosaic(path, tiles, names)


def _tile(steps: int, path: pathlib.Path) -> figures.Tile:
    """Some samples of each class, a column per class, of a grid with a row per class."""
    with Image.open(path) as file:
        image = np.asarray(file)
    image = image[..., None] if image.ndim == 2 else image
    gap, (height, width, channels) = figures.GAP, image.shape
    side = (width - gap) // COLUMNS
    cells = image[gap:, gap:].reshape((height - gap) // side, side, COLUMNS, side, channels)
    turned = cells[:, :, :SHOWN].transpose(2, 1, 0, 3, 4)
    turned = turned.reshape(SHOWN * side, cells.shape[0] * side, channels)
    return figures.Tile(f"{steps} step{'s' * (steps > 1)}", turned)
