"""What a prepared folder looks like: originals beside reconstructions, and the latents' channels.

Works on finished shards, so that it can be written during the work too.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pipelines import prepare
from pipelines.prepare import Plan, Work
from utils import figures, shards
from utils.cli import UserError
from utils.sources import CorruptPicture, centre_crop

PAIRS = 8
SAMPLED = 2048  # records that the latents' statistics are taken over
_CHUNK = 256


class Look(NamedTuple):
    """Some pictures of the source, and what the autoencoder gives back of them."""

    names: list[str]
    originals: np.ndarray  # uint8 (n, H, W, 3)
    reconstructions: np.ndarray | None  # the same; None where pictures are kept as pictures

    @property
    def psnr(self) -> np.ndarray:
        """Peak signal-to-noise ratio of each reconstruction, float64 (n,), in dB."""
        assert self.reconstructions is not None
        error = self.originals.astype(np.float64) - self.reconstructions
        return 10 * np.log10(255**2 / np.square(error).mean((1, 2, 3)).clip(1e-9))


class Channels(NamedTuple):
    """Mean and deviation of the latents' channels, over places and pictures; (c,) each."""

    records: int
    raw: tuple[np.ndarray, np.ndarray]  # as stored: of the posterior's mean
    scaled: tuple[np.ndarray, np.ndarray]  # of posterior samples, as the flow sees them


def write(plan: Plan) -> pathlib.Path:
    """Writes report.md, report.png and, for moments, report_channels.png into `plan.out`.

    Args:
      plan: only `out` is needed; a source that is given is taken instead of the card's, and should
        be where it has moved.

    Raises:
      UserError: no prepared folder, or its source is gone or another.
    """
    out = pathlib.Path(plan.out).expanduser()
    work = _reopened(out, plan)
    finished = [
        k for k in range(work.card.shards) if k not in shards.missing_shards(out, work.card)
    ]
    look = _look(work)
    pictures = [look.originals]
    if look.reconstructions is not None:
        pictures.append(look.reconstructions)
    sheet = np.stack(pictures, axis=1).reshape(-1, *look.originals.shape[1:])
    figures.save_grid(out / "report.png", sheet, columns=4)
    channels = _channels(out, work, finished) if finished else None
    if channels:
        figures.save_png(out / "report_channels.png", _bars(channels))
    path = out / "report.md"
    path.write_text(_text(out, work, finished, look, channels), encoding="utf-8")
    return path


def _reopened(out: pathlib.Path, plan: Plan) -> Work:
    """The work that a folder's card describes, with the copy of the autoencoder."""
    if not plan.out:
        raise UserError("which folder? give --out=FOLDER")
    card = shards.read_card(out, complete=False)
    given = plan._asdict() if plan.source else card.source
    again = Plan(
        source=given["source"],
        data_dir=given["data_dir"],
        split=given["split"],
        out=str(out),
        autoencoder=str(out / "autoencoder") if card.autoencoder else "none",
        dataset_name=card.dataset_name,
        image_size=card.image_size,
        dtype=card.dtype,
        flip=card.flipped,
        compute_dtype=(card.autoencoder or {}).get("compute_dtype", "float32"),
    )
    work = prepare.open_work(again)
    if work.pictures.fingerprint != card.source_fingerprint:
        raise UserError(f"{out} was not prepared from {work.pictures.where} as it is now")
    return work._replace(card=card)


# Pictures.


def _look(work: Work) -> Look:
    """Pictures from all over the source; corrupt ones are passed over."""
    count = work.card.source_count
    names, originals = [], []
    for start in np.unique(np.linspace(0, count - 1, PAIRS).astype(int)):
        try:
            picture, _ = work.pictures.picture(int(start))
        except CorruptPicture:
            continue
        names.append(work.pictures.name(int(start)))
        originals.append(np.asarray(centre_crop(picture, work.card.image_size)))
    if not originals:
        raise UserError(f"{work.pictures.where}: none of {PAIRS} pictures can be read")
    x = np.stack(originals)
    if work.pretrained is None:
        return Look(names, x, None)
    decoded = _reconstruct(work.pretrained.autoencoder, x, work.card.dtype)
    return Look(names, x, np.asarray(decoded))


def _reconstruct(autoencoder, pictures: np.ndarray, dtype: str) -> jax.Array:
    """Decodes the posterior's mean as stored, without noise."""
    moments = prepare.encode(autoencoder, pictures, dtype, False).moments[:, 0]
    channels = prepare.latent_shapes(autoencoder, pictures.shape[1])[1][-1]
    moments = moments.at[..., channels:].set(0)  # the deviations, where there are any
    return jax.jit(_decoded)(autoencoder, moments)


def _decoded(autoencoder, moments: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(0), len(moments))
    return autoencoder.decode(autoencoder.sample(moments, keys))


# Latents.


def _channels(out: pathlib.Path, work: Work, finished: Sequence[int]) -> Channels | None:
    """Statistics over records from all over the finished shards; None for pictures."""
    if work.pretrained is None:
        return None
    each = max(1, SAMPLED // len(finished))
    records: list[bytes] = []
    for k in finished[:SAMPLED]:
        shard = shards.Shard(shards.shard_path(out, work.card, k))
        if len(shard):
            rows = np.linspace(0, len(shard) - 1, min(each, len(shard)))
            records += shard.read(rows.astype(int).tolist())
        shard.close()
    if not records:
        return None
    channels = prepare.latent_channels(work)
    moments = np.frombuffer(b"".join(records), work.card.record)["moments"][:, 0]
    keys = jax.random.split(jax.random.key(0), len(moments))
    sample = work.pretrained.autoencoder.sample
    parts = [slice(i, i + _CHUNK) for i in range(0, len(moments), _CHUNK)]
    x = np.concatenate([np.asarray(sample(jnp.asarray(moments[p]), keys[p])) for p in parts])
    return Channels(
        len(records), _mean_and_deviation(moments[..., :channels]), _mean_and_deviation(x)
    )


def _mean_and_deviation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = x.astype(np.float64).reshape(-1, x.shape[-1])
    return rows.mean(0), rows.std(0)


def _bars(channels: Channels) -> np.ndarray:
    """Draws means and deviations as bars, raw and scaled side by side: uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(channels.raw[0])
    figure = Figure(figsize=(max(5.0, 0.3 * count), 5.0), layout="constrained", dpi=figures.DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True)
    place = np.arange(count)
    for ax, name, row in zip(axes, ("mean", "deviation"), (0, 1), strict=True):
        ax.bar(place - 0.2, channels.raw[row], 0.4, label="raw", color="0.6")
        ax.bar(place + 0.2, channels.scaled[row], 0.4, label="scaled, as the flow sees it")
        ax.axhline(row, color="0.2", linewidth=0.8, linestyle="--")
        ax.set(ylabel=name)
        ax.grid(axis="y", alpha=0.25)
    axes[1].set(xlabel="channel of the latents", xticks=place)
    axes[0].legend(fontsize=9)
    axes[0].set_title("dashed: what a standard normal has", fontsize=9)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


# Words.


def _text(
    out: pathlib.Path,
    work: Work,
    finished: Sequence[int],
    look: Look,
    channels: Channels | None,
) -> str:
    text = f"# {out.name}\n\n" + _table(("what", ""), _facts(out, work, finished))
    if look.reconstructions is None:
        text += "\nPictures of the source, cropped as they are stored:\n\n![](report.png)\n"
    else:
        text += (
            f"\nOriginals, and to the right of each what the autoencoder gives back, "
            f"{look.psnr.mean():.2f} dB on average:\n\n![](report.png)\n\n"
        )
        text += _table(("picture", "PSNR, dB"), [(n, f"{p:.2f}") for n, p in _pairs(look)])
    if channels:
        text += (
            f"\nThe latents' channels, over {channels.records} pictures; scaled is what the flow "
        )
        text += "sees, a sample of the posterior:\n\n![](report_channels.png)\n\n"
        head = ("channel", "mean, raw", "deviation, raw", "mean, scaled", "deviation, scaled")
        columns = (*channels.raw, *channels.scaled)
        rows = [
            (str(i), *(f"{v:.3f}" for v in r)) for i, r in enumerate(zip(*columns, strict=True))
        ]
        text += _table(head, rows)
    return text


def _pairs(look: Look) -> list[tuple[str, float]]:
    return list(zip(look.names, look.psnr.tolist(), strict=True))


def _facts(out: pathlib.Path, work: Work, finished: Sequence[int]) -> list[tuple[str, str]]:
    card = work.card
    sizes = [shards.shard_path(out, card, k).stat().st_size for k in finished]
    state = "complete" if card.complete else "unfinished"
    facts = [
        ("state", f"{state}: {len(finished)} of {card.shards} shards, {sum(sizes) / 1e6:.1f} MB"),
        (
            "source",
            f"{card.source['source']} ({card.source_fingerprint}), {card.source_count} pictures",
        ),
        ("labels", f"{card.num_classes or 'no'} classes ({card.dataset_name})"),
        ("pictures", f"{card.image_size} × {card.image_size}, {card.crop}"),
        ("records", f"{card.kind}, {card.dtype} {' × '.join(map(str, card.shape))}"),
        ("mirrored too", "yes" if card.flipped else "no"),
    ]
    if card.autoencoder:
        name, mark, kind = (card.autoencoder[k] for k in ("name", "fingerprint", "compute_dtype"))
        facts.append(("autoencoder", f"{name} ({mark}), computed in {kind}"))
    if card.complete:
        left_out = (
            f"{len(card.skipped)}: {', '.join(card.skipped[:20])}" if card.skipped else "none"
        )
        facts += [("records in all", str(card.count)), ("left out as corrupt", left_out)]
        facts.append(("content", card.content))
    return facts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
