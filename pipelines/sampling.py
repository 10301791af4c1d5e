"""A run, classes and a way of sampling → pictures, each with what it takes to make it again.

A picture is a function of the model, its label, the seed and its index, and of the sampler's
settings: which others are drawn beside it, and in batches of which size, changes it by rounding at
most. Pictures are numbered so that more of them, by a greater --num, leave the first ones as they
are: index k·L + j is the k-th picture of the j-th of L labels.
"""

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from flows.samplers import ADAPTIVE, GRIDS
from pipelines import plan
from pipelines.flow import FlowPipeline, check_finite
from pipelines.runs import Run, load_runs
from pipelines.stored import WEIGHTS
from utils import animation, classes, files
from utils.cli import UserError, printable
from utils.log import progress
from utils.sharding import fetch

RANDOM, NO_CLASS = -1, "none"  # among --labels
POINTS = 5000  # of a figure, where their number is not given
MOST = 10_000  # pictures of a figure
MOST_BYTES = 4 << 30  # of samples that are held in memory
MANY_STEPS = 32  # by default, of a flow and of the way that a video shows
TOLERANCE = 1e-5
OUT = "runs/samples"
RANGES = {  # the least and the most an option may be
    "steps": (1, plan.MOST_STEPS),
    "num": (0, 1_000_000),
    "first": (0, 2**31 - 1),
    "seed": (0, 2**31 - 1),
    "batch_size": (1, 1_000_000),
    "tolerance": (1e-7, 1.0),
    "video_seconds": (0.1, 600.0),
    "guidance": (-1e6, 1e6),
}


class Sampling(NamedTuple):
    """What is to be sampled, which are the flags of sample.py.

    Attributes:
      workdir: A run's folder or gs://BUCKET/FOLDER, or that of an exported or imported model.
      labels: Classes by number or name, by commas: 207,360 or "golden retriever"; -1 for one by
        chance, none for no class. By default each picture's class is by chance.
      num: Pictures of each label; by default 4 of each, or 16 where no label is given, and 5000
        points of a toy.
      steps: Sampling steps; several, by commas, are shown side by side, from the same noise. By
        default 1 for a network of average velocities, 32 for flow matching and for
        --video=denoising.
      sampler: meanflow, consistency, euler, heun (two network calls a step), euler_stochastic, or
        dopri5, which chooses its steps by --tolerance; by default what the run was trained for.
      grid: Where the steps lie between t = 1, noise, and t = 0, data: uniform, cosine, quadratic or
        shifted; or the times themselves, by commas, as 1,0.6,0.
      guidance: Scale ω of classifier-free guidance, which doubles the network calls; 1 for none. A
        run trained with guidance needs none, and a network that is told its guidance takes it as an
        input, at no further call.
      guidance_interval: Times LOW:HIGH at which guidance is used; t = 1 is noise.
      tolerance: Of dopri5, the error of a step, relative and absolute.
      seed: Of noise and of classes by chance.
      first: Index of the first picture; with the seed it decides the noise.
      batch_size: Pictures at a time over all devices; changes no picture but by rounding.
      checkpoint: latest, best (as --best_metric of the training had it), or a step.
      ema: Averaged parameters: a decay as 0.999, power_0.05, posthoc_0.1 (made of snapshots: any
        width) or none; by default the run's own.
      autoencoder: Of a run on latents: its folder, if not where the run found it.
      out: Folder to write to; by default runs/samples/ and the model's name.
      video: Writes an animation instead: denoising, the way from noise to the pictures; or
        interpolation, from noise to noise (--num of them, 4 by default) and back to the first.
      video_format: webp, gif, or mp4, for which an ffmpeg must be installed.
      video_seconds: Length of the animation in seconds.
      watch: Keeps the model warm, and samples again at each key: space for the next seed, r for the
        same again, 1 to 9 for as many steps, + and - for twice and half as many, s to save what is
        shown, q to end. A newer checkpoint of the run is taken as soon as it is there.
    """

    workdir: str = ""
    labels: tuple[str, ...] = ()
    num: int = 0
    steps: tuple[int, ...] = ()
    sampler: str = ""
    grid: tuple[str, ...] = ("uniform",)
    guidance: float = 1.0
    guidance_interval: str = "0:1"
    tolerance: float = TOLERANCE
    seed: int = 0
    first: int = 0
    batch_size: int = 64
    checkpoint: str = "latest"
    ema: str = ""
    autoencoder: str = ""
    out: str = ""
    video: Literal["", "denoising", "interpolation"] = ""
    video_format: Literal["webp", "gif", "mp4"] = "webp"
    video_seconds: float = 4.0
    watch: bool = False


class Job(NamedTuple):
    """What is to be sampled, checked and with every default filled in."""

    options: Sampling
    run: Run
    pipeline: FlowPipeline
    checkpoint: int
    ema: str
    names: tuple[str, ...]  # of all classes; empty: the model knows none
    words: tuple[int, ...]  # labels, RANDOM among them
    num: int
    steps: tuple[int, ...]  # empty: the sampler chooses them
    sampler: str
    grid: str | tuple[float, ...]
    interval: plan.Interval
    seed: int
    out: pathlib.Path

    @property
    def points(self) -> bool:
        """Whether samples are points in the plane."""
        return len(self.pipeline.shape) == 1

    @property
    def exported(self) -> bool:
        """Whether the model lies in a folder of its own, without checkpoints."""
        return (self.run.path / WEIGHTS).exists()

    @property
    def total(self) -> int:
        """The number of samples of each step count."""
        return len(self.words) * self.num

    @property
    def batch(self) -> int:
        """Samples at a time; points are cheap."""
        return min(max(self.options.batch_size, POINTS if self.points else 1), self.total)

    @property
    def indices(self) -> np.ndarray:
        """The numbers of the samples, int32 (total,)."""
        return self.options.first + np.arange(self.total, dtype=np.int32)

    @property
    def labels(self) -> np.ndarray:
        """Their labels, int32 (total,)."""
        return np.array([self.label_of(place) for place in range(self.total)], np.int32)

    def label_of(self, place: int) -> int:
        """The label of one; what is by chance is a function of (seed, index)."""
        label = self.words[place % len(self.words)]
        if label != RANDOM:
            return label
        rng = np.random.default_rng((self.seed, plan.LABELS, self.options.first + place))
        return int(rng.integers(max(len(self.names), 1)))

    def name_of(self, label: int) -> str:
        """What a label is called; empty where there are no classes."""
        if not self.names:
            return ""
        return self.names[label] if label < len(self.names) else "no class"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `FlowPipeline.draw` that all pictures share."""
        return {
            "sampler": self.sampler,
            "grid": self.grid,
            "guidance": self.options.guidance,
            "guidance_interval": self.interval,
            "seed": self.seed,
            "tolerance": self.options.tolerance,
        }


class Drawn(NamedTuple):
    """The samples of one step count."""

    steps: int  # 0: the sampler chose
    samples: np.ndarray  # uint8 (n, H, W, C), or float32 points (n, 2)
    calls: np.ndarray  # int32 (n,), network calls of each
    first: float  # seconds of the first batch, in which programs are compiled
    rate: float  # samples a second of the others; 0: there was one batch


# What is asked for.


def prepare(options: Sampling) -> Job:
    """Opens the model and checks what is asked of it, before anything is computed or written.

    Raises:
      UserError: there is no model, or it cannot be sampled so.
    """
    check(options)
    (run,) = load_runs([options.workdir], options.autoencoder).values()
    found = run.checkpoints([options.checkpoint])
    if len(found) > 1:
        raise UserError(f"--checkpoint={options.checkpoint}: one of {', '.join(map(str, found))}")
    ema = run.average(options.ema)
    names = class_names(run.pipeline)
    words = find_labels(options.labels, names)
    sampler = _sampler(options, run.pipeline)
    grid, steps = _grid(options, run.pipeline), _steps(options, sampler, run.pipeline)
    points = len(run.pipeline.shape) == 1
    _check_video(options, sampler, points)
    num = options.num or usual_num(options, points)
    _check_total(options.first, len(words) * num, points)
    return Job(
        options=options,
        run=run,
        pipeline=run.load(found[0], ema),
        checkpoint=found[0],
        ema=ema,
        names=names,
        words=words,
        num=num,
        steps=steps,
        sampler=sampler,
        grid=grid,
        interval=plan.intervals(plan.Plan(guidance_interval=(options.guidance_interval,)))[0],
        seed=options.seed,
        out=pathlib.Path(options.out or f"{OUT}/{'_'.join(run.path.parts[-2:])}").expanduser(),
    )


def usual_num(options: Sampling, points: bool) -> int:
    """The number of samples of each label where none is given."""
    few = bool(options.labels) or options.video == "interpolation"
    return POINTS if points else 4 if few else 16


def _check_total(first: int, total: int, points: bool) -> None:
    if first + total > 2**31:
        raise UserError(f"--first={first} and {total} samples go beyond {2**31 - 1}")
    most = RANGES["num"][1] if points else MOST
    if total > most:
        more = "" if points else "; eval_fid.py --save_samples=png writes any number"
        raise UserError(f"{total:,} samples are too many for one figure: {most:,} at most{more}")


def check(options: Sampling) -> None:
    """Raises UserError where an option is out of its range, or contradicts another."""
    if not options.workdir:
        raise UserError(
            "which model? give --workdir=FOLDER, as --workdir=pretrained/digits_mean_flow"
        )
    files.check_local(out=options.out, autoencoder=options.autoencoder)
    for name, (low, high) in RANGES.items():
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:  # NaN too
                raise UserError(f"--{name}={number:g}: from {low:g} to {high:g}")
    if options.out and pathlib.Path(options.out).expanduser().is_file():
        raise UserError(f"--out={options.out} is a file: name a folder")
    if options.watch and options.video:
        raise UserError("--watch shows pictures: leave --video out")
    if options.video and len(options.steps) > 1:
        raise UserError(f"--video shows one step count, not {len(options.steps)}: give one --steps")
    if options.video and options.video_format == "mp4":
        animation.find_ffmpeg()
    plan.intervals(plan.Plan(guidance_interval=(options.guidance_interval,)))


def class_names(pipeline: FlowPipeline) -> tuple[str, ...]:
    """The names of a model's classes, by its card; of ImageNet's 1000 where that is what it knows.

    Raises:
      UserError: the card names other classes than it counts.
    """
    count, card = pipeline.num_classes, pipeline.card
    names = card.get("class_names")
    if names:
        if not isinstance(names, list) or len(names) != count or set(map(type, names)) - {str}:
            raise UserError(f"class_names of the model's card.json are not {count} names: mend it")
        return tuple(printable(name) for name in names)
    dataset = str(card.get("dataset") or pipeline.config.dataset_name)
    if count == 1000 and dataset.startswith("imagenet"):
        return classes.imagenet()
    return tuple(map(str, range(count)))


def find_labels(asked: Sequence[str], names: tuple[str, ...]) -> tuple[int, ...]:
    """The labels that words mean, `RANDOM` for -1 and len(names) for "none".

    Raises:
      UserError: a word that is no class, or classes asked of a model that knows none.
    """
    if not names:
        if asked:
            raise UserError(
                f"--labels={','.join(asked)}: this model knows no classes, leave it out"
            )
        return (0,)
    words = classes.imagenet_words() if names == classes.imagenet() else ()
    return tuple(_label(word.strip(), names, words) for word in asked or (str(RANDOM),))


def _label(word: str, names: tuple[str, ...], words: classes.Words) -> int:
    if word == str(RANDOM):
        return RANDOM
    if word == NO_CLASS and NO_CLASS not in names:
        return len(names)
    try:
        return classes.find(word, names, words)
    except UserError as error:
        raise UserError(f"--labels: {error}") from error


def _sampler(options: Sampling, pipeline: FlowPipeline) -> str:
    """The sampler's name with the default filled in."""
    sampler = pipeline.check(1, options.sampler, [options.guidance])
    if sampler == ADAPTIVE:
        if options.steps:
            raise UserError(
                f"{ADAPTIVE} chooses its own steps: leave --steps out, give --tolerance"
            )
        if options.grid != ("uniform",):
            raise UserError(f"{ADAPTIVE} chooses its own times: leave --grid out")
    elif options.tolerance != TOLERANCE:
        raise UserError(f"--tolerance is {ADAPTIVE}'s: give --sampler={ADAPTIVE}, or leave it out")
    return sampler


def _grid(options: Sampling, pipeline: FlowPipeline) -> str | tuple[float, ...]:
    """The name of a grid, or times."""
    if len(options.grid) == 1 and options.grid[0] in GRIDS:
        return options.grid[0]
    try:
        times = tuple(map(float, options.grid))
        pipeline.times(len(times) - 1, times)
    except (ValueError, UserError) as error:
        names = ", ".join(GRIDS)
        raise UserError(
            f"--grid={','.join(options.grid)}: one of {names}, or times that fall from 1 to 0, as "
            "1,0.6,0"
        ) from error
    if options.steps not in ((), (len(times) - 1,)):
        raise UserError(f"--grid gives {len(times) - 1} steps by its times: leave --steps out")
    return times


def _steps(options: Sampling, sampler: str, pipeline: FlowPipeline) -> tuple[int, ...]:
    """The step counts, each once."""
    if sampler == ADAPTIVE:
        return ()
    if options.grid[0] not in GRIDS:
        return (len(options.grid) - 1,)
    few = pipeline.averages and options.video != "denoising"
    return tuple(dict.fromkeys(options.steps)) or ((1,) if few else (MANY_STEPS,))


def _check_video(options: Sampling, sampler: str, points: bool) -> None:
    if options.video == "denoising" and sampler == ADAPTIVE:
        raise UserError(
            f"--video=denoising shows the steps of a grid, and {ADAPTIVE} has none: give another "
            "--sampler"
        )
    if options.video == "interpolation" and points:
        raise UserError("--video=interpolation is for pictures: give --video=denoising for points")
    if options.video == "interpolation" and options.num == 1:
        raise UserError("--video=interpolation goes from noise to noise: give --num=2 or more")
    if points and options.watch:
        raise UserError("--watch is for pictures: a toy's points are drawn without it")


# Drawing.


def batches(
    job: Job, labels: np.ndarray, indices: np.ndarray, size: int, bar: Any = None, **options: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields samples (size, …), or their way (steps + 1, size, …), and calls; the last are fewer.

    Args:
      labels, indices: int32 (n,).
      bar: is moved on by every batch.
      options: of `FlowPipeline.draw`, beside the job's settings; noise is that of all, (n, …).
    Raises:
      UserError: samples that are not finite, or a missing autoencoder.
    """
    noise = options.pop("noise", None)
    for start in range(0, len(labels), size):
        # The last batch is filled up, so that all are one program.
        part = np.minimum(np.arange(start, start + size), len(labels) - 1)
        kept = min(size, len(labels) - start)
        own = {} if noise is None else {"noise": noise[part]}
        samples, finite, calls = fetch(
            job.pipeline.draw(labels[part], indices=indices[part], **job.settings, **options, **own)
        )
        check_finite(finite[:kept])
        if bar is not None:
            bar.update(kept)
        yield samples[:, :kept] if options.get("keep") else samples[:kept], calls[:kept]


def draw(job: Job, steps: int, bar: Any = None) -> Drawn:
    """Draws all samples of a job at one step count (0: of the sampler's choice), in batches.

    Raises:
      UserError: samples that are not finite, or a missing autoencoder.
    """
    found, times = [], [time.perf_counter()]
    for part in batches(job, job.labels, job.indices, job.batch, bar, steps=max(steps, 1)):
        found.append(part)
        times.append(time.perf_counter())
    samples, calls = (np.concatenate(parts) for parts in zip(*found, strict=True))
    rest = times[-1] - times[1]
    rate = (job.total - job.batch) / rest if rest else 0.0
    return Drawn(steps, samples, calls, times[1] - times[0], rate)


def picture(job: Job) -> jax.ShapeDtypeStruct:
    """Shape and type of one sample as it is written.

    Raises:
      UserError: a missing autoencoder.
    """
    one = jax.ShapeDtypeStruct((1, *job.pipeline.shape), np.float32)
    found = jax.eval_shape(lambda codec, x: codec.decode(x), job.pipeline.autoencoder, one)
    return jax.ShapeDtypeStruct(found.shape[1:], found.dtype)


def check_memory(size: int, fewer: str) -> None:
    """Raises UserError where so many bytes of samples are too many to hold; `fewer`: the mend."""
    if size > MOST_BYTES:
        raise UserError(
            f"the samples would take {size / 2**30:,.1f} GiB of memory, and "
            f"{MOST_BYTES / 2**30:g} are the most: give {fewer}"
        )


def draw_all(job: Job) -> Iterator[Drawn]:
    """Draws every step count from the same noise; a bar shows how far it is where it takes long.

    Raises:
      UserError: samples that are not finite or too many for the memory, or a missing autoencoder.
    """
    counts, one = job.steps or (0,), picture(job)  # which tells a missing autoencoder first
    size = job.total * len(counts) * one.size * one.dtype.itemsize
    check_memory(size, "a smaller --num, or fewer --labels or --steps")
    many = job.total > job.batch
    what = "point" if job.points else "picture"
    bar = progress(0, job.total * len(counts), what, "samples") if many else None
    for steps in counts:
        yield draw(job, steps, bar)
    if bar is not None:
        bar.close()


def described(job: Job) -> str:
    """A line on what is sampled."""
    what = f"{job.options.workdir}: {job.pipeline.config.objective} after {job.checkpoint:,} steps"
    return printable(f"{what} of training, sampler {job.sampler}, seed {job.seed}")


def told(drawn: Drawn, size: int) -> str:
    """A line on what was drawn: network calls, time and rate."""
    low, high = int(drawn.calls.min()), int(drawn.calls.max())
    calls = f"{low}" if low == high else f"{low} to {high}, {drawn.calls.mean():.1f} on average,"
    how = counted(drawn.steps, "step") if drawn.steps else ADAPTIVE
    line = f"{how}: {calls} network call{'s' * (high > 1)} each (NFE); "
    first = f"{min(size, len(drawn.samples))} in {drawn.first:.2f} s, compilation included"
    return line + first + (f", then {drawn.rate:,.1f} a second" if drawn.rate else "")


def counted(count: int, what: str) -> str:
    """A number of things, as \"1 step\" or \"4 steps\"."""
    return f"{count} {what}{'s' * (count != 1)}"
