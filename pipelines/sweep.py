"""Runs × checkpoints × samplers × steps × … → rows of a table, cell by cell.

A cell is one way of drawing samples from one network. It is measured with all extractors in one
pass, saved at once when it is done, and never measured again: the same command continues, another
one adds cells, and several jobs may share a folder. The noise and the label of a sample are
functions of (seed, its index): batches, devices and hosts change nothing.
"""

import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flows.samplers import grid_of
from pipelines import groups, measure
from pipelines.cells import Cells, Row, name_of
from pipelines.flow import FlowPipeline, check_finite
from pipelines.jobs import Job, work_off
from pipelines.measure import Batch
from pipelines.plan import LABELS, POINTS, Interval, Plan, checked, intervals
from pipelines.runs import Run, load_runs
from pipelines.yardsticks import Yardstick
from utils.claims import Claims
from utils.log import progress
from utils.samples import Samples
from utils.sharding import fetch

COLUMNS = 10  # of a grid of samples
UNIFORM = "uniform"  # the grid of times that there always was


class Cell(NamedTuple):
    """One way of drawing samples from one network."""

    run: str
    checkpoint: int
    ema: str
    sampler: str
    grid: str
    guidance: float
    interval: Interval
    seed: int
    steps: int


class Group(NamedTuple):
    """Runs whose samples are measured alike."""

    runs: dict[str, Run]
    plan: Plan
    yardstick: Yardstick
    cells: list[Cell]  # in the table's order


class Section(NamedTuple):
    """What was found of a group."""

    title: str
    cells: list[Cell]
    rows: dict[Cell, list[Row]]
    real: list[Row]  # about real data, and about pictures made elsewhere
    samples: dict[Cell, np.ndarray]  # pictures of a grid, or all points
    target: np.ndarray | None  # real points beside them
    warnings: list[str]


def run(plan: Plan) -> list[Section]:
    """Measures all cells, and real data beside them; one section per data set.

    Returns:
      The sections; none on processes other than the first.

    Raises:
      UserError: an impossible plan, runs that cannot be compared, samples that are not finite.
    """
    plan = checked(plan)
    if plan.samples:
        return measure_samples(plan)
    return measure_runs(load_runs(plan.workdir, plan.autoencoder), plan)


def measure_runs(runs: dict[str, Run], plan: Plan) -> list[Section]:
    """`run` for runs that are loaded, and a plan that is checked."""
    grouped = [
        Group(members, plan, stick, [c for run in members.values() for c in _cells(run, plan)])
        for members, stick in groups.group_runs(runs, plan)
    ]
    cells, claims = _place(plan)
    for group in grouped:
        _warn(group.yardstick, _count(group))
    samples = sum(_count(group) * len(_open(cells, group)) for group in grouped)
    with progress(0, samples, "sample", "samples") as bar:
        for group in grouped:
            jobs = [_job(cells, group, cell, bar) for cell in group.cells]
            work_off(claims, jobs + group.yardstick.jobs(cells, _count(group)))
    if jax.process_index():
        return []
    return [_section(cells, group) for group in grouped]


def measure_samples(plan: Plan) -> list[Section]:
    """Pictures made elsewhere, a row each; the plan is checked."""
    found = groups.of_samples(plan)
    cells, claims = _place(plan)
    stick = found[0][-1]
    counts = [plan.num_samples or len(samples.source) for _, samples, _ in found]
    names = [
        name_of([name, f"n{n}"], {"pictures": samples.fingerprint, "n": n})
        for (name, samples, _), n in zip(found, counts, strict=True)
    ]
    _warn(stick, min(counts))
    with progress(0, sum(counts), "picture", "samples") as bar:
        jobs = [
            _samples_job(cells, file, stick, samples, name, n, bar)
            for (name, samples, _), file, n in zip(found, names, counts, strict=True)
        ]
        for n in dict.fromkeys(counts):
            jobs += stick.jobs(cells, n)
        work_off(claims, jobs)
    if jax.process_index():
        return []
    rows = [row for name in names for key in stick.keys for row in cells.rows(name)[key]]
    rows += [row for n in dict.fromkeys(counts) for row in stick.rows(cells, n)]
    return [Section(stick.title, [], {}, rows, {}, None, stick.warnings(min(counts)))]


def _samples_job(
    cells: Cells, file: str, stick: Yardstick, samples: Samples, name: str, n: int, bar: tqdm
) -> Job:
    def work(held: Callable[[], bool]) -> None:
        batches = measure.source_batches(samples.source, stick.plan.batch_size, bar.update, n)
        found = stick.measure(batches, n, cells.work(file), known=cells.rows(file), seed=0)
        rows = {key: [Row.of(run=name, **fact) for fact in facts] for key, facts in found.items()}
        if jax.process_index() == 0 and held():
            cells.write(file, {"samples": samples.words}, rows)
            cells.clear(file)

    return Job(file, lambda: set(stick.keys) <= cells.rows(file).keys(), work)


def _warn(stick: Yardstick, n: int) -> None:
    for words in stick.warnings(n) if jax.process_index() == 0 else []:
        print(f"warning: {words}", file=sys.stderr)


def _place(plan: Plan) -> tuple[Cells, Claims]:
    """Where the cells lie, and who is at which."""
    cells = Cells(pathlib.Path(plan.out) / "cells")
    return cells, Claims(cells.folder / "claims", plan.expires, plan.expires / 10)


def _section(cells: Cells, group: Group) -> Section:
    stick, rows, samples = group.yardstick, {}, {}
    for cell in group.cells:
        name, found = cell_name(group, cell), cells.rows(cell_name(group, cell))
        # By the name that this table gives the run, which others beside it can lengthen; and by
        # the grid asked for, since few steps may be the same on several.
        kept = [row for key in stick.keys for row in found[key]]
        rows[cell] = [row._replace(run=cell.run, grid=cell.grid) for row in kept]
        samples[cell] = cells.samples(name)
    return Section(
        title=stick.title,
        cells=group.cells,
        rows=rows,
        real=stick.rows(cells, _count(group)),
        samples=samples,
        target=stick.target(_count(group)),
        warnings=stick.warnings(_count(group)),
    )


# Cells.


def _cells(run: Run, plan: Plan) -> list[Cell]:
    """What is asked of a run; guidance that is none has one interval."""
    found = itertools.product(
        run.checkpoints(plan.checkpoint),
        [run.average(word) for word in plan.ema or ("",)],
        plan.sampler or ("",),
        plan.grid,
        plan.guidance,
        intervals(plan),
        plan.seed,
        plan.steps,
    )
    given = (Cell(run.name, *values) for values in found)
    check = run.pipeline.check
    cells = [c._replace(sampler=check(c.steps, c.sampler, [c.guidance])) for c in given]
    return list(
        dict.fromkeys(c._replace(interval=(0.0, 1.0)) if c.guidance == 1 else c for c in cells)
    )


def cell_name(group: Group, cell: Cell) -> str:
    """The name of a cell's file: the same for the same samples, measured in whatever way."""
    run, n = group.runs[cell.run], _count(group)
    words = [run.path.name, f"at{cell.checkpoint}", cell.sampler, f"steps{cell.steps}"]
    words += [f"g{cell.guidance:g}"] if cell.guidance != 1 else []
    identity = cell._replace(run=run.identity(cell.checkpoint, cell.ema))._asdict()
    if np.array_equal(grid_of(cell.steps, cell.grid), grid_of(cell.steps, UNIFORM)):
        del identity["grid"]  # as cells were named before there were grids
    else:
        words += [cell.grid]
    return name_of([*words, f"n{n}"], {**identity, "n": n, "labels": group.plan.labels})


def _open(cells: Cells, group: Group) -> list[Cell]:
    """The cells that are not done."""
    return [cell for cell in group.cells if not _done(cells, group, cell)]


def _done(cells: Cells, group: Group, cell: Cell) -> bool:
    name = cell_name(group, cell)
    saved = _saved(group, cell)
    return cells.whole(name, group.yardstick.keys) and (saved is None or saved.exists())


def _saved(group: Group, cell: Cell) -> pathlib.Path | None:
    """Where all pictures of a cell are to be kept; None: nowhere."""
    kind = group.plan.save_samples if group.yardstick.side else ""  # points are kept in any case
    path = pathlib.Path(group.plan.out) / "samples" / cell_name(group, cell)
    return {"": None, "png": path, "npz": path.with_name(f"{path.name}.npz")}[kind]


def _job(cells: Cells, group: Group, cell: Cell, bar: tqdm) -> Job:
    name = cell_name(group, cell)

    def work(held: Callable[[], bool]) -> None:
        rows = _measured(cells, group, cell, bar)
        grid = _grid(group, cell)
        if jax.process_index() == 0 and held():
            about = cell._asdict() | {"num_samples": _count(group)}
            cells.write(name, about, rows, grid)
            cells.clear(name)

    return Job(name, lambda: _done(cells, group, cell), work)


def _measured(cells: Cells, group: Group, cell: Cell, bar: tqdm) -> dict[str, list[Row]]:
    """The rows of a cell that are still missing; on processes other than the first, none."""
    run, n, name = group.runs[cell.run], _count(group), cell_name(group, cell)
    pipeline = run.load(cell.checkpoint, cell.ema)
    labels = draw_labels(cell.seed, n, pipeline.num_classes, group.plan.labels)

    def batches(start: int) -> Iterator[Batch]:
        bar.update(start)
        for batch in _cell_batches(group, cell, labels)(start):
            yield batch
            bar.update(batch.count)

    found = group.yardstick.measure(
        batches,
        n,
        cells.work(name),
        known=cells.rows(name),
        saved=_saved(group, cell),
        seed=cell.seed,
    )
    facts = _facts(run, pipeline, cell, group.plan)
    return {key: [Row.of(**facts, **row) for row in rows] for key, rows in found.items()}


def _facts(run: Run, pipeline: FlowPipeline, cell: Cell, plan: Plan) -> dict[str, Any]:
    """What a row says of where its samples came from."""
    card = ("trained_guidance", "train_steps", "train_images", "train_flops")
    interval = ":".join(f"{time:g}" for time in cell.interval)
    return {
        "run": run.name,
        "objective": pipeline.config.objective,
        "ema": cell.ema,
        "sampler": cell.sampler,
        "steps": cell.steps,
        "grid": cell.grid,
        "nfe": pipeline.network_calls(
            cell.steps, cell.guidance, cell.interval, cell.sampler, cell.grid
        ),
        "sampling_guidance": cell.guidance,
        "guidance_interval": interval,
        "labels": plan.labels if pipeline.num_classes > 1 else None,
        "seed": cell.seed,
        **{name: pipeline.card[name] for name in card},
    }


# Samples.


def _count(group: Group) -> int:
    return group.plan.num_samples or group.yardstick.default_count


def draw_labels(seed: int, n: int, num_classes: int, law: str = "random") -> np.ndarray:
    """Labels int32 (n,), a function of (seed, index); 0 where there is no class.

    Args:
      law: "random" for uniform ones, "balanced" for 0, 1, …, num_classes − 1 again and again.
    """
    if law == "balanced":
        return (np.arange(n) % max(num_classes, 1)).astype(np.int32)
    rng = np.random.default_rng((seed, LABELS))
    return rng.integers(max(num_classes, 1), size=n, dtype=np.int32)


def grid_labels(num_classes: int, rows: int = 10) -> np.ndarray:
    """Labels int32 of a grid with ten columns: whole rows of a class, `rows` classes at most."""
    shown = min(max(num_classes, 1), rows)
    classes = np.linspace(0, max(num_classes - 1, 0), shown).astype(np.int32)
    return np.repeat(classes, COLUMNS * (rows // shown))


def sample_batches(
    pipeline: FlowPipeline,
    plan: Plan,
    labels: np.ndarray,
    *,
    seed: int,
    **options: Any,
) -> Callable[[int], Iterator[Batch]]:
    """Sample number → exactly the samples from there on; batches of one size, compiled once.

    Args:
      labels: of all samples.
      options: of `FlowPipeline.draw`.
    """
    n = len(labels)
    size = min(plan.batch_size, plan.num_samples or n)
    padded = np.pad(labels, (0, size))

    def batches(start: int) -> Iterator[Batch]:
        for first in range(start, n, size):
            indices = np.arange(first, first + size, dtype=np.int32)
            label = padded[first : first + size]
            samples, finite, _ = pipeline.draw(label, indices=indices, seed=seed, **options)
            yield Batch(samples, min(size, n - first), finite)

    return batches


def _cell_batches(group: Group, cell: Cell, labels: np.ndarray) -> Callable[[int], Iterator[Batch]]:
    return sample_batches(
        group.runs[cell.run].load(cell.checkpoint, cell.ema),
        group.plan,
        labels,
        seed=cell.seed,
        steps=cell.steps,
        sampler=cell.sampler,
        grid=cell.grid,
        guidance=cell.guidance,
        guidance_interval=cell.interval,
    )


def _grid(group: Group, cell: Cell) -> np.ndarray:
    """Pictures for a grid, from the noise of the first indices; or all points."""
    pipeline = group.runs[cell.run].load(cell.checkpoint, cell.ema)
    stick = group.yardstick
    if stick.default_count == POINTS:
        labels = draw_labels(cell.seed, _count(group), pipeline.num_classes, group.plan.labels)
    else:
        labels = grid_labels(pipeline.num_classes, rows=10 if stick.side <= 64 else 4)
    found = []
    for batch in _cell_batches(group, cell, labels)(0):
        samples, finite = fetch((batch.pictures, batch.finite))
        check_finite(finite[: batch.count])
        found.append(samples[: batch.count])
    return np.concatenate(found)
