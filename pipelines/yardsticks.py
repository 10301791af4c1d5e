"""What samples are measured by: features and real pictures, or real points.

A yardstick gives the rows of a cell from its samples, and the rows about real data that say what
the numbers mean: what draws of the reference score, and what held-out pictures score.
"""

import contextlib
import functools
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from pipelines import measure
from pipelines.cells import Cells, Row, name_of
from pipelines.extractors import Extractor
from pipelines.flow import check_finite
from pipelines.jobs import Job
from pipelines.measure import Batch, Measure, Reference
from pipelines.plan import FEWEST, PICTURES, POINTS, Plan, wanted_metrics
from utils import data, distances, fid, samples
from utils.fid import FeatureStats
from utils.log import progress
from utils.sharding import agreed, fetch

REPEATS = 5  # of a draw of real data
NEAREST = 1000  # samples whose nearest training picture is looked for
CHUNK = 4096  # rows of features, or pictures, at a time
_DRAWS = 2  # sets the random streams of one seed apart
DRAWS, HELDOUT = "draws of the reference", "held-out split"

Facts = dict[str, Any]  # some fields of a Row
Batches = Callable[[int], Iterator[Batch]]


class Yardstick(Protocol):
    """How the samples of a group of runs are measured."""

    @property
    def title(self) -> str:
        """What a table calls the group."""

    @property
    def plan(self) -> Plan:
        """What was asked for."""

    @property
    def default_count(self) -> int:
        """Samples of a cell, where their number is not given."""

    @property
    def side(self) -> int:
        """Pixels of a picture's side; 0 for points."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What is wanted of a cell, in the table's order."""

    def measure(
        self, batches: Batches, n: int, folder: pathlib.Path, *, known: dict, seed: int, saved=None
    ) -> dict[str, list[Facts]]:
        """Measures n samples by the keys that are not in `known`; all processes call it alike.

        Args:
          folder: of what an interrupted measurement goes on with.
          saved: where all pictures are written to; None: nowhere.
        """

    def jobs(self, cells: Cells, n: int) -> list[Job]:
        """What must be known of real data beside cells of n samples."""

    def rows(self, cells: Cells, n: int) -> list[Row]:
        """The rows that these jobs leave."""

    def target(self, n: int) -> np.ndarray | None:
        """Real points, where samples are points."""

    def warnings(self, n: int) -> list[str]:
        """What makes numbers of n samples less than they seem."""


def trained_on(dataset: data.Dataset) -> str:
    """The reference of distances to the training split."""
    return f"training split of {dataset.name}, {len(dataset.train):,} pictures"


@functools.cache
def commit() -> str | None:
    """The commit of this code, with a + where files differ from it; None where git knows none."""
    root = pathlib.Path(__file__).parents[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


# Pictures.


@dataclass(frozen=True, eq=False)
class PictureYardstick:
    """Extractors, and the reference of each; `dataset` where the real pictures are at hand."""

    title: str
    shape: tuple[int, int, int]  # of a picture, (H, W, C)
    plan: Plan
    extractors: tuple[Extractor, ...]
    references: tuple[Reference, ...]
    dataset: data.Dataset | None = None
    default_count: int = PICTURES

    @property
    def side(self) -> int:
        return self.shape[0]

    @property
    def keys(self) -> tuple[str, ...]:
        keys = [key for one in self._wanted() for key in one]
        return (*keys, self._nearest_key) if "nearest" in self.plan.metrics else tuple(keys)

    def _wanted(self) -> list[dict[str, str]]:
        """The metrics of each extractor by their keys."""
        return [
            {_key(m, e, r, self.plan): m for m in self._metrics(e, r)}
            for e, r in zip(self.extractors, self.references, strict=True)
        ]

    def _metrics(self, extractor: Extractor, against: Reference) -> tuple[str, ...]:
        """What is asked for; of what is there by default, what the reference can serve."""
        metrics = wanted_metrics(self.plan, extractor)
        if self.plan.metrics:
            return metrics
        lacking = list(measure.OF_FEATURES) if against.features is None else []
        lacking += ["sfid"] if against.spatial is None else []
        return tuple(m for m in metrics if m not in lacking)

    @property
    def _nearest_key(self) -> str:
        assert self.dataset is not None
        return f"nearest {self.dataset.fingerprint}"

    def measure(
        self, batches: Batches, n: int, folder: pathlib.Path, *, known: dict, seed: int, saved=None
    ) -> dict[str, list[Facts]]:
        missing = _agreed_missing(self.keys, known)
        wanted = [{k: m for k, m in one.items() if k in missing} for one in self._wanted()]
        used = [
            (e, r, w) for e, r, w in zip(self.extractors, self.references, wanted, strict=True) if w
        ]
        nearest = "nearest" in self.plan.metrics and self._nearest_key in missing
        saved = saved if agreed(bool(saved and not saved.exists())) else None
        first: list[np.ndarray] = []
        if used:
            size = min(self.plan.batch_size, n)
            measure.prepare([e for e, _, _ in used], size, self.shape)
        with _writer(saved, n, self.shape) as write:
            tallies = measure.tally(
                batches,
                [e for e, _, _ in used],
                folder,
                n,
                parts=sorted({measure.PARTS[m] for *_, w in used for m in w.values()} | {"pool"}),
                each=_each(first, write) if nearest or write else None,
                complaint=check_finite,
            )
        rows: dict[str, list[Facts]] = {}
        for tally, (e, r, w) in zip(tallies, used, strict=False):
            found = measure.measures(
                tally, r, e, tuple(w.values()), bootstrap=self.plan.bootstrap, seed=seed
            )
            rows |= {key: [_fact(x, n, e, r) for x in found[metric]] for key, metric in w.items()}
        if nearest and jax.process_index() == 0:
            rows[self._nearest_key] = [self._nearest(np.concatenate(first)[:NEAREST])]
        return rows

    def jobs(self, cells: Cells, n: int) -> list[Job]:
        jobs = [self._draws_job(cells, count) for count in self._counts(n)]
        return [*jobs, self._heldout_job(cells)] if self._heldout else jobs

    def rows(self, cells: Cells, n: int) -> list[Row]:
        names = [self._draws_name(count) for count in self._counts(n)]
        names += [self._heldout_name] if self._heldout else []
        found = [cells.rows(name) for name in names]
        return [row for key in self.keys for rows in found for row in rows.get(key, [])]

    def target(self, n: int) -> None:
        return None

    def warnings(self, n: int) -> list[str]:
        return [
            f"N = {n:,} samples are too few for the {e.widths['pool']:,} features of {e.name}: "
            "their covariance is singular, and the distance is mostly the bias of a small N; take "
            f"--num_samples={2 * e.widths['pool']} or more"
            for e in self.extractors
            if n <= e.widths["pool"] and "fid" in wanted_metrics(self.plan, e)
        ]

    # Real pictures.

    @property
    def _heldout(self) -> Any:
        """The held-out pictures; nothing where they are too few for any metric."""
        held = self.dataset.heldout if self.dataset else ()
        return held if len(held) >= FEWEST else ()

    @property
    def _heldout_name(self) -> str:
        assert self.dataset is not None
        return name_of(["heldout"], {"pictures": self.dataset.fingerprint})

    def _heldout_job(self, cells: Cells) -> Job:
        held, name, keys = self._heldout, self._heldout_name, self.keys

        def run(still: Callable[[], bool]) -> None:
            with progress(0, len(held), "picture", HELDOUT) as bar:
                batches = measure.source_batches(held, self.plan.batch_size, bar.update)
                found = self.measure(
                    batches, len(held), cells.work(name), known=cells.rows(name), seed=0
                )
            _write_real(cells, name, HELDOUT, found, still)

        return Job(name, lambda: set(keys) <= cells.rows(name).keys(), run)

    def _counts(self, n: int) -> list[int]:
        """Numbers of pictures to be drawn: as many as samples, and as are held out."""
        return list(dict.fromkeys([n, len(self._heldout)] if self._heldout else [n]))

    def _draws_name(self, n: int) -> str:
        return name_of(["draws", f"n{n}"], {"references": [r.fingerprint for r in self.references]})

    def _draws_job(self, cells: Cells, n: int) -> Job:
        """What n real pictures, drawn with replacement, score: the least that can be told apart."""
        name = self._draws_name(n)
        sets = [
            (key, e, r)
            for e, r, one in zip(self.extractors, self.references, self._wanted(), strict=True)
            for key, metric in one.items()
            if metric == "fid" and r.features is not None
        ]

        def run(still: Callable[[], bool]) -> None:
            found = {key: [_draws_fact(e, r, n)] for key, e, r in sets if not jax.process_index()}
            _write_real(cells, name, DRAWS, found, still)

        return Job(name, lambda: {key for key, *_ in sets} <= cells.rows(name).keys(), run)

    # The nearest training picture.

    def _nearest(self, pictures: np.ndarray) -> Facts:
        """The mean distance to the nearest training picture."""
        assert self.dataset is not None
        train, best = self.dataset.train, np.full(len(pictures), np.inf)
        with progress(0, len(train), "picture", "nearest training pictures") as bar:
            for chunk in data.chunks(train, CHUNK):
                best = np.minimum(best, distances.nearest_distances(pictures, chunk["x"]))
                bar.update(len(chunk["x"]))
        return {
            "metric": "nearest_train_distance",
            "value": float(best.mean()),
            "num_samples": len(pictures),
            "protocol": f"mean over the first {NEAREST:,} at most of the RMS difference per value, "
            "black 0 and white 1, from the nearest training picture",
            "reference": trained_on(self.dataset),
            "reference_fingerprint": self.dataset.fingerprint,
            "commit": commit(),
        }


def _agreed_missing(keys: Sequence[str], known: dict) -> set[str]:
    """The keys that process 0 does not know, on every process."""
    bits = agreed(sum(1 << i for i, key in enumerate(keys) if key not in known))
    return {key for i, key in enumerate(keys) if bits >> i & 1}


def _key(metric: str, e: Extractor, r: Reference, plan: Plan) -> str:
    drawn = f" bootstrap {plan.bootstrap}" if metric == "fid" else ""
    return f"{metric} {e.name} {e.protocol} {e.fingerprint} {r.fingerprint}{drawn}"


def _fact(found: Measure, n: int, extractor: Extractor, against: Reference) -> Facts:
    return {
        "metric": found.metric,
        "features": extractor.name,
        "resize": extractor.protocol or None,
        "value": found.value,
        "deviation": found.deviation,
        "deviation_of": found.of or None,
        "num_samples": n,
        "protocol": extractor.words,
        "reference": against.words,
        "reference_fingerprint": against.fingerprint,
        "commit": commit(),
    }


def _draws_fact(extractor: Extractor, against: Reference, n: int) -> Facts:
    """The mean distance of REPEATS draws of n of the reference's pictures."""
    features = against.features
    assert features is not None
    values = []
    for repeat in range(REPEATS):
        rng = np.random.default_rng((_DRAWS, repeat))
        rows = np.sort(rng.integers(len(features), size=n))
        stats = FeatureStats.empty(features.shape[1])
        for start in range(0, n, CHUNK):
            stats = stats.update(features[rows[start : start + CHUNK]])
        values.append(fid.frechet_distance(stats, against.pool, against.pool_root))
    spread = Measure(
        measure.metric_names("fid", extractor)[0],
        float(np.mean(values)),
        float(np.std(values)),
        f"{REPEATS} draws with replacement",
    )
    return _fact(spread, n, extractor, against)


def _write_real(
    cells: Cells, name: str, title: str, found: dict[str, list[Facts]], still: Callable[[], bool]
) -> None:
    if jax.process_index() == 0 and still():
        about = {"run": title, "objective": "real data"}
        rows = {key: [Row.of(**about, **fact) for fact in facts] for key, facts in found.items()}
        cells.write(name, about, rows)
        cells.clear(name)


@contextlib.contextmanager
def _writer(
    path: pathlib.Path | None, n: int, shape: tuple[int, int, int]
) -> Iterator[Callable[[np.ndarray], None] | None]:
    """A function that keeps pictures at `path`, on process 0."""
    if path is None:
        yield None
        return
    if jax.process_index():
        yield lambda pictures: None
        return
    npz = path.suffix == ".npz"
    with samples.NpzFile(path, n, shape) if npz else samples.PngFolder(path, n) as file:
        yield file.add


def _each(first: list[np.ndarray], write: Callable | None) -> Callable[[np.ndarray], None]:
    """Keeps the first pictures, and writes all where they are to be written."""

    def each(pictures: np.ndarray) -> None:
        if sum(map(len, first)) < NEAREST:
            first.append(pictures)
        if write:
            write(pictures)

    return each


# Points.


@dataclass(frozen=True, eq=False)
class PointYardstick:
    """Points are compared by the sliced Wasserstein distance from as many held-out ones."""

    dataset: data.Dataset
    plan: Plan
    default_count: int = POINTS
    side: int = 0

    @property
    def title(self) -> str:
        return self.dataset.name

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"sliced_wasserstein {self.dataset.fingerprint}",)

    def measure(
        self, batches: Batches, n: int, folder: pathlib.Path, *, known: dict, seed: int, saved=None
    ) -> dict[str, list[Facts]]:
        points = []
        for batch in batches(0):
            values, finite = fetch((batch.pictures, batch.finite))
            check_finite(finite[: batch.count])
            points.append(values[: batch.count])
        return {self.keys[0]: [self._fact(np.concatenate(points), seed)]}

    def jobs(self, cells: Cells, n: int) -> list[Job]:
        name = self._draws_name(n)

        def run(still: Callable[[], bool]) -> None:
            facts = [self._fact(self._drawn(n, repeat), 0) for repeat in range(REPEATS)]
            values = [fact["value"] for fact in facts]
            fact = facts[0] | {"value": float(np.mean(values)), "deviation": float(np.std(values))}
            fact |= {"deviation_of": f"{REPEATS} draws without replacement"}
            _write_real(cells, name, "training points", {self.keys[0]: [fact]}, still)

        return [Job(name, lambda: bool(cells.rows(name)), run)]

    def rows(self, cells: Cells, n: int) -> list[Row]:
        return cells.rows(self._draws_name(n))[self.keys[0]]

    def warnings(self, n: int) -> list[str]:
        return []

    def target(self, n: int) -> np.ndarray:
        return data.arrays(self.dataset.heldout, range(n))["x"]

    def _draws_name(self, n: int) -> str:
        return name_of(["draws", self.dataset.name, f"n{n}"], {"points": self.dataset.fingerprint})

    def _drawn(self, n: int, repeat: int) -> np.ndarray:
        rng, train = np.random.default_rng((_DRAWS, repeat)), self.dataset.train
        return data.arrays(train, rng.choice(len(train), n, replace=False))["x"]

    def _fact(self, points: np.ndarray, seed: int) -> Facts:
        return {
            "metric": "sliced_wasserstein",
            "value": distances.sliced_wasserstein(points, self.target(len(points)), seed=seed),
            "num_samples": len(points),
            "protocol": f"root of the mean over {distances.PROJECTIONS} directions of the squared "
            "W₂ along each",
            "reference": f"as many held-out points of {self.dataset.name}",
            "reference_fingerprint": self.dataset.fingerprint,
            "commit": commit(),
        }
