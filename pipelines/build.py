"""From a config to the objects it names. Sizes are resolved here; keys given win over the table."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from configs import base
from models import autoencoder as autoencoders
from models import dit, unet
from models.attention import FORWARD, REVERSE, forward_attention, reverse_attention
from models.dit import REMAT, SIZES, DiT
from models.layers import TIME_INPUTS
from models.mlp import MLP
from models.prediction import PREDICTIONS, velocity_from_data, velocity_from_noise
from models.unet import UNet
from pipelines.plan import FEATURES, FEWEST, MOST_STEPS
from pipelines.pretrained import Pretrained, load_autoencoder
from utils.cli import SIZE_KEYS, UserError, absolute, flatten
from utils.optimizers import check_optimizer
from utils.sources import LARGEST
from utils.toys import TOYS

AUTOENCODER = "autoencoder"  # the folder of the copy that goes with latents, and with a model
MANY = 2**31 - 1
MOST_PATCHES = 2**18  # of a picture: 512 pixels each way, one by one
MOST_PARAMETERS = 10**11  # with their average and Adam's moments 2 TB
SEVERAL = 1_000_000
DEFAULTS = base.get_config()
OBJECTIVES = base.objectives()  # the section of each
OF_OBJECTIVES: dict[str, tuple[float, float]] = {  # of a key in every section that has it
    "time_mean": (-100, 100),
    "time_std": (0, 100),
    "interval_share": (0, 1),
    "p": (0, 10),
    "c": (1e-12, 1e6),
    "omega": (0, 100),
    "kappa": (0, 0.999),
    "omega_max": (1, 1000),
    "omega_power": (0, 10),
    "sharpness": (0.01, 1e6),
    "clamp": (0, 0.49),
    "levels": (1, 20),
    "clip": (0, 1e6),
}
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
    "model.velocity_head": (0, 1000),
    **{
        f"{section}.{key}": between
        for section, values in OBJECTIVES.items()
        for key, between in OF_OBJECTIVES.items()
        if key in values
    },
    "optimizer.lr": (1e-12, 100),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.weight_decay": (0, 100),
    "optimizer.warmup_steps": (0, MANY),
    "optimizer.decay_steps": (0, MANY),
    "optimizer.clip_norm": (0, 1e9),
    "ema.decay": (0, 0.9999999),
    "ema.start_step": (0, MANY),
    "ema.interval": (1, MANY),
    "ema.snapshot_interval": (0, MANY),
    **dict.fromkeys(("mesh.data", "mesh.fsdp"), (-1, SEVERAL)),
    "sample.num": (1, 10_000),
    "sample.guidance": (-1000, 1000),
    "fid.num": (0, 10_000_000),
}
PAIRS = {  # of the objectives: the least, the most, and an example
    "guidance_interval": (0, 1, "0,1"),
    "time_range": (0, 1, "0,1"),
    "transition": (0, MANY, "0,100000"),
    "tangent": (-100, 100, "0,1"),
}
CHOICES: dict[str, tuple] = {  # what else a key may be
    "use_stable_vae": (0, 1),
    "model.attention": ("auto", *REVERSE),
    "model.attention_jvp": ("auto", *FORWARD),
    "model.remat": ("none", *REMAT),
    "model.prediction": PREDICTIONS,
    "model.positions": ("absolute", "rope"),
    "model.mlp": ("gelu", "swiglu"),
    "model.norm": ("layer", "rms"),
    "model.conditioning": ("adaln", "tokens"),
    "model.name": ("dit", "unet", "mlp"),
    "model.qk_norm": (False, True),
    "model.guidance_inputs": (False, True),
    "model.resample": ("box", "fir"),
    "mean_flow.derivative": ("apart", "plain"),
    "autoencoder_dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "adamw8bit", "muon"),
    "optimizer.moments": ("float32", "bfloat16"),
    "optimizer.schedule": ("constant", "cosine", "wsd"),
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
    check_optimizer(config)
    _check_network(config)
    _check_evaluation(config)


def _check_lists(values: dict[str, Any]) -> None:
    """Raises UserError where a list holds something else than it should."""
    for key in ("sample.steps", "fid.steps"):
        steps = values[key]
        whole = isinstance(steps, tuple) and all(type(step) is int for step in steps)
        if not (whole and steps and 1 <= min(steps) <= max(steps) <= MOST_STEPS):
            raise UserError(f"{key}={steps}: give --{key}=1,32 or the like, up to {MOST_STEPS}")
    for key, (least, most, given) in PAIRS.items():
        for name in (name for name in values if name.endswith(f".{key}")):
            pair = values[name]
            two = isinstance(pair, tuple) and len(pair) == 2
            numbers = two and all(type(t) in (int, float) and least <= t <= most for t in pair)
            if not numbers or (key != "tangent" and pair[0] > pair[1]):
                raise UserError(
                    f"{name}={pair}: two numbers from {least:,} to {most:,}, the lower first: "
                    f"give --{name}={given}"
                )


def _check_network(config: ConfigDict) -> None:
    """Raises UserError where a network is larger than any machine, before it is looked at."""
    m = config.model
    table = SIZES.get(m.size, {}) if m.name == "dit" else {}
    depth, width = (
        table.get(key, 1) if m[key] is None else m[key] for key in ("depth", "hidden_size")
    )
    if m.name == "unet":
        try:
            unet.check_levels(depth, m.channel_multipliers, m.attention_resolutions)
        except ValueError as error:
            raise UserError(str(error)) from error
        # A level has depth blocks down and depth + 1 up, of two convolutions by 3 × 3 at least.
        widths = [width * multiplier for multiplier in m.channel_multipliers]
        count = 2 * 9 * (2 * depth + 1) * sum(width**2 for width in widths)
    else:
        # Of a block: attention 4 d², the MLP 2 or 3 · ratio · d², the modulation 6 d².
        products = 2 if m.name == "dit" and m.mlp == "gelu" else 3
        count = int((depth + m.velocity_head) * width**2 * (10 + products * m.mlp_ratio))
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
    if m.name == "unet":
        last = side // 2 ** (len(m.channel_multipliers) - 1)
        most = max([last, *(own for own in m.attention_resolutions if own <= side)])
        if most**2 > MOST_PATCHES:
            raise UserError(
                f"attention on maps of {most}x{most}, more than {MOST_PATCHES} places: give a "
                "smaller --image_size, or --model.channel_multipliers of more numbers"
            )
        return
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

    init: key → parameters. apply: (parameters, z, r, t, label, dropout_keys) → u, and where `told`
    also of guidance (n, 3): a scale, and an interval's ends. The others are the same u by other
    kernels of attention: forward, for what is differentiated in forward mode alone, and plain, for
    what is differentiated in both. heads: as apply, (u, v); None without a second head.
    """

    init: Callable[[Array], Any]
    apply: Callable
    forward: Callable
    plain: Callable
    null_label: int
    told: bool = False
    heads: Callable | None = None


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
    kinds = _by_attention(module, config.model, shape, num_classes, platform or this_platform())
    apply, forward, plain = (_applied(kind, config.model.prediction) for kind in kinds)
    both: dict[str, Any] = {"heads": True} if config.model.velocity_head else {}
    return Network(
        init=lambda key: module.init(key, z, t, t, jnp.zeros(1, jnp.int32), **both)["params"],
        apply=apply,
        forward=forward,
        plain=plain,
        null_label=num_classes,
        told=config.model.guidance_inputs,
        heads=_applied(kinds[0], config.model.prediction, **both) if both else None,
    )


def this_platform() -> str:
    """cpu, tpu, gpu, or other_gpu, which cuDNN's attention is not for: AMD's, and before Ampere."""
    platform, device = jax.default_backend(), jax.local_devices()[0]
    if platform != "gpu":
        return platform
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; of AMD's, "gfx942"
    major = capability.partition(".")[0]
    return "gpu" if major.isdecimal() and int(major) >= 8 else "other_gpu"


def _applied(module: nn.Module, prediction: str, **options: Any) -> Callable:
    """(parameters, z, r, t, label, dropout_keys, …) → u, whatever the module predicts."""

    def apply(params: Any, *inputs: Any) -> Any:
        return module.apply({"params": params}, *inputs, **options)

    def from_noise(params: Any, z: Array, r: Array, t: Array, *rest: Any) -> Any:
        return velocity_from_noise(lambda y, step: apply(params, y, step, step, *rest), z, t)

    def from_data(params: Any, z: Array, r: Array, t: Array, *rest: Any) -> Any:
        x = apply(params, z, r, t, *rest)
        return jax.tree.map(lambda x: velocity_from_data(x, z, t), x)

    return {"velocity": apply, "noise": from_noise, "data": from_data}[prediction]


def _by_attention(
    module: nn.Module, model: ConfigDict, shape: tuple[int, ...], num_classes: int, platform: str
) -> list[nn.Module]:
    """The network with the attention for gradients, for forward mode alone, and for both.

    Raises:
      UserError: an attention that this machine, type or size cannot have.
    """
    if not isinstance(module, DiT):
        return [module] * 3
    names = attention_names(model, dit_sizes(model, shape), shape, num_classes, platform)
    return [module.clone(attention=name) for name in (*names, "xla")]


def attention_names(
    model: ConfigDict,
    sizes: dict[str, int],
    shape: tuple[int, ...],
    num_classes: int,
    platform: str,
) -> tuple[str, str]:
    """What computes attention in reverse mode, and in forward mode, "auto" resolved.

    Args:
      sizes: of the network, as `dit_sizes` gives them; shape: of what it sees.
    Raises:
      UserError: an attention that this machine, type or size cannot have.
    """
    tokens = shape[0] * shape[1] // sizes["patch_size"] ** 2 + dit.prefix(
        model.conditioning, model.guidance_inputs, model.time_inputs, num_classes
    )
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
        "dropout": model.dropout,
        "time_inputs": model.time_inputs,
    }
    if model.name == "mlp" and len(shape) > 1:
        raise UserError("model.name=mlp is for points: --model.name=dit for pictures")
    _check_own(model)
    if model.name == "dit":
        common |= dit_sizes(model, shape)
        common |= {key: model[key] for key in (*OWN["dit"], "mlp_ratio", "remat", "unroll")}
        return DiT(**common, dtype=_dtype(model.dtype))
    if model.name == "unet":
        common |= _unet_sizes(model, shape)
        return UNet(**common, remat=model.remat, dtype=_dtype(model.dtype))
    common |= _given(model, ("depth", "hidden_size"))
    return MLP(**common, mlp_ratio=model.mlp_ratio)


OWN = {  # what one kind of network alone knows
    "dit": (
        *("time_scale", "positions", "mlp", "norm", "qk_norm", "conditioning"),
        *("velocity_head", "guidance_inputs"),
    ),
    "unet": ("channel_multipliers", "attention_resolutions", "resample"),
}
KERNELS = ("attention", "attention_jvp")
IGNORED = {  # what changes nothing in one kind of network
    "unet": ("size", "patch_size", "mlp_ratio", "unroll", *KERNELS),
    "mlp": ("size", "patch_size", "num_heads", "dtype", "remat", "unroll", *KERNELS),
}


def _check_own(model: ConfigDict) -> None:
    """Raises UserError where a network is given what another kind alone knows."""
    for name, keys in OWN.items():
        changed = [key for key in keys if model[key] != DEFAULTS.model[key]]
        if changed and name != model.name:
            raise UserError(
                f"model.{changed[0]} is for model.name={name}, this is {model.name}: leave it out"
            )
    if model.prediction == "noise" and model.name != "dit":
        raise UserError("model.prediction=noise is for model.name=dit: leave it out")
    for key in _ignored(model):
        raise UserError(
            f"model.{key}={model[key]} changes nothing where model.name={model.name}: leave it "
            "out, or take a --config that does not give it"
        )


def _ignored(model: ConfigDict) -> list[str]:
    """The keys that were given though the network does not know them."""
    given = [key for key in IGNORED.get(model.name, ()) if model[key] != DEFAULTS.model[key]]
    return [key for key in given if not (key in KERNELS and model[key] == "xla")]  # as it is


def without_ignored(config: ConfigDict) -> ConfigDict:
    """The config of a run, which may be older than the refusal of what changes nothing."""
    for key in _ignored(config.model):
        config.model[key] = DEFAULTS.model[key]
    return config


def _unet_sizes(model: ConfigDict, shape: tuple[int, ...]) -> dict[str, Any]:
    """What `models.unet.UNet` is made of.

    Raises:
      UserError: sizes that are missing or do not fit.
    """
    if len(shape) != 3:
        raise UserError("model.name=unet needs pictures: --model.name=mlp for points")
    sizes: dict[str, Any] = _given(model, ("depth", "hidden_size"))
    sizes |= {"num_heads": model.num_heads or 1}
    sizes |= {key: model[key] for key in OWN["unet"]}
    try:
        unet.check(shape, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from error
    return sizes


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
    try:
        options = model.positions, model.velocity_head
        dit.check(sizes["depth"], sizes["hidden_size"], sizes["num_heads"], *options)
    except ValueError as error:
        raise UserError(str(error)) from error
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


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


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
