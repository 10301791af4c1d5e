"""How fast data arrives: moments from disk, and pictures through decoders and autoencoders.

    python benchmarks/data.py [--autoencoder=DIR] [--items=20000]

1. Items a second of 32 × 32 × 8 float16 moments at random in batches of 256, by
   `MomentsSource.gather` and as training has them, through `utils.data.batches`; from few and from
   many shards. They are written just before, so that they lie in the page cache.
2. The share of a step that waits for data, where a step takes 24.7 ms: 256 pictures at 10,377 a
   second, the fastest known for latents of this size on one H200. The step is a sleep: the device
   computes, the host is free.
3. Pictures a second at 256 pixels: JPEG files decoded and cropped on this host; encoded and decoded
   by the Stable Diffusion VAE's architecture with random weights, and by --autoencoder.

Prints a table; compare numbers of one run, on one machine. Everything is written to a temporary
folder and removed.
"""

import dataclasses
import importlib.metadata
import io
import itertools
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from models import autoencoder as autoencoders
from models.autoencoder import Autoencoder
from models.autoencoder_kl import AutoencoderKL
from pipelines.pretrained import KL_SCALING, load_autoencoder
from utils import cli, data, shards
from utils.feed import feed
from utils.sharding import make_mesh
from utils.sources import Pictures, PictureSource

AUTOENCODER = flags.DEFINE_string("autoencoder", "", "A folder or name: one more to measure.")
ITEMS = flags.DEFINE_integer("items", 20_000, "Moments on disk; 16.4 KB each.", lower_bound=1)
STEPS = flags.DEFINE_integer(
    "steps", 200, "Batches that each of the rates is taken over.", lower_bound=2
)
COMPUTE_DTYPE = flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Of the VAE."
)
BATCH = flags.DEFINE_integer(
    "batch", 0, "Pictures of a call; 0: 2 on a CPU, else 32.", lower_bound=0
)

BATCH_SIZE = 256
STEP_SECONDS = 24.7e-3
SHAPE = (32, 32, 8)
SHARD_SIZES = {"few": 4096, "many": 64}
SD_VAE = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2)

Rows = Iterator[tuple[str, str]]


def main(_) -> None:
    """Measures and prints."""
    print(f"\n{hardware()}\n")
    print("| what | measured |\n| --- | --- |")
    for what, measured in [*moments(), *pictures()]:
        print(f"| {what} | {measured} |", flush=True)


def hardware() -> str:
    """One line: processor, cores, device, versions."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    packages = ("jax", "grain", "array_record", "numpy", "pillow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{(names or [platform.processor()])[0]}, {cores} cores; {jax.local_device_count()} × "
        f"{jax.devices()[0].device_kind}; Python {platform.python_version()}, {versions}"
    )


# Moments from disk.


def moments() -> Rows:
    """Rates and waiting for each number of shards."""
    for name, size in SHARD_SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_moments(pathlib.Path(folder), size)
            source = shards.MomentsSource(folder)
            label = f"{name} shards ({source.card.shards})"
            yield f"gather, {label}", f"{gather_rate(source):,.0f} items/s"
            yield f"batches for training, {label}", f"{batch_rate(source):,.0f} items/s"
            idle, asking = waiting(source)
            yield f"step of 24.7 ms waiting for data, {label}", f"{100 * idle:.2f} %"
            yield f"host asking for data meanwhile, {label}", f"{100 * asking:.1f} %"


def write_moments(folder: pathlib.Path, shard_size: int) -> None:
    """A prepared folder of random moments."""
    count = ITEMS.value
    card = shards.Card(
        kind="moments",
        dataset_name="folder",
        source={"source": "", "data_dir": "", "split": ""},
        source_fingerprint="",
        source_count=count,
        num_classes=1000,
        image_size=256,
        crop=shards.CROP,
        autoencoder={"name": "", "fingerprint": "", "compute_dtype": ""},
        dtype="float16",
        shape=SHAPE,
        flipped=False,
        shard_size=shard_size,
        shards=-(-count // shard_size),
        versions={},
    )
    draws = np.random.default_rng(0).standard_normal((512, 1, *SHAPE)).astype(np.float16)
    for k in range(card.shards):
        key = np.arange(k * shard_size, k * shard_size + card.expected(k))
        records = shards.pack(card.record, key, key % 1000, draws[key % 512])
        shards.write_shard(shards.shard_path(folder, card, k), records)
    index = np.zeros(count, shards.INDEX)
    index["key"], index["label"] = np.arange(count), np.arange(count) % 1000
    shards.write_index(folder, index)
    shards.write_card(folder, dataclasses.replace(card, complete=True, count=count))


def gather_rate(source: shards.MomentsSource) -> float:
    """Items a second by `gather` alone."""
    order = np.random.default_rng(0).integers(len(source), size=(STEPS.value, BATCH_SIZE))
    return batches_a_second(source.gather(rows) for rows in order) * BATCH_SIZE


def batch_rate(source: shards.MomentsSource) -> float:
    """Items a second of host batches, fetched ahead by grain."""
    batches = data.batches(source, batch_size=BATCH_SIZE, seed=0)
    return batches_a_second(itertools.islice(batches, STEPS.value)) * BATCH_SIZE


def batches_a_second(batches: Iterator) -> float:
    """The median over ten parts, after a few batches that may have been fetched ahead."""
    for _ in range(5):
        next(batches)
    times = [time.perf_counter() for _ in batches]
    part = len(times) // 10
    return part / float(np.median(np.diff(times[::part])))


def waiting(source: shards.MomentsSource) -> tuple[float, float]:
    """Shares of a step: the device without its batch, and the host asking for the next one.

    As in utils/train.py, the host runs one step ahead: it asks while the step before is computed.
    """
    batches = feed(source, make_mesh(), cache="disk", batch_size=BATCH_SIZE, seed=0, flip=False)(0)
    jax.block_until_ready(next(batches))
    idle = asking = 0.0
    first = free = time.perf_counter()  # free: when the device has computed all it was given
    for _ in range(STEPS.value):
        asked = time.perf_counter()
        jax.block_until_ready(next(batches))
        ready = time.perf_counter()
        idle, asking = idle + max(0.0, ready - free), asking + ready - asked
        begun = max(ready, free)
        free = begun + STEP_SECONDS
        time.sleep(max(0.0, begun - time.perf_counter()))
    return idle / (free - first), asking / (free - first)


# Pictures.


def pictures() -> Rows:
    """Rates of JPEG decoding and of autoencoders."""
    yield "JPEG 500 × 375 decoded and cropped", f"{jpeg_rate():,.1f} pictures/s"
    network = SD_VAE.clone(dtype=jnp.dtype(COMPUTE_DTYPE.value))
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    scale = autoencoders.Scale.of({}, SD_VAE.latent_channels, KL_SCALING)
    yield from rates("SD VAE, random weights", autoencoders.kl(network, params, scale))
    if AUTOENCODER.value:
        loaded = load_autoencoder(AUTOENCODER.value, COMPUTE_DTYPE.value).autoencoder
        yield from rates(pathlib.Path(AUTOENCODER.value).name, loaded)


def jpeg_rate() -> float:
    """Pictures a second through `PictureSource`, at ImageNet's usual size."""
    coarse = np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(file, "jpeg")
    encoded, count = file.getvalue(), 256
    collection = Pictures("", np.arange(count), str, lambda _: (encoded, 0), 0, "")
    source = PictureSource(collection, np.arange(count), 256)
    source.gather(range(16))
    start = time.perf_counter()
    source.gather(range(count))
    return count / (time.perf_counter() - start)


def rates(name: str, autoencoder: Autoencoder) -> Rows:
    """Pictures a second of one device, encoded and decoded."""
    n = BATCH.value or (2 if jax.default_backend() == "cpu" else 32)
    x = jnp.asarray(np.random.default_rng(0).integers(256, size=(n, 256, 256, 3), dtype=np.uint8))
    encode = jax.jit(lambda model, x: model.moments(x))
    decode = jax.jit(lambda model, z: model.decode(z))
    z = autoencoder.sample(encode(autoencoder, x), jax.random.split(jax.random.key(0), n))
    what = f"{name}, {COMPUTE_DTYPE.value}, batches of {n}"
    yield f"encode, {what}", f"{rate(lambda: encode(autoencoder, x), n):,.2f} pictures/s"
    yield f"decode, {what}", f"{rate(lambda: decode(autoencoder, z), n):,.2f} pictures/s"


def rate(call: Callable, n: int) -> float:
    """Pictures a second, over two seconds or two calls after the first."""
    jax.block_until_ready(call())
    calls, start = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - start < 2:
        jax.block_until_ready(call())
        calls += 1
    return n * calls / (time.perf_counter() - start)


if __name__ == "__main__":
    cli.run(main)
