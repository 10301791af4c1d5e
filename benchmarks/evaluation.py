"""How fast an evaluation is, stage by stage, and that its memory does not grow with N.

    python benchmarks/evaluation.py [--workdir=RUN] [--weights=FILE]
    # two CPU cores, about a minute
    python benchmarks/evaluation.py --features=mobilenet --num=64 --batch_size=16 \\
        --sizes=500,2000 --metrics=fid,kid

1. Pictures a second of each stage by itself, one after another: samples in --steps steps, decoded
   to pictures; their features; features brought to the host; statistics, summed there in float64;
   saves of these sums.
2. Pictures a second of all of it as `eval_fid.py` does it, the host one batch behind the devices,
   and the time of --total pictures that follows, with the metrics at its end.
3. Resident memory after --sizes pictures, and seconds of each metric: made-up features of the
   extractor's widths go through the same loop, so that N may be large where pictures are slow.

Without --workdir a network with random weights is measured: MeanFlow's B/2 with the Stable
Diffusion VAE's architecture on an accelerator, the digits' small one on a CPU. Without --weights
those of Inception and MobileNet are random, too: speed does not care. Prints a table; compare
numbers of one run, on one machine. What is written lies in a temporary folder.
"""

import importlib.metadata
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from absl import flags

from configs import digits, imagenet256
from models import autoencoder as autoencoders
from models import inception, mobilenet
from models.autoencoder_kl import AutoencoderKL
from pipelines import extractors, measure, sweep
from pipelines.extractors import Extractor
from pipelines.flow import FlowPipeline
from pipelines.measure import Batch, Reference
from pipelines.plan import Plan
from pipelines.pretrained import KL_SCALING
from utils import cli
from utils.cli import UserError
from utils.sharding import batch_sharding, fetch, make_mesh, replicated
from utils.tally import Tally

METRICS = tuple(measure.PARTS)
WORKDIR = flags.DEFINE_string("workdir", "", "A run's folder; empty: random weights.")
FEATURES = flags.DEFINE_enum("features", "inception", list(extractors.PROTOCOLS), "Whose.")
PROTOCOL = flags.DEFINE_string("protocol", "", "tf, clean or pytorch; empty: the usual one.")
WEIGHTS = flags.DEFINE_string("weights", "", "Of the features; empty: random ones.")
STEPS = flags.DEFINE_integer(
    "steps", 1, "Of the sampler; at 1 the other stages weigh most.", lower_bound=1
)
NUM = flags.DEFINE_integer(
    "num", 0, "Pictures that are measured; 0: 64 on a CPU, else 8192.", lower_bound=0
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "0: 16 on a CPU, else 256.", lower_bound=0)
TOTAL = flags.DEFINE_integer(
    "total", 50_000, "Pictures of the evaluation that is extrapolated to.", lower_bound=1
)
SIZES = flags.DEFINE_list("sizes", ["2000", "10000", "50000"], "N at which memory is measured.")
ASKED = flags.DEFINE_list("metrics", list(METRICS), "Metrics that are timed.")
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 10, "Draws of the bootstrap of fid.", lower_bound=0)
MOST = 0.10  # of the whole, for statistics, transfers and saves
SD_VAE = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2)

Seconds = dict[str, float]
Rows = Iterator[tuple[str, str]]


def main(_) -> None:
    """Measures and prints."""
    sizes = check()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        pipeline, extractor = network(), features(folder)
        print(f"\n{hardware()}\n\n{told(pipeline, extractor)}\n")
        print("| what | measured |\n| --- | --- |")
        for what, measured in rows(pipeline, extractor, folder, sizes):
            print(f"| {what} | {measured} |", flush=True)


def check() -> list[int]:
    """The sizes of --sizes, in order.

    Raises:
      UserError: sizes, metrics or a number of draws that cannot be.
    """
    served = METRICS
    if FEATURES.value != "inception":
        served = tuple(name for name in METRICS if name not in measure.OF_INCEPTION)
    unknown = [name for name in ASKED.value if name not in METRICS]
    if unknown or not set(ASKED.value) & set(served):
        asked = ",".join(unknown or ASKED.value)
        raise UserError(f"--metrics={asked}: {FEATURES.value} serves {', '.join(served)}")
    if BOOTSTRAP.value == 1:
        raise UserError("--bootstrap=1: one draw has no spread, give 10, or 0 for none")
    if not SIZES.value or not all(word.isdecimal() and int(word) > 9 for word in SIZES.value):
        raise UserError(f"--sizes={','.join(SIZES.value)}: numbers of 10 or more, as 2000,50000")
    return sorted(map(int, SIZES.value))


def hardware() -> str:
    """One line: processor, cores, device, versions."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "numpy"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{(names or [platform.processor()])[0]}, {cores} cores; {jax.local_device_count()} × "
        f"{jax.devices()[0].device_kind}; Python {platform.python_version()}, {versions}"
    )


def rows(
    pipeline: FlowPipeline, extractor: Extractor, folder: pathlib.Path, sizes: list[int]
) -> Rows:
    """The table."""
    stages = by_stage(pipeline, extractor)
    loop = whole_loop(pipeline, extractor, folder)
    memory = {0: resident()}
    ends: dict[int, Seconds] = {}
    saving = 0.0
    for n in sizes:
        stages["statistics"], saving, ends[n] = made_up(extractor, folder, n)
        memory[n] = resident()
    for name, seconds in stages.items():
        yield name, f"{1 / seconds:,.1f} pictures/s, {seconds / loop:.1%} of the whole"
    saves = saving / measure.SAVE_SECONDS
    yield "a save of the sums", f"{saving:.2f} s, each {measure.SAVE_SECONDS:g} s: {saves:.2%}"
    yield "all of it, as eval_fid.py does it", f"{1 / loop:,.1f} pictures/s"
    host = (stages["statistics"] + stages["transfers"]) / loop + saves
    verdict = "below" if host < MOST else "NOT below"
    yield "statistics, transfers and saves", f"{host:.1%} of the whole, {verdict} {MOST:.0%}"
    yield from extrapolated(loop * (1 + saves), ends)
    for n, (rss, anonymous) in memory.items():
        what = f"N = {n:,}" if n else "before"
        yield f"resident memory, {what}", f"RSS {rss:,.0f} MB, RssAnon {anonymous:,.0f} MB"


def extrapolated(loop: float, ends: dict[int, Seconds]) -> Rows:
    """Time of the whole evaluation, and of the metrics at its end."""
    total, n = TOTAL.value, max(ends)
    times = {metric: at(total, metric, ends) for metric in ends[n]}
    for metric, seconds in ends[n].items():
        far = "" if n == total else f", {times[metric]:,.1f} s extrapolated to {total:,}"
        yield f"{metric} of {n:,} features", f"{seconds:,.1f} s{far}"
    pictures, end = total * loop, sum(times.values())
    yield (
        f"an evaluation of {total:,}",
        f"{pictures / 60:,.1f} minutes for pictures, {end / 60:,.1f} for {', '.join(times)}",
    )


def at(total: int, metric: str, ends: dict[int, Seconds]) -> float:
    """Seconds of a metric at `total` pictures, from those at the two largest sizes."""
    power = 2 if metric == "pr" else 1  # all pairs of pictures, or a pass over them
    *_, (n, last) = sorted(ends.items())
    if metric == "kid" and n >= 1000:
        return last[metric]  # its subsets are of 1000
    before, first = sorted(ends.items())[-2] if len(ends) > 1 else (0, dict.fromkeys(last, 0.0))
    slope = (last[metric] - first[metric]) / (n**power - before**power)
    return last[metric] + max(slope, 0.0) * (total**power - n**power)


# What is measured.


def on_cpu() -> bool:
    """Whether there is no accelerator."""
    return jax.default_backend() == "cpu"


def batch_size() -> int:
    """Pictures of a batch, a multiple of the number of devices."""
    size = BATCH_SIZE.value or (16 if on_cpu() else 256)
    return -(-size // jax.device_count()) * jax.device_count()


def network() -> FlowPipeline:
    """The run of --workdir, or one with random weights.

    Raises:
      UserError: no such run, or one of points.
    """
    if WORKDIR.value:
        pipeline = FlowPipeline.from_pretrained(WORKDIR.value)
        if len(pipeline.shape) == 1:
            raise UserError(f"{WORKDIR.value} draws points, which have no features: name another")
        return pipeline
    codec = None
    if on_cpu():
        config, shape, classes = digits.get_config(), (8, 8, 1), 10
    else:
        config, shape, classes = imagenet256.get_config("meanflow_b2"), (32, 32, 4), 1000
        weights = jax.jit(SD_VAE.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
        scale = autoencoders.Scale.of({}, SD_VAE.latent_channels, KL_SCALING)
        codec = autoencoders.kl(SD_VAE, weights, scale, config.autoencoder_slice)
    config.objective = "mean_flow"
    card = {"shape": list(shape), "num_classes": classes}
    pipeline = FlowPipeline.build(config, card, autoencoder=codec)
    return pipeline.with_params(jax.jit(pipeline.network.init)(jax.random.key(0)))


def features(folder: pathlib.Path) -> Extractor:
    """The extractor, with random weights where none are given."""
    name, weights = FEATURES.value, WEIGHTS.value
    shapes = {"inception": inception.shapes, "mobilenet": mobilenet.shapes}.get(name)
    if not weights and shapes:
        rng, path = np.random.default_rng(0), folder / "weights.npz"
        np.savez(path, **{key: tensor(rng, key, shape) for key, shape in shapes().items()})
        weights = str(path)
    return extractors.load(name, PROTOCOL.value, weights)


def tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights that keep the features' size about the same; norms that change nothing."""
    if len(shape) == 1:
        ones = name.endswith(("weight", "gamma", "var", "variance"))
        return np.full(shape, float(ones), np.float32)
    inputs = np.prod(shape) / max(shape)
    return (rng.standard_normal(shape) * np.sqrt(2 / inputs)).astype(np.float32)


def told(pipeline: FlowPipeline, extractor: Extractor) -> str:
    """What is measured, for a reader."""
    network = WORKDIR.value or "a network with random weights"
    has_weights = WEIGHTS.value or FEATURES.value not in ("inception", "mobilenet")
    random = "" if has_weights else " (random ones: speed does not care)"
    return (
        f"{network}, {'×'.join(map(str, pipeline.shape))}, batches of {batch_size()}"
        f"; {extractor.words}{random}"
    )


# Stages.


def by_stage(pipeline: FlowPipeline, extractor: Extractor) -> Seconds:
    """Seconds per picture of the devices' stages and of transfers, one after another."""
    size, place = batch_size(), replicated(make_mesh())
    latents = replace(pipeline, loaded=autoencoders.points())
    codec, applies = jax.device_put((pipeline.autoencoder, (extractor.apply,)), place)
    decode = jax.jit(lambda codec, x: codec.decode(x))
    labels = np.zeros(size, np.int32)
    names = (
        f"samples in {STEPS.value} step{'s' * (STEPS.value > 1)}",
        "decoded",
        f"{extractor.name} features",
    )
    spent: Seconds = dict.fromkeys((*names, "transfers"), 0.0)
    batches = max(2, -(-count() // size))
    for k in range(-1, batches):  # the first compiles
        clock = [time.perf_counter()]
        indices = np.arange(size) + max(k, 0) * size
        x, finite, _ = lap(clock, latents.draw(labels, steps=STEPS.value, indices=indices))
        pictures = lap(clock, decode(codec, x))
        found = lap(clock, measure.features_of(applies, pictures))
        fetch((found, finite))
        clock.append(time.perf_counter())
        if k >= 0:
            for name, seconds in zip(spent, np.diff(clock), strict=True):
                spent[name] += float(seconds) / (batches * size)
    return spent


def lap(clock: list[float], values: Any) -> Any:
    """Waits for the values, and notes the time."""
    jax.block_until_ready(values)
    clock.append(time.perf_counter())
    return values


def count() -> int:
    """Pictures that are measured."""
    return NUM.value or (64 if on_cpu() else 8192)


def whole_loop(pipeline: FlowPipeline, extractor: Extractor, folder: pathlib.Path) -> float:
    """Seconds per picture of `measure.tally`, saves aside."""
    size = batch_size()
    n = max(2, -(-count() // size)) * size
    plan = Plan(batch_size=size, num_samples=n)
    loop = 0.0
    for name, pictures in (("first", size), ("timed", n)):  # the first compiles
        labels = np.zeros(pictures, np.int32)
        batches = sweep.sample_batches(pipeline, plan, labels, seed=0, steps=STEPS.value)
        start = time.perf_counter()
        (tally,) = measure.tally(
            batches, [extractor], folder / name, pictures, parts=parts(extractor)
        )
        tally.stats  # noqa: B018  # adds up what is pending, which a short loop leaves
        loop = (time.perf_counter() - start) / pictures
    return loop


def parts(extractor: Extractor) -> list[str]:
    """The features that the metrics asked for need."""
    metrics = measure.metrics_of(extractor, ASKED.value)
    return sorted({measure.PARTS[metric] for metric in metrics} | {"pool"})


# Many features.


def made_up(extractor: Extractor, folder: pathlib.Path, n: int) -> tuple[float, float, Seconds]:
    """Puts n made-up features through the loop.

    Returns:
      Seconds per picture of the statistics, of a save, and of each metric.
    """
    widths = {part: extractor.widths[part] for part in parts(extractor)}
    apply = jax.tree_util.Partial(_Random(tuple(widths.items())))
    stand_in = extractor._replace(apply=apply, fingerprint=f"made_up_{n}", widths=widths)
    spent, update = [], Tally.update

    def timed(self: Tally, rows: dict[str, np.ndarray]) -> None:
        start = time.perf_counter()
        update(self, rows)
        spent.append(time.perf_counter() - start)

    Tally.update = timed  # type: ignore[method-assign]
    try:
        (tally,) = measure.tally(numbers(n), [stand_in], folder, n, parts=list(widths))
    finally:
        Tally.update = update  # type: ignore[method-assign]
    start = time.perf_counter()
    stats = tally.stats
    spent.append(time.perf_counter() - start)
    start = time.perf_counter()
    tally.save()
    saving = time.perf_counter() - start
    reference = Reference(stats["pool"], stats.get("spatial"), tally.features, "itself", "")
    ends = metric_seconds(tally, reference, extractor)
    tally.remove()
    return sum(spent) / n, saving, ends


def metric_seconds(tally: Tally, reference: Reference, extractor: Extractor) -> Seconds:
    """Seconds of each metric; the reference's roots, which serve all cells, are there already."""
    ends: Seconds = {}
    _ = reference.pool_root, reference.spatial and reference.spatial_root
    for metric in measure.metrics_of(extractor, ASKED.value):
        start = time.perf_counter()
        measure.measures(tally, reference, extractor, [metric], bootstrap=BOOTSTRAP.value)
        ends[metric] = time.perf_counter() - start
    return ends


class _Random:
    """Random features of a picture, a function of its number."""

    def __init__(self, widths: tuple[tuple[str, int], ...]):
        self.widths = widths

    def __call__(self, numbers: jax.Array) -> dict[str, jax.Array]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
        return {
            part: jax.vmap(lambda key, d=width: jax.random.normal(key, (d,)))(keys)
            for part, width in self.widths
        }

    def __hash__(self) -> int:
        return hash(self.widths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Random) and other.widths == self.widths


def numbers(n: int) -> Callable[[int], Iterator[Batch]]:
    """Batches of pictures' numbers, in place of pictures."""
    size, place = batch_size() * 16, batch_sharding(make_mesh())

    def batches(start: int) -> Iterator[Batch]:
        for first in range(start, n, size):
            rows = np.arange(first, first + size, dtype=np.int32)
            yield Batch(jax.device_put(rows, place), min(size, n - first))

    return batches


def resident() -> tuple[float, float]:
    """Megabytes of this process: RSS, and its anonymous part, which no file could give back."""
    rss = psutil.Process().memory_info().rss / 1e6
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    anonymous = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return rss, int(anonymous[0]) * 1024 / 1e6 if anonymous else float("nan")


if __name__ == "__main__":
    cli.run(main)
