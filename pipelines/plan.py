"""What an evaluation is asked for: its options, checked before anything is computed."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from flows.samplers import ADAPTIVE, GRIDS, SAMPLERS
from pipelines import extractors, measure
from utils import files
from utils.cli import UserError
from utils.sources import LARGEST

PICTURES, POINTS = 50_000, 10_000  # samples of a cell, where their number is not given
CLASSIFIER = "classifier"
FEATURES = (*extractors.PROTOCOLS, CLASSIFIER)
METRICS = (*measure.PARTS, "nearest")
DEFAULT_METRICS = tuple(measure.PARTS)  # as far as the features serve them
FEWEST = 4  # samples that any metric can do with: recall looks for the third neighbour
FEW = 10_000  # samples below which a FID is a glance, not a result
MOST_STEPS = 10_000  # of a sampler; its times are an array of the program
RANGES = {  # the least and the most an option may be
    "steps": (1, MOST_STEPS),
    "num_samples": (0, 100_000_000),
    "batch_size": (1, 1_000_000),
    "bootstrap": (0, 100_000),
    "expires": (10, 10_000_000),
    "image_size": (0, LARGEST),
}

LABELS = 1  # sets the random stream of labels apart from others of one seed

Interval = tuple[float, float]


class Plan(NamedTuple):
    """The options of an evaluation, which are the flags of eval_fid.py.

    Attributes:
      workdir: A run's folder or gs://BUCKET/FOLDER, or that of an exported model; give the flag
        once per run.
      samples: Pictures made elsewhere: a folder, a .zip, or an .npz with arr_0; once per set.
      steps: Sampling steps, by commas.
      guidance: Scales ω of classifier-free guidance in sampling, by commas; 1 for none. A run
        trained with guidance needs none, and every other scale doubles the network calls; but a
        network that is told its guidance takes it as an input, at no further call.
      guidance_interval: Times LOW:HIGH at which guidance is used, by commas; t = 1 is noise.
      sampler: Of meanflow, consistency, euler, heun and euler_stochastic, by commas; by default
        what the run was trained for.
      grid: Where the steps lie, by commas: uniform, cosine (short at both ends), quadratic (short
        near the data) or shifted (short near the noise).
      checkpoint: Of each run: latest, best (as --best_metric of its training had it), all, or
        steps, by commas.
      ema: Averaged parameters, by commas: decays as 0.999, power_0.05, posthoc_0.1 (made of
        snapshots: any width) or none; by default the run's own.
      seed: Of noise and labels, which are the same for every run; several, by commas, give a mean
        and a deviation.
      num_samples: Samples per cell; 0 for 50,000 pictures or 10,000 points. Fewer pictures score
        higher, so compare at one number.
      labels: random (uniform) or balanced (as many of each class).
      features: Of inception, mobilenet, dinov2 and classifier (trained on the spot, for data sets
        that the others do not know), by commas.
      protocol: Of tf, clean and pytorch, by commas: how pictures are resized for the network. By
        default tf for inception, clean for others.
      metrics: Of fid, sfid, is, kid, pr (precision and recall) and nearest (distance to the nearest
        training picture), by commas; by default all of them but nearest that the features serve.
      weights: Files of the features' weights, by commas, in their order; Inception's and DINOv2's
        are downloaded where there is none.
      reference: What to compare with: a folder or .zip of pictures, or an .npz with arr_0 or with
        mu and sigma. By default the training split of the runs' data set.
      image_size: Crops the pictures of --samples and --reference (as ADM does) to this; 0: those of
        --samples are taken as they are, those of --reference in their size.
      bootstrap: Draws of the samples that say how far a Fréchet distance would move; 0: none.
      batch_size: Samples at a time over all devices; changes no result but by rounding.
      out: Folder of results.md, .csv, .json and .png, of sample grids, and of the cells, which a
        later call or another job goes on with.
      save_samples: Also keeps all pictures: png (a folder per cell) or npz (ADM's arr_0).
      cache_dir: Keeps weights, classifiers and references.
      data_dir: The pictures (not latents) that the runs were trained on, if they have moved.
      autoencoder: Of runs on latents: its folder, if not where the run found it.
      expires: Seconds after which the cells of a job that died elsewhere are taken over.
      wandb: Logs the table to wandb: online or offline.
    """

    workdir: Sequence[str] = ()
    samples: Sequence[str] = ()
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    guidance: tuple[float, ...] = (1.0,)
    guidance_interval: tuple[str, ...] = ("0:1",)
    sampler: tuple[str, ...] = ()
    grid: tuple[str, ...] = ("uniform",)
    checkpoint: tuple[str, ...] = ("latest",)
    ema: tuple[str, ...] = ()
    seed: tuple[int, ...] = (0,)
    num_samples: int = 0
    labels: Literal["random", "balanced"] = "random"
    features: tuple[str, ...] = ("inception",)
    protocol: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    reference: str = ""
    image_size: int = 0
    bootstrap: int = 10
    batch_size: int = 256
    out: str = "runs/eval"
    save_samples: Literal["", "png", "npz"] = ""
    cache_dir: str = "runs/cache"
    data_dir: str = ""
    autoencoder: str = ""
    expires: int = 300
    wandb: Literal["", "online", "offline"] = ""


def checked(plan: Plan) -> Plan:
    """The plan with lists sorted and without doubles.

    Raises:
      UserError: an option out of its range, or two that contradict each other.
    """
    if not plan.workdir and not plan.samples:
        raise UserError("nothing to measure: give --workdir=FOLDER of a run, or --samples=FOLDER")
    local = ("out", "cache_dir", "data_dir", "autoencoder", "reference")
    files.check_local(**{name: getattr(plan, name) for name in local})
    if plan.workdir and plan.samples:
        raise UserError("--workdir and --samples do not go together: measure one, then the other")
    if plan.samples and not plan.reference:
        raise UserError("--samples need something to compare with: give --reference=FOLDER")
    for name in (
        "steps",
        "guidance",
        "guidance_interval",
        "grid",
        "checkpoint",
        "seed",
        "features",
    ):
        if not getattr(plan, name):
            raise UserError(f"--{name} is empty: leave it out for the default")
    _check_numbers(plan)
    check_words(plan)
    intervals(plan)
    words = ("guidance_interval", "sampler", "grid", "ema", "features", "protocol", "metrics")
    once: dict[str, Any] = {name: tuple(dict.fromkeys(getattr(plan, name))) for name in words}
    numbers = ("steps", "guidance", "seed")
    once |= {name: tuple(sorted(set(getattr(plan, name)))) for name in numbers}
    return plan._replace(**once)


def _check_numbers(plan: Plan) -> None:
    for name, (low, high) in RANGES.items():
        value = getattr(plan, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if min(numbers) < low:
            raise UserError(f"--{name}={min(numbers)}: at least {low}")
        if max(numbers) > high:
            raise UserError(f"--{name}={max(numbers)}: at most {high}")
    if 0 < plan.num_samples < FEWEST:
        raise UserError(f"--num_samples={plan.num_samples}: at least {FEWEST}, and 2000 say more")
    if plan.bootstrap == 1:
        raise UserError("--bootstrap=1: one draw has no spread, 10 have one; 0 for none")
    for seed in plan.seed:
        if not 0 <= seed < 2**31:
            raise UserError(f"--seed={seed}: from 0 to {2**31 - 1}")
    if not all(abs(scale) < 1e6 for scale in plan.guidance):  # NaN too
        raise UserError(f"--guidance={plan.guidance}: finite numbers, 1 for none")


def check_words(plan: Plan) -> None:
    """Raises UserError where an option is none of the words that it may be."""
    known = {
        "sampler": tuple(SAMPLERS),
        "grid": tuple(GRIDS),
        "features": FEATURES,
        "metrics": METRICS,
        "protocol": tuple(dict.fromkeys(p for ps in extractors.PROTOCOLS.values() for p in ps)),
    }
    if ADAPTIVE in plan.sampler:
        raise UserError(
            f"--sampler={ADAPTIVE} has no step count: draw by sample.py --sampler={ADAPTIVE}, then "
            "measure those pictures by --samples=FOLDER --reference=PICTURES --features=inception"
        )
    for name, words in known.items():
        for word in getattr(plan, name):
            if word not in words:
                own = "; times of one's own are for sample.py" if name == "grid" else ""
                raise UserError(f"--{name}={word}: there are {', '.join(words)}{own}")
    _check_features(plan)


def _check_features(plan: Plan) -> None:
    """Raises UserError where the features cannot serve what else is asked for."""
    if len(plan.weights) > len(plan.features):
        raise UserError(
            f"--weights names {len(plan.weights)} files for {len(plan.features)} features"
        )
    has = {p for name in plan.features for p in extractors.PROTOCOLS.get(name, ())}
    for word in plan.protocol:
        if word not in has:
            names = " and ".join(plan.features)
            raise UserError(f"--protocol={word}: {names} has {', '.join(sorted(has)) or 'none'}")
    for metric in plan.metrics:
        if metric in measure.OF_INCEPTION and "inception" not in plan.features:
            raise UserError(f"--metrics={metric} is defined by Inception: add --features=inception")
    if plan.samples and (CLASSIFIER in plan.features or "nearest" in plan.metrics):
        raise UserError(
            "--samples have no data set: no classifier, and no nearest training picture"
        )


def intervals(plan: Plan) -> tuple[Interval, ...]:
    """The guidance intervals as numbers.

    Raises:
      UserError: an interval that is none, or lies outside [0, 1].
    """
    found = []
    for word in plan.guidance_interval:
        try:
            low, high = map(float, word.split(":"))
        except ValueError:
            low, high = 1.0, 0.0
        if not 0 <= low <= high <= 1:
            raise UserError(f"--guidance_interval={word}: LOW:HIGH within 0:1, as 0.1:0.8")
        found.append((low, high))
    return tuple(found)


def wanted_metrics(plan: Plan, extractor: extractors.Extractor) -> tuple[str, ...]:
    """The metrics to be measured with an extractor, in the table's order."""
    asked = plan.metrics or DEFAULT_METRICS
    return measure.metrics_of(extractor, [m for m in METRICS if m in asked])
