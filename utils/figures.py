"""Grids of pictures, with words or without, curves and scatter panels, written as PNG.

matplotlib and Pillow are imported where they are used: both cost start-up time.
"""

import functools
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from utils import files

CELL = 48  # pixels: smaller pictures are enlarged by a whole factor to about this height
GAP = 2  # pixels of white between pictures
LABELLED = 96  # pixels: the least height of a picture with words above it, which are to be read
DPI = 130


class Curve(NamedTuple):
    """One line of a panel: `y` over `x`, both positive; `y` may hold NaN where nothing is known."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    deviations: Sequence[float] = ()  # of y, drawn as bars; 0 for none


class Panel(NamedTuple):
    """One pair of axes: curves, and horizontal lines {label: height}."""

    title: str
    curves: Sequence[Curve]
    lines: dict[str, float]


class Tile(NamedTuple):
    """One square of a mosaic: a picture (H, W, C) uint8 or points (n, 2), and words around it."""

    title: str
    content: np.ndarray
    caption: str = ""


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lays pictures out row by row on white; points are drawn as dots.

    Args:
      images: (n, H, W, C) uint8, C = 1 or 3, where pictures below 48 pixels are enlarged; or points
        (n, 2) of any float dtype.
      columns: pictures per row; None: as square as possible.

    Returns:
      uint8 (height, width, C).

    Raises:
      ValueError: another dtype or shape, or no picture at all.
    """
    images = np.asarray(images)
    if images.ndim == 2 and images.shape[1] == 2:
        return _pixels(_mosaic([[Tile("", images)]]))
    _check_pictures(images)
    images = _enlarged(images)
    rows, columns = _shape(len(images), columns)
    _, height, width, channels = images.shape
    cells = np.full((rows * columns, height + GAP, width + GAP, channels), 255, np.uint8)
    cells[: len(images), :height, :width] = images
    sheet = cells.reshape(rows, columns, height + GAP, width + GAP, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (height + GAP), columns * (width + GAP), channels)
    return np.pad(sheet, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255)


def labelled(
    images: np.ndarray,
    words: Sequence[str],
    columns: int | None = None,
    heads: Sequence[str] = (),
) -> np.ndarray:
    """Lays pictures out row by row on white, each under words of its own.

    Args:
      images: (n, H, W, C) uint8, C = 1 or 3, enlarged to 96 pixels or more.
      words: n of them, of two lines at most; what does not fit is cut.
      columns: pictures per row; None: as square as possible.
      heads: words above the columns; empty: none.

    Returns:
      uint8 (height, width, C).

    Raises:
      ValueError: as `grid`, or another number of words.
    """
    from PIL import Image, ImageDraw

    images = np.asarray(images)
    _check_pictures(images)
    images = images.repeat(factor := enlargement(images.shape[1]), axis=1).repeat(factor, axis=2)
    rows, columns = _shape(len(images), columns)
    if len(words) != len(images) or len(heads) not in (0, columns):
        raise ValueError(f"{len(images)} pictures in {columns} columns need as many words")
    _, height, width, channels = images.shape
    size = max(12, width // 14)
    font, bold = _font(size), _font(size, "-Bold")
    line = round(1.25 * size)
    told = [_lines(text, width, font) for text in words]
    above = line * max(map(len, told)) + 2 * GAP
    top = round(1.5 * line) if heads else 0
    step_x, step_y = width + 2 * GAP, height + above + GAP
    mode, white = ("L", 255) if channels == 1 else ("RGB", (255, 255, 255))
    sheet = Image.new(mode, (columns * step_x + 2 * GAP, top + rows * step_y + GAP), white)
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        x = 2 * GAP + column * step_x + width // 2
        draw.text((x, top // 2), _cut(head, width, bold), fill=0, font=bold, anchor="mm")
    for i, (image, lines) in enumerate(zip(images, told, strict=True)):
        x, y = 2 * GAP + i % columns * step_x, top + i // columns * step_y
        for number, text in enumerate(lines):  # the last one right above the picture
            down = above - line * (len(lines) - number - 0.5) - GAP
            draw.text((x + width // 2, y + down), text, fill=0, font=font, anchor="mm")
        sheet.paste(Image.fromarray(_squeezed(image)), (x, y + above))
    return np.asarray(sheet).reshape(sheet.height, sheet.width, channels)


def enlargement(height: int) -> int:
    """The whole factor by which `labelled` enlarges pictures of a height."""
    return max(1, math.ceil(LABELLED / height))


@functools.cache
def _font(size: int, weight: str = "") -> Any:
    """DejaVu Sans, which matplotlib brings, of `size` pixels: Latin, Greek and Cyrillic."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{weight}.ttf", size
    )


def _lines(text: str, width: int, font: Any) -> list[str]:
    """The words in two lines at most."""
    if font.getlength(text) <= width:
        return [text] if text else []
    letters = max(1, int(len(text) * width / font.getlength(text)))
    first, *rest = textwrap.wrap(text, letters, break_long_words=False) or [text]
    return [_cut(part, width, font) for part in (first, " ".join(rest)) if part]


def _cut(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _check_pictures(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"a grid needs (n, H, W, 1 or 3) uint8, not {images.shape} {images.dtype}")
    if not len(images):
        raise ValueError("a grid needs at least one picture")


def _shape(count: int, columns: int | None) -> tuple[int, int]:
    """Rows and columns of a grid."""
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    return math.ceil(count / columns), columns


def _enlarged(images: np.ndarray) -> np.ndarray:
    factor = max(1, round(CELL / images.shape[1]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def save_png(
    path: str | os.PathLike, image: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
    """Writes uint8 (H, W), (H, W, 1) or (H, W, 3) as PNG; an older file is replaced at once.

    Args:
      text: what the file says of itself, {keyword of 1 to 79 Latin letters: any text}, as chunks
        that `exiftool`, `identify -verbose` and `read_text` show.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)  # as iTXt where it is not Latin-1
    picture = Image.fromarray(_squeezed(image))
    files.write(path, lambda file: picture.save(file, format="png", pnginfo=info))


def read_text(path: str | os.PathLike) -> dict[str, str]:
    """What `save_png` was given as `text`."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as picture:
        picture.load()  # text may follow the pixels
        return {key: str(value) for key, value in picture.text.items()}  # type: ignore[attr-defined]


def _squeezed(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image


def save_grid(path: str | os.PathLike, images: np.ndarray, columns: int | None = None) -> None:
    """Writes `grid(images, columns)` as PNG."""
    save_png(path, grid(images, columns))


def save_curves(path: str | os.PathLike, panels: Sequence[Panel], ylabel: str) -> None:
    """Writes panels of distance by step count: log-log axes, ticks at the step counts.

    One legend serves all panels: curves and lines of one label look alike.
    """
    figure = _panels(panels, _draw_panel)
    figure.supxlabel("sampling steps", fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    _save_figure(figure, path)


def save_logs(path: str | os.PathLike, panels: Sequence[Panel]) -> None:
    """Writes panels of what was logged by training step: y logarithmic, each panel with its own."""
    figure = _panels(panels, _draw_log)
    figure.supxlabel("training steps", fontsize=10)
    _save_figure(figure, path)


def _panels(panels: Sequence[Panel], draw: Callable) -> Any:
    """A figure of panels, three in a row, and one legend of them all."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (6.4, 4.8) if len(panels) == 1 else (4.0 * columns, 3.0 * rows + 0.6)
    figure = _figure(*size)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.axis("off")
    names = dict.fromkeys(curve.label for panel in panels for curve in panel.curves)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for ax, panel in zip(axes, panels, strict=False):
        draw(ax, panel, colours)
    shown = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels())}  # noqa: B905
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=2, fontsize=9)
    return figure


def _draw_log(ax, panel: Panel, colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for curve in panel.curves:
        ax.plot(curve.x, curve.y, color=colours[curve.label], label=curve.label, linewidth=1.3)
    for height in panel.lines.values():
        ax.axhline(height, color="0.35", linewidth=1, linestyle=":")
    ax.set(yscale="log")
    ax.set_title(panel.title, fontsize=10)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25)


def _draw_panel(ax, panel: Panel, colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for curve in panel.curves:
        colour = colours[curve.label]
        ax.plot(curve.x, curve.y, marker="o", markersize=4, color=colour, label=curve.label)
        if any(curve.deviations):
            # A bar that reaches below 0 has no place on a logarithmic axis.
            low = [min(d, 0.9 * y) for d, y in zip(curve.deviations, curve.y, strict=True)]
            bars = [low, list(curve.deviations)]
            ax.errorbar(curve.x, curve.y, bars, fmt="none", ecolor=colour, capsize=3, linewidth=1)
    for (label, height), style in zip(panel.lines.items(), _line_styles(), strict=False):
        ax.axhline(height, color="0.35", linewidth=1, linestyle=style, label=label)
    ax.set(xscale="log", yscale="log", title=panel.title)
    steps = sorted({x for curve in panel.curves for x in curve.x})
    ax.set_xticks(steps, [f"{x:g}" for x in steps])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25)
    ax.title.set_fontsize(10)


def _line_styles() -> list:
    return ["--", ":", "-.", (0, (6, 2, 1, 2, 1, 2))]


def save_mosaic(
    path: str | os.PathLike, rows: Sequence[Sequence[Tile]], names: Sequence[str] = ()
) -> None:
    """Writes tiles side by side: pictures as they are, points as small dots on equal square axes.

    Args:
      path: the PNG.
      rows: tiles; the points of one row share their limits, which the row's first tile sets.
      names: the rows' names, written at the left; may be empty.
    """
    _save_figure(_mosaic(rows, names), path)


def mosaic(
    rows: Sequence[Sequence[Tile]], names: Sequence[str] = (), limits: np.ndarray | None = None
) -> np.ndarray:
    """The same as uint8 (height, width, 3); `limits`, points (n, 2), set those of all tiles."""
    return _pixels(_mosaic(rows, names, limits))


def _mosaic(
    rows: Sequence[Sequence[Tile]], names: Sequence[str] = (), limits: np.ndarray | None = None
):
    columns = max(map(len, rows))
    shape = rows[0][0].content.shape
    aspect = shape[0] / shape[1] if len(shape) == 3 else 1.0
    width = 2.2
    figure = _figure(width * columns + 0.5, len(rows) * (width * aspect + 0.45))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_visible(False)
    for row, tiles in enumerate(rows):
        for ax, tile in zip(axes[row], tiles, strict=False):
            _draw_tile(ax, tile, _limits(tiles[0].content if limits is None else limits))
    for ax, name in zip(axes[:, 0], names, strict=False):
        ax.set_ylabel(name, fontsize=10)
    return figure


def _draw_tile(ax, tile: Tile, limits: tuple) -> None:
    ax.set_visible(True)
    ax.set_title(tile.title, fontsize=9)
    ax.set_xlabel(tile.caption, fontsize=9)
    if tile.content.ndim == 3:
        image = tile.content.squeeze()
        ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        ax.spines[:].set_visible(False)
        return
    size = min(4.0, max(0.3, 4000 / len(tile.content)))
    ax.scatter(*tile.content.T, s=size, alpha=0.6, linewidths=0, rasterized=True)
    ax.set(xlim=limits[0], ylim=limits[1], aspect="equal")


def _limits(content: np.ndarray) -> tuple:
    """A square around points (n, 2), a tenth wider than they are."""
    if content.ndim != 2:
        return (None, None), (None, None)
    low, high = content.min(0), content.max(0)
    middle, reach = (low + high) / 2, 0.55 * float((high - low).max() or 1.0)
    return tuple((m - reach, m + reach) for m in middle)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure) -> np.ndarray:
    figure.set_dpi(DPI)
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3]


def _save_figure(figure, path: str | os.PathLike) -> None:
    files.write(path, lambda file: figure.savefig(file, format="png", dpi=DPI))
