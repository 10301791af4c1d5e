"""FlowPipeline: a trained network and all it needs to make pictures.

A folder holds `config.json` (the run's config), `card.json` (what was trained, and how much) and
the averaged parameters: a run's `checkpoints/`, or `model.safetensors` where it was exported.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from ml_collections import ConfigDict

from configs import base
from flows.guidance import guided_velocity, network_calls
from flows.samplers import instantaneous, sample, uniform_grid
from models.autoencoder import Autoencoder
from pipelines import build
from pipelines.pretrained import copy_autoencoder
from utils.checkpoint import Checkpoints
from utils.cli import UserError, flatten
from utils.sharding import batch_sharding, make_mesh, replicated
from utils.train import SAMPLING, stream

WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class FlowPipeline:
    """Samples from a trained velocity network.

    Attributes:
      config: the run's config; `config.objective` says how it was trained.
      card: shape, num_classes, parameters, flops_per_step, train_steps, train_images, train_flops,
        trained_guidance (ω′; 1: none), dataset, autoencoder (fingerprint), pictures (where those
        lie that the latents were made of).
      network: (init, apply, null_label), built from the two.
      autoencoder: latents ↔ pictures; its leaves are its parameters.
      sampler: `make_sampler` of it, compiled once per step count.
      params: the averaged parameters.
    """

    config: ConfigDict
    card: dict[str, Any]
    network: build.Network
    autoencoder: Autoencoder
    sampler: Callable[..., Array]
    params: Any

    @classmethod
    def build(
        cls,
        config: ConfigDict,
        card: dict[str, Any],
        params: Any = None,
        autoencoder: Autoencoder | None = None,
    ) -> "FlowPipeline":
        """Builds the network that `config` and `card` describe, around `params`.

        Args:
          autoencoder: where it is loaded already; None: the one that config and card name.
        """
        shape = tuple(card["shape"])
        if autoencoder is None:
            autoencoder = build.autoencoder(config, shape, card.get("autoencoder", ""))
        network = build.network(config, shape, card["num_classes"])
        sampler = make_sampler(network, shape, averages=config.objective == "mean_flow")
        return cls(config, card, network, autoencoder, sampler, params)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, autoencoder: str = "") -> "FlowPipeline":
        """Loads a run's workdir, or a folder that `save_pretrained` wrote.

        Args:
          autoencoder: folder or hub name, for a run on latents; empty: the copy in `path`, or where
            the run had it from.
        Raises:
          UserError: no such folder, no weights in it, or weights of another network.
        """
        path = pathlib.Path(path)
        config, card = read_config(path / "config.json"), read_json(path / "card.json")
        if not {"shape", "num_classes"} <= card.keys() or not config.objective:
            raise UserError(f"{path} holds no whole run: its config.json or card.json lacks keys")
        copy = path / build.AUTOENCODER
        config.autoencoder = autoencoder or (str(copy) if copy.is_dir() else config.autoencoder)
        pipeline = cls.build(config, card)
        abstract = jax.eval_shape(pipeline.network.init, jax.random.key(0))
        if (path / WEIGHTS).exists():
            return dataclasses.replace(pipeline, params=_read_weights(path / WEIGHTS, abstract))
        if not (path / "checkpoints").is_dir():
            raise UserError(
                f"{path} holds no checkpoint yet: train it first, or name another folder"
            )
        with Checkpoints(path) as checkpoints:
            if checkpoints.latest is None:
                raise UserError(f"{path} holds no checkpoint yet: train it until its first save")
            params, step = _read_ema(checkpoints, config, abstract), checkpoints.latest
        card = card | trained_card(config, card, step)
        return dataclasses.replace(pipeline, params=params, card=card)

    def save_pretrained(self, path: str | os.PathLike, dtype: str = "float32") -> None:
        """Writes the folder that `from_pretrained` reads; float16 halves its size.

        Raises:
          UserError: the folder already holds weights.
        """
        path = pathlib.Path(path)
        if (path / WEIGHTS).exists():
            raise UserError(f"{path / WEIGHTS} exists: name another folder, or remove it")
        path.mkdir(parents=True, exist_ok=True)
        flat = flatten_dict(jax.device_get(self.params), sep=".")
        tensors = {k: np.ascontiguousarray(v, dtype) for k, v in flat.items()}
        write_json(path / "config.json", {**self.config.to_dict(), "autoencoder": ""})
        write_json(path / "card.json", self.card)
        part = path / f"{WEIGHTS}.part"  # the weights last and at once: with them it is whole
        safetensors.numpy.save_file(tensors, part)
        if self.config.use_stable_vae:
            copy_autoencoder(build.autoencoder_place(self.config), path / build.AUTOENCODER)
        part.replace(path / WEIGHTS)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.card["shape"])

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for none."""
        return self.card["num_classes"]

    def __call__(
        self,
        labels: np.ndarray,
        *,
        steps: int = 1,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        indices: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns n pictures uint8 (n, height, width, channels), or points float32 (n, 2).

        Args:
          labels: (n,) int32; num_classes for none.
          steps: steps of the sampler from t = 1 to t = 0.
          guidance: scale of classifier-free guidance; 1 for none.
          indices: (n,) image numbers, default 0 … n − 1. The noise of a picture is a function of
            (seed, its number): neither batches nor devices change it.
        Raises:
          UserError: steps below 1, or guidance of a network without labels.
        """
        self._check(steps, guidance)
        n = len(labels)
        indices = np.arange(n) if indices is None else indices
        mesh = make_mesh()
        padding = -n % mesh.size
        label, index = (
            jax.device_put(np.pad(np.asarray(a, np.int32), (0, padding)), batch_sharding(mesh))
            for a in (labels, indices)
        )
        params, codec = jax.device_put((self.params, self.autoencoder), replicated(mesh))
        interval = tuple(guidance_interval)
        pictures = self.sampler(params, codec, label, index, seed, steps, guidance, interval)
        return np.asarray(jax.device_get(pictures))[:n]

    def network_calls(
        self,
        steps: int,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> int:
        """The number of function evaluations (NFE) per sample."""
        return network_calls(np.asarray(uniform_grid(steps)), guidance, guidance_interval)

    def with_params(self, params: Any) -> "FlowPipeline":
        """The same pipeline around other parameters; nothing is compiled again."""
        return dataclasses.replace(self, params=params)

    def _check(self, steps: int, guidance: float) -> None:
        if steps < 1:
            raise UserError(f"steps={steps}: at least 1")
        if guidance != 1 and self.num_classes == 0:
            raise UserError(f"guidance={guidance}: this network knows no labels, use 1")


def make_sampler(
    network: build.Network, shape: tuple[int, ...], *, averages: bool
) -> Callable[..., Array]:
    """Returns the jitted (params, autoencoder, label, index, seed, steps, guidance, interval) →
    pictures.

    Args:
      averages: the network knows average velocities (MeanFlow) and is asked for u(z, r, t); else it
        is asked for u(z, t, t), the velocity of the flow.
    """

    def run(params, autoencoder, label, index, seed, steps, guidance, interval):
        keys = jax.vmap(lambda i: jax.random.fold_in(stream(seed, SAMPLING), i))(index)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        velocity = guided_velocity(
            network.apply, params, label, network.null_label, guidance, interval
        )
        velocity = velocity if averages else instantaneous(velocity)
        return autoencoder.decode(sample(velocity, noise, uniform_grid(steps)))

    return jax.jit(run, static_argnums=(5, 6, 7))


def trained_card(config: ConfigDict, card: dict[str, Any], step: int) -> dict[str, Any]:
    """How much training a checkpoint at `step` has seen."""
    return {
        "train_steps": step,
        "train_images": step * config.batch_size,
        "train_flops": step * card["flops_per_step"],
        "trained_guidance": build.trained_guidance(config),
    }


def read_config(path: pathlib.Path) -> ConfigDict:
    """Returns a run's config; keys younger than the run have their defaults.

    Raises:
      UserError: there is no such file, or it is no config of this project.
    """
    config, values = base.get_config(), flatten(ConfigDict(read_json(path)))
    unknown = sorted(values.keys() - flatten(config).keys())
    if unknown:
        raise UserError(f"{path} is no config of this version: it has no key {unknown[0]}")
    try:
        config.update_from_flattened_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no config of this version ({error})") from error
    return config


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns what a run's JSON file holds.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        folder, name = path.parent, path.name
        raise UserError(f"{folder} is no run and no exported model: it has no {name}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it or train again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: restore it or train again")
    return value


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes JSON at once or not at all; process 0 only."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, indent=2))
        part.replace(path)


def _read_ema(checkpoints: Checkpoints, config: ConfigDict, abstract: Any) -> Any:
    """The averaged parameters of the newest checkpoint, on this process's devices."""
    here = replicated(make_mesh())
    ema = {
        str(config.ema.decay): jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), abstract
        )
    }
    return next(iter(checkpoints.restore({"ema": ema})["ema"].values()))


def _read_weights(path: pathlib.Path, abstract: Any) -> Any:
    """The tensors of a safetensors file, as float32, in the shape of `abstract`."""
    try:
        flat = safetensors.numpy.load_file(path)
    except Exception as error:  # the library raises its own kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error
    wanted = {k: v.shape for k, v in flatten_dict(abstract, sep=".").items()}
    found = {k: v.shape for k, v in flat.items()}
    wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path} does not fit its config.json: {len(wrong)} tensors differ, first {name}: "
            f"the network has {wanted.get(name)}, the file {found.get(name)}"
        )
    return unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}, sep=".")
