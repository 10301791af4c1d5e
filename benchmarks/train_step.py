"""How fast the training step is: flow matching, MeanFlow, MeanFlow with guidance, side by side.

    python benchmarks/train_step.py     # S/4 at batch 8: two or three minutes of two CPU cores
    python benchmarks/train_step.py --size=B/4,B/2,XL/2 --batch_size=256 \\
        --dtype=bfloat16,float32 --json=speed.jsonl                         # a GPU or TPU
    python benchmarks/train_step.py --size=B/2 --batch_size=256 --dtype=bfloat16 \\
        --attention=auto,xla --remat=none,dots,full
    python benchmarks/train_step.py --size=B/4,B/2,XL/2 --batch_size=256 --count  # any machine
    python benchmarks/train_step.py --config=configs/digits.py              # a config as it is
    python benchmarks/train_step.py --size=B/2 --batch_size=256 --dtype=bfloat16 --profile=trace

Every combination of the options below is a row. The step is that of the scripts, on the devices
that are there, with made-up data of the config's data set (by default latents of 256 × 256 pictures
with 1000 classes) and every weight drawn from N(0, 0.02²). Keys of the config work as in training:
--model.depth=2, --mesh.fsdp=4, --accumulation=2.

- `guidance` is κ, at ω = 1; `derivative` is MeanFlow's mean_flow.derivative: apart, or plain, one
  jvp over the whole batch, to compare with. `attention` is that of the pass backward and, where
  du/dt has another, that; the plain form has XLA's for u and du/dt, which no other can do.
- `flops`: of the model in a step, counted in the jaxpr: a scan's body times its length, attention
  as XLA computes it, nothing computed again.
- `temp_bytes`: memory that a step needs on a device beside its arguments; `peak_bytes` (JSON) with
  them. As the compiler says.
- `ms`, `img_s`: the median of --rounds blocks of about --seconds each. All cases of a size take
  turns with one state, so that drift hits them alike and memory holds one state.
- `share_of_peak`: FLOPs a second as a share of the device's matrix rate, measured in the same run
  with the largest products that are sensible, in the same type.
- `compile_s`: tracing and compiling, without the cache on disk.
- `of_flow`, `flops_of_flow`, `temp_of_flow`: img_s, FLOPs and temporary memory as ratios to flow
  matching of the same size, batch, dtype, attention and remat; `of_plain`: img_s of MeanFlow as a
  ratio to its plain form's. Ratios of speed are medians over the rounds' own.
- `spread`: the slowest round over the fastest. Well above 1 the machine does other work, too, and
  ratios say little.

A case that does not fit says so in its row. --count compiles and counts, on shapes alone.
--profile writes a trace of a few steps per case (for Perfetto or XProf) and prints where the time
goes, by kind of kernel. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for the largest cases on a GPU.
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
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks import profiling, programs, timing
from pipelines import build
from utils import cli
from utils.cli import UserError
from utils.sharding import make_mesh

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:variant].")
OBJECTIVE = flags.DEFINE_list("objective", list(programs.OBJECTIVES), "What is trained.")
SIZE = flags.DEFINE_list("size", [], "As B/4,B/2,XL/2; none: the config's, B/2 or on CPUs S/4.")
BATCH_SIZE = flags.DEFINE_list("batch_size", [], "None: the config's, 256 or on CPUs 8.")
GUIDANCE = flags.DEFINE_list("guidance", ["0", "0.5"], "κ of MeanFlow.")
DERIVATIVE = flags.DEFINE_list("derivative", ["apart", "plain"], "Of MeanFlow: apart, plain.")
DTYPE = flags.DEFINE_list("dtype", [], "None: the config's, bfloat16 or on CPUs float32.")
ATTENTION = flags.DEFINE_list(
    "attention", ["auto"], "model.attention, or with model.attention_jvp, as cudnn/fused."
)
REMAT = flags.DEFINE_list("remat", [], "Of none, dots, full; none given: the config's.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "In which all cases take turns.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.5, "That a block of steps lasts.", lower_bound=0.0)
COUNT = flags.DEFINE_boolean("count", False, "Compiles and counts, and runs nothing.")
PROFILE = flags.DEFINE_string("profile", "", "A folder for a trace of each case.")
JSON = flags.DEFINE_string("json", "", "A file to which a JSON line per row is added.")

COLUMNS = ("objective", "size", "batch", "guidance", "derivative", "dtype", "attention", "remat")
COLUMNS += ("flops", "temp_bytes", "ms", "img_s", "share_of_peak", "compile_s")
RATIOS = ("of_flow", "flops_of_flow", "temp_of_flow", "of_plain", "spread")


class Case(NamedTuple):
    """A row, as it is asked for; `kappa` and `derivative` are MeanFlow's."""

    objective: str
    size: str  # "": as the config has it
    batch: int
    kappa: float
    derivative: str
    dtype: str
    attention: str
    remat: str

    @property
    def flow(self) -> "Case":
        """The case of flow matching that this one is compared with."""
        return self._replace(objective="flow_matching", kappa=0.0, derivative="")

    @property
    def plain(self) -> "Case":
        """The case of MeanFlow's plain form."""
        return self._replace(derivative="plain")


class Prepared(NamedTuple):
    """A case with its config, what the compiler made of it, and what is known without running."""

    config: ConfigDict
    compiled: Callable | None  # None: it does not fit
    row: dict[str, Any]


def main(_) -> None:
    """Measures and prints."""
    timing.add_lines(JSON.value, [])  # mistakes before anything is measured
    if pathlib.Path(PROFILE.value).is_file():
        raise UserError(f"--profile={PROFILE.value} is a file: name a folder")
    jax.config.update("jax_enable_compilation_cache", False)  # compile_s would be the disk's
    cases, mesh = list(asked()), make_mesh(CONFIG.value.mesh.data, CONFIG.value.mesh.fsdp)
    configs = {case: config_of(case) for case in cases}  # mistakes before anything is compiled
    about = timing.about()
    print(f"\n{timing.told(about)}\n", flush=True)
    rates = {} if COUNT.value else measured_rates(cases, mesh)
    rows, parts = [], []
    for size, group in itertools.groupby(cases, lambda case: case.size):
        found, kinds = measure(size, {case: configs[case] for case in group}, mesh, rates)
        found = [row | about for row in found]
        timing.add_lines(JSON.value, found)
        rows += found
        parts += kinds
    names = (*COLUMNS, *RATIOS)
    table = [[timing.cell(name, row[name]) for name in names] for row in rows]
    table = [
        [*cells[:-1], row["note"] or cells[-1]] for cells, row in zip(table, rows, strict=True)
    ]
    print(timing.markdown(names, table))
    if parts:
        print("\n" + profiling.tables(parts))


# What is asked for.


def asked() -> Iterator[Case]:
    """The cases, sizes outermost.

    Raises:
      UserError: a word that no option has.
    """
    standard, cpu = programs.standard_config(), jax.default_backend() == "cpu"
    small = standard and not SIZE.value
    sizes = SIZE.value or ([("S/4" if cpu else "B/2")] if standard else [""])
    config = CONFIG.value
    default = [str((8 if cpu else 256) if standard else config.batch_size)]
    batches = programs.numbers("batch_size", BATCH_SIZE.value or default, int)
    own = config.model.dtype if not standard or cpu else "bfloat16"
    kappas = programs.numbers("guidance", GUIDANCE.value, float)
    if small and not BATCH_SIZE.value:
        timing.say(f"no --size: {sizes[0]} at batch {batches[0]}, which says little of larger ones")
    programs.check("objective", OBJECTIVE.value, list(programs.OBJECTIVES))
    programs.check("derivative", DERIVATIVE.value, build.CHOICES["mean_flow.derivative"])
    programs.check("dtype", DTYPE.value or [own], ("float32", "bfloat16"))
    targets = [("flow_matching", 0.0, "")] if "flow_matching" in OBJECTIVE.value else []
    if "mean_flow" in OBJECTIVE.value:
        pairs = itertools.product(kappas, DERIVATIVE.value)
        targets += [("mean_flow", kappa, derivative) for kappa, derivative in pairs]
    remats = REMAT.value or [config.model.remat]
    rest = (DTYPE.value or [own], ATTENTION.value, remats)
    for size, batch, dtype, attention, remat in itertools.product(sizes, batches, *rest):
        for objective, kappa, derivative in targets:
            yield Case(objective, size, batch, kappa, derivative, dtype, attention, remat)


def config_of(case: Case) -> ConfigDict:
    """The config of a case.

    Raises:
      UserError: values out of range, or sizes that do not fit.
    """
    config = programs.sized(CONFIG.value, case.size)
    config.batch_size = case.batch
    reverse, _, forward = case.attention.partition("/")
    config.model.update({"dtype": case.dtype, "attention": reverse, "remat": case.remat})
    if forward:
        config.model.attention_jvp = forward
    config.mean_flow.update({"omega": 1.0, "kappa": case.kappa})
    if case.derivative:
        config.mean_flow.derivative = case.derivative
    build.check_ranges(config)
    programs.size_name(config)
    programs.attention_names(config)
    return config


# What is found.


def measured_rates(cases: list[Case], mesh: Mesh) -> dict[str, float]:
    """FLOP/s of all devices by type: the products' peak."""
    rates = {}
    for dtype in dict.fromkeys(case.dtype for case in cases):
        rates[dtype] = timing.matrix_rate(dtype) * mesh.size
        print(f"matrix rate in {dtype}: {rates[dtype] / 1e12:.4g} TFLOP/s\n", flush=True)
    return rates


def measure(
    size: str, configs: dict[Case, ConfigDict], mesh: Mesh, rates: dict[str, float]
) -> tuple[list[dict[str, Any]], list[profiling.Part]]:
    """The rows of one size, and where the time goes."""
    prepared = {case: prepare(case, config, mesh) for case, config in configs.items()}
    fit = {case: made for case, made in prepared.items() if made.compiled is not None}
    rounds: dict[Case, list[float]] = {}
    kinds: list[profiling.Part] = []
    if fit and not COUNT.value:
        timing.say(f"running {len(fit)} cases in turns")
        state = Shared(functools.partial(programs.random_state, next(iter(configs.values())), mesh))
        batches = {c.batch: programs.placed_batch(made.config, mesh) for c, made in fit.items()}
        calls = {
            case: functools.partial(state.step, made.compiled, batches[case.batch])
            for case, made in fit.items()
        }
        rounds, failed = timing.interleaved(calls, ROUNDS.value, SECONDS.value, state.reset)
        for case, note in failed.items():
            prepared[case].row["note"] = note
        kinds = profiled({case: calls[case] for case in rounds}, prepared)
    for case, made in prepared.items():
        made.row.update(speeds(case, made.row, rounds, rates) | ratios(case, prepared, rounds))
    return [made.row for made in prepared.values()], kinds


class Shared:
    """The state that all cases of a size take turns with: of the same shapes, whatever is trained.

    A step uses up the state it is given.
    """

    def __init__(self, make: Callable[[], Any]):
        """Keeps how it is made; nothing is on the devices yet."""
        self.make, self.state = make, None

    def step(self, compiled: Callable, batch: dict) -> Any:
        """Starts a step; returns its metrics."""
        if self.state is None:
            self.state = self.make()
        self.state, metrics = compiled(self.state, batch)
        return metrics

    def reset(self) -> None:
        """Forgets the state, which a step that failed may have used up."""
        self.state = None


def prepare(case: Case, config: ConfigDict, mesh: Mesh) -> Prepared:
    """Compiles a case's step on shapes, and counts."""
    reverse, forward = programs.attention_names(config)
    if case.derivative == "plain":
        forward = "xla"  # of u and du/dt, a jvp under a gradient; guidance has the other
    row = {
        "objective": case.objective,
        "size": programs.size_name(config),
        "batch": case.batch,
        "guidance": case.kappa,
        "derivative": case.derivative,
        "dtype": case.dtype,
        "attention": f"{reverse}/{forward}" if case.derivative and forward != reverse else reverse,
        "remat": case.remat,
    }
    timing.say("compiling " + " ".join(str(value) for value in row.values() if value != ""))
    program = programs.step(config, case.objective, mesh)
    row |= {"flops": program.flops, "temp_bytes": None, "peak_bytes": None, "compile_s": None}
    row |= {"note": "", "accumulation": config.accumulation, "mesh": dict(mesh.shape)}
    start = time.perf_counter()
    try:
        compiled = program.function.lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return Prepared(config, None, row | {"note": timing.out_of_memory(error)})
    row["compile_s"] = time.perf_counter() - start
    stats = compiled.memory_analysis()
    row["temp_bytes"] = stats.temp_size_in_bytes
    row["peak_bytes"] = stats.temp_size_in_bytes + stats.argument_size_in_bytes
    row["peak_bytes"] += stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Prepared(config, None if COUNT.value else compiled, row)


def speeds(
    case: Case, row: dict[str, Any], rounds: dict[Case, list[float]], rates: dict[str, float]
) -> dict[str, Any]:
    """What running says of a case; None where it did not run."""
    if case not in rounds:
        return dict.fromkeys(("ms", "img_s", "share_of_peak", "matrix_rate", "ms_by_round"))
    seconds = statistics.median(rounds[case])
    return {
        "ms": 1e3 * seconds,
        "img_s": case.batch / seconds,
        "share_of_peak": row["flops"] / seconds / rates[case.dtype],
        "matrix_rate": rates[case.dtype],
        "ms_by_round": [1e3 * s for s in rounds[case]],
    }


def ratios(
    case: Case, prepared: dict[Case, Prepared], rounds: dict[Case, list[float]]
) -> dict[str, float | None]:
    """A case beside its flow matching and its plain form; None where these are not there."""
    found: dict[str, float | None] = dict.fromkeys(RATIOS)
    if case in rounds:
        found["spread"] = max(rounds[case]) / min(rounds[case])
    if case.derivative and case in rounds and case.plain in rounds:
        found["of_plain"] = timing.ratio(rounds[case.plain], rounds[case])
    if case.flow not in prepared:
        return found
    row, flow = prepared[case].row, prepared[case.flow].row
    found["flops_of_flow"] = row["flops"] / flow["flops"]
    if row["temp_bytes"] and flow["temp_bytes"]:
        found["temp_of_flow"] = row["temp_bytes"] / flow["temp_bytes"]
    if case in rounds and case.flow in rounds:
        found["of_flow"] = timing.ratio(rounds[case.flow], rounds[case])
    return found


def profiled(
    calls: dict[Case, Callable[[], Any]], prepared: dict[Case, Prepared]
) -> list[profiling.Part]:
    """Traces of each case in a folder of its own, read again."""
    parts = []
    for case, call in calls.items() if PROFILE.value else ():
        row = prepared[case].row
        words = [row[name] for name in COLUMNS[:8] if row[name] not in ("", 0.0)]
        name = "_".join(str(word).replace("/", "-") for word in words)
        folder, hlo = pathlib.Path(PROFILE.value) / name, prepared[case].compiled.as_text()
        part = profiling.profile(name, call, folder, hlo)
        row["ms_by_kind"] = part.kinds
        parts.append(part)
    return parts


if __name__ == "__main__":
    programs.fill_in_config()
    cli.run(main)
