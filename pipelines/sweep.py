"""Runs × steps × guidance → rows of a table, with what real data scores beside them.

Pictures are measured by the Fréchet distance of a classifier's features (`pipelines/features.py`)
and by the distance to the nearest training picture, points by the sliced Wasserstein distance. The
noise and the label of a sample are functions of (seed, its index): batches change nothing.
"""

import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines import features
from pipelines.flow import FlowPipeline
from utils import data, distances, fid
from utils.cli import UserError
from utils.log import progress

REPEATS = 5  # of a draw of real data
NEAREST = 1000  # samples whose nearest training picture is looked for
COLUMNS = 10  # of a grid of samples
_LABELS, _DRAWS = 1, 2  # set the random streams of one seed apart

BOOTSTRAP, HELDOUT = "bootstrap draws of the training split", "held-out split"


class Plan(NamedTuple):
    """What is asked for."""

    steps: tuple[int, ...]
    guidance: tuple[float, ...] = (1.0,)
    num_samples: int = 2000
    batch_size: int = 256
    seed: int = 0


class Row(NamedTuple):
    """One number, and all that is needed to know what it is; None where it does not apply."""

    run: str
    objective: str
    steps: int | None
    nfe: int | None  # network calls per sample
    sampling_guidance: float | None
    trained_guidance: float | None  # ω′ = ω / (1 − κ); 1: none
    train_steps: int | None
    train_images: int | None
    train_flops: float | None
    metric: str
    protocol: str
    reference: str
    value: float
    num_samples: int
    seed: int


class Cell(NamedTuple):
    """One place of the table."""

    run: str
    guidance: float
    steps: int


class Group(NamedTuple):
    """Runs on one data set, and what is asked of them."""

    dataset: data.Dataset
    runs: dict[str, FlowPipeline]
    plan: Plan

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the table's order."""
        places = itertools.product(self.runs, self.plan.guidance, self.plan.steps)
        return [Cell(*place) for place in places]

    @property
    def trained_on(self) -> str:
        """The reference of distances to the training split."""
        return f"training split of {self.dataset.name}, {len(self.dataset.train):,} pictures"


class Section(NamedTuple):
    """What was found of a group."""

    group: Group
    rows: list[Row]
    samples: dict[Cell, np.ndarray]  # pictures of a grid, or all points

    @property
    def values(self) -> dict[Cell, float]:
        """The first metric's value of each cell."""
        return dict(zip(self.group.cells, (row.value for row in self.rows), strict=False))

    @property
    def real(self) -> list[Row]:
        """The first metric's rows about real data."""
        metric = self.rows[0].metric
        return [row for row in self.rows if row.metric == metric and row.steps is None]


def measure(
    runs: Mapping[str, FlowPipeline],
    plan: Plan,
    cache_dir: str | os.PathLike = "runs/cache",
    data_dir: str = "",
) -> list[Section]:
    """Measures all cells, and real data beside them; one section per data set.

    Args:
      runs: names and pipelines; pictures of one data set, or points of any.
      plan: steps, guidance and how many samples.
      cache_dir: where classifiers and reference statistics are kept.
      data_dir: of the pictures, or of MNIST; empty: where the runs, or who prepared the latents,
        found them.

    Raises:
      UserError: an impossible plan, or runs that cannot be compared.
    """
    groups = _groups(runs, _checked(plan), data_dir)
    return [
        _points(group) if len(group.dataset.shape) == 1 else _pictures(group, cache_dir)
        for group in groups
    ]


# What can be compared.


def load_runs(
    folders: Iterable[str | os.PathLike], autoencoder: str = ""
) -> dict[str, FlowPipeline]:
    """Loads the runs in `folders`, by the names of `run_names`.

    Args:
      autoencoder: of runs on latents; empty: the one that each names.
    Raises:
      UserError: a folder that holds no run, or two of one name.
    """
    names = run_names(folders).items()
    return {name: FlowPipeline.from_pretrained(path, autoencoder) for name, path in names}


def run_names(folders: Iterable[str | os.PathLike]) -> dict[str, pathlib.Path]:
    """Names runs by their folders, and by the folders above too where these are alike.

    Raises:
      UserError: runs that would still be of one name.
    """
    paths = list(dict.fromkeys(pathlib.Path(folder).resolve() for folder in folders))
    short = [path.name for path in paths]
    full = ["_".join(path.parts[-2:]) for path in paths]
    names = [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"runs of one name cannot share a table: {', '.join(full)}; rename one")
    return dict(zip(names, paths, strict=True))


def _checked(plan: Plan) -> Plan:
    if not plan.steps or not plan.guidance:
        raise UserError("nothing to measure: give --steps=1,2,4 and --guidance=1")
    if min(plan.steps) < 1:
        raise UserError(f"--steps={min(plan.steps)}: at least 1")
    if plan.num_samples < 2:
        raise UserError(f"--num_samples={plan.num_samples}: at least 2, and 2000 say more")
    if plan.batch_size < 1:
        raise UserError(f"--batch_size={plan.batch_size}: at least 1")
    if not 0 <= plan.seed < 2**31:
        raise UserError(f"--seed={plan.seed}: from 0 to {2**31 - 1}")
    if not np.isfinite(plan.guidance).all():
        raise UserError(f"--guidance={plan.guidance}: finite numbers, 1 for none")
    return plan._replace(
        steps=tuple(sorted(set(plan.steps))), guidance=tuple(sorted(set(plan.guidance)))
    )


def _groups(runs: Mapping[str, FlowPipeline], plan: Plan, data_dir: str) -> list[Group]:
    """Groups runs by data set; several data sets share a call only where they are points."""
    if not runs:
        raise UserError("no run to measure: give --workdir=FOLDER")
    groups: dict[str, Group] = {}
    for name, pipeline in runs.items():
        dataset = data.load_pictures(pipeline.config, pipeline.card.get("pictures"), data_dir)
        _check_data(name, pipeline, dataset, plan)
        group = groups.setdefault(dataset.fingerprint, Group(dataset, {}, plan))
        group.runs[name] = pipeline
    if len(groups) > 1 and any(len(group.dataset.shape) > 1 for group in groups.values()):
        told = ", ".join(f"{next(iter(g.runs))} on {g.dataset.name}" for g in groups.values())
        raise UserError(f"runs on different data sets ({told}): evaluate each data set by itself")
    return list(groups.values())


def _check_data(name: str, pipeline: FlowPipeline, dataset: data.Dataset, plan: Plan) -> None:
    here = dataset.identity
    card = pipeline.card
    there = (card.get("pictures") or {}).get("identity") or card.get("dataset", here)
    if there != here:
        raise UserError(f"{name} was trained on {there}, the data here is {here}: see --data_dir")
    if dataset.num_classes == 0 and plan.guidance != (1.0,):
        raise UserError(f"{name} knows no labels: give --guidance=1")
    most = min(len(dataset.heldout), len(dataset.train))
    if len(dataset.shape) == 1 and plan.num_samples > most:
        raise UserError(f"{dataset.name} has {most} held-out points: --num_samples={most} or less")


# Samples.


def draw_labels(seed: int, n: int, num_classes: int) -> np.ndarray:
    """Uniform labels int32 (n,); label i is a function of (seed, i), 0 where there is no class."""
    rng = np.random.default_rng((seed, _LABELS))
    return rng.integers(max(num_classes, 1), size=n, dtype=np.int32)


def grid_labels(num_classes: int) -> np.ndarray:
    """Labels int32 of a grid with ten columns: whole rows of a class, ten classes at most."""
    shown = min(max(num_classes, 1), 10)
    classes = np.linspace(0, max(num_classes - 1, 0), shown).astype(np.int32)
    return np.repeat(classes, COLUMNS * (10 // shown))


def _samples(group: Group, cell: Cell, labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yields exactly len(labels) samples; all batches are of one size, so that one is compiled."""
    plan, n = group.plan, len(labels)
    size = min(plan.batch_size, plan.num_samples)
    padded = np.pad(labels, (0, -n % size))
    for start in range(0, n, size):
        batch = group.runs[cell.run](
            padded[start : start + size],
            steps=cell.steps,
            guidance=cell.guidance,
            seed=plan.seed,
            indices=np.arange(start, start + size, dtype=np.int32),
        )
        yield batch[: n - start]


def _table_samples(group: Group) -> Iterator[tuple[Cell, Iterator[np.ndarray]]]:
    """Yields each cell and its batches, under a progress bar."""
    n = group.plan.num_samples
    labels = draw_labels(group.plan.seed, n, group.dataset.num_classes)
    with progress(0, n * len(group.cells), "sample", group.dataset.name) as bar:
        for cell in group.cells:
            yield cell, _ticked(_samples(group, cell, labels), bar)


def _ticked(batches: Iterator[np.ndarray], bar) -> Iterator[np.ndarray]:
    for batch in batches:
        yield batch
        bar.update(len(batch))


# Rows.


def _cell_row(group: Group, cell: Cell, **measured) -> Row:
    """A row about a run; `measured`: metric, protocol, reference, value, num_samples."""
    pipeline = group.runs[cell.run]
    card = ("trained_guidance", "train_steps", "train_images", "train_flops")
    return Row(
        run=cell.run,
        objective=pipeline.config.objective,
        steps=cell.steps,
        nfe=pipeline.network_calls(cell.steps, cell.guidance),
        sampling_guidance=cell.guidance,
        seed=group.plan.seed,
        **{name: pipeline.card[name] for name in card},
        **measured,
    )


def _real_row(group: Group, name: str, **measured) -> Row:
    """A row about real data: nothing was sampled, nothing was trained."""
    empty: dict[str, Any] = dict.fromkeys(Row._fields)
    about = {"run": name, "objective": "real data", "seed": group.plan.seed}
    return Row(**empty | about | measured)


def _how_drawn(dataset: data.Dataset) -> str:
    drawn = "labels uniform, noise and label" if dataset.num_classes > 1 else "no labels, noise"
    return f"{drawn} a function of (seed, sample index)"


def _mean_of_draws(values: Sequence[float], drawn: str) -> tuple[float, str]:
    """The mean over draws of real data, and the words of the protocol."""
    words = f"{drawn}, mean of {len(values)} (deviation {np.std(values):.2g})"
    return float(np.mean(values)), words


# Pictures.


def _pictures(group: Group, cache_dir: str | os.PathLike) -> Section:
    reference = features.prepare(group.dataset, cache_dir)
    labels = grid_labels(group.dataset.num_classes)
    rows, grids, first = [], {}, {}
    for cell, batches in _table_samples(group):
        value, first[cell] = _frechet(batches, reference)
        facts = _frechet_facts(group, reference, _how_drawn(group.dataset))
        n = group.plan.num_samples
        rows.append(_cell_row(group, cell, **facts, value=value, num_samples=n))
        grids[cell] = np.concatenate(list(_samples(group, cell, labels)))
    rows += _real_pictures(group, reference) + _nearest_rows(group, first)
    return Section(group, rows, grids)


def _frechet(
    batches: Iterable[np.ndarray], reference: features.Reference
) -> tuple[float, np.ndarray]:
    """Returns the distance of all pictures from the reference, and the first NEAREST of them."""
    stats, first = fid.FeatureStats.empty(len(reference.stats.total)), []
    for batch in batches:
        first.append(batch[: max(0, NEAREST - stats.count)])
        stats = stats.update(reference.extractor.apply(batch))
    return fid.frechet_distance(stats, reference.stats), np.concatenate(first)


def _frechet_facts(group: Group, reference: features.Reference, drawn: str) -> dict[str, str]:
    protocol = f"{drawn}; {reference.extractor.protocol}"
    metric = reference.extractor.name
    return {"metric": metric, "protocol": protocol, "reference": group.trained_on}


def _real_pictures(group: Group, reference: features.Reference) -> list[Row]:
    """Draws of real data at the table's N, the held-out split, and draws at the split's own N."""
    heldout, n = group.dataset.heldout, group.plan.num_samples
    rows = [_bootstrap_row(group, reference, n)]
    if len(heldout) < 2:
        return rows
    value, _ = _frechet((c["x"] for c in data.chunks(heldout, features.CHUNK)), reference)
    facts = _frechet_facts(group, reference, "all held-out pictures")
    rows += [_real_row(group, HELDOUT, **facts, value=value, num_samples=len(heldout))]
    return rows if len(heldout) == n else [*rows, _bootstrap_row(group, reference, len(heldout))]


def _bootstrap_row(group: Group, reference: features.Reference, n: int) -> Row:
    """What n training pictures, drawn with replacement, score: the least that can be told apart."""
    values = [_frechet(_bootstrap(group, n, k), reference)[0] for k in range(REPEATS)]
    value, drawn = _mean_of_draws(values, "draws with replacement")
    facts = _frechet_facts(group, reference, drawn)
    return _real_row(group, BOOTSTRAP, **facts, value=value, num_samples=n)


def _bootstrap(group: Group, n: int, repeat: int) -> Iterator[np.ndarray]:
    rng, train = np.random.default_rng((group.plan.seed, _DRAWS, repeat)), group.dataset.train
    drawn = rng.integers(len(train), size=n)
    for start in range(0, n, features.CHUNK):
        yield data.arrays(train, drawn[start : start + features.CHUNK])["x"]


def _nearest_rows(group: Group, first: dict[Cell, np.ndarray]) -> list[Row]:
    """Mean distances to the nearest training picture, of samples and of the held-out split."""
    heldout = group.dataset.heldout
    held = data.arrays(heldout, range(min(NEAREST, len(heldout))))["x"]
    facts = {
        "metric": "nearest_train_distance",
        "protocol": f"mean over the first {NEAREST:,} at most of the RMS difference per value, "
        "black 0 and white 1, from the nearest training picture",
        "reference": group.trained_on,
    }
    *means, held_mean = _nearest_means(group.dataset, [*first.values(), held])
    rows = [
        _cell_row(group, cell, **facts, value=mean, num_samples=len(first[cell]))
        for cell, mean in zip(first, means, strict=True)
    ]
    if len(held):
        rows += [_real_row(group, HELDOUT, **facts, value=held_mean, num_samples=len(held))]
    return rows


def _nearest_means(dataset: data.Dataset, sets: Sequence[np.ndarray]) -> list[float]:
    """The training split is read once for all sets; an empty set gets NaN."""
    together = np.concatenate(sets)
    best = np.full(len(together), np.inf)
    with progress(0, len(dataset.train), "picture", "nearest training pictures") as bar:
        for chunk in data.chunks(dataset.train, distances.CHUNK):
            best = np.minimum(best, distances.nearest_distances(together, chunk["x"]))
            bar.update(len(chunk["x"]))
    parts = np.split(best, np.cumsum([len(s) for s in sets])[:-1])
    return [float(part.mean()) if len(part) else float("nan") for part in parts]


# Points.


def _points(group: Group) -> Section:
    n, samples = group.plan.num_samples, {}
    target = data.arrays(group.dataset.heldout, range(n))["x"]
    facts = {
        "metric": "sliced_wasserstein",
        "reference": f"as many held-out points of {group.dataset.name}",
        "num_samples": n,
    }
    how = f"; root of the mean over {distances.PROJECTIONS} directions of the squared W₂ along each"
    protocol, rows = _how_drawn(group.dataset) + how, []
    for cell, batches in _table_samples(group):
        samples[cell] = np.concatenate(list(batches))
        value = distances.sliced_wasserstein(samples[cell], target, seed=group.plan.seed)
        rows.append(_cell_row(group, cell, **facts, protocol=protocol, value=value))
    draws = [_training_points(group, k) for k in range(REPEATS)]
    values = [distances.sliced_wasserstein(draw, target, seed=group.plan.seed) for draw in draws]
    value, drawn = _mean_of_draws(values, "draws without replacement")
    real = _real_row(group, "training points", **facts, protocol=drawn + how, value=value)
    return Section(group, [*rows, real], samples)


def _training_points(group: Group, repeat: int) -> np.ndarray:
    rng, train = np.random.default_rng((group.plan.seed, _DRAWS, repeat)), group.dataset.train
    return data.arrays(train, rng.choice(len(train), group.plan.num_samples, replace=False))["x"]
