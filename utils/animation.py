"""Animated pictures: WebP and GIF by Pillow, MP4 by an ffmpeg that is installed."""

import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from utils import files
from utils.cli import UserError

KINDS = ("webp", "gif", "mp4")


def save_animation(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    count: int,
    *,
    kind: str,
    fps: float,
    hold: float = 0.0,
    sharp: bool = False,
) -> None:
    """Writes frames of one size as an animation; an older file is replaced at once.

    Args:
      frames: `count` of them, uint8 (H, W, C) with C 1 or 3, taken one by one; `count` is 1 or
        more.
      kind: webp and gif repeat for ever; mp4 is what that ffmpeg makes by default, H.264 mostly.
      fps: frames a second; a gif's frames last whole hundredths of a second, two at least.
      hold: seconds more for the last frame.
      sharp: keep every pixel of a webp as it is, as pictures of few pixels want.
    Raises:
      UserError: no ffmpeg for an mp4, or it failed.
    """
    if kind == "mp4":
        _save_mp4(path, frames, fps, round(hold * fps))
        return
    pictures = (_image(frame) for frame in frames)
    unit, least = (10, 20) if kind == "gif" else (1, 1)
    each, last = (max(least, round(1000 * s / unit) * unit) for s in (1 / fps, hold + 1 / fps))
    options: dict[str, Any] = {"duration": [each] * (count - 1) + [last]}
    options |= {} if kind == "gif" else {"lossless": sharp, "quality": 90, "method": 4}
    first = next(pictures)
    files.write(
        path,
        lambda file: first.save(
            file, kind, save_all=True, loop=0, append_images=pictures, **options
        ),
    )


def _image(frame: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame)


def find_ffmpeg() -> str:
    """The ffmpeg on the PATH, or that of the package imageio-ffmpeg.

    Raises:
      UserError: there is neither.
    """
    found = shutil.which("ffmpeg")
    if not found and importlib.util.find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        with contextlib.suppress(RuntimeError):  # the package without its program
            found = imageio_ffmpeg.get_ffmpeg_exe()
    if not found:
        raise UserError(
            "mp4 needs ffmpeg: install it, or pip install imageio-ffmpeg; webp and gif need nothing"
        )
    return found


def _save_mp4(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, more: int) -> None:
    """Pipes frames to ffmpeg, the last one `more` times again."""
    every = _repeated(iter(frames), more)
    first = next(every)
    height, width, channels = first.shape
    with files.beside(path) as part, tempfile.TemporaryFile() as told:
        command = [find_ffmpeg(), "-y", "-loglevel", "error", "-f", "rawvideo"]
        command += ["-pix_fmt", "gray" if channels == 1 else "rgb24", "-s", f"{width}x{height}"]
        command += ["-r", f"{fps:g}", "-i", "-", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
        # Colour has half the resolution, and so the sides are even.
        command += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-f", "mp4", str(part)]
        status = _pipe(command, itertools.chain([first], every), told)
        told.seek(0)
        if status or not part.exists():
            reason = told.read().decode(errors="replace").strip().splitlines() or ["no reason"]
            raise UserError(f"ffmpeg failed ({reason[-1]}): take webp or gif")


def _repeated(frames: Iterator[np.ndarray], more: int) -> Iterator[np.ndarray]:
    frame = None
    for frame in frames:
        yield frame
    if frame is not None:
        yield from itertools.repeat(frame, more)


def _pipe(command: list[str], frames: Iterable[np.ndarray], told: IO[bytes]) -> int:
    """Gives the frames to a program; returns its exit status."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=told)
    assert process.stdin
    try:
        with contextlib.suppress(BrokenPipeError):  # it says why on its own
            for frame in frames:
                process.stdin.write(np.ascontiguousarray(frame).data)
    except BaseException:
        process.kill()
        raise
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
    return process.returncode
