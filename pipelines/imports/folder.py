"""A checkpoint of others → a folder that `FlowPipeline.from_pretrained` opens."""

import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from configs import base
from flows.guidance import effective_scale
from models import tensors
from models.dit import SIZES, WIDTHS
from pipelines import build, model_card
from pipelines.export import read_diffusers
from pipelines.flow import FlowPipeline
from pipelines.imports import convert, read
from pipelines.imports.convert import Sizes
from pipelines.imports.formats import FORMATS, Format
from utils import classes, files
from utils.cli import UserError, printable
from utils.sources import LARGEST

LATENT_CHANNELS, LATENT_SCALE = 4, 8  # of Stable Diffusion's autoencoders
IMAGENET = 1000  # classes; every one of these repositories has them in the same order
IMAGE_SIZE = 256  # where the tensors do not say
DIFFUSERS = "diffusers"
KNOWN = (*FORMATS, DIFFUSERS)
HEADS = {width: heads for _, width, heads in WIDTHS.values()}


class Import(NamedTuple):
    """The options of an import, which are the flags of import_weights.py.

    Attributes:
      format: Whose the weights are: dit (facebookresearch/DiT), sit (willisma/SiT), meanflow
        (Gsunshine/meanflow, in JAX), meanflow_torch (zhuyu-cs/MeanFlow), jax_flow
        (kvfrans/jax-flow), or diffusers (what export_diffusers.py wrote).
      checkpoint: The file, or the folder of flax or of diffusers.
      out: The folder to write: a new one, or an empty one.
      ema: Which tree of the file: by default averaged parameters where it has any, none for the
        parameters themselves, or the tree's key.
      image_size: Pixels along a side, where the file has no table of positions that says it: 256.
      num_heads: Of attention, where it is not that of DiT's networks of this width.
      autoencoder: Folder, or name on the hub, of what decodes the latents; by default the one that
        the repository samples with.
      licence: Of the weights; by default that of the repository.
      guidance: The scale that MeanFlow's training put into the network, for tables; 1 for none, 0
        for what the file says, if it does.
    """

    format: str = ""
    checkpoint: str = ""
    out: str = ""
    ema: str = ""
    image_size: int = 0
    num_heads: int = 0
    autoencoder: str = ""
    licence: str = ""
    guidance: float = 0.0


def run(options: Import) -> str:
    """Imports, and returns what was done in a few lines, safe to print.

    Raises:
      UserError: an option or a file that cannot be; nothing is written then.
    """
    check(options)
    pipeline, remarks = exported(options) if options.format == DIFFUSERS else converted(options)
    check_shapes(pipeline, options)
    check_autoencoder(pipeline, options)
    card = pipeline.card
    readme = model_card.text(pipeline.config, card, name=options.out)
    pipeline.save_pretrained(options.out, readme=readme)
    of = f" ({card['ema']})" if card.get("ema") else ""
    told = f"{options.checkpoint}{of}: {build.count_parameters(pipeline.params):,} parameters"
    told += f" of {card['origin']}" if card.get("origin") else ""
    done = f"{told}, {pipeline.config.objective}, written to {options.out}"
    return "\n".join(printable(line) for line in (done, *remarks))


def converted(options: Import) -> tuple[FlowPipeline, list[str]]:
    """The network of a checkpoint of one of FORMATS, and what is to be said of it.

    Raises:
      UserError: a file that is damaged or of another format, or sizes that cannot be.
    """
    style = FORMATS[options.format]
    checkpoint = read.read(pathlib.Path(options.checkpoint), options.format, options.ema)
    check_trained(options, style, checkpoint)
    timeless = checkpoint.config.get("t_conditioning", 1) == 0
    try:
        params, sizes, left = convert.convert(style, checkpoint.tensors, timeless)
    except ValueError as error:
        raise UserError(mismatch(options, checkpoint.tensors, error)) from error
    check_classes(options, sizes, checkpoint)
    config = described(style, sizes, options)
    card = make_card(style, sizes, config, options, checkpoint)
    tree = unflatten_dict(params, sep=".")
    card["parameters"] = build.count_parameters(tree)
    shown = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
    remarks = [f"left out: {shown}" if left else "", style.remark, doubt(sizes, checkpoint)]
    return FlowPipeline.build(config, card, tree), [remark for remark in remarks if remark]


def check_shapes(pipeline: FlowPipeline, options: Import) -> None:
    """Raises UserError where the folder would describe another network than its weights are of."""
    needed = jax.eval_shape(pipeline.network.init, jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in flatten_dict(needed, sep=".").items()}
    try:
        tensors.check(flatten_dict(pipeline.params, sep="."), shapes)
    except ValueError as error:
        raise UserError(
            f"{options.checkpoint}: no network here has these sizes, so that it cannot be "
            f"imported: {error}"
        ) from error


def check_autoencoder(pipeline: FlowPipeline, options: Import) -> None:
    """Raises UserError where --autoencoder is none that decodes these latents.

    A name on the hub is taken as it is: it is loaded where pictures are drawn.
    """
    name = options.autoencoder
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not os.path.exists(name)
    if not name or on_hub:
        return
    if not pipeline.config.use_stable_vae:
        raise UserError(f"--autoencoder={name}: this network makes pixels, leave it out")
    latents = jax.ShapeDtypeStruct((1, *pipeline.shape), jnp.float32)
    try:
        jax.eval_shape(pipeline.autoencoder.decode, latents)
    except (TypeError, ValueError, FlaxError) as error:
        raise UserError(
            f"--autoencoder={name} does not decode latents of {pipeline.shape}: name another"
        ) from error


def check_trained(options: Import, style: Format, checkpoint: read.Checkpoint) -> None:
    """Raises UserError where the options in a checkpoint say that it is another network."""
    for name, start in style.options.items():
        value = checkpoint.config.get(name)
        if isinstance(value, str) and not value.startswith(start):
            raise UserError(
                f"{options.checkpoint} was trained with {name}={value[:40]}, and "
                f"--format={options.format} is for {name}={start}: name another format or file"
            )


def check_classes(options: Import, s: Sizes, checkpoint: read.Checkpoint) -> None:
    """Raises UserError where a network was trained without a null label."""
    told = checkpoint.config.get("num_classes")
    if isinstance(told, int) and told == s.num_classes + 1:
        raise UserError(
            f"{options.checkpoint} was trained on {told} classes without a null label (its "
            "class_dropout_prob is 0), which networks here have: it cannot be imported"
        )


def doubt(s: Sizes, checkpoint: read.Checkpoint) -> str:
    """What is to be said of a table of labels that may have no null label; often nothing.

    Tensors do not show it, and of most files nothing else is known.
    """
    if s.num_classes + 1 != IMAGENET or checkpoint.config.get("num_classes") == s.num_classes:
        return ""
    return (
        f"its table of labels has {IMAGENET} rows, taken as those of {s.num_classes} classes and "
        "of the null label; if it was trained on ImageNet without a null label, label "
        f"{s.num_classes} is its last class, and guidance means nothing"
    )


def exported(options: Import) -> tuple[FlowPipeline, list[str]]:
    """What export_diffusers.py wrote, back again; there is nothing to be said of it.

    Raises:
      UserError: another kind of folder, or an option that is for checkpoints of others.
    """
    for name in ("ema", "image_size", "num_heads"):
        if getattr(options, name):
            raise UserError(f"--{name} does not go with --format={DIFFUSERS}: leave it out")
    config, card, params = read_diffusers(options.checkpoint)
    config.autoencoder = options.autoencoder or config.autoencoder
    card |= {"licence": options.licence} if options.licence else {}
    return FlowPipeline.build(config, card, params), []


def check(options: Import) -> None:
    """Looks at the options, before anything is read.

    Raises:
      UserError: an option is missing or out of its range, or the folder holds something already.
    """
    if not (options.format and options.checkpoint and options.out):
        raise UserError(
            f"what, and where to? --format={'|'.join(KNOWN)} --checkpoint=FILE --out=FOLDER"
        )
    if options.format not in KNOWN:
        raise UserError(f"--format={options.format}: there are {', '.join(KNOWN)}")
    files.check_local(
        checkpoint=options.checkpoint, out=options.out, autoencoder=options.autoencoder
    )
    for name, least, most in (("image_size", 1, LARGEST), ("num_heads", 1, 1024)):
        value = getattr(options, name)
        if value and not least <= value <= most:
            raise UserError(f"--{name}={value}: from {least} to {most}")
    if not 0 <= options.guidance <= 1000:
        raise UserError(f"--guidance={options.guidance}: from 0 to 1000, 1 for none, 0 if unknown")
    files.check_empty(options.out, f"--out={options.out}")


def mismatch(options: Import, given: convert.Tensors, error: ValueError) -> str:
    """What is wrong with a file, and whose it seems to be."""
    told = f"{options.checkpoint} is no {options.format} network: {error}"
    likely = convert.likely(given)
    if not likely or options.format in likely:  # then its names are not what is wrong
        return told
    return f"{told}; its names are those of --format={' or '.join(likely)}"


def described(style: Format, s: Sizes, options: Import) -> ConfigDict:
    """The config of the network: a size of the table where it is one, else each number.

    Raises:
      UserError: sizes that no network of ours has, or a picture's size against the tensors.
    """
    config = base.get_config()
    latent = s.channels == LATENT_CHANNELS
    pixels = _pixels(s, options)
    config.image_size = pixels
    config.use_stable_vae = int(latent)
    config.autoencoder = (options.autoencoder or style.autoencoder) if latent else ""
    known = latent and s.num_classes == IMAGENET
    config.dataset_name = f"imagenet{pixels}" if known else "folder"
    config.objective = style.objective
    config.model.update(
        {
            "time_inputs": style.time_inputs,
            "time_scale": style.time_scale,
            "prediction": style.prediction,
            "mlp_ratio": s.mlp_size / s.hidden_size,
        }
    )
    wanted = {
        "depth": s.depth,
        "hidden_size": s.hidden_size,
        "patch_size": s.patch_size,
        "num_heads": _heads(s, options),
    }
    size = next((name for name, values in SIZES.items() if values == wanted), "")
    config.model.update({"size": size} if size else wanted)
    build.check_ranges(config)
    return config


def make_card(
    style: Format, s: Sizes, config: ConfigDict, options: Import, checkpoint: read.Checkpoint
) -> dict[str, Any]:
    """What the folder says of itself; of the training it knows nothing."""
    side = config.image_size // (LATENT_SCALE if config.use_stable_vae else 1)
    return {
        "dataset": "",
        "autoencoder": "",
        "pictures": None,
        "shape": [side, side, s.channels],
        "num_classes": s.num_classes,
        **({"class_names": list(classes.imagenet())} if s.num_classes == IMAGENET else {}),
        "train_steps": 0,
        "train_images": 0,
        "train_flops": 0,
        "trained_guidance": options.guidance or _guidance(checkpoint),
        "origin": style.origin,
        "licence": options.licence or style.licence,
        "ema": checkpoint.tree,
    }


def _guidance(checkpoint: read.Checkpoint) -> float:
    """The scale that MeanFlow was trained with, as zhuyu-cs/MeanFlow's options say it; 1: none."""
    omega, kappa = (
        checkpoint.config.get(name, default)
        for name, default in (("cfg_omega", 1), ("cfg_kappa", 0))
    )
    numbers = isinstance(omega, int | float) and isinstance(kappa, int | float) and 0 <= kappa < 1
    numbers = numbers and abs(omega) < 1e6  # NaN is not
    return effective_scale(omega, kappa) if numbers else 1.0


def _pixels(s: Sizes, options: Import) -> int:
    """Pixels along a side of a picture, by the positions or by --image_size."""
    scale = LATENT_SCALE if s.channels == LATENT_CHANNELS else 1
    told = s.grid * s.patch_size * scale if s.grid else 0
    if told and options.image_size not in (0, told):
        raise UserError(
            f"--image_size={options.image_size}: the table of positions is for {told}; leave it out"
        )
    pixels = told or options.image_size or IMAGE_SIZE
    if pixels % (s.patch_size * scale):
        raise UserError(
            f"--image_size={pixels}: give a multiple of {s.patch_size * scale}, patch and scale"
        )
    return pixels


def _heads(s: Sizes, options: Import) -> int:
    """The number of heads, which most tensors do not show.

    Raises:
      UserError: a width that is none of DiT's, or a number that does not divide it.
    """
    if s.num_heads and options.num_heads not in (0, s.num_heads):
        raise UserError(f"--num_heads={options.num_heads}: its tensors have {s.num_heads}")
    heads = s.num_heads or options.num_heads or HEADS.get(s.hidden_size, 0)
    if not heads:
        raise UserError(
            f"networks of width {s.hidden_size} are none of DiT's: give --num_heads=NUMBER"
        )
    if s.hidden_size % heads:
        raise UserError(f"--num_heads={heads} does not divide the width, {s.hidden_size}")
    return heads
