"""The programs that benchmarks compile and run: what the scripts run, on shapes or random weights.

Nothing here is written for speed's sake: the step is `utils.step.make_step` around the config's
objective, network and autoencoder, as `pipelines.train` builds it; only data and weights are made
up. Shapes alone are enough to compile and count (`jax.ShapeDtypeStruct`), so that the largest
network needs no memory for it.
"""

import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from models import autoencoder as autoencoders
from models.autoencoder_kl import AutoencoderKL
from models.dit import SIZES
from pipelines import build, objectives
from pipelines.pretrained import KL_SCALING
from pipelines.train import step_flops
from utils import flops
from utils.cli import SIZE_KEYS, UserError
from utils.sharding import abstract_state, batch_sharding, born_sharded, replicated
from utils.step import TrainState, init_state, make_step

SD_VAE = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
OBJECTIVES = {
    "flow_matching": objectives.flow_objective,
    "mean_flow": objectives.mean_flow_objective,
}
CLASSES = {"imagenet256": 1000, "celebahq256": 0}  # whose pictures are as large as the config says
EMBEDDED = {"digits": ((8, 8, 1), 10), "mnist": ((28, 28, 1), 10)}
CONFIG = "configs/imagenet256.py:meanflow_b4"  # where none is given
ASKED = tuple(sys.argv[1:])  # by the user's own hand
SPREAD = 0.02  # standard deviation of every weight: DiT's zeros would leave work undone


class Program(NamedTuple):
    """A jitted function, its abstract arguments, and the FLOPs of its model."""

    function: Callable
    arguments: tuple
    flops: int


# Command lines.


def given(name: str) -> bool:
    """Whether a flag stands on the command line."""
    return any(word.partition("=")[0] == f"--{name}" for word in ASKED)


def standard_config() -> bool:
    """Whether the config is CONFIG, as none was named."""
    return not (given("config") or given("dataset_name"))


def fill_in_config() -> None:
    """Names CONFIG on the command line where there is no other; before flags are parsed."""
    if standard_config():
        sys.argv.insert(1, f"--config={pathlib.Path(__file__).parents[1] / CONFIG}")


def numbers(name: str, words: Sequence[str], kind: Callable) -> list:
    """The numbers of a flag's list.

    Raises:
      UserError: one is none.
    """
    try:
        return [kind(word) for word in words]
    except ValueError as error:
        raise UserError(f"--{name}={','.join(words)}: numbers, separated by commas") from error


def check(name: str, words: Sequence[str], choices: Sequence[str]) -> None:
    """Raises UserError where a flag's list holds none of the choices, or another word."""
    if not words or set(words) - set(choices):
        raise UserError(f"--{name}={','.join(words)}: of {', '.join(choices)}")


def sized(config: ConfigDict, size: str) -> ConfigDict:
    """A copy with `model.size`, which wins over a preset's sizes; "": as it is."""
    config = config.copy_and_resolve_references()
    if size:
        config.model.size = size
        for key in SIZE_KEYS:
            if not (given(f"model.{key}") or given(f"config.model.{key}")):
                config.model[key] = None
    return config


def tpu_devices(topology: str, instead: str) -> list:
    """The devices of a TPU topology, without the machine.

    Args:
      topology: as v5e:2x2.
      instead: what to do where there is no compiler for it.
    Raises:
      UserError: no such topology, or no compiler.
    """
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # the library raises its own kinds
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f'the TPU compiler is not installed: pip install "jax[tpu]", or {instead}'
            ) from error
        raise UserError(
            f"--topology={topology}: there is none such ({error}), give v5e:2x2 or the like"
        ) from error


# Programs.


def stored(config: ConfigDict, embedded: bool = True) -> tuple[tuple[int, ...], int]:
    """The shape of an item of the config's data set as it is stored, and the number of classes.

    Args:
      embedded: whether the small data sets count, too.
    Raises:
      UserError: a data set of which no more is known than what lies in its folder.
    """
    name, side = config.dataset_name, config.image_size
    known = EMBEDDED if embedded else {}
    if name in known:
        return known[name]
    if name not in CLASSES or not side:
        raise UserError(
            f"dataset_name={name}: of {', '.join([*CLASSES, *known])}; give "
            "--config=configs/imagenet256.py:meanflow_b4 or the like"
        )
    shape = (side // 8, side // 8, 8) if config.use_stable_vae else (side, side, 3)
    return shape, CLASSES[name]


def codec(config: ConfigDict, weights: bool = False, devices: int = 0) -> autoencoders.Autoencoder:
    """Stable Diffusion's autoencoder, or pixels.

    Args:
      weights: random ones; else shapes alone, which are enough to sample from moments.
      devices: that decode; 0: those that are there.
    """
    if not config.use_stable_vae:
        return autoencoders.pixels()
    network = SD_VAE.clone(dtype=jnp.dtype(config.autoencoder_dtype))
    picture = jnp.zeros((1, 64, 64, 3))

    def init(key: jax.Array) -> Any:
        return network.init(key, picture)["params"]

    make = functools.partial(random, init) if weights else functools.partial(jax.eval_shape, init)
    params = make(jax.random.key(0))
    scale = autoencoders.Scale.of({}, network.latent_channels, KL_SCALING)
    return autoencoders.kl(
        network, params, scale, config.autoencoder_slice * (devices or jax.device_count())
    )


def seen(config: ConfigDict) -> tuple[int, ...]:
    """The shape of what the network sees."""
    return build.latent_shape(codec(config), stored(config)[0])


def step(config: ConfigDict, objective: str, mesh: Mesh, platform: str = "") -> Program:
    """The training step, on moments of latents or pictures as they are stored.

    Args:
      objective: of OBJECTIVES.
      platform: as `build.network` takes it.
    Raises:
      UserError: sizes that do not fit each other or the devices.
    """
    shape, classes = seen(config), stored(config)[1]
    network = build.network(config, shape, classes, platform)
    local = config.batch_size // mesh.size // config.accumulation
    if local * mesh.size * config.accumulation != config.batch_size:
        raise UserError(f"batch_size={config.batch_size} does not split over {mesh.size} devices")
    made = OBJECTIVES[objective](config, classes, local=local)
    made = objectives.with_forward(made, network)
    state = abstract_state(lambda: init_state(config, network.init), mesh)
    return Program(
        make_step(config, network.apply, made, codec(config).sample, mesh),
        (state, on(batch_sharding(mesh), jax.eval_shape(lambda: batch(config)))),
        step_flops(config, shape, classes, made),
    )


def batch(config: ConfigDict) -> dict[str, jax.Array]:
    """A made-up batch: moments of latents (float16) or pictures (uint8), labels and positions."""
    shape, classes = stored(config)
    n, keys = config.batch_size, jax.random.split(jax.random.key(1), 3)
    if config.use_stable_vae:  # a mean of the size that latents have, and a small deviation
        mean, spread = jnp.split(jax.random.normal(keys[0], (n, *shape)), 2, axis=-1)
        x = jnp.concatenate([5 * mean, 0.1 * jnp.abs(spread)], axis=-1).astype(jnp.float16)
    else:
        x = jax.random.bits(keys[0], (n, *shape), jnp.uint8)
    label = jax.random.randint(keys[1], (n,), 0, max(classes, 1), jnp.int32)
    return {"x": x, "label": label, "position": jnp.arange(n, dtype=jnp.int32)}


def placed_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
    """`batch`, over the devices."""
    return jax.jit(lambda: batch(config), out_shardings=batch_sharding(mesh))()


def random_state(config: ConfigDict, mesh: Mesh) -> TrainState:
    """The state before the first step, every weight drawn from N(0, SPREAD²), over the devices."""
    shape, classes = seen(config), stored(config)[1]
    network = build.network(config, shape, classes)
    return born_sharded(lambda: init_state(config, lambda key: random(network.init, key)), mesh)


def random(init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
    """Parameters of the shapes that `init` gives, drawn from N(0, SPREAD²)."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(init, key))
    keys = jax.random.split(key, len(leaves))
    drawn = [SPREAD * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def on(place: NamedSharding, tree: Any) -> Any:
    """The shapes of a tree, at a place."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def attention_names(config: ConfigDict) -> tuple[str, str]:
    """`build.attention_names`, here."""
    shape = seen(config)
    sizes = build.dit_sizes(config.model, shape)
    classes = stored(config)[1]
    return build.attention_names(config.model, sizes, shape, classes, build.this_platform())


def size_name(config: ConfigDict) -> str:
    """As B/2; depth×width/patch where the table has no such network."""
    sizes = build.dit_sizes(config.model, seen(config))
    if SIZES.get(config.model.size) == sizes:
        return config.model.size
    return f"{sizes['depth']}x{sizes['hidden_size']}/{sizes['patch_size']}"


def forward_flops(config: ConfigDict, n: int) -> int:
    """FLOPs of the network on n samples, forward; attention as XLA computes it."""
    plain = config.copy_and_resolve_references()
    plain.model.update({"remat": "none", "attention": "xla", "attention_jvp": "xla"})
    network = build.network(plain, seen(config), stored(config)[1])
    z, t = jax.ShapeDtypeStruct((n, *seen(config)), jnp.float32), jax.ShapeDtypeStruct((n,), "f4")
    label = jax.ShapeDtypeStruct((n,), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0))
    return flops.count(network.apply, params, z, t, t, label, None)


def placed_params(config: ConfigDict, mesh: Mesh) -> Any:
    """Random parameters of the config's network, whole on every device."""
    network = build.network(config, seen(config), stored(config)[1])
    make = jax.jit(lambda key: random(network.init, key), out_shardings=replicated(mesh))
    return make(jax.random.key(0))
