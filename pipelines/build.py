"""From a config to the objects it names. Sizes are resolved here; keys given win over the table."""

import functools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from flows import times
from flows.guidance import effective_scale
from flows.objectives import flow_matching, mean_flow
from models import autoencoder as autoencoders
from models.attention import FORWARD, REVERSE, forward_attention, reverse_attention
from models.dit import REMAT, SIZES, DiT
from models.layers import TIME_INPUTS
from models.mlp import MLP
from models.prediction import PREDICTIONS, velocity_from_noise
from pipelines.plan import FEATURES, FEWEST, MOST_STEPS
from pipelines.pretrained import Pretrained, load_autoencoder
from utils.cli import SIZE_KEYS, UserError, absolute, flatten
from utils.sources import LARGEST
from utils.toys import TOYS

AUTOENCODER = "autoencoder"  # the folder of the copy that goes with latents, and with a model
MANY = 2**31 - 1
MOST_PATCHES = 2**18  # of a picture: 512 pixels each way, one by one
MOST_PARAMETERS = 10**11  # with their average and Adam's moments 2 TB
SEVERAL = 1_000_000
RANGES: dict[str, tuple[float, float]] = {  # the least and the most a key may be
    "seed": (0, MANY),
    **dict.fromkeys(("batch_size", "accumulation"), (1, 2**24)),
    **dict.fromkeys(("max_steps", "keep_checkpoints"), (1, MANY)),
    **dict.fromkeys(("log_interval", "eval_interval", "save_interval"), (1, MANY)),
    "save_patience": (0, 1e6),
    "keep_best": (0, MANY),
    "skip_limit": (1, MANY),
    "stall": (0.01, 1e6),
    "image_size": (0, LARGEST),
    **dict.fromkeys((f"model.{key}" for key in SIZE_KEYS), (1, SEVERAL)),
    "model.depth": (1, 1000),
    "autoencoder_slice": (0, SEVERAL),
    "model.mlp_ratio": (0.01, 100),
    "model.dropout": (0, 0.99),
    "model.class_dropout_prob": (0, 1),
    "model.unroll": (1, 1000),
    "model.time_scale": (1e-3, 1e6),
    **dict.fromkeys(("flow_matching.time_mean", "mean_flow.time_mean"), (-100, 100)),
    **dict.fromkeys(("flow_matching.time_std", "mean_flow.time_std"), (0, 100)),
    "mean_flow.interval_share": (0, 1),
    "mean_flow.p": (0, 10),
    "mean_flow.c": (1e-12, 1e6),
    "mean_flow.omega": (0, 100),
    "mean_flow.kappa": (0, 0.999),
    "optimizer.lr": (1e-12, 100),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.weight_decay": (0, 100),
    "optimizer.warmup_steps": (0, MANY),
    "optimizer.clip_norm": (0, 1e9),
    "ema.decay": (0, 0.9999999),
    "ema.start_step": (0, MANY),
    **dict.fromkeys(("mesh.data", "mesh.fsdp"), (-1, SEVERAL)),
    "sample.num": (1, 10_000),
    "sample.guidance": (-1000, 1000),
    "fid.num": (0, 10_000_000),
}
CHOICES: dict[str, tuple] = {  # what else a key may be
    "use_stable_vae": (0, 1),
    "model.attention": ("auto", *REVERSE),
    "model.attention_jvp": ("auto", *FORWARD),
    "model.remat": ("none", *REMAT),
    "model.prediction": PREDICTIONS,
    "mean_flow.derivative": ("apart", "plain"),
    "autoencoder_dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("constant", "cosine"),
    "fid.features": FEATURES,
    "wandb.mode": ("disabled", "offline", "online"),
}


def check_ranges(config: ConfigDict) -> None:
    """Raises UserError, naming the range, where a number of the config lies outside its own."""
    values = flatten(config)
    for key, (low, high) in RANGES.items():
        value = values[key]
        if value is None:  # a size that the table gives
            continue
        if not (isinstance(value, int | float) and low <= value <= high):  # NaN fails too
            raise UserError(f"{key}={value}: give --{key} from {low} to {high}")
    for key, words in CHOICES.items():
        if values[key] not in words:
            *first, last = map(str, words)
            raise UserError(f"{key}={values[key]!r}: give --{key}={', '.join(first)} or {last}")
    o = config.optimizer
    if o.schedule == "cosine" and o.warmup_steps >= config.max_steps:
        raise UserError(
            f"optimizer.warmup_steps={o.warmup_steps} must be below max_steps={config.max_steps}: "
            f"give --optimizer.warmup_steps={config.max_steps // 10}"
        )
    _check_lists(values)
    _check_network(config)
    _check_evaluation(config)


def _check_lists(values: dict[str, Any]) -> None:
    """Raises UserError where a list holds something else than it should."""
    for key in ("sample.steps", "fid.steps"):
        steps = values[key]
        whole = isinstance(steps, tuple) and all(type(step) is int for step in steps)
        if not (whole and steps and 1 <= min(steps) <= max(steps) <= MOST_STEPS):
            raise UserError(f"{key}={steps}: give --{key}=1,32 or the like, up to {MOST_STEPS}")
    interval = values["mean_flow.guidance_interval"]
    numbers = isinstance(interval, tuple) and all(type(t) in (int, float) for t in interval)
    if not (numbers and len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise UserError(
            f"mean_flow.guidance_interval={interval}: two times from 0 to 1, the lower first: "
            "give --mean_flow.guidance_interval=0,1"
        )


def _check_network(config: ConfigDict) -> None:
    """Raises UserError where a network is larger than any machine, before it is looked at."""
    m = config.model
    table = SIZES.get(m.size, {})
    depth, width = (
        table.get(key, 1) if m[key] is None else m[key] for key in ("depth", "hidden_size")
    )
    # Of a block: attention 4 d², the MLP 2 · ratio · d², the modulation 6 d².
    count = int(depth * width**2 * (10 + 2 * m.mlp_ratio))
    if count > MOST_PARAMETERS:
        raise UserError(
            f"model.depth={depth} and model.hidden_size={width} make a network of {count:.1e} "
            f"parameters, more than {MOST_PARAMETERS:.0e}: give a smaller --model.hidden_size"
        )
    if not config.use_stable_vae:
        check_patches(config, config.image_size)


def check_patches(config: ConfigDict, side: int) -> None:
    """Raises UserError where what is `side` long each way makes more patches than attention can."""
    m = config.model
    patch = SIZES.get(m.size, {}).get("patch_size", 1) if m.patch_size is None else m.patch_size
    if (side // patch) ** 2 > MOST_PATCHES:
        raise UserError(
            f"{side} with model.patch_size={patch} makes {(side // patch) ** 2} patches, more than "
            f"{MOST_PATCHES}: give a smaller --image_size or a larger --model.patch_size"
        )


def _check_evaluation(config: ConfigDict) -> None:
    """Raises UserError where a run could not draw or measure its own samples."""
    if 0 < config.fid.num < FEWEST:
        raise UserError(f"fid.num={config.fid.num}: give --fid.num=2000, or 0 for none")
    points = config.dataset_name in TOYS
    if points and config.fid.num:
        raise UserError(
            f"{config.dataset_name} has points, no pictures' features: leave --fid.num=0"
        )
    if points and config.sample.guidance != 1:
        raise UserError(
            f"{config.dataset_name} has no labels to guide by: leave --sample.guidance=1"
        )


class Network(NamedTuple):
    """A velocity network as pure functions.

    init: key → parameters. apply: (parameters, z, r, t, label, dropout_keys) → u. The others
    are the same u by other kernels of attention: forward, for what is differentiated in forward
    mode alone, and plain, for what is differentiated in both.
    """

    init: Callable[[Array], Any]
    apply: Callable
    forward: Callable
    plain: Callable
    null_label: int


def network(
    config: ConfigDict, shape: tuple[int, ...], num_classes: int, platform: str = ""
) -> Network:
    """The network `config.model` names, for samples of `shape` and labels below `num_classes`.

    Args:
      platform: where it is to run, as `this_platform` says it; empty: here.
    Raises:
      UserError: sizes that are missing, unknown or do not fit.
    """
    z, t = jnp.zeros((1, *shape)), jnp.zeros(1)
    module = _module(config.model, shape, num_classes)
    kinds = _by_attention(module, config.model, shape, platform or this_platform())
    apply, forward, plain = (_applied(kind, config.model.prediction) for kind in kinds)
    return Network(
        init=lambda key: module.init(key, z, t, t, jnp.zeros(1, jnp.int32))["params"],
        apply=apply,
        forward=forward,
        plain=plain,
        null_label=num_classes,
    )


def this_platform() -> str:
    """cpu, tpu, gpu, or other_gpu, which cuDNN's attention is not for: AMD's, and before Ampere."""
    platform, device = jax.default_backend(), jax.local_devices()[0]
    if platform != "gpu":
        return platform
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; of AMD's, "gfx942"
    major = capability.partition(".")[0]
    return "gpu" if major.isdecimal() and int(major) >= 8 else "other_gpu"


def _applied(module: nn.Module, prediction: str) -> Callable:
    """(parameters, z, r, t, label, dropout_keys) → u, whatever the module predicts."""

    def apply(params: Any, *inputs: Any) -> Any:
        return module.apply({"params": params}, *inputs)

    def from_noise(params: Any, z: Array, r: Array, t: Array, *rest: Any) -> Any:
        return velocity_from_noise(lambda y, step: apply(params, y, step, step, *rest), z, t)

    return from_noise if prediction == "noise" else apply


def _by_attention(
    module: nn.Module, model: ConfigDict, shape: tuple[int, ...], platform: str
) -> list[nn.Module]:
    """The network with the attention for gradients, for forward mode alone, and for both.

    Raises:
      UserError: an attention that this machine, type or size cannot have.
    """
    if not isinstance(module, DiT):
        return [module] * 3
    names = attention_names(model, dit_sizes(model, shape), shape, platform)
    return [module.clone(attention=name) for name in (*names, "xla")]


def attention_names(
    model: ConfigDict, sizes: dict[str, int], shape: tuple[int, ...], platform: str
) -> tuple[str, str]:
    """What computes attention in reverse mode, and in forward mode, "auto" resolved.

    Args:
      sizes: of the network, as `dit_sizes` gives them; shape: of what it sees.
    Raises:
      UserError: an attention that this machine, type or size cannot have.
    """
    tokens = shape[0] * shape[1] // sizes["patch_size"] ** 2
    case = platform, model.dtype, tokens, sizes["hidden_size"] // sizes["num_heads"]
    try:
        reverse = reverse_attention(model.attention, *case)
        return reverse, forward_attention(model.attention_jvp, *case)
    except ValueError as error:
        raise UserError(str(error)) from error


def _module(model: ConfigDict, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    if not set(told(model)) <= set(TIME_INPUTS) or len(set(told(model))) < len(told(model)):
        raise UserError(f"model.time_inputs={model.time_inputs!r}: a choice of t,r,t-r")
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "mlp_ratio": model.mlp_ratio,
        "dropout": model.dropout,
        "time_inputs": model.time_inputs,
    }
    if model.name == "dit":
        common |= dit_sizes(model, shape)
        common |= {"remat": model.remat, "unroll": model.unroll, "time_scale": model.time_scale}
        return DiT(**common, dtype=_dtype(model.dtype))
    if model.name == "mlp" and len(shape) > 1:
        raise UserError("model.name=mlp is for points: --model.name=dit for pictures")
    if model.name == "mlp" and (model.time_scale != 1 or model.prediction != "velocity"):
        raise UserError("model.time_scale and model.prediction are for model.name=dit")
    if model.name == "mlp":
        common |= _given(model, ("depth", "hidden_size"))
        return MLP(**common)
    raise UserError(f"model.name={model.name!r}: dit or mlp")


def told(model: ConfigDict) -> list[str]:
    """The times a network is told, of t, r and t-r."""
    return [name.strip() for name in model.time_inputs.split(",")]


def dit_sizes(model: ConfigDict, shape: tuple[int, ...]) -> dict[str, int]:
    """Depth, width, heads and patch of a DiT: the table's at `model.size`, then the keys given."""
    if model.size and model.size not in SIZES:
        raise UserError(f"model.size={model.size!r}: one of {', '.join(SIZES)}")
    table = SIZES.get(model.size, {})
    given = {key: model[key] for key in SIZE_KEYS if model[key] is not None}
    sizes = table | given
    missing = [key for key in SIZE_KEYS if key not in sizes]
    if missing:
        raise UserError(
            f"the network's {', '.join(missing)} are not set: --model.size=B/2, or each"
        )
    if len(shape) != 3:
        raise UserError("model.name=dit needs pictures: --model.name=mlp for points")
    if shape[0] % sizes["patch_size"] or shape[1] % sizes["patch_size"]:
        raise UserError(
            f"model.patch_size={sizes['patch_size']} does not divide {shape[0]}x{shape[1]}"
        )
    if sizes["hidden_size"] % sizes["num_heads"] or sizes["hidden_size"] % 4:
        raise UserError(
            f"model.hidden_size={sizes['hidden_size']} must be a multiple of 4 and of "
            f"model.num_heads={sizes['num_heads']}"
        )
    return sizes


def autoencoder(
    config: ConfigDict, shape: tuple[int, ...], fingerprint: str = ""
) -> autoencoders.Autoencoder:
    """What lies between pictures and the flow.

    Args:
      shape: of a picture, of latents or of a point.
      fingerprint: of the autoencoder that made the latents; empty: any will do.
    Raises:
      UserError: no autoencoder, a damaged one, or another than that of `fingerprint`.
    """
    if len(shape) == 1:
        return autoencoders.points()
    if not config.use_stable_vae:
        return autoencoders.pixels()
    name = autoencoder_place(config)
    slice_size = config.autoencoder_slice * jax.device_count()
    loaded = _loaded(name, config.autoencoder_dtype, slice_size)
    if fingerprint not in ("", loaded.fingerprint):
        raise UserError(
            f"the latents were made by another autoencoder (fingerprint {fingerprint}) than {name} "
            f"({loaded.fingerprint}): give --autoencoder=FOLDER of that one, or prepare them again"
        )
    return loaded.autoencoder


@functools.lru_cache(maxsize=1)  # runs that are compared share it
def _loaded(name: str, dtype: str, slice_size: int) -> Pretrained:
    return load_autoencoder(name, dtype, slice_size)


def autoencoder_place(config: ConfigDict) -> str:
    """The folder or hub name of the config's autoencoder: its own, else the copy in data_dir.

    Raises:
      UserError: there is neither.
    """
    copy = Path(config.data_dir).expanduser() / AUTOENCODER
    if config.autoencoder or copy.is_dir():
        return absolute(config.autoencoder or str(copy))
    place = config.data_dir or "data_dir"
    lost = "holds no copy of the autoencoder" if Path(place).is_dir() else "is not there any more"
    raise UserError(
        f"{place} {lost}: give --autoencoder=FOLDER, of the autoencoder or of the prepared data, "
        "or its name on the hub"
    )


def latent_shape(codec: autoencoders.Autoencoder, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what the network sees, from the shape of what is stored."""
    moments = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return jax.eval_shape(codec.sample, moments, keys).shape[1:]


def flow_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.objectives.flow_matching` with the config's options bound.

    Args:
      local: as `mean_flow_objective` takes it; all the same here.
    Raises:
      UserError: options out of range.
    """
    if told(config.model) == ["t-r"]:
        raise UserError("flow matching needs model.time_inputs with t or r: t-r alone is always 0")
    return partial(
        flow_matching,
        time_law=time_law(config.flow_matching, "flow_matching"),
        **_label_dropout(config, num_classes),
    )


def mean_flow_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.objectives.mean_flow` with the config's options bound.

    Args:
      local: samples that a device has in a microbatch. Where they are whole periods of the pattern
        that says which have r ≠ t, du/dt is computed for those alone; 0: for all, which is slower
        and gives the same numbers.
    Raises:
      UserError: options out of range.
    """
    m = config.mean_flow
    if told(config.model) in (["t"], ["r"]):
        raise UserError("MeanFlow needs model.time_inputs of two times, t,t-r, or t-r alone")
    if config.model.prediction != "velocity":
        raise UserError("MeanFlow needs --model.prediction=velocity: noise says nothing of r < t")
    guided = m.omega != 1 or m.kappa != 0
    if guided and config.model.class_dropout_prob == 0:
        raise UserError("guidance needs a trained null label: --model.class_dropout_prob=0.1")
    if guided and num_classes == 0:
        raise UserError("guidance needs labels: --mean_flow.omega=1 --mean_flow.kappa=0")
    return partial(
        mean_flow,
        time_law=time_law(m, "mean_flow"),
        interval_share=m.interval_share,
        p=m.p,
        c=m.c,
        omega=m.omega,
        kappa=m.kappa,
        guidance_interval=tuple(m.guidance_interval),
        apart=m.derivative == "apart" and splits_evenly(m.interval_share, local),
        forward=None,
        dropout=config.model.dropout > 0,
        **_label_dropout(config, num_classes),
    )


def with_forward(objective: Callable, network: Network) -> Callable:
    """The objective with the network that it differentiates in forward mode, if it does."""
    given = objective.keywords  # type: ignore[attr-defined]
    if "forward" not in given:
        return objective
    return partial(objective, forward=network.forward if given["apart"] else network.plain)


def splits_evenly(share: float, local: int) -> bool:
    """Whether `local` samples hold whole periods of the pattern of r ≠ t; if not, warns once."""
    period = len(times.interval_pattern(share))
    if local % period and jax.process_index() == 0:
        print(
            f"warning: {local} samples per device and microbatch are no multiple of {period}, so "
            f"mean_flow.interval_share={share:g} does not split evenly: du/dt is computed for all "
            "samples, the same numbers at more work; a larger --batch_size avoids it",
            file=sys.stderr,
        )
    return local > 0 and local % period == 0


def time_law(section: ConfigDict, name: str) -> times.TimeLaw:
    """The law of t that a section of the config names."""
    if section.time_law == "uniform":
        return times.uniform()
    if section.time_law == "logit_normal":
        return times.logit_normal(section.time_mean, section.time_std)
    raise UserError(f"{name}.time_law={section.time_law!r}: logit_normal or uniform")


def trained_guidance(config: ConfigDict) -> float:
    """ω′: the guidance scale that training put into the network; 1 for none."""
    if config.objective != "mean_flow":
        return 1.0
    return effective_scale(config.mean_flow.omega, config.mean_flow.kappa)


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _label_dropout(config: ConfigDict, num_classes: int) -> dict:
    probability = config.model.class_dropout_prob if num_classes else 0.0
    return {"class_dropout_prob": probability, "null_label": num_classes}


def _given(model: ConfigDict, keys: tuple[str, ...]) -> dict[str, int]:
    missing = [key for key in keys if model[key] is None]
    if missing:
        raise UserError(
            f"the network's {', '.join(missing)} are not set: give --model.{missing[0]}"
        )
    return {key: model[key] for key in keys}


def _dtype(name: str) -> Any:
    if name not in ("float32", "bfloat16"):
        raise UserError(f"model.dtype={name!r}: float32 or bfloat16")
    return jnp.dtype(name)
