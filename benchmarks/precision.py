"""How far u and du/dt in bfloat16 lie from float32, and what each choice keeps in memory.

    python benchmarks/precision.py [--workdir=RUN,RUN] [--json=out.jsonl]    # a minute of a CPU
    python benchmarks/precision.py --size= --kept= --workdir=pretrained/digits_mean_flow

Errors: B/4 (--size) with every weight drawn from N(0, 0.02²), the ones that start at zero included,
since with those at zero du/dt is 0; then each run of MeanFlow given, after its training. Errors are
relative, ‖found − right‖ / ‖right‖ over a batch, against float32 with products as precise as the
device has them (on CPUs that is what float32 is; GPUs and TPUs round what they multiply):

- u(z, r, t); du/dt along (v, 0, 1), by jax.jvp; and what MeanFlow regresses on, v − (t − r)·du/dt.
- z lies between noise and the network's own samples in --steps steps (normal numbers for the drawn
  weights), t uniform in [0, 1], r uniform below it.

Memory: GiB that --batch_size samples keep of the forward pass for the backward pass at each size
of --kept, by type and by model.remat, counted in the jaxpr. "of it attention" are the arrays of
tokens × tokens, its scores, which attention in XLA keeps and the others do not.

Prints Markdown tables; docs/precision.md has them.
"""

import dataclasses
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from absl import flags
from jax import Array
from jax.extend.core import Literal

from benchmarks import timing
from flows.guidance import guided_velocity
from flows.samplers import sample, uniform_grid
from models.dit import SIZES, DiT
from pipelines import build
from pipelines.flow import FlowPipeline
from utils import cli
from utils.cli import UserError

SIZE = flags.DEFINE_string("size", "B/4", "Of the network with drawn weights; empty: none.")
WORKDIR = flags.DEFINE_list("workdir", [], "Runs of MeanFlow, or exported models.")
NUM = flags.DEFINE_integer("num", 16, "Samples.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 4, "Of the samples that z is made of.", lower_bound=1)
KEPT = flags.DEFINE_list("kept", ["B/4", "B/2", "XL/2"], "Sizes whose memory is counted.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Samples that memory is for.", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "A file to which a JSON line per row is added.")
CHOICES = {  # products, residual stream
    ("float32", "float32"): "float32",
    ("bfloat16", "float32"): "bfloat16, residual stream float32",
    ("bfloat16", "bfloat16"): "bfloat16",
}
SIZES_HEAD = """
| GiB kept | computed in | none | of it attention | dots | full |
| --- | --- | --- | --- | --- | --- |"""
HEAD = "| network | computed in | u | du/dt | v − (t − r) du/dt |\n| --- | --- | --- | --- | --- |"


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with its parameters, and where it is looked at.

    inputs: z (n, height, width, channels), r (n,), t (n,); v: as z; label: (n,) int32.
    """

    name: str
    module: DiT
    params: Any
    inputs: tuple[Array, Array, Array]
    v: Array
    label: Array


def main(_) -> None:
    """Measures and prints."""
    timing.add_lines(JSON.value, [])  # mistakes before anything is measured
    for size in filter(None, [SIZE.value, *KEPT.value]):
        known(size)
    for path in WORKDIR.value:
        FlowPipeline.describe(path)
    print(f"\n{hardware()}\n\n{HEAD}", flush=True)
    for case in cases():
        for row in rows(case):
            errors = " | ".join(f"{row[key]:.3%}" for key in ("u", "du_dt", "target"))
            print(f"| {row['network']} | {row['computed_in']} | {errors} |", flush=True)
            write(row)
    print(SIZES_HEAD)
    for row in (memory(known(size), types) for size in KEPT.value for types in CHOICES):
        sizes = " | ".join(f"{row[key]:.1f}" for key in ("none", "attention", "dots", "full"))
        print(f"| {row['size']} | {row['computed_in']} | {sizes} |", flush=True)
        write(row)


def write(row: dict[str, Any]) -> None:
    """Adds a row to the file of --json."""
    timing.add_lines(JSON.value, [row | {"hardware": hardware()}])


def known(size: str) -> str:
    """The size.

    Raises:
      UserError: there is none of the name.
    """
    if size not in SIZES:
        raise UserError(f"no size {size!r}: one of {', '.join(SIZES)}, or empty for none")
    return size


def hardware() -> str:
    """One line: device and versions."""
    device = jax.devices()[0].device_kind
    machine, python = platform.machine(), platform.python_version()
    return f"{device} ({machine}), Python {python}, jax {jax.__version__}"


def cases() -> Iterator[Case]:
    """What the options name.

    Raises:
      UserError: an unknown size, or a run that is none of MeanFlow on pictures.
    """
    if SIZE.value:
        yield drawn(known(SIZE.value), NUM.value)
    for path in WORKDIR.value:
        yield trained(path, NUM.value, STEPS.value)


def drawn(size: str, n: int) -> Case:
    """ImageNet's network of a size, on latents 32 × 32 × 4, every weight from N(0, 0.02²)."""
    module = DiT(**SIZES[size], num_classes=1000)
    inputs, v, label = points(jax.random.normal(jax.random.key(0), (n, 32, 32, 4)), 1000)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, label)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.02 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return Case(f"{size}, weights N(0, 0.02²)", module, tree.unflatten(drawn), inputs, v, label)


def trained(path: str, n: int, steps: int) -> Case:
    """A run's network, on its own samples.

    Raises:
      UserError: it is no MeanFlow on pictures.
    """
    pipeline = FlowPipeline.from_pretrained(path)
    model, shape, classes = pipeline.config.model, pipeline.shape, pipeline.num_classes
    if not pipeline.averages or model.name != "dit":
        raise UserError(f"--workdir={path}: give a run of train_meanflow.py on pictures")
    module = DiT(
        **build.dit_sizes(model, shape),
        num_classes=classes,
        mlp_ratio=model.mlp_ratio,
        time_inputs=model.time_inputs,
    )
    noise = jax.random.normal(jax.random.key(2), (n, *shape))
    label = jnp.arange(n) % max(classes, 1)
    network = pipeline.network
    velocity = guided_velocity(
        network.apply, pipeline.params, label, network.null_label, 1.0, (0.0, 1.0)
    )
    x = sample(velocity, noise, uniform_grid(steps))
    return Case(pathlib.Path(path).name, module, pipeline.params, *points(x, classes))


def points(x: Array, classes: int) -> tuple[tuple[Array, Array, Array], Array, Array]:
    """Data (n, ...) → (z, r, t), v and labels."""
    n = len(x)
    keys = jax.random.split(jax.random.key(3), 3)
    noise = jax.random.normal(keys[0], x.shape)
    t = jax.random.uniform(keys[1], (n,))
    r = t * jax.random.uniform(keys[2], (n,))
    z = x + jnp.expand_dims(t, (1, 2, 3)) * (noise - x)
    return (z, r, t), noise - x, jnp.arange(n) % max(classes, 1)


def rows(case: Case) -> Iterator[dict[str, Any]]:
    """One for each of CHOICES, with its errors."""
    with jax.default_matmul_precision("highest"):
        right = outputs(case, jnp.float32, jnp.float32)
    for (products, residual), computed_in in CHOICES.items():
        found = outputs(case, jnp.dtype(products), jnp.dtype(residual))
        errors = {key: error(found[key], right[key]) for key in right}
        yield {"network": case.name, "computed_in": computed_in} | errors


def outputs(case: Case, products: Any, residual: Any) -> dict[str, Array]:
    """u, du/dt and MeanFlow's target of a case, computed in these types."""
    module = case.module.clone(dtype=products, residual_dtype=residual)

    def network(z: Array, r: Array, t: Array) -> Array:
        return module.apply({"params": case.params}, z, r, t, case.label, None)

    _, r, t = case.inputs
    tangents = case.v, jnp.zeros_like(r), jnp.ones_like(t)
    derivative: Callable = jax.jit(lambda inputs: jax.jvp(network, inputs, tangents))
    u, du_dt = derivative(case.inputs)
    return {"u": u, "du_dt": du_dt, "target": case.v - jnp.expand_dims(t - r, (1, 2, 3)) * du_dt}


def error(found: Array, right: Array) -> float:
    """‖found − right‖ / ‖right‖, over all."""
    return float(jnp.linalg.norm(found - right) / jnp.linalg.norm(right))


def memory(size: str, types: tuple[str, str]) -> dict[str, Any]:
    """GiB kept without remat, of it by attention, and with each kind of remat."""
    products, residual = map(jnp.dtype, types)
    module = DiT(**SIZES[size], num_classes=1000, dtype=products, residual_dtype=residual)
    found = {"size": size, "computed_in": CHOICES[types], "batch_size": BATCH_SIZE.value}
    found["none"], found["attention"] = kept(module, BATCH_SIZE.value)
    return found | {
        remat: kept(module.clone(remat=remat), BATCH_SIZE.value)[0] for remat in ("dots", "full")
    }


def kept(module: DiT, n: int) -> tuple[float, float]:
    """GiB of what `jax.vjp` returns beside its inputs, and of those that are tokens × tokens."""

    def pullback(params: Any, *inputs: Array) -> Callable:
        return jax.vjp(lambda params: module.apply(params, *inputs), params)[1]

    z, t = (
        jax.ShapeDtypeStruct((n, 32, 32, 4), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.float32),
    )
    inputs = z, t, t, jax.ShapeDtypeStruct((n,), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    jaxpr = jax.make_jaxpr(pullback)(params, *inputs).jaxpr
    made = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - set(jaxpr.invars)
    tokens = (32 // module.patch_size) ** 2
    pairs = [v for v in made if _several(v.aval.shape)[2:][-2:] == (tokens, tokens)]
    size, of_it = (
        sum(v.aval.size * v.aval.dtype.itemsize for v in group) for group in (made, pairs)
    )
    return size / 2**30, of_it / 2**30


def _several(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its axes of length 1."""
    return tuple(size for size in shape if size > 1)


if __name__ == "__main__":
    cli.run(main)
