"""What samples are compared with: statistics and features of real pictures, from a file or cached.

A reference of pictures is computed once per extractor and kept in the cache, by the fingerprints of
both; interrupted, it goes on, and jobs that share the cache do not compute it twice.
"""

import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from pipelines import measure
from pipelines.extractors import Extractor
from pipelines.jobs import Job, work_off
from pipelines.measure import Reference
from pipelines.plan import FEWEST
from utils import statistics
from utils.claims import Claims
from utils.cli import UserError
from utils.fid import FeatureStats
from utils.log import progress
from utils.sharding import agreed
from utils.sources import Source
from utils.tally import Tally

KEPT = 50_000  # pictures whose features are kept, for what compares with features
PARTS = ("pool", "spatial")  # of the features, what samples are compared by


def of_pictures(
    source: Source,
    extractors: Sequence[Extractor],
    *,
    words: str,
    identity: str,
    cache_dir: str | os.PathLike,
    batch_size: int = 256,
) -> list[Reference]:
    """Statistics of all pictures of a source, one per extractor, from the cache where it has them.

    Args:
      words: what the pictures are, for a reader.
      identity: names exactly these pictures.

    Returns:
      The references; on processes other than the first they are empty ones.
    """
    cache, total = pathlib.Path(cache_dir), len(source)
    if total < FEWEST:
        raise UserError(f"{words}: {total} pictures are too few to compare with")
    kept = _kept(total)

    def done() -> bool:
        return all(_whole(cache, e, identity, total, kept) for e in extractors)

    def run(_) -> None:
        # Looked up under the claim, and by one process for all: tallies exclude each other.
        there = [_whole(cache, e, identity, total, kept) for e in extractors]
        bits = agreed(sum(1 << i for i, whole in enumerate(there) if not whole))
        missing = [e for i, e in enumerate(extractors) if bits >> i & 1]
        with progress(0, total, "picture", f"reference of {words}"[:60]) as bar:
            batches = measure.source_batches(source, batch_size, bar.update)
            tallies = measure.tally(
                batches, missing, cache / f"features_{identity}", total, parts=PARTS, kept=kept
            )
        for tally in tallies:
            tally.save()

    # One claim for all extractors: another set of them may share a tally with this one.
    work_off(Claims(cache), [Job(f"reference_{identity}", done, run)])
    if jax.process_index():  # process 0 alone does the sums, the others know what there is
        none = FeatureStats.empty(1)
        return [Reference(none, none, none.outer, words, identity) for _ in extractors]
    return [_of_tally(_open(cache, e, identity, total, kept), words, identity) for e in extractors]


def _kept(total: int) -> np.ndarray | None:
    """Numbers of the pictures whose features are kept, drawn once for all; None: all."""
    if total <= KEPT:
        return None
    return np.sort(np.random.default_rng(0).choice(total, KEPT, replace=False))


def _open(cache: pathlib.Path, e: Extractor, identity: str, total: int, kept) -> Tally:
    folder = cache / f"features_{identity}" / e.fingerprint
    return Tally.open(folder, total, measure.parts_of(e, PARTS), kept)


def _whole(cache: pathlib.Path, e: Extractor, identity: str, total: int, kept) -> bool:
    folder = cache / f"features_{identity}" / e.fingerprint
    return Tally.is_whole(folder, total, measure.parts_of(e, PARTS), kept)


def _of_tally(tally: Tally, words: str, identity: str) -> Reference:
    stats = tally.stats
    return Reference(stats["pool"], stats.get("spatial"), tally.features, words, identity)


def of_file(path: str | os.PathLike, extractor: Extractor, side: int) -> Reference:
    """The statistics in a file, which must be those of the extractor.

    Args:
      side: pixels of the pictures that are compared with it.

    Raises:
      UserError: `utils.statistics.read`, or they say that they were made otherwise.
    """
    found = statistics.read(path)
    about = found.about
    made = (about.get("features", extractor.name), about.get("protocol", extractor.protocol))
    if made != (extractor.name, extractor.protocol):
        raise UserError(
            f"{path} holds statistics of {made[0]}, protocol {made[1]}, not of {extractor.name}, "
            f"protocol {extractor.protocol}: compare within one protocol"
        )
    if about.get("extractor", extractor.fingerprint) != extractor.fingerprint:
        raise UserError(f"{path} was made with other weights of {extractor.name}: see --weights")
    if about.get("image_size", side) != side:
        raise UserError(
            f"{path} is of pictures of {about['image_size']} pixels, the samples have {side}: "
            "compare pictures of one size"
        )
    told = about.get("pictures") or "of unstated pictures and protocol"
    words = f"statistics {pathlib.Path(path).name} ({told})"
    return Reference(found.pool, found.spatial, found.features, words, found.fingerprint)


def save(path: str | os.PathLike, reference: Reference, extractor: Extractor, **about) -> None:
    """Writes a reference as a file that `of_file` and other people's tools read."""
    statistics.write(
        path,
        pool=reference.pool,
        spatial=reference.spatial,
        features=reference.features,
        about={
            "features": extractor.name,
            "protocol": extractor.protocol,
            "extractor": extractor.fingerprint,
            "words": extractor.words,
            "pictures": reference.words,
            "pictures_fingerprint": reference.fingerprint,
            **about,
        },
    )
