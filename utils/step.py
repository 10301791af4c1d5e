"""One step of the optimizer: TrainState, and how a batch changes it.

The objective arrives as an argument: nothing here knows what is learned. Everything random is a
function of (seed, step, position in the global batch), so a run does not depend on devices, hosts,
accumulation or interruptions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from utils import averages
from utils.optimizers import make_optimizer, updates_before
from utils.sharding import mean_gradient, state_sharding

INITIALISATION, TRAINING, SAMPLING, EVALUATION = range(4)  # streams of one seed

Objective = Callable[[Callable, Any, dict, Array], tuple[Array, dict]]


@flax.struct.dataclass
class TrainState:
    """What a run is at a step: arrays only."""

    step: Array  # () int32, steps done
    params: Any
    ema: dict[str, Any]  # {name: averaged parameters}, of utils.averages
    opt_state: Any


def stream(seed: int | Array, number: int) -> Array:
    """The key of one of a seed's streams; they never meet."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)


def init_state(config: ConfigDict, init: Callable[[Array], Any]) -> TrainState:
    """The state before the first step; `init(key)` makes the parameters."""
    optimizer, _ = make_optimizer(config)
    params = init(stream(config.seed, INITIALISATION))
    ema = averages.begin(config.ema, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_step(
    config: ConfigDict, network: Callable, objective: Objective, encode: Callable, mesh: Mesh
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Returns the jitted step (state, batch) → (state, metrics); the state given is used up.

    An update that is not finite, or whose loss or gradient is not, is left out: the state stays as
    it is but for `step`, which moves on, so that the next batch is another one.

    Args:
      encode: (moments, keys (n,)) → x.
    Returns:
      As metrics, scalars by name, `skipped` (1 where the update was left out) among them, and
      `leaf_norms` (leaves,), the gradient's norm by leaf of the parameters.
    """
    optimizer, schedule = make_optimizer(config)

    def loss(params: Any, batch: dict, key: Array):
        encode_key, key = jax.random.split(key)
        keys = jax.vmap(lambda i: jax.random.fold_in(encode_key, i))(batch["position"])
        return objective(network, params, {**batch, "x": encode(batch["x"], keys)}, key)

    def of_one_device(params: Any, batch: dict, key: Array) -> tuple[Any, dict]:
        gradient = jax.grad(lambda p, b: _with_loss(loss(p, b, key)), has_aux=True)
        return accumulate(gradient, params, microbatches(batch, config.accumulation))

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(stream(config.seed, TRAINING), state.step)
        batch = {**batch, "step": jnp.full_like(batch["position"], state.step)}
        grads, metrics = mean_gradient(of_one_device, mesh)(state.params, batch, key)
        metrics = {name: total / count for name, (total, count) in metrics.items()}
        norms = jnp.stack([optax.tree.norm(leaf) for leaf in jax.tree.leaves(grads)])
        norm = optax.tree.norm(norms)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        told = jnp.stack([metrics["loss"], norm, optax.tree.norm(updates)])
        finite = jnp.isfinite(told).all()
        params = optax.apply_updates(state.params, updates)
        count = updates_before(opt_state)
        ema = averages.update(config.ema, state.ema, params, state.step, count)
        new = TrainState(state.step + 1, params, ema, opt_state)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics |= {
            "grad_norm": norm,
            "leaf_norms": norms,
            "lr": jnp.asarray(schedule(updates_before(state.opt_state))),
            "skipped": (~finite).astype(jnp.float32),
        }
        state = dataclasses.replace(state, step=new.step)
        return jax.lax.with_sharding_constraint(state, state_sharding(mesh, state)), metrics

    return jax.jit(step, donate_argnums=0)


def _with_loss(result: tuple[Array, dict]) -> tuple[Array, dict]:
    loss, metrics = result
    return loss, {**metrics, "loss": (loss, jnp.ones_like(loss))}


def microbatches(batch: dict, count: int) -> dict:
    """(B, ...) → (count, B / count, ...)."""
    return jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)


def accumulate(gradient: Callable, params: Any, parts: dict) -> tuple[Any, dict]:
    """The mean gradient and the added metrics over microbatches, one at a time."""
    count = jax.tree.leaves(parts)[0].shape[0]
    if count == 1:
        return gradient(params, jax.tree.map(lambda a: a[0], parts))
    abstract = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)

    def add(sums: tuple, part: dict) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, gradient(params, part)), None

    grads, metrics = jax.lax.scan(add, zeros, parts)[0]
    return jax.tree.map(lambda g: g / count, grads), metrics
