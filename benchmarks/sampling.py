"""How fast samples are drawn: the whole sampler as one program, and beside it decode and features.

    python benchmarks/sampling.py       # a small network, two CPU cores, below two minutes
    python benchmarks/sampling.py --size=B/2,XL/2 --batch_size=256 --dtype=bfloat16 --steps=1,2,4 \\
        --guidance=1,2 --decode=float32,bfloat16 --features --json=sampling.jsonl   # a GPU or TPU
    python benchmarks/sampling.py --size=S/2 --image_size=32 --batch_size=1 --guidance=1 \\
        --steps=1 --decode=float32 --features --rounds=2     # all of it on a CPU, some minutes
    python benchmarks/sampling.py --size=B/2 --steps=50 --sampler=euler,heun --guidance=1,4
    python benchmarks/sampling.py --size=B/2,XL/2 --batch_size=256 --count       # any machine

Every combination of the options is a row. Weights are random: speed does not care. Latents are
those of 256 × 256 pictures with 1000 classes; --config names another config, whose keys work as in
training.

- `nfe`: network calls per sample; a guided step makes two, in one doubled batch.
- `ms`, `img_s`: of a batch from its noise to what `decode` and `features` name: latents, pictures
  (by an autoencoder of Stable Diffusion's sizes, computing in that type), features (Inception).
  The median of --rounds blocks of about --seconds each, all rows of a size in turns.
- `sampler_share`, `decode_share`, `features_share`: of the sum of the parts' own times, each
  measured by itself in the same rounds.
- `of_unguided`: ms as a ratio to the same row at guidance 1, a median over rounds.
- `flops`: of the network in all steps. `temp_bytes`: of the sampler's program on a device, beside
  its arguments.

--count compiles and counts, on shapes alone. A row that does not fit says so.
"""

import functools
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks import programs, timing
from flows.samplers import SAMPLERS
from models import autoencoder as autoencoders
from models import inception
from pipelines import build
from pipelines.flow import FlowPipeline, noise_of, numbers_of
from utils import cli
from utils.cli import UserError
from utils.sharding import batch_sharding, make_mesh, replicated

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:variant].")
SIZE = flags.DEFINE_list("size", [], "As B/2,XL/2; none: the config's, B/2 or on CPUs S/8.")
BATCH_SIZE = flags.DEFINE_list("batch_size", [], "None: 256, on CPUs 16.")
DTYPE = flags.DEFINE_list("dtype", [], "None: bfloat16, on CPUs float32.")
STEPS = flags.DEFINE_list("steps", ["1", "4"], "Of the sampler.")
SAMPLER = flags.DEFINE_list("sampler", ["meanflow"], "Of meanflow, euler, heun.")
GUIDANCE = flags.DEFINE_list("guidance", ["1", "2"], "Scales of classifier-free guidance.")
DECODE = flags.DEFINE_list("decode", ["none"], "Of none, float32, bfloat16: the autoencoder's.")
FEATURES = flags.DEFINE_boolean("features", False, "Inception's features of the pictures, too.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "In which all rows take turns.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.5, "That a block of batches lasts.", lower_bound=0.0)
COUNT = flags.DEFINE_boolean("count", False, "Compiles and counts, and runs nothing.")
JSON = flags.DEFINE_string("json", "", "A file to which a JSON line per row is added.")

ASKED_FOR = ("size", "batch", "dtype", "sampler", "steps", "guidance", "nfe", "decode", "features")
FOUND = ("flops", "temp_bytes", "ms", "img_s", "of_unguided")
SHARES = ("sampler_share", "decode_share", "features_share")
COLUMNS = (*ASKED_FOR, *FOUND, *SHARES, "compile_s")


class Case(NamedTuple):
    """A row, as it is asked for."""

    size: str  # "": as the config has it
    batch: int
    dtype: str
    sampler: str
    steps: int
    guidance: float
    decode: str


class Prepared(NamedTuple):
    """A row's parts, each a call that starts its work; "all" is one after the other."""

    parts: dict[str, Callable[[], Any]]
    row: dict[str, Any]


def main(_) -> None:
    """Measures and prints."""
    timing.add_lines(JSON.value, [])  # mistakes before anything is measured
    jax.config.update("jax_enable_compilation_cache", False)  # compile_s would be the disk's
    cases, mesh, about = list(asked()), make_mesh(), timing.about()
    for case in cases:
        config_of(case)  # mistakes before anything is compiled
    print(f"\n{timing.told(about)}\n", flush=True)
    rows = []
    for _, group in itertools.groupby(cases, lambda case: case[:3]):
        found = [row | about for row in measure(list(group), mesh)]
        timing.add_lines(JSON.value, found)
        rows += found
    table = [[timing.cell(name, row[name]) for name in COLUMNS] for row in rows]
    table = [
        [*cells[:-1], row["note"] or cells[-1]] for cells, row in zip(table, rows, strict=True)
    ]
    print(timing.markdown(COLUMNS, table))


def asked() -> Iterator[Case]:
    """The cases, what needs other weights outermost.

    Raises:
      UserError: a word that no option has.
    """
    standard, cpu = programs.standard_config(), jax.default_backend() == "cpu"
    sizes = SIZE.value or ([("S/8" if cpu else "B/2")] if standard else [""])
    batches = programs.numbers("batch_size", BATCH_SIZE.value or ["16" if cpu else "256"], int)
    dtypes = DTYPE.value or ["float32" if cpu else "bfloat16"]
    programs.check("dtype", dtypes, ("float32", "bfloat16"))
    programs.check("sampler", SAMPLER.value, tuple(SAMPLERS))
    programs.check("decode", DECODE.value, ("none", "float32", "bfloat16"))
    if FEATURES.value and "none" in DECODE.value:
        raise UserError("--features needs pictures: give --decode=float32")
    if COUNT.value and (FEATURES.value or DECODE.value != ["none"]):
        raise UserError("--count is of the sampler alone: leave --decode and --features out")
    if standard and not SIZE.value:
        timing.say(f"no --size: {sizes[0]} at batch {batches[0]}, which says little of larger ones")
    steps = programs.numbers("steps", STEPS.value, int)
    scales = programs.numbers("guidance", GUIDANCE.value, float)
    every = (sizes, batches, dtypes, SAMPLER.value, steps, scales, DECODE.value)
    yield from itertools.starmap(Case, itertools.product(*every))


def config_of(case: Case) -> ConfigDict:
    """The config of a case; UserError where values are out of range or do not fit."""
    config = programs.sized(CONFIG.value, case.size)
    config.objective = "mean_flow" if case.sampler == "meanflow" else "flow_matching"
    config.model.dtype = case.dtype
    if case.decode != "none":
        config.autoencoder_dtype = case.decode
    build.check_ranges(config)
    programs.size_name(config)
    pipeline_of(config).check(case.steps, case.sampler, [case.guidance])
    if case.batch < 1 or case.batch % jax.device_count():
        raise UserError(f"--batch_size={case.batch} does not split over {jax.device_count()}")
    return config


def pipeline_of(config: ConfigDict, params: Any = None, decodes: Any = None) -> FlowPipeline:
    """What the scripts draw samples by; latents, where there is nothing that decodes."""
    card = {"shape": list(programs.seen(config)), "num_classes": programs.stored(config)[1]}
    return FlowPipeline.build(config, card, params, decodes or autoencoders.points())


def measure(cases: list[Case], mesh: Mesh) -> list[dict[str, Any]]:
    """The rows of one network."""
    timing.say(f"compiling {len(cases)} rows")
    if COUNT.value:
        return [compiled(case, pipeline_of(config_of(case)), mesh)[1] for case in cases]
    params = programs.placed_params(config_of(cases[0]), mesh)
    extractor = features(mesh) if FEATURES.value else None
    decoders = {
        case.decode: jax.device_put(programs.codec(config_of(case), weights=True), replicated(mesh))
        for case in cases
        if case.decode != "none"
    }
    prepared = {
        case: prepare(
            case, pipeline_of(config_of(case), params), decoders.get(case.decode), extractor, mesh
        )
        for case in cases
    }
    calls = {(case, part): call for case, p in prepared.items() for part, call in p.parts.items()}
    timing.say(f"running {len(calls)} parts in turns")
    times, failed = timing.interleaved(calls, ROUNDS.value, SECONDS.value)
    for (case, part), note in failed.items():
        prepared[case].row["note"] = f"{part}: {note}"
    for case, made in prepared.items():
        made.row.update(speeds(case, times))
    return [made.row for made in prepared.values()]


def compiled(
    case: Case, pipeline: FlowPipeline, mesh: Mesh
) -> tuple[Callable[[], Any] | None, dict[str, Any]]:
    """The sampler's program as a call that draws a batch, and its row.

    Without parameters it is compiled on shapes alone, and there is no call.
    """
    row = row_of(case, pipeline)
    params = pipeline.params
    if params is None:
        params = programs.on(
            replicated(mesh), jax.eval_shape(pipeline.network.init, jax.random.key(0))
        )
    index = jax.device_put(jnp.arange(case.batch, dtype=jnp.int32), batch_sharding(mesh))
    label = index % max(pipeline.num_classes, 1)
    codec = jax.device_put(pipeline.autoencoder, replicated(mesh))
    noise, keys = noise_of(pipeline.shape)(0, index)
    numbers = numbers_of(pipeline.times(case.steps), case.guidance)
    inputs = (params, codec, label, noise, keys, numbers)
    start = time.perf_counter()
    lowered = pipeline.sampler.lower(*inputs, case.sampler, case.guidance != 1, False)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return None, row | {"note": timing.out_of_memory(error)}
    row["compile_s"] = time.perf_counter() - start
    row["temp_bytes"] = program.memory_analysis().temp_size_in_bytes
    return None if pipeline.params is None else functools.partial(program, *inputs), row


def row_of(case: Case, pipeline: FlowPipeline) -> dict[str, Any]:
    """What is known of a row before it is compiled."""
    nfe = pipeline.network_calls(case.steps, case.guidance, sampler=case.sampler)
    known = {
        "size": programs.size_name(pipeline.config),
        "nfe": nfe,
        "features": "inception" if FEATURES.value else "none",
        "flops": nfe * programs.forward_flops(pipeline.config, case.batch),
        "note": "",
    }
    return dict.fromkeys(COLUMNS) | case._asdict() | known


def prepare(
    case: Case,
    pipeline: FlowPipeline,
    codec: autoencoders.Autoencoder | None,
    extractor: Callable | None,
    mesh: Mesh,
) -> Prepared:
    """The parts of a case on the devices: sampler, decode, features, and all as one call."""
    draw, row = compiled(case, pipeline, mesh)
    if draw is None:
        return Prepared({}, row)
    parts: dict[str, Callable[[], Any]] = {"sampler": draw}
    if codec is not None:
        whole, of_both = compiled(case, pipeline_of(pipeline.config, pipeline.params, codec), mesh)
        row = row | {name: of_both[name] for name in ("temp_bytes", "compile_s", "note")}
        if whole is None:
            return Prepared({}, row)
        latents = jax.device_put(jnp.zeros((case.batch, *pipeline.shape)), batch_sharding(mesh))
        decode = functools.partial(jax.jit(lambda decode, x: decode(x)), codec.decode, latents)
        parts |= {"decode": decode, "all": whole}
        if extractor is not None:
            shape = jax.eval_shape(decode)
            pictures = jax.device_put(jnp.zeros(shape.shape, shape.dtype), batch_sharding(mesh))
            parts["features"] = functools.partial(extractor, pictures)
            parts["all"] = lambda: extractor(whole()[0])
    return Prepared(parts, row)


def features(mesh: Mesh) -> Callable[[jax.Array], Any]:
    """Inception with random weights: uint8 pictures → features, in FID's resize."""
    network = inception.Inception()
    picture = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    weights = programs.random(lambda key: network.init(key, picture), jax.random.key(0))
    weights = jax.device_put(jax.tree.map(jnp.abs, weights), replicated(mesh))  # variances, too
    apply = jax.jit(lambda weights, x: network.apply(weights, inception.tf(x)))
    return functools.partial(apply, weights)


def speeds(case: Case, times: dict[tuple[Case, str], list[float]]) -> dict[str, Any]:
    """What running says of a case; nothing where it did not run."""
    mine = {part: rounds for (of, part), rounds in times.items() if of == case}
    whole = mine.get("all", mine.get("sampler"))
    if not whole or ("all" in mine) != (case.decode != "none"):
        return {}
    seconds = statistics.median(whole)
    found: dict[str, Any] = {
        "ms": 1e3 * seconds,
        "img_s": case.batch / seconds,
        "ms_by_round": [1e3 * s for s in whole],
    }
    parts = {part: statistics.median(rounds) for part, rounds in mine.items() if part != "all"}
    for part, own in parts.items():
        found[f"{part}_share"] = own / sum(parts.values())
    plain = case._replace(guidance=1.0)
    unguided = times.get((plain, "all"), times.get((plain, "sampler")))
    if unguided:
        found["of_unguided"] = timing.ratio(whole, unguided)
    return found


if __name__ == "__main__":
    programs.fill_in_config()
    cli.run(main)
