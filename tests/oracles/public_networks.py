"""The public networks with random weights, in one shape: their tensors, u by their own code, and
their own files. Their conventions are the issue's formulas, written out once more in numpy.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from tests import import_case as case
from tests.oracles import peers

# Of their argparse, with the defaults of their train.py.
SIT_OPTIONS = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}
ZHUYU_OPTIONS = {"model": "SiT-B/4", "path_type": "linear", "cfg_omega": 0.2, "cfg_kappa": 0.92}

Velocity = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Public(NamedTuple):
    """A network of a public repository.

    Attributes:
      shapes: of its tensors, by their names.
      velocity: (z, r, t, labels) → u, all numpy; for DiT t is of its steps.
      save: writes the checkpoint that its training would, of that name and beside it raw weights.
    """

    shapes: dict[str, tuple[int, ...]]
    velocity: Velocity
    save: Callable[[pathlib.Path], None]


def nchw(z: np.ndarray) -> torch.Tensor:
    """(n, h, w, c) → torch's (n, c, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(z, -1, 1)))


def call(network: torch.nn.Module, z: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    """What a network makes of NHWC latents and numbers per sample."""
    with torch.no_grad():
        inputs = [
            torch.as_tensor(a) if a.dtype.kind == "i" else torch.as_tensor(a, dtype=torch.float32)
            for a in rest
        ]
        return np.moveaxis(network(nchw(z), *inputs).numpy(), 1, -1)


def filled(network: torch.nn.Module, width: int) -> dict[str, tuple[int, ...]]:
    """Gives a network the case's weights, and returns the shapes of its tensors."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    state = {k: torch.from_numpy(v) for k, v in case.weights(shapes, width).items()}
    state["pos_embed"] = network.state_dict()["pos_embed"]  # as their own code has it
    network.load_state_dict(state)
    network.eval()
    return shapes


def save_torch(
    network: torch.nn.Module, bare: bool, options: Mapping[str, object]
) -> Callable[[pathlib.Path], None]:
    """Writes what DiT, SiT and MeanFlow's train.py do, or a bare state dict, as DiT publishes."""

    def save(path: pathlib.Path) -> None:
        state = network.state_dict()
        if not bare:
            args = argparse.Namespace(**options)
            raw = {k: value + (k != "pos_embed") for k, value in state.items()}
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
            state = {"model": raw, "ema": state, "opt": optimizer.state_dict(), "args": args}
        torch.save(state, path)

    return save


def dit(size: str = "", bare: bool = False, **sizes) -> Public:
    """facebookresearch/DiT, a size of its table or the sizes given."""
    module = peers.file("DiT", "models.py")
    network = module.DiT_models[size]() if size else module.DiT(**sizes)
    shapes = filled(network, network.pos_embed.shape[-1])

    def velocity(z, r, t, labels):
        steps = case.STEPS[: len(z)]
        t = case.times_of(steps)[:, None, None, None]
        scaled = z / np.sqrt((1 - t) ** 2 + t**2)
        noise = call(network, scaled.astype(np.float32), steps.astype(np.float32), labels)
        return (noise[..., : case.CHANNELS].astype(np.float64) - z) / (1 - t)

    return Public(shapes, velocity, save_torch(network, bare, {"model": "DiT-XL/2"}))


def sit(size: str = "", bare: bool = False, options: dict | None = None, **sizes) -> Public:
    """willisma/SiT."""
    module = peers.file("SiT", "models.py")
    network = module.SiT_models[size]() if size else module.SiT(**sizes)
    shapes = filled(network, network.pos_embed.shape[-1])
    return Public(
        shapes,
        lambda z, r, t, labels: -call(network, z, 1 - t, labels),
        save_torch(network, bare, SIT_OPTIONS | (options or {})),
    )


def meanflow_torch(size: str = "", bare: bool = False, qk_norm: bool = False, **sizes) -> Public:
    """zhuyu-cs/MeanFlow."""
    module = peers.file("MeanFlow-zhuyu", "sit.py")
    switches = {"fused_attn": False, "qk_norm": qk_norm}
    if size:
        network = module.SiT_models[size](**switches)
    else:
        network = module.SiT(**sizes, decoder_hidden_size=sizes["hidden_size"], **switches)
    shapes = filled(network, network.pos_embed.shape[-1])
    return Public(
        shapes,
        lambda z, r, t, labels: call(network, z, r, t, labels),
        save_torch(network, bare, ZHUYU_OPTIONS),
    )


def meanflow(size: str = "", bare: bool = False, **sizes) -> Public:
    """Gsunshine/meanflow: written by flax.training.checkpoints, as its ckpt_util.py does."""
    module = peers.package("meanflow", "meanflow.py", "models")
    if not size:
        size, width = "DiT_tiny", sizes["hidden_size"]
        setattr(module.models_dit, size, lambda **named: module.models_dit.DiT(**sizes, **named))
    else:
        width = getattr(module.models_dit, size).keywords["hidden_size"]
    network = module.MeanFlow(model_str=size, model_config={})
    side, one = sizes.get("input_size", 32), jnp.zeros(1)
    key = jax.random.key(0)

    def init():
        z = jnp.zeros((1, side, side, case.CHANNELS))
        return network.init({"params": key, "gen": key}, z, one, jnp.zeros(1, int))["params"]

    shapes = {k: v.shape for k, v in flatten_dict(jax.eval_shape(init), sep=".").items()}
    params = unflatten_dict(case.weights(shapes, width), sep=".")
    short = {name.removeprefix("net."): shape for name, shape in shapes.items()}

    def velocity(z, r, t, labels):
        return np.asarray(
            network.apply(
                {"params": params},
                *(jnp.asarray(a) for a in (z, t, t - r, labels)),
                train=False,
                method=network.u_fn,
                rngs={"gen": key},
            )
        )

    def save(path: pathlib.Path) -> None:
        from flax.training import checkpoints, train_state

        class TrainState(train_state.TrainState):
            ema_params: dict

        raw = jax.tree.map(lambda a: a + 1, params)
        state = TrainState.create(
            apply_fn=network.apply, params=raw, ema_params=params, tx=optax.adamw(1e-4)
        )
        state = jax.device_get(state.replace(step=1234))
        checkpoints.save_checkpoint_multiprocess(path.parent, state, 1234, keep=3)

    return Public(shapes if bare else short, velocity, save)


def jax_flow(size: str = "", bare: bool = False, t_conditioning: int = 1, **sizes) -> Public:
    """kvfrans/jax-flow: pickled by its own Checkpoint, of its own TrainState."""
    module = peers.file("jax-flow", "diffusion_transformer.py")
    states = peers.file("jax-flow", "utils/train_state.py")
    checkpoint = peers.file("jax-flow", "utils/checkpoint.py")
    side = sizes.pop("input_size")
    network = module.DiT(**sizes, mlp_ratio=4.0, class_dropout_prob=0.1)
    z, one = jnp.zeros((1, side, side, case.CHANNELS)), jnp.zeros(1)
    init = network.init(jax.random.key(0), z, one, jnp.zeros(1, int))["params"]
    shapes = {k: v.shape for k, v in flatten_dict(init, sep=".").items()}
    flat = case.weights(shapes, sizes["hidden_size"]) | {"pos_embed": init["pos_embed"]}
    params = jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="."))

    def velocity(z, r, t, labels):
        time = (1 - t) * t_conditioning
        return -np.asarray(network.apply({"params": params}, z, time, labels, train=False))

    def save(path: pathlib.Path) -> None:
        raw = jax.tree.map(lambda a: a + 1, params) | {"pos_embed": params["pos_embed"]}
        trainer = argparse.Namespace(
            model=states.TrainState.create(network, raw, tx=optax.adam(1e-4, 0.9, 0.99)),
            model_eps=states.TrainState.create(network, params),
            config=ConfigDict({**sizes, "t_conditioning": t_conditioning}),
        )
        file = checkpoint.Checkpoint(str(path), parallel=False)
        file.set_model(trainer)
        path.mkdir()  # theirs makes a folder of the file's name first, and moves the file into it
        file.save()

    return Public(shapes, velocity, save)


BUILD: dict[str, Callable[..., Public]] = {
    "dit": dit,
    "sit": sit,
    "meanflow": meanflow,
    "meanflow_torch": meanflow_torch,
    "jax_flow": jax_flow,
}
TINY = case.TINY | {"input_size": case.SIDE, "num_classes": case.CLASSES}
