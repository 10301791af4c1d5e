"""Reference statistics of a source's pictures, as a file for eval_fid.py and other tools."""

import pathlib
import sys
from typing import Any, NamedTuple

import jax

from configs import base
from pipelines import groups, prepare, reference
from pipelines import plan as plans
from pipelines.yardsticks import commit, trained_on
from utils import data, shards
from utils.cli import UserError


class Wanted(NamedTuple):
    """Which statistics prepare_data.py makes.

    Attributes:
      statistics: Writes mu, sigma, mu_s and sigma_s of the pictures to this .npz, for --reference
        of eval_fid.py and for other tools; without --source, of the pictures --out was made of.
      features: Of --statistics: inception, mobilenet or dinov2.
      protocol: Of --statistics: tf, clean or pytorch; by default tf for inception, else clean.
      weights: Of --statistics: the file of the features' weights, if they are not to be downloaded.
      holdout: Of --statistics: share kept from training, as the runs to be compared have it; the
        published recipes keep none.
      cache_dir: Of --statistics: keeps what was computed so far.
    """

    statistics: str = ""
    features: str = "inception"
    protocol: str = ""
    weights: str = ""
    holdout: float = 0.0
    cache_dir: str = "runs/cache"


def write(wanted: Wanted, plan: prepare.Plan) -> str:
    """Writes the statistics, or goes on with them; returns what they are.

    Raises:
      UserError: no pictures, no weights, or a place that is no .npz.
    """
    if not wanted.statistics.endswith(".npz"):
        raise UserError(f"--statistics={wanted.statistics}: name a file that ends in .npz")
    if plan.image_size < 1:
        raise UserError(f"--image_size={plan.image_size}: pixels to crop the pictures to, 256 say")
    dataset = _pictures(wanted, plan)
    asked = plans.Plan(
        features=(wanted.features,),
        protocol=(wanted.protocol,) if wanted.protocol else (),
        weights=(wanted.weights,) if wanted.weights else (),
        cache_dir=wanted.cache_dir,
    )
    plans.check_words(asked)
    (extractor,) = groups.load_extractors(asked, None)
    words = trained_on(dataset)
    (found,) = reference.of_pictures(
        dataset.train,
        [extractor],
        words=words,
        identity=dataset.fingerprint,
        cache_dir=wanted.cache_dir,
    )
    about = {"image_size": dataset.shape[0], "count": len(dataset.train), "commit": commit()}
    if jax.process_index() == 0:  # it alone has the sums
        reference.save(wanted.statistics, found, extractor, **about)
    return f"{wanted.statistics}: {words}, {extractor.words}"


def _pictures(wanted: Wanted, plan: prepare.Plan) -> data.Dataset:
    """The source's pictures, or those that a prepared folder was made of, ADM-cropped."""
    if plan.source:
        name = plan.dataset_name or prepare.dataset_name_of(plan.source)
        source = {"source": plan.source, "data_dir": plan.data_dir, "split": plan.split}
        origin: dict[str, Any] = {"source": source, "image_size": plan.image_size}
        origin |= {"count": plan.num or sys.maxsize, "skipped": []}
    elif plan.out and shards.is_prepared(plan.out):
        card = shards.read_card(pathlib.Path(plan.out))
        name, origin = card.dataset_name, {"source": card.source, "image_size": card.image_size}
        origin |= {"count": card.source_count, "skipped": list(card.skipped_keys)}
    else:
        raise UserError("--statistics of what? Give --source=PICTURES, or --out=PREPARED_FOLDER")
    config = base.get_config()
    config.dataset_name, config.holdout = name, wanted.holdout
    if not 0 <= wanted.holdout < 1:
        raise UserError(f"--holdout={wanted.holdout}: a share in [0, 1)")
    return data.load_pictures(config, origin)
