"""A trained network as a pipeline of diffusers, and back; neither torch nor diffusers is needed.

The folder is what `diffusers.DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)` opens:

  model_index.json    what the parts are, objective, names of the classes
  flow_pipeline.py    the pipeline
  transformer/        config.json, flow_transformer.py, diffusion_pytorch_model.safetensors
  vae/                the autoencoder of a network on latents
  training/           config.json and card.json of the run, from which the folder can be read back
  README.md           the model card

Tensors have DiT's names and PyTorch's layout: (out, in), a patch's convolution (out, in, h, w), and
a tensor for each block where `models.dit` stacks them.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from configs import base
from models.autoencoder_kl import AutoencoderKL
from models.autoencoder_tiny import AutoencoderTiny
from models.layers import GUIDANCE, TIME_INPUTS, token_count, told_times
from pipelines import build, model_card, runs
from pipelines.flow import FlowPipeline
from pipelines.pretrained import CONFIG, KL_SCALING, SAFETENSORS, Pretrained, load_autoencoder
from pipelines.stored import NO_EMA, check_described, read_config, read_json, write_json
from utils import files
from utils.cli import UserError

CODE = pathlib.Path(__file__).parent / "diffusers"  # files that go out as they are
PIPELINE, TRANSFORMER = "flow_pipeline", "flow_transformer"  # those, without .py
INDEX, TRAINING, VAE = "model_index.json", "training", "vae"
VERSION = "0.42.0"  # of diffusers, whose layout this is
FREQUENCIES = 256  # that `models.layers.sinusoids` embeds a time as

# Names in `models.dit` and in the file; `{}` is a block's number. All are of a kernel and a bias.
LAYERS = {
    **{
        f"condition.{name}.{layer}": f"{name}_embedder.mlp.{number}"
        for name in GUIDANCE
        for layer, number in (("in", 0), ("out", 2))
    },
    "condition.time_t.in": "t_embedder.mlp.0",
    "condition.time_t.out": "t_embedder.mlp.2",
    "condition.time_r.in": "r_embedder.mlp.0",
    "condition.time_r.out": "r_embedder.mlp.2",
    "condition.time_t-r.in": "d_embedder.mlp.0",
    "condition.time_t-r.out": "d_embedder.mlp.2",
    "patch": "x_embedder.proj",
    "blocks.attention.qkv": "blocks.{}.attn.qkv",
    "blocks.attention.out": "blocks.{}.attn.proj",
    "blocks.mlp.in": "blocks.{}.mlp.fc1",
    "blocks.mlp.out": "blocks.{}.mlp.fc2",
    "blocks.modulation": "blocks.{}.adaLN_modulation.1",
    "head.modulation": "final_layer.adaLN_modulation.1",
    "head.out": "final_layer.linear",
}
KEYS = {  # of a config's `model`, and of the transformer's config.json
    **{key: key for key in ("hidden_size", "patch_size", "mlp_ratio", "time_inputs")},
    **{"depth": "num_layers", "num_heads": "num_attention_heads"},
    **{key: key for key in ("time_scale", "prediction")},
}
YOUNGER = ("positions", "mlp", "norm", "qk_norm", "conditioning", "guidance_inputs")
KEYS |= {key: key for key in YOUNGER}  # that files written before November 2026 lack
NAMES = ("label", *GUIDANCE, *(f"time_{name}" for name in TIME_INPUTS))
ARRAYS = {  # those that lie as they are, without a kernel and a bias
    "condition.label.embedding": "y_embedder.embedding_table.weight",
    **{f"condition.{name}_tokens": f"tokens.{name}" for name in NAMES},
    **{f"blocks.attention.{x}_norm": f"blocks.{{}}.attn.{x}_norm.weight" for x in "qk"},
    **{
        "blocks.attention_norm": "blocks.{}.norm1.weight",
        "blocks.mlp_norm": "blocks.{}.norm2.weight",
    },
    **{"blocks.attention_gate": "blocks.{}.attn_gate", "blocks.mlp_gate": "blocks.{}.mlp_gate"},
    "head.norm": "final_layer.norm.weight",
}

Tensors = dict[str, np.ndarray]


class Options(NamedTuple):
    """What goes out, and where to: the flags of export_diffusers.py and scripts/export.py.

    Attributes:
      workdir: The run's folder or gs://BUCKET/FOLDER, or that of an exported model.
      out: The folder to write: a new one, or an empty one.
      checkpoint: The step that goes out: latest, best or a number.
      ema: Averaged parameters: a decay as 0.999, power_0.05, posthoc_0.1 (made of snapshots: any
        width) or none, the parameters themselves; by default the run's own.
      dtype: Of the weights in the file; float16 halves it.
      autoencoder: Of a run on latents: its folder, if not where the run found it.
      licence: What others may do with the weights, such as mit or cc-by-nc-4.0, for the model card.
      results: results.json of eval_fid.py, whose numbers of this run the model card is to show.
    """

    workdir: str = ""
    out: str = ""
    checkpoint: str = "latest"
    ema: str = ""
    dtype: Literal["float32", "float16"] = "float32"
    autoencoder: str = ""
    licence: str = ""
    results: str = ""


def load(options: Options) -> FlowPipeline:
    """The network that goes out; its card says the licence and what was measured.

    Raises:
      UserError: options that are missing, or that name what is not there; `out` holds files.
    """
    if not options.workdir or not options.out:
        raise UserError("which run, and where to? --workdir=runs/... --out=FOLDER")
    files.check_local(out=options.out, autoencoder=options.autoencoder, results=options.results)
    files.check_empty(options.out)
    ((_, run),) = runs.load_runs([options.workdir], options.autoencoder).items()
    if options.checkpoint == runs.ALL:
        raise UserError("--checkpoint=all: one goes out; give latest, best or its step")
    (step,) = run.checkpoints([options.checkpoint])
    ema = run.average(options.ema)
    pipeline = run.load(step, ema)
    card = {**pipeline.card}
    model_card.check(card)
    if not card.get("origin"):  # of imported weights nothing of the kind is known
        card.setdefault("ema", ema)
    card["licence"] = options.licence or card.get("licence") or ""
    measured = card.get("measured") or []
    if not measured and ema != NO_EMA:  # which is measured on averages
        measured = model_card.measured_in_training(run.path, step)
    if options.results:
        config = pipeline.config
        by = model_card.measured_by(options.results, options.workdir, config, card)
        measured = [row for row in measured if row not in by] + by
    if measured:
        card["measured"] = measured
    return dataclasses.replace(pipeline, card=card)


# Out


def write(options: Options) -> None:
    """Writes the folder of `FlowPipeline.save_pretrained`, with its model card.

    Raises:
      UserError: as `load`.
    """
    pipeline = load(options)
    readme = model_card.text(pipeline.config, pipeline.card, name=options.out)
    pipeline.save_pretrained(options.out, options.dtype, readme)


def write_diffusers(
    pipeline: FlowPipeline, folder: str | os.PathLike, dtype: str = "float32"
) -> list[str]:
    """Writes a pipeline of diffusers; returns warnings, a line each.

    Raises:
      UserError: the folder holds files, or the network is none that diffusers can be given.
    """
    files.check_empty(folder)
    out = files.place(folder)
    config, card, warnings = pipeline.config, dict(pipeline.card), []
    transformer = torch_config(config, card)
    autoencoder = _autoencoder(config, card)
    known = autoencoder is None or _diffusers_knows(autoencoder)
    if not known:
        card["without_decoder"] = True
        warnings.append(
            "diffusers has no class for this autoencoder (pooled blocks, TAEF2): the pipeline goes "
            "out without it and gives output_type='latent' alone"
        )
    name = os.fspath(folder)
    readme = model_card.text(config, card, library="diffusers", name=name)
    params = without_second_head(jax.device_get(pipeline.params))
    tensors = to_torch_names(params, transformer)
    _write_part(out / "transformer", transformer, tensors, dtype)
    if autoencoder is not None and known:
        _write_autoencoder(out / VAE, autoencoder)
    _copy_code(out)
    written = {**config.to_dict(), "autoencoder": ""}
    written["model"] = {**written["model"], "velocity_head": 0}  # which training alone needs
    write_json(out / TRAINING / CONFIG, written)
    write_json(out / TRAINING / "card.json", card)
    files.write(out / "README.md", readme)
    vae = None if autoencoder is None or not known else type(_decoder(autoencoder)).__name__
    # Last: with it the folder is whole.
    write_json(out / INDEX, index(config, card, vae))
    return warnings


def torch_config(config: ConfigDict, card: dict[str, Any]) -> dict[str, Any]:
    """transformer/config.json: the arguments of `FlowTransformer2DModel`.

    Raises:
      UserError: a network that it is not.
    """
    m, shape = config.model, tuple(card["shape"])
    if m.name != "dit" or len(shape) != 3:
        what = "points" if len(shape) != 3 else f"model.name={m.name}"
        raise UserError(
            f"only a DiT on pictures or latents goes to diffusers, and this network is of {what}: "
            "scripts/export.py writes it for JAX"
        )
    if not set(build.told(m)) <= set(TIME_INPUTS):
        raise UserError(f"model.time_inputs={m.time_inputs!r}: a choice of t,r,t-r")
    values = {**m.to_dict(), **build.dit_sizes(m, shape), "time_inputs": ",".join(build.told(m))}
    return {
        "_class_name": "FlowTransformer2DModel",
        "_diffusers_version": VERSION,
        "sample_size": list(shape[:2]),
        "in_channels": shape[2],
        "num_classes": card["num_classes"],
        **{other: values[name] for name, other in KEYS.items()},
    }


def index(config: ConfigDict, card: dict[str, Any], vae: str | None) -> dict[str, Any]:
    """model_index.json.

    Args:
      vae: diffusers' class of the autoencoder; None: there is none.
    """
    names = card.get("class_names") or ()
    return {
        "_class_name": [PIPELINE, "FlowPipeline"],
        "_diffusers_version": VERSION,
        "objective": config.objective,
        "latents": bool(config.use_stable_vae),
        # A list would be taken for a part of the pipeline.
        "id2label": {str(number): name for number, name in enumerate(names)} or None,
        "transformer": [TRANSFORMER, "FlowTransformer2DModel"],
        "vae": ["diffusers", vae] if vae else [None, None],
    }


def without_second_head(params: Any) -> Any:
    """What computes u: the blocks that u has of its own come after the shared ones."""
    if "blocks_v" not in params:
        return params
    kept = {k: v for k, v in params.items() if k not in ("blocks_u", "blocks_v", "head_v")}
    parts = [params[name] for name in ("blocks", "blocks_u") if name in params]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return {**kept, "blocks": joined}


def to_torch_names(params: Any, transformer: Mapping[str, Any]) -> Tensors:
    """Parameters of `models.dit.DiT` → tensors by their names in the file, types as they are.

    Args:
      transformer: its config.json.
    """
    tensors: Tensors = {}
    for name, array in flatten_dict(params, sep=".").items():
        array = np.asarray(array)
        layer, _, leaf = name.rpartition(".")
        new = ARRAYS.get(name) or f"{LAYERS[layer]}.{'weight' if leaf == 'kernel' else 'bias'}"
        array = np.swapaxes(array, -1, -2) if leaf == "kernel" else array
        if name == "patch.kernel":  # p, q and c of `models.dit.patches`
            side, channels = transformer["patch_size"], transformer["in_channels"]
            array = array.reshape(-1, side, side, channels).transpose(0, 3, 1, 2)
        if name.startswith("blocks."):
            tensors |= {new.format(i): part for i, part in enumerate(array)}
        else:
            tensors[new] = array
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def from_torch_names(tensors: Mapping[str, np.ndarray], transformer: Mapping[str, Any]) -> Any:
    """The inverse of `to_torch_names`: the nested tree of parameters, types as they are.

    Raises:
      UserError: a tensor is missing, left over or of another shape; it names the first.
    """
    _check_tensors(tensors, transformer)
    flat, depth = {}, transformer["num_layers"]
    for name, new in ARRAYS.items():
        if new.format(0) in tensors:
            parts = [tensors[new.format(i)] for i in range(depth)] if "{}" in new else ()
            flat[name] = np.stack(parts) if parts else tensors[new]
    for layer, new in LAYERS.items():
        for leaf, kind in (("kernel", "weight"), ("bias", "bias")):
            name = f"{new}.{kind}"
            if name.format(0) not in tensors:  # of what this network is not told, or has not
                continue
            blocks = layer.startswith("blocks.")
            parts = [tensors[name.format(i)] for i in range(depth if blocks else 1)]
            if layer == "patch" and leaf == "kernel":
                parts = [part.transpose(0, 2, 3, 1).reshape(len(part), -1) for part in parts]
            parts = [part.T if leaf == "kernel" else part for part in parts]
            flat[f"{layer}.{leaf}"] = np.stack(parts) if blocks else parts[0].copy()
    return unflatten_dict(flat, sep=".")


def _check_tensors(tensors: Mapping[str, np.ndarray], transformer: Mapping[str, Any]) -> None:
    """Raises UserError where a tensor is missing, left over or of another shape."""
    shapes = torch_shapes(transformer)
    for problem, names in (
        ("lacks", sorted(shapes.keys() - tensors.keys())),
        ("has left over", sorted(tensors.keys() - shapes.keys())),
    ):
        if names:
            raise UserError(
                f"the file {problem} {len(names)} of the {len(shapes)} tensors that its "
                f"config.json describes, first {names[0]}"
            )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{name} has the shape {tensors[name].shape}, and its config.json means {shape}"
            )


def torch_shapes(transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of `FlowTransformer2DModel`: names and shapes, from its config.json."""
    c = transformer
    d, channels, side = c["hidden_size"], c["in_channels"], c["patch_size"]
    hidden, pixels = round(c["mlp_ratio"] * d), side**2 * channels
    between = hidden * (2 if c["mlp"] == "swiglu" else 1)
    of = {"t": "t", "r": "r", "t-r": "d"}
    names = [of[name] for name in told_times(c["time_inputs"])]
    layers: dict[str, tuple[int, ...]] = {"x_embedder.proj": (d, channels, side, side)}
    for name in names + list(GUIDANCE) * c["guidance_inputs"]:
        layers |= {f"{name}_embedder.mlp.0": (d, FREQUENCIES), f"{name}_embedder.mlp.2": (d, d)}
    adaln = c["conditioning"] == "adaln"
    for i in range(c["num_layers"]):
        layers |= {f"blocks.{i}.attn.qkv": (3 * d, d), f"blocks.{i}.attn.proj": (d, d)}
        layers |= {f"blocks.{i}.mlp.fc1": (between, d), f"blocks.{i}.mlp.fc2": (d, hidden)}
        layers |= {f"blocks.{i}.adaLN_modulation.1": (6 * d, d)} if adaln else {}
    layers |= {"final_layer.adaLN_modulation.1": (2 * d, d)} if adaln else {}
    layers |= {"final_layer.linear": (pixels, d)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return shapes | _array_shapes(c)


def _array_shapes(c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Those of them that are no layer's kernel or bias."""
    d, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {}
    if c["num_classes"]:
        shapes[ARRAYS["condition.label.embedding"]] = (c["num_classes"] + 1, d)
    of_block = {f"blocks.attention.{x}_norm": (head,) for x in "qk" if c["qk_norm"]}
    if c["conditioning"] == "tokens":
        told = [f"time_{name}" for name in told_times(c["time_inputs"])]
        told += ["label"] * bool(c["num_classes"]) + list(GUIDANCE) * c["guidance_inputs"]
        shapes |= {f"tokens.{name}": (token_count(name), d) for name in told}
        shapes[ARRAYS["head.norm"]] = (d,)
        of_block |= {
            f"blocks.{x}_{y}": (d,) for x in ("attention", "mlp") for y in ("norm", "gate")
        }
    for i in range(c["num_layers"]):
        shapes |= {ARRAYS[name].format(i): shape for name, shape in of_block.items()}
    return shapes


def _write_part(folder: epath.Path, config: dict[str, Any], tensors: Tensors, dtype: str) -> None:
    """A model's folder: its config, and its weights as `dtype`."""
    cast = {name: np.ascontiguousarray(array, dtype) for name, array in tensors.items()}
    write_json(folder / CONFIG, config)
    # diffusers asks for the format before it reads a file.
    files.write(folder / SAFETENSORS, safetensors.numpy.save(cast, {"format": "pt"}))


def _copy_code(out: epath.Path) -> None:
    for name, folder in ((PIPELINE, out), (TRANSFORMER, out / "transformer")):
        files.write(folder / f"{name}.py", (CODE / f"{name}.py").read_text(encoding="utf-8"))


# The autoencoder


def _autoencoder(config: ConfigDict, card: dict[str, Any]) -> Pretrained | None:
    """That of a network on latents.

    Raises:
      UserError: it is not there, or another one than made the latents.
    """
    if not config.use_stable_vae:
        return None
    place = build.autoencoder_place(config)
    loaded = load_autoencoder(place)
    made_by = card.get("autoencoder") or loaded.fingerprint
    if made_by != loaded.fingerprint:
        raise UserError(
            f"the latents were made by another autoencoder (fingerprint {made_by}) than {place} "
            f"({loaded.fingerprint}): give --autoencoder=FOLDER of that one"
        )
    return loaded


def _decoder(loaded: Pretrained) -> AutoencoderKL | AutoencoderTiny:
    """Its network, of this project."""
    return loaded.autoencoder.decode.func.network  # type: ignore[attr-defined]


def _diffusers_knows(loaded: Pretrained) -> bool:
    network = _decoder(loaded)
    return not (
        isinstance(network, AutoencoderTiny) and (network.encoder_pools or network.decoder_pools)
    )


def _write_autoencoder(folder: epath.Path, loaded: Pretrained) -> None:
    """In diffusers' form, whatever form it was read from; float32."""
    network, functions = _decoder(loaded), loaded.autoencoder
    config = {}
    if (loaded.folder / CONFIG).is_file():
        config = read_json(loaded.folder / CONFIG)
    fields = [field.name for field in dataclasses.fields(network)]
    ours = ("dtype", "encoder_pools", "decoder_pools", "parent", "name")
    config |= {name: getattr(network, name) for name in fields if name not in ours}
    config |= {"_class_name": type(network).__name__, "_diffusers_version": VERSION}
    if isinstance(network, AutoencoderKL):
        blocks = len(network.block_out_channels)
        config["down_block_types"] = ["DownEncoderBlock2D"] * blocks
        config["up_block_types"] = ["UpDecoderBlock2D"] * blocks
    if config.get("scaling_factor") is None:
        config["scaling_factor"] = KL_SCALING if isinstance(network, AutoencoderKL) else 1.0
    params = {**functions.moments.args[0], **functions.decode.args[0]}  # type: ignore[attr-defined]
    flat = flatten_dict(jax.device_get(params), sep="/")
    tensors = dict(_torch_tensor(name, np.asarray(array)) for name, array in flat.items())
    _write_part(folder, config, tensors, "float32")


def _torch_tensor(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor of `models.autoencoder_kl` or `_tiny`, as PyTorch names it and lays it out."""
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    name = re.sub(r"/(kernel|scale)$", "/weight", name)
    name = re.sub(r"_(\d+)(?=/)", r".\1", name).replace("/", ".")
    return name, array if order is None else array.transpose(order)


# And back


def read_diffusers(folder: str | os.PathLike) -> tuple[ConfigDict, dict[str, Any], Any]:
    """What `write_diffusers` wrote, or `FlowPipeline.save_pretrained` of the pipeline in PyTorch.

    Returns config and card as `pipelines.flow.FlowPipeline.build` takes them, and parameters: a
    nested tree of float32 arrays. The config names the autoencoder in the folder, if it has one.

    Raises:
      UserError: no such folder, another kind of pipeline, or tensors that are missing, left over or
        of other shapes.
    """
    path = files.place(folder)
    described, part = read_json(path / INDEX), path / "transformer"
    if described.get("_class_name") != [PIPELINE, "FlowPipeline"]:
        raise UserError(
            f"{path} holds a {described.get('_class_name')}, no pipeline that export_diffusers.py "
            "wrote: only those can be read back"
        )
    younger = {key: base.get_config().model[key] for key in YOUNGER}
    config, card = _described(path, described, younger | read_json(part / CONFIG))
    try:
        tensors = safetensors.numpy.load_file(part / SAFETENSORS)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{part / SAFETENSORS} cannot be read ({error}): copy it again") from error
    try:
        params = from_torch_names(tensors, torch_config(config, card))
    except UserError as error:
        raise UserError(f"{part}: {error}") from error
    if (path / VAE / CONFIG).exists():
        config.autoencoder = os.fspath(path / VAE)
    return config, card, jax.tree.map(lambda a: np.asarray(a, np.float32), params)


def _described(
    path: epath.Path, described: dict[str, Any], transformer: dict[str, Any]
) -> tuple[ConfigDict, dict[str, Any]]:
    """Config and card: those of the run, or what the pipeline's own files say."""
    if (path / TRAINING / CONFIG).exists():
        config = read_config(path / TRAINING / CONFIG)
        card = read_json(path / TRAINING / "card.json")
        card.pop("without_decoder", None)
    else:
        config, card = _derived(path, described, transformer)
    if not {"shape", "num_classes"} <= card.keys() or not config.objective:
        raise UserError(f"{path / TRAINING} lacks keys: export it again")
    check_described(path, config, card)
    for key, value in torch_config(config, card).items():
        if not key.startswith("_") and transformer.get(key) != value:
            raise UserError(
                f"{path / 'transformer' / CONFIG}: {key}={transformer.get(key)}, but the network "
                f"that was exported has {value}: export it again, or remove {path / TRAINING}"
            )
    return config, card


def _derived(
    path: epath.Path, described: dict[str, Any], transformer: dict[str, Any]
) -> tuple[ConfigDict, dict[str, Any]]:
    """The same from what PyTorch's `save_pretrained` writes, which knows nothing of training."""
    config, c = base.get_config(), transformer
    try:
        config.objective, config.use_stable_vae = described["objective"], int(described["latents"])
        config.model.update({name: c[other] for name, other in KEYS.items()})
        card = {
            "shape": [*c["sample_size"], c["in_channels"]],
            "num_classes": c["num_classes"],
            "origin": f"{path.name}, a pipeline of diffusers",
        }
        if names := described.get("id2label"):
            card["class_names"] = [names[str(i)] for i in range(len(names))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} describes no network of this project ({error})") from error
    return config, card
