"""What a recipe needs on a TPU pod, from the TPU's own compiler, on any CPU machine.

    pip install "jax[tpu]"    # the compiler comes in the package libtpu; no TPU is needed
    python benchmarks/tpu_compile.py --topology=v5e:2x2 \\
        --config=configs/imagenet256.py:meanflow_b4 --mesh.fsdp=4
    python benchmarks/tpu_compile.py --topology=v5e:8x8 --what=step,sampler,decoder,inception \\
        --config=configs/imagenet256.py:meanflow_xl2 --mesh.fsdp=8 --model.remat=full \\
        --json=out.jsonl
    python benchmarks/tpu_compile.py --topology=cpu:8 --config=configs/imagenet256.py:meanflow_b4
    python benchmarks/tpu_compile.py --table=out.jsonl    # the table of docs/devices.md

Compiles the programs that the scripts run (nothing stands in for them but shapes for weights and
data) for a topology of devices that are not there, and prints, per chip:

- bytes by kind. Arguments are parameters, averages, optimizer state and batch; "padding" is what
  the chip's tiles add to them. Outputs that take an argument's place (aliased) cost nothing. The
  sum stands beside the chip's memory (HBM); stay below 80 %, as the runtime needs some, too.
- FLOPs: of the model (counted in the jaxpr; no recomputation), of all chips as the program runs
  them (with it), and as XLA counts (each loop's body once).
- collectives: kind, count (in a loop, times its turns), bytes of the whole arrays concerned, and
  whether they are FSDP's, gathers of parameters and sums of gradients, or others.

Topologies are GENERATION:XxY or XxYxZ, counting chips: v5e and v6e have two axes, v4 and v5p three,
each with 2 to a host on the first two, as v5e:2x2, v5e:8x8 (v5e-64), v6e:4x4, v4:2x2x4 (v4-32),
v5p:2x2x4 (v5p-32). A v4 chip shows two devices: their bytes are added. cpu:N is N virtual devices
of this machine. Options of the config are those of the training scripts: --model.remat=full,
--mesh.fsdp=8, --batch_size=512. What cannot be learnt here is time.
"""

import json
import os
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# What was compiled for a topology cannot be read back.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, config_flags

from benchmarks import programs, timing
from flows.samplers import grid_of
from models import autoencoder as autoencoders
from models import inception
from pipelines import build
from pipelines.flow import make_sampler, noise_of, numbers_of
from pipelines.plan import Plan
from utils import cli, flops
from utils.cli import UserError
from utils.sharding import (
    AXES,
    batch_sharding,
    make_mesh,
    mesh_sizes,
    replicated,
)

GIB = 2**30


class Chip(NamedTuple):
    """HBM in GiB and peak bf16 TFLOP/s, from the makers' pages."""

    hbm: float
    peak: float


CHIPS = {
    "v4": Chip(32, 275),
    "v5e": Chip(16, 197),
    "v5p": Chip(95, 459),
    "v6e": Chip(32, 918),
}
GPUS = {"H100": Chip(80e9 / GIB, 989), "H200": Chip(141e9 / GIB, 989)}

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "As v5e:8x8; or cpu:8. See above.")
WHAT = flags.DEFINE_list("what", ["step"], "Of step, sampler, decoder, inception.")
CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:variant].")
OBJECTIVE = flags.DEFINE_enum(
    "objective", "mean_flow", list(programs.OBJECTIVES), "What is trained."
)
JSON = flags.DEFINE_string("json", "", "A file to which a JSON line per result is added.")
TABLE = flags.DEFINE_string("table", "", "Such a file: prints its table and compiles nothing.")


def main(_) -> None:
    """Compiles and prints, or prints the table."""
    if TABLE.value:
        print(table(read(pathlib.Path(TABLE.value))))
        return
    unknown = [name for name in WHAT.value if name not in PROGRAMS]
    if unknown or not WHAT.value:
        raise UserError(f"--what={','.join(WHAT.value)}: of {', '.join(PROGRAMS)}")
    name = next((w[len("--config=") :] for w in sys.argv if w.startswith("--config=")), "")
    overrides = [w.removeprefix("--config.") for w in sys.argv if w.startswith("--config.")]
    config = CONFIG.value
    build.check_ranges(config)
    timing.add_lines(JSON.value, [])
    devices = abstract_devices(TOPOLOGY.value)
    mesh = mesh_of(config, devices)
    for what in WHAT.value:
        found = {"config": name, "overrides": overrides} | measure(what, config, mesh)
        print(told(found), flush=True)
        timing.add_lines(JSON.value, [found])


def abstract_devices(topology: str) -> list:
    """The devices of a topology, without the machine.

    Raises:
      UserError: no such topology, or no compiler for it.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdecimal() and 0 < int(shape) <= 1024:
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices("cpu")
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise UserError(f"--topology={topology}: as v5e:2x2, of {', '.join(CHIPS)}, or cpu:8")
    return programs.tpu_devices(topology, "--topology=cpu:8")


def mesh_of(config: ConfigDict, devices: list) -> Mesh:
    """The mesh of the config; on v4, whose cores show apart here, in the devices' order."""
    if TOPOLOGY.value.startswith("v4"):
        sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, len(devices))
        return Mesh(np.reshape(devices, sizes), AXES)
    return make_mesh(config.mesh.data, config.mesh.fsdp, devices)


# Programs: what is compiled, on shapes.


class Program(NamedTuple):
    """A jitted function, its abstract arguments by kind, and the parameters that FSDP splits."""

    function: Callable
    arguments: dict[str, Any]
    static: tuple = ()
    params: Any = None
    model_flops: Callable[[], int] | None = None


def platform() -> str:
    """What the programs are for, as JAX calls it."""
    return "cpu" if TOPOLOGY.value.startswith("cpu") else "tpu"


def step_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The training step, with moments of latents or pictures as they are stored."""
    programs.stored(config, embedded=False)
    made = programs.step(config, OBJECTIVE.value, mesh, platform())
    state, batch = made.arguments
    return Program(
        made.function, {"state": state, "batch": batch}, (), state.params, lambda: made.flops
    )


def sampler_program(config: ConfigDict, mesh: Mesh) -> Program:
    """A batch of samples in the most steps of --sample.steps, at --sample.guidance."""
    _, classes = programs.stored(config, embedded=False)
    shape = programs.seen(config)
    network = build.network(config, shape, classes, platform())
    params = programs.on(replicated(mesh), jax.eval_shape(network.init, jax.random.key(0)))
    index = jax.ShapeDtypeStruct((samples(mesh),), jnp.int32, sharding=batch_sharding(mesh))
    noise, keys = programs.on(batch_sharding(mesh), jax.eval_shape(noise_of(shape), 0, index))
    guidance = config.sample.guidance
    arguments = {
        "params": params,
        "autoencoder": autoencoders.points(),
        "label": index,
        "noise": noise,
        "keys": keys,
        "numbers": numbers_of(grid_of(max(config.sample.steps)), guidance),
    }
    sampler = "meanflow" if OBJECTIVE.value == "mean_flow" else "euler"
    static = (sampler, guidance != 1, False)
    return Program(make_sampler(network, shape), arguments, static)


def decoder_program(config: ConfigDict, mesh: Mesh) -> Program:
    """Latents to pictures."""
    programs.stored(config, embedded=False)
    codec, shape = (
        programs.codec(config, devices=mesh.size),
        (samples(mesh), *programs.seen(config)),
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
    decode = programs.on(replicated(mesh), codec.decode)
    return Program(jax.jit(lambda decode, x: decode(x)), {"params": decode, "latents": x})


def inception_program(config: ConfigDict, mesh: Mesh) -> Program:
    """Pictures to Inception's features, in FID's resize."""
    picture = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    weights = jax.eval_shape(inception.Inception().init, jax.random.key(0), picture)
    shape = (samples(mesh), config.image_size, config.image_size, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))
    apply = jax.jit(lambda weights, x: inception.Inception().apply(weights, inception.tf(x)))
    return Program(apply, {"params": programs.on(replicated(mesh), weights), "pictures": x})


def samples(mesh: Mesh) -> int:
    """An evaluation's batch, a multiple of the devices."""
    return -(-Plan().batch_size // mesh.size) * mesh.size


PROGRAMS = {
    "step": step_program,
    "sampler": sampler_program,
    "decoder": decoder_program,
    "inception": inception_program,
}


# What the compiler says.


def measure(what: str, config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Compiles a program; returns what there is to say, as JSON holds it."""
    program, start = PROGRAMS[what](config, mesh), time.monotonic()
    arguments = (*program.arguments.values(), *program.static)
    print(f"compiling the {what} for {TOPOLOGY.value}, which may take minutes", file=sys.stderr)
    try:
        compiled = program.function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        told = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in told:
            raise
        raise UserError(
            f"the {what} does not fit ({told}): more chips, a larger --mesh.fsdp, "
            "--model.remat=full, or --accumulation=2"
        ) from error
    seconds = time.monotonic() - start
    kind, devices = TOPOLOGY.value.partition(":")[0], mesh.devices.ravel()
    chips = len({tuple(d.coords) for d in devices}) if kind in CHIPS else len(devices)
    each = len(devices) // chips
    n = config.batch_size if what == "step" else samples(mesh)
    return {
        "what": what,
        "objective": OBJECTIVE.value,
        "topology": TOPOLOGY.value,
        "kind": kind,
        "chips": chips,
        "devices_per_chip": each,
        "hbm": CHIPS[kind].hbm * GIB if kind in CHIPS else None,
        "mesh": dict(mesh.shape),
        "batch_size": n,
        "max_steps": config.max_steps,
        "bytes": {k: v * each for k, v in bytes_of(program, compiled).items()},
        "model_flops": program.model_flops() if program.model_flops else None,
        "flops": flops_of(program, arguments, mesh),
        "xla_flops_per_device": float((compiled.cost_analysis() or {}).get("flops", 0)),
        "collectives": collectives(compiled.as_text(), fsdp_shapes(program.params)),
        "compile_seconds": round(seconds, 1),
    }


def flops_of(program: Program, arguments: tuple, mesh: Mesh) -> int:
    """FLOPs of all devices as the program runs; a step's jaxpr is that of one device."""
    fixed = len(arguments) - len(program.static)
    bound = partial(_with_static, program.function, arguments[fixed:])
    return flops.count(bound, *arguments[:fixed]) * (mesh.size if program.params else 1)


def _with_static(function: Callable, static: tuple, *arguments: Any) -> Any:
    return function(*arguments, *static)


def bytes_of(program: Program, compiled: Any) -> dict[str, int]:
    """Bytes of a device: arguments by kind, then what the compiler adds."""
    kinds = dict(program.arguments)
    state = kinds.pop("state", None)
    if state is not None:
        kinds = {"parameters": state.params, "ema": state.ema, "optimizer": state.opt_state} | kinds
    found = {kind: sum(map(share, jax.tree.leaves(tree))) for kind, tree in kinds.items()}
    stats = compiled.memory_analysis()
    found["padding"] = stats.argument_size_in_bytes - sum(found.values())
    found["outputs"] = stats.output_size_in_bytes
    found["temporaries"] = stats.temp_size_in_bytes
    found["code"] = stats.generated_code_size_in_bytes
    found["aliased"] = -stats.alias_size_in_bytes
    return found | {"sum": sum(found.values())}


def share(leaf: Any) -> int:
    """Bytes of a device's part of an abstract array."""
    shape = getattr(leaf, "shape", ())
    place = getattr(leaf, "sharding", None)
    part = place.shard_shape(shape) if isinstance(place, NamedSharding) else shape
    count = 1
    for size in part:
        count *= size
    return count * getattr(leaf, "dtype", np.dtype(np.int32)).itemsize


# Collectives, read from the optimised HLO's text.

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
KINDS += ("ragged-all-to-all", "collective-broadcast")
OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
WIDTH = re.compile(r"\d+")


def fsdp_shapes(params: Any) -> set[tuple[int, ...]]:
    """The shapes, sides in order, of parameters, of their parts, and of the parts side by side."""
    found = set()
    for leaf in jax.tree.leaves(params):
        part = leaf.sharding.shard_shape(leaf.shape)
        for shape in (leaf.shape, part, (leaf.size // int(np.prod(part)), *part)):
            found |= {squeezed(shape), squeezed(shape[1:])}
    return found


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of a shape, by size, without ones: what transposing leaves as it is."""
    return tuple(sorted(size for size in shape if size > 1))


def collectives(text: str, wanted: set[tuple[int, ...]]) -> list[dict[str, Any]]:
    """The collectives of a program, added up by kind and by whether they are FSDP's."""
    bodies = computations(text)
    turns = times_run(bodies)
    found: dict[tuple[str, bool], list] = {}
    chains: set[str] = set()
    for name, lines in bodies.items():
        for line in lines:
            match = OPERATION.search(line)
            chain = re.search(r'chain_id="\d+"', line)  # one collective, in pieces between others
            if match and turns[name] and not (chain and chain[0] in chains):
                chains |= {chain[0]} if chain else set()
                for dims, size in arrays(match, line):
                    key = match[2], dims != () and squeezed(dims) in wanted
                    row = found.setdefault(key, [0, 0, 0, ()])
                    row[0] += turns[name]
                    row[1] += turns[name] * size
                    row[2:] = max((row[2], row[3]), (size, dims))
    return [
        {
            "kind": kind,
            "fsdp": ours,
            "count": count,
            "bytes": total,
            "largest": most,
            "shape": shape,
        }
        for (kind, ours), (count, total, most, shape) in sorted(found.items())
    ]


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation by its name; the entry's is ""."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            lines = found.setdefault("" if header[1] else header[2], [])
        elif line.startswith("  "):
            lines.append(line)
    return found


def times_run(bodies: dict[str, list[str]]) -> Counter:
    """How often each computation runs: a loop's body as often as it turns."""
    calls = {name: list(called(lines, bodies)) for name, lines in bodies.items()}
    turns = Counter({"": 1})
    waiting = [("", 1)]
    while waiting:
        name, count = waiting.pop()
        for inner, times in calls[name]:
            turns[inner] += count * times
            waiting.append((inner, count * times))
    return turns


def called(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """The computations that instructions call, and how often."""
    for line in lines:
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        times = int(trips[1]) if trips and " while(" in line else 1
        for inner in set(NAME.findall(line)) & bodies.keys():
            yield inner, times


def arrays(match: re.Match, line: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shape and bytes of each whole array of a collective: gathered, or before it is scattered."""
    result = match[1]
    if match[3] and match[2] != "all-reduce":  # (operands, results, …) of one that is in flight
        found = ARRAY.findall(result)
        found = found[len(found) // 2 :] if match[2] == "all-gather" else found[:1]
    else:
        found = ARRAY.findall(result)
    factor = group_size(line) if match[2] == "reduce-scatter" else 1
    for dtype, dims in found:
        shape = tuple(map(int, dims.split(","))) if dims else ()
        bits = int(WIDTH.search(dtype)[0]) if WIDTH.search(dtype) else 8
        size = bits * factor // 8
        for side in shape:
            size *= side
        yield shape, size


def group_size(line: str) -> int:
    """The devices that take part in a collective together."""
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return int(iota[1]) if iota else len(listed[1].split(",")) if listed else 1


# For readers.


def told(found: dict[str, Any]) -> str:
    """A result as lines of text."""
    mesh, sizes = found["mesh"], found["bytes"]
    lines = [
        f"{found['what']} of {found['config']} {' '.join(found['overrides'])}".rstrip(),
        f"  {found['topology']}, {found['chips']} chips, mesh data {mesh['data']} x fsdp "
        f"{mesh['fsdp']}, {found['batch_size']} samples, compiled in {found['compile_seconds']} s",
        "  GiB per chip: "
        + ", ".join(f"{kind} {size / GIB:.3f}" for kind, size in sizes.items() if kind != "sum"),
    ]
    of = f" of {found['hbm'] / GIB:g}, {sizes['sum'] / found['hbm']:.0%}" if found["hbm"] else ""
    lines.append(f"  sum: {sizes['sum'] / GIB:.2f} GiB per chip{of}")
    model = f"model {found['model_flops'] / 1e12:.2f} T, " if found["model_flops"] else ""
    lines.append(
        f"  FLOPs: {model}run {found['flops'] / 1e12:.2f} T on all chips, by XLA's count "
        f"{found['xla_flops_per_device'] / 1e12:.3f} T on a device (loops' bodies once)"
    )
    for row in found["collectives"]:
        whose = "FSDP's" if row["fsdp"] else "others"
        largest = "x".join(map(str, row["shape"])) or "a scalar"
        lines.append(
            f"  {row['kind']}, {whose}: {row['count']} arrays, {row['bytes'] / 2**20:.2f} MiB, "
            f"the largest {row['largest'] / 2**20:.3f}, {largest}"
        )
    return "\n".join(lines if found["collectives"] else [*lines, "  no collectives"])


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The results in a file of JSON lines.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"--table={path}: no file of results ({error}); make it by --json"
        ) from error


MOST = 0.8  # of the memory; the rest is the runtime's and the data's
SHARE_OF_PEAK = 0.4


def table(rows: list[dict[str, Any]]) -> str:
    """The tables of docs/devices.md: what was compiled, GPU nodes, and what a run costs."""
    latest = {key(row): row for row in rows}
    steps = [row for row in latest.values() if row["what"] == "step" and row["hbm"]]
    others = [row for row in latest.values() if row["what"] != "step" and row["hbm"]]
    leanest = {recipe(row): row for row in sorted(steps, key=per_sample, reverse=True)}
    by_recipe = [leanest[name] for name in sorted(leanest)]
    return "\n\n".join(
        [
            timing.markdown(COMPILED, map(compiled_row, sorted(steps, key=recipe))),
            timing.markdown(PARTS, map(part_row, others)),
            timing.markdown(ON_GPUS, (gpu_row(row, gpu) for row in by_recipe for gpu in GPUS)),
            timing.markdown(COSTS, map(cost_row, by_recipe)),
        ]
    )


COMPILED = ("recipe", "slice", "mesh, data × fsdp", "keys", "state", "temporaries", "sum", "of HBM")
COMPILED += ("fits", "FSDP's", "others, largest")
PARTS = ("program", "recipe", "slice", "weights", "temporaries", "sum", "of HBM", "collectives")
ON_GPUS = ("recipe", "node", "keys", "state", "temporaries", "sum", "of memory", "fits")
COSTS = ("recipe", "steps", "FLOPs a step", *CHIPS, *GPUS)


def key(row: dict[str, Any]) -> tuple:
    """What a later result takes the place of."""
    options = tuple(sorted(row["overrides"]))
    return row["what"], row["objective"], row["config"], row["topology"], options


def recipe(row: dict[str, Any]) -> str:
    """The config's file and variant, and what is trained."""
    file, _, variant = pathlib.PurePath(row["config"]).name.partition(":")
    return f"{file.removesuffix('.py')} {variant or row['objective']}"


def keys_of(row: dict[str, Any]) -> str:
    """The options given, but for the mesh, which has a column."""
    given = [word for word in row["overrides"] if not word.startswith("mesh.")]
    return " ".join(f"`--{word.removesuffix('=true')}`" for word in given)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}"


def state_of(row: dict[str, Any]) -> float:
    """Bytes of parameters, averages and optimizer state, on a chip."""
    return sum(row["bytes"][kind] for kind in ("parameters", "ema", "optimizer"))


def per_sample(row: dict[str, Any]) -> float:
    """Bytes of temporaries for each sample that a chip has in a step."""
    return row["bytes"]["temporaries"] * row["chips"] / row["batch_size"]


def compiled_row(row: dict[str, Any]) -> list[str]:
    """A step on a slice."""
    sizes, used = row["bytes"], row["bytes"]["sum"] / row["hbm"]
    crossing = sum(c["bytes"] for c in row["collectives"] if c["fsdp"])
    largest = max([c["largest"] for c in row["collectives"] if not c["fsdp"]], default=0)
    return [
        recipe(row),
        f"{row['topology']}, {row['chips']} chips",
        f"{row['mesh']['data']} × {row['mesh']['fsdp']}",
        keys_of(row),
        gib(state_of(row)),
        gib(sizes["temporaries"]),
        gib(sizes["sum"]),
        f"{used:.0%}",
        "yes" if used < MOST else "no",
        f"{gib(crossing)} a step",
        f"{largest / 1024:.1f} KiB",
    ]


def part_row(row: dict[str, Any]) -> list[str]:
    """A sampler, decoder or Inception on a slice."""
    sizes = row["bytes"]
    used = f"{sizes['sum'] / row['hbm']:.0%}"
    weights, temporaries = gib(sizes["params"]), gib(sizes["temporaries"])
    crossing = gib(sum(c["bytes"] for c in row["collectives"])) if row["collectives"] else "none"
    return [row["what"], recipe(row), row["topology"], weights, temporaries, gib(sizes["sum"]),
            used, crossing]  # fmt: skip


def gpu_row(row: dict[str, Any], gpu: str) -> list[str]:
    """An estimate for a node of 8: an eighth of the state, temporaries by samples per chip.

    Twice those of the slice, as a TPU rounds what float32 products keep to bfloat16.
    """
    whole = state_of(row) * row["mesh"]["fsdp"] / row["devices_per_chip"]
    temporaries = 2 * per_sample(row) * row["batch_size"] / 8
    total, memory = whole / 8 + temporaries, GPUS[gpu].hbm * GIB
    fits = "yes" if total < MOST * memory else "with more --accumulation or --model.remat=full"
    return [recipe(row), f"8 × {gpu}", f"`--mesh.fsdp=8` {keys_of(row)}".rstrip(), gib(whole / 8),
            gib(temporaries), gib(total), f"{total / memory:.0%}", fits]  # fmt: skip


def cost_row(row: dict[str, Any]) -> list[str]:
    """Chip-hours of the whole run."""
    whole = row["model_flops"] * row["max_steps"]
    hours = [whole / (SHARE_OF_PEAK * c.peak * 1e12) / 3600 for c in (CHIPS | GPUS).values()]
    cells = [f"{h:,.0f}" for h in hours]
    return [recipe(row), f"{row['max_steps']:,}", f"{row['model_flops']:.3g}", *cells]


if __name__ == "__main__":
    cli.run(main)
