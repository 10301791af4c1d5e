"""Pictures × extractors → tallies → numbers with names.

One pass over the pictures serves all extractors and all metrics. Features are computed on all
devices; process 0 keeps the sums, on the host in float64, and continues from them when interrupted.
"""

import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from pipelines.extractors import Extractor
from utils import compilation, data, fid
from utils.cli import UserError
from utils.fid import FeatureStats, Gaussian
from utils.sharding import agreed, batch_sharding, fetch, make_mesh, replicated
from utils.sources import Source
from utils.tally import Tally

PARTS = {"fid": "pool", "sfid": "spatial", "is": "logits", "kid": "pool", "pr": "pool"}
OF_INCEPTION = ("sfid", "is")  # what is defined by Inception's own layers
OF_FEATURES = ("kid", "pr")  # what needs the features of the reference, not their statistics alone
SAVE_SECONDS = 120.0  # between two saves of a tally: as much work is lost at most
BOOTSTRAP = "bootstrap of the samples"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with."""

    pool: FeatureStats | Gaussian
    spatial: FeatureStats | Gaussian | None
    features: np.ndarray | None  # (n, d) float32, at random access; of some of the pictures
    words: str
    fingerprint: str

    @functools.cached_property
    def pool_root(self) -> np.ndarray:
        """`fid.root`, which takes most of a distance's time and serves all cells."""
        return fid.root(self.pool)

    @functools.cached_property
    def spatial_root(self) -> np.ndarray:
        """The same of the spatial features."""
        assert self.spatial is not None
        return fid.root(self.spatial)


class Batch(NamedTuple):
    """Pictures over the devices, of which the first `count` are meant; they may be computing."""

    pictures: Array  # uint8 (n, H, W, C)
    count: int  # type: ignore[assignment]  # hides tuple.count
    finite: Array | None = None  # bool (n,)


class Measure(NamedTuple):
    """A number with its name, and its standard deviation where one is known."""

    metric: str
    value: float
    deviation: float | None = None
    of: str = ""  # what the deviation is over


def metric_names(metric: str, extractor: Extractor) -> tuple[str, ...]:
    """What a metric's numbers are called: FID and KID are Inception's, other features' are not."""
    if metric == "pr":
        return "precision", "recall"
    if extractor.name == "inception" or metric not in ("fid", "kid"):
        return (metric,)
    return (f"{'fd' if metric == 'fid' else 'kd'}_{extractor.name}",)


def metrics_of(extractor: Extractor, asked: Sequence[str]) -> tuple[str, ...]:
    """Those of `asked` that the extractor can serve."""
    inception = extractor.name == "inception"
    return tuple(m for m in asked if m in PARTS and (inception or m not in OF_INCEPTION))


# Features.


def tally(
    batches: Callable[[int], Iterator[Batch]],
    extractors: Sequence[Extractor],
    folder: pathlib.Path,
    total: int,
    *,
    parts: Sequence[str],
    kept: np.ndarray | None = None,
    each: Callable[[np.ndarray], None] | None = None,
    complaint: Callable[[np.ndarray], None] = lambda finite: None,
) -> list[Tally]:
    """Tallies the features of exactly `total` pictures, a tally per extractor, under `folder`.

    Goes on where an earlier call stopped. While the devices compute a batch, the host adds up the
    one before it.

    Args:
      batches: picture number → batches from there on, `total` pictures in all.
      parts: of the features, what is needed.
      kept: numbers of the pictures whose features are kept; None: all.
      each: is given the pictures, uint8 (count, H, W, C), in order; then nothing is continued.
      complaint: is given which samples of a batch are finite, and raises where it matters.

    Returns:
      The tallies, in the order of `extractors`; none on processes other than the first.
    """
    first = jax.process_index() == 0
    if each and first:
        shutil.rmtree(folder, ignore_errors=True)
    tallies = [
        Tally.open(folder / e.fingerprint, total, parts_of(e, parts), kept)
        for e in extractors
        if first
    ]
    position = agreed(min((t.count for t in tallies), default=0))
    saved = time.monotonic()
    applies = jax.device_put(tuple(e.apply for e in extractors), replicated(make_mesh()))
    for batch, features in _one_ahead(batches(position), applies):
        values, finite = fetch((features, batch.finite))
        if finite is not None:
            complaint(finite[: batch.count])
        if each:
            each(fetch(batch.pictures)[: batch.count])
        for one, value in zip(tallies, values, strict=False):
            skip = one.count - position  # it was saved a batch later than the others
            one.update({part: rows[skip : batch.count] for part, rows in value.items()})
        position += batch.count
        if tallies and time.monotonic() - saved > SAVE_SECONDS:
            for one in tallies:
                one.save()
            saved = time.monotonic()
    return tallies


def _one_ahead(batches: Iterator[Batch], applies: tuple) -> Iterator[tuple[Batch, Any]]:
    """Yields each batch with its features once those of the next are under way."""
    waiting: tuple[Batch, Any] | None = None
    for batch in batches:
        coming = batch, features_of(applies, batch.pictures)
        if waiting:
            yield waiting
        waiting = coming
    if waiting:
        yield waiting


@compilation.Ahead
@jax.jit
def features_of(applies: tuple, pictures: Array) -> tuple[dict[str, Array], ...]:
    """The features of uint8 pictures (n, H, W, C) by each of `applies`, `Extractor.apply`."""
    return tuple(apply(pictures) for apply in applies)


def prepare(extractors: Sequence[Extractor], size: int, shape: Sequence[int]) -> None:
    """Starts to compile `features_of` for batches of `size` pictures (H, W, C), as they are padded.

    A sampler is compiled, or pictures are read, meanwhile.
    """
    mesh = make_mesh()
    here, size = replicated(mesh), -(-size // mesh.size) * mesh.size
    applies = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here),
        tuple(e.apply for e in extractors),
    )
    pictures = jax.ShapeDtypeStruct((size, *shape), np.uint8, sharding=batch_sharding(mesh))
    features_of.prepare(applies, pictures)


def source_batches(
    source: Source, size: int, tick: Callable[[int], Any] = lambda count: None, total: int = 0
) -> Callable[[int], Iterator[Batch]]:
    """Batches of the first `total` pictures of a source (0: all), in order, padded to one size.

    Args:
      tick: is told how many pictures were done.
    """
    mesh, total = make_mesh(), total or len(source)
    size = -(-min(size, total) // mesh.size) * mesh.size

    def batches(start: int) -> Iterator[Batch]:
        tick(start)
        for first in range(start, total, size):
            x = data.arrays(source, range(first, min(first + size, total)))["x"]
            padded = np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
            yield Batch(jax.device_put(padded, batch_sharding(mesh)), len(x))
            tick(len(x))

    return batches


# Numbers.


def measures(
    tallied: Tally,
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[str],
    *,
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, list[Measure]]:
    """The numbers of each metric.

    Args:
      metrics: of PARTS.
      bootstrap: how many draws of the samples say how far a Fréchet distance would move.
    """
    found: dict[str, list[Measure]] = {}
    for metric in metrics:
        names = metric_names(metric, extractor)
        numbers = _NUMBERS[metric](tallied, reference, bootstrap, seed)
        found[metric] = [
            Measure(name, *number) for name, number in zip(names, numbers, strict=True)
        ]
    return found


Number = tuple[float, float | None, str]


def _fid(tallied: Tally, reference: Reference, bootstrap: int, seed: int) -> list[Number]:
    root = reference.pool_root
    value = fid.frechet_distance(tallied.stats["pool"], reference.pool, root)
    if not bootstrap:
        return [(value, None, "")]
    deviation = fid.bootstrap_deviation(tallied.features, reference.pool, bootstrap, seed, root)
    return [(value, deviation, BOOTSTRAP)]


def _sfid(tallied: Tally, reference: Reference, *_) -> list[Number]:
    assert reference.spatial is not None
    spatial, root = tallied.stats["spatial"], reference.spatial_root
    return [(fid.frechet_distance(spatial, reference.spatial, root), None, "")]


def _is(tallied: Tally, *_) -> list[Number]:
    assert tallied.scores is not None
    return [(*fid.inception_score(tallied.scores), "ten parts of the samples")]


def _kid(tallied: Tally, reference: Reference, bootstrap: int, seed: int) -> list[Number]:
    assert reference.features is not None
    subsets = fid.kernel_distance(tallied.features, reference.features, seed=seed)
    return [(*subsets, "subsets")]


def _pr(tallied: Tally, reference: Reference, *_) -> list[Number]:
    assert reference.features is not None
    return [
        (share, None, "") for share in fid.precision_recall(tallied.features, reference.features)
    ]


_NUMBERS: dict[str, Callable[..., list[Number]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "is": _is,
    "kid": _kid,
    "pr": _pr,
}


def check_reference(reference: Reference, extractor: Extractor, metrics: Sequence[str]) -> None:
    """Raises UserError where the reference lacks what a metric compares with."""
    needs_features = [m for m in metrics if m in OF_FEATURES]
    if needs_features and reference.features is None:
        raise UserError(
            f"{reference.words} hold no features, which {' and '.join(needs_features)} compare "
            "with: give --reference=FOLDER of pictures, or other --metrics"
        )
    if "sfid" in metrics and reference.spatial is None:
        raise UserError(
            f"{reference.words} hold no mu_s and sigma_s, which sfid compares with: give "
            "--reference=FOLDER of pictures, or --metrics without sfid"
        )
    found, wanted = len(reference.pool.mean), extractor.widths["pool"]
    if found != wanted and jax.process_index() == 0:
        raise UserError(
            f"{reference.words} are of {found} features, {extractor.name} gives {wanted}: "
            "give statistics made with it, or another --features"
        )


def parts_of(extractor: Extractor, parts: Sequence[str]) -> tuple[str, ...]:
    """Those of `parts` that the extractor gives."""
    return tuple(part for part in parts if part in extractor.widths)
