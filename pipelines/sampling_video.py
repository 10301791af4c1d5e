"""Animations: the way from noise to pictures, and pictures along a way through several noises."""

import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from models.autoencoder import Autoencoder
from pipelines.sampling import Job, batches, check_memory, picture
from pipelines.sampling_files import stem
from utils import figures
from utils.animation import save_animation
from utils.log import progress

SMOOTH = 20  # frames a second of an interpolation, and at most of the way from noise
RESTS = 0.25  # of a video's time, in which the finished pictures stand still
SHOWN = 36  # pictures of a frame at most
SHARP = 64  # pixels: pictures up to this height keep every pixel as it is


class Film(NamedTuple):
    """Frames uint8 (height, width, C), and how they are shown."""

    frames: Iterator[np.ndarray]
    length: int
    fps: float
    hold: float  # seconds more for the last frame
    sharp: bool


def write(job: Job) -> tuple[pathlib.Path, int]:
    """Writes the animation that the job's options ask for; returns where, and its frames.

    Raises:
      UserError: samples that are not finite or too many for the memory, a missing autoencoder, or
        an ffmpeg that fails.
    """
    options = job.options
    film = denoising(job) if options.video == "denoising" else interpolation(job)
    path = job.out / f"{stem(job)}_{options.video}.{options.video_format}"
    save_animation(
        path,
        film.frames,
        film.length,
        kind=options.video_format,
        fps=film.fps,
        hold=film.hold,
        sharp=film.sharp,
    )
    return path, film.length


# From noise to pictures.


def denoising(job: Job) -> Film:
    """The samples at times of the grid, decoded frame by frame; the last ones stand for a while.

    Raises:
      UserError: samples that are not finite or too many for the memory, or a missing autoencoder.
    """
    height = picture(job).shape[0]  # which tells a missing autoencoder first
    seconds = job.options.video_seconds
    times = job.pipeline.times(job.steps[0], job.grid)
    most = max(2, int(SMOOTH * seconds * (1 - RESTS)))
    shown = np.linspace(0, len(times) - 1, min(most, len(times))).round().astype(int)
    way = _way(job, shown)
    drawn = way if job.points else _decoded(job, way)
    frames = (_frame(job, x, f"t = {t:.2f}", way) for x, t in zip(drawn, times[shown], strict=True))
    fps = len(shown) / (seconds * (1 - RESTS))
    return Film(frames, len(shown), fps, RESTS * seconds, job.points or height <= SHARP)


def _way(job: Job, shown: np.ndarray) -> np.ndarray:
    """What the network sees at the times of the numbers `shown`, float32 (frames, n, …)."""
    labels, indices = job.labels, job.indices
    labels, indices = (labels, indices) if job.points else (labels[:SHOWN], indices[:SHOWN])
    size = min(job.batch, len(labels))
    held = (job.steps[0] + 1) * size + len(shown) * len(labels)  # a batch's whole way, and frames
    check_memory(
        held * 4 * math.prod(job.pipeline.shape), "a smaller --num, --steps or --batch_size"
    )
    with progress(0, len(labels), "picture", "samples") as bar:
        options = {"steps": job.steps[0], "keep": True, "decode": False}
        drawn = batches(job, labels, indices, size, bar, **options)
        return np.concatenate([way[shown] for way, _ in drawn], axis=1)


def _decoded(job: Job, way: np.ndarray) -> Iterator[np.ndarray]:
    """The pictures uint8 (n, H, W, C) of each frame of (frames, n, …), when it is taken."""
    codec = jax.device_put(job.pipeline.autoencoder)
    n, size = way.shape[1], min(job.batch, way.shape[1])
    for frame in way:
        parts = -(-n // size)
        full = np.resize(frame, (parts, size, *frame.shape[1:]))  # the last one filled up
        yield np.concatenate([np.asarray(_decode(codec, part)) for part in full])[:n]


@jax.jit
def _decode(codec: Autoencoder, x: jax.Array) -> jax.Array:
    return codec.decode(x)


def _frame(job: Job, samples: np.ndarray, head: str, way: np.ndarray) -> np.ndarray:
    if job.points:
        return figures.mosaic([[figures.Tile(head, samples)]], limits=way[[0, -1]].reshape(-1, 2))
    words = [job.name_of(label) for label in job.labels[: len(samples)]]
    columns = len(job.words) if 1 < len(job.words) <= 9 and job.num > 1 else None
    columns = min(len(samples), columns or int(np.ceil(np.sqrt(len(samples)))))
    return figures.labelled(samples, words, columns, [head] + [""] * (columns - 1))


# From noise to noise.


def interpolation(job: Job) -> Film:
    """A picture of each label, on a way through `num` noises and back to the first.

    Raises:
      UserError: samples that are not finite or too many for the memory, or a missing autoencoder.
    """
    labels = job.labels[: min(len(job.words), SHOWN)]
    count = max(2, round(job.options.video_seconds * SMOOTH / job.num)) * job.num
    one = picture(job)
    each = one.size * one.dtype.itemsize + 4 * math.prod(job.pipeline.shape)  # and its noise
    check_memory(
        count * len(labels) * each, "fewer --labels, or a smaller --num or --video_seconds"
    )
    own = job.indices.reshape(job.num, len(job.words))[:, : len(labels)]
    stops = np.stack([job.pipeline.noise(job.seed, row) for row in own])
    samples = _along(job, labels, own[0], loop(stops, count))
    words = [job.name_of(label) for label in labels]
    frames = (figures.labelled(each, words) for each in samples)
    fps = count / job.options.video_seconds
    return Film(frames, count, fps, 0.0, samples.shape[2] <= SHARP)


def _along(job: Job, labels: np.ndarray, indices: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Pictures uint8 (frames, n, H, W, C) from noise (frames, n, …), drawn in batches."""
    count, n = noise.shape[:2]
    flat = noise.reshape(count * n, *noise.shape[2:])
    # The indices serve stochastic samplers: one path through all frames.
    every, paths = np.tile(labels, count), np.tile(indices, count)
    size = min(job.options.batch_size, len(flat))
    with progress(0, len(flat), "picture", "samples") as bar:
        options = {"noise": flat, "steps": max((*job.steps, 1))}
        drawn = [samples for samples, _ in batches(job, every, paths, size, bar, **options)]
    return np.concatenate(drawn).reshape(count, n, *drawn[0].shape[1:])


def loop(stops: np.ndarray, frames: int) -> np.ndarray:
    """Noise float32 (frames, n, …) on a closed way through `stops` (k, n, …), the first one first.

    Between two it is spherical (Shoemake, SIGGRAPH 1985, "slerp"), so that what lies between is as
    likely as noise as they are; on a straight line it would be too short by up to √2.
    """
    where = np.arange(frames) * len(stops) / frames
    return np.stack([_slerp(stops[int(p)], stops[(int(p) + 1) % len(stops)], p % 1) for p in where])


def _slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """What lies at a share of the arc from each of a (n, …) to that of b."""
    axes = tuple(range(1, a.ndim))
    lengths = [np.sqrt(np.sum(np.float64(x) ** 2, axes, keepdims=True)) for x in (a, b)]
    cosine = np.sum(np.float64(a) * b, axes, keepdims=True) / (lengths[0] * lengths[1])
    angle = np.arccos(np.clip(cosine, -1, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        arc = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    straight = (1 - share) * a + share * b  # of noises that are the same
    return np.where(np.sin(angle) > 1e-6, arc, straight).astype(np.float32)
