"""Training that starts from parameters that are there already: `init_from`.

MeanFlow from a flow: u(z, t, t) is the flow's velocity, and u is told of r by an embedding that
has no effect until it has been trained, so at first u(z, r, t) = v(z, t); but for a flow that was
told t and r, whose r always was t and has its effect. Labels that the other network does not know
start as its null label. A second head begins as a copy of the first, so that v is u, and what is
told of guidance has no effect yet.
"""

import re
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax import Array
from jax.tree_util import Partial
from ml_collections import ConfigDict

from models.layers import GUIDANCE, sinusoids
from pipelines import build
from pipelines.flow import FlowPipeline
from pipelines.stored import read_json
from utils.cli import UserError
from utils.sharding import gathered

# Of the model, what tensors do not show, or what one line says better than their names.
FOLLOWED = (
    *("name", "prediction", "time_scale", "positions", "mlp", "norm", "qk_norm", "conditioning"),
    *("channel_multipliers", "attention_resolutions", "resample"),
)


def first(
    config: ConfigDict, network: build.Network, path: epath.Path, goes_on: bool
) -> tuple[Callable[[], Callable], dict]:
    """What gives a run's first (key → parameters), and what its card says of them.

    Args:
      path: the run's folder. goes_on: whether that holds checkpoints; if none of them is whole, the
        run begins anew, from the same parameters.
    Raises:
      UserError: as `begin`.
    """
    if not goes_on:
        init, card = begin(config, network) if config.init_from else (network.init, {})
        return lambda: init, card
    before = read_json(path / "card.json").get("initialised_from")

    def again() -> Callable:
        if before and not config.init_from:
            raise UserError(
                f"{path} began from {before['path']} and holds no whole checkpoint: give "
                f"--init_from={before['path']}, or another --workdir"
            )
        return begin(config, network)[0] if config.init_from else network.init

    return again, {"initialised_from": before} if before else {}


def begin(config: ConfigDict, network: build.Network) -> tuple[Callable[[Array], Any], dict]:
    """How to make the first parameters, from a key, and what the card says of where they come from.

    The function is a pytree: what was loaded is an argument of what is compiled, and no constant.

    Args:
      network: the one to be trained.
    Raises:
      UserError: `init_from` is no such folder, or is of a network of other sizes.
    """
    source = FlowPipeline.from_pretrained(config.init_from)
    check_alike(source, config)
    fresh = jax.eval_shape(network.init, jax.random.key(0))
    loaded = with_heads(
        jax.device_get(source.params), source.config.model.velocity_head, config.model.velocity_head
    )
    fitted = fitted_tokens if config.model.conditioning == "tokens" else fitted_condition
    loaded["condition"] = fitted(
        loaded["condition"], fresh["condition"], source.config, config.model
    )
    check_shapes(loaded, fresh, config.init_from)
    check_same(loaded)
    before = source.card.get("initialised_from") or {}
    steps, flops = (
        (source.card.get(key) or 0) + before.get(key, 0) for key in ("train_steps", "train_flops")
    )
    origin = {"path": config.init_from, "train_steps": steps, "train_flops": flops}
    there, here = (tree["condition"].get("label") for tree in (source.params, fresh))
    if jax.process_index() == 0:
        print(f"starting from {config.init_from}, after {steps:,} steps", file=sys.stderr)
        if source.config.objective == "flow_matching" and "r" in build.told(source.config.model):
            print("it was told r, which was t: at r < t nobody knows what it says", file=sys.stderr)
        if jax.tree.map(jnp.shape, there) != jax.tree.map(jnp.shape, here):
            print("its labels are others: all start as its null label", file=sys.stderr)
    return Partial(_merged(network.init), loaded), {"initialised_from": origin}


def _merged(init: Callable) -> Callable:
    """(loaded, key) → parameters: fresh ones where nothing was loaded."""

    def merge(fresh: Any, loaded: Any) -> Any:
        if not isinstance(fresh, dict):
            return jnp.asarray(loaded, fresh.dtype)
        return {k: merge(v, loaded[k]) if k in loaded else v for k, v in fresh.items()}

    return lambda loaded, key: merge(init(key), loaded)


def check_alike(source: FlowPipeline, config: ConfigDict) -> None:
    """Raises UserError where two networks differ in what their tensors do not show."""
    theirs, ours = source.config.model, config.model
    for key in FOLLOWED:
        if theirs[key] != ours[key]:
            value = theirs[key]
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(
                f"init_from={config.init_from} has model.{key}={value}: give "
                f"--model.{key}={value}, or another network"
            )
    sizes, mine = (_sizes(model, source.shape) for model in (theirs, ours))
    if changed := [key for key in sizes if sizes[key] != mine[key]]:
        given = " ".join(f"--model.{key}={sizes[key]}" for key in changed)
        key = changed[0]
        raise UserError(
            f"init_from={config.init_from} has model.{key}={sizes[key]}, this network {mine[key]}: "
            f"give {given}"
        )


def _sizes(model: ConfigDict, shape: tuple[int, ...]) -> dict[str, int]:
    """What `model.size`, or the keys, make of a network's sizes."""
    if model.name == "dit":
        return build.dit_sizes(model, shape)
    return {
        "depth": model.depth,
        "hidden_size": model.hidden_size,
        "num_heads": model.num_heads or 1,
    }


def with_heads(loaded: dict, there: int, here: int) -> dict:
    """Parameters of a network whose second head has `there` blocks, for one in which it has `here`.

    The last blocks become those of both heads; where no second head is wanted, v's go. u stays.

    Raises:
      UserError: heads of other numbers of blocks, both with a second one.
    """
    if there == here:
        return loaded
    if there and here:
        raise UserError(
            f"init_from has model.velocity_head={there}: give --model.velocity_head={there}"
        )
    kept = {k: v for k, v in loaded.items() if not k.startswith("blocks") and k != "head_v"}
    if there:
        parts = [loaded[name] for name in ("blocks", "blocks_u") if name in loaded]
        return kept | {"blocks": jax.tree.map(lambda *a: np.concatenate(a), *parts)}
    first, last = (
        jax.tree.map(lambda a, part=part: a[part], loaded["blocks"])
        for part in (slice(None, -here), slice(-here, None))
    )
    shared = {"blocks": first} if len(jax.tree.leaves(first)[0]) else {}
    return kept | shared | {"blocks_u": last, "blocks_v": last, "head_v": loaded["head"]}


def fitted_condition(loaded: dict, fresh: dict, source: ConfigDict, model: ConfigDict) -> dict:
    """The embeddings of times and labels, for a network that may be told other ones.

    What was the same for every sample becomes part of a bias; what is new gets an output of zeros.

    Args:
      loaded, fresh: parameters of `models.layers.Condition`, arrays and shapes.
      source: the config of the run that was loaded. model: of the network to be trained.
    Raises:
      UserError: the new network is not told a time that the other one needs.
    """
    given, wanted = build.told(source.model), build.told(model)
    still = {"t-r"} if source.objective == "flow_matching" else set()  # t − r was always 0
    kept = [name for name in given if name not in still]
    if missing := [name for name in kept if name not in wanted]:
        raise UserError(
            f"init_from is told {','.join(given)}: give --model.time_inputs with {missing[0]}"
        )
    constant: np.ndarray | float = sum(
        (embedded_at(loaded[f"time_{name}"], 0) for name in still & set(given)), 0.0
    )
    fitted = {f"time_{name}": loaded[f"time_{name}"] for name in kept}
    told = [name for name in GUIDANCE if name in fresh]
    fitted |= {name: loaded[name] for name in told if name in loaded}
    for name in [f"time_{name}" for name in wanted] + told:
        if name not in fitted:
            fitted[name] = {"out": {k: np.zeros(v.shape) for k, v in fresh[name]["out"].items()}}
    if "omega" in loaded and not told:  # as without guidance
        unguided = zip(GUIDANCE, (0, 0, 1), strict=True)
        constant += sum(embedded_at(loaded[name], value) for name, value in unguided)
    width = len(loaded[f"time_{given[0]}"]["out"]["bias"])
    table = loaded["label"]["embedding"] if "label" in loaded else np.zeros((1, width))
    if "label" not in fresh:
        constant = constant + table[-1]
    else:
        shape = fresh["label"]["embedding"].shape
        other = len(table) != shape[0]
        fitted["label"] = {"embedding": np.repeat(table[-1:], shape[0], 0) if other else table}
    first = fitted[f"time_{kept[0]}"]
    out = {**first["out"], "bias": first["out"]["bias"] + constant}
    return fitted | {f"time_{kept[0]}": {**first, "out": out}}


def fitted_tokens(loaded: dict, fresh: dict, source: ConfigDict, model: ConfigDict) -> dict:
    """The same for what is told by tokens, of which there must be as many: each has its effect.

    Raises:
      UserError: the new network is told something else.
    """
    told = build.told(source.model)
    words = {"time_inputs": ",".join(told), "guidance_inputs": source.model.guidance_inputs}
    ours = {"time_inputs": ",".join(build.told(model)), "guidance_inputs": model.guidance_inputs}
    for key, value in words.items():
        if ours[key] != value:
            raise UserError(
                f"init_from has model.{key}={value}, told by tokens: give --model.{key}={value}"
            )
    if ("label" in loaded) != ("label" in fresh):
        raise UserError(
            "init_from and this data set must both have labels, or neither: they are told by "
            "tokens; give another --init_from"
        )
    fitted = dict(loaded)
    if source.objective == "flow_matching" and "t-r" in told:  # t − r was always 0
        embedder, tokens = loaded["time_t-r"], "time_t-r_tokens"
        fitted["time_t-r"] = {"out": {k: np.zeros(v.shape) for k, v in embedder["out"].items()}}
        fitted[tokens] = loaded[tokens] + embedded_at(embedder, 0)
    if "label" in fresh and fresh["label"]["embedding"].shape != loaded["label"]["embedding"].shape:
        count = len(fresh["label"]["embedding"])
        fitted["label"] = {"embedding": np.repeat(loaded["label"]["embedding"][-1:], count, 0)}
    return fitted


def embedded_at(embedder: dict, value: float) -> np.ndarray:
    """What `models.layers.TimeEmbedder` makes of a time, (hidden_size,)."""
    first, second = embedder["in"], embedder["out"]
    h = sinusoids(jnp.full(1, value))[0] @ first["kernel"] + first["bias"]
    return np.asarray(jax.nn.silu(h) @ second["kernel"] + second["bias"])


def check_same(loaded: Any) -> None:
    """Raises UserError, on all processes, where they loaded different parameters."""
    crc = 0
    for leaf in jax.tree.leaves(loaded) if jax.process_count() > 1 else ():
        crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    if len(set(gathered(crc >> 1))) > 1:  # int32
        raise UserError("init_from holds other parameters on another host: give all the same")


def check_shapes(loaded: Any, fresh: Any, path: str) -> None:
    """Raises UserError, naming the first, where tensors do not fit those of a fresh network."""
    found, wanted = (
        {k: v.shape for k, v in flatten_dict(tree, sep=".").items()} for tree in (loaded, fresh)
    )
    wrong = [k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
    fresh_layers = re.compile(r"condition\..*\.in\.")  # of what is told anew
    wrong = [k for k in wrong if k in found or not fresh_layers.match(k)]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"init_from={path} is another network: {name} is {found.get(name)} there and "
            f"{wanted.get(name)} here; give this one its sizes (see its config.json)"
        )
