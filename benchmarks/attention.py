"""Attention by its implementations: time, memory and error, as ratios to XLA's in one run.

    python benchmarks/attention.py --tokens=64,256 --heads=2x64 --batch_size=2   # a CPU, small
    python benchmarks/attention.py --tokens=256,1024,4096 --heads=12x64,16x72 \\
        --dtype=bfloat16,float32 --json=attention.jsonl                          # a GPU or TPU
    python benchmarks/attention.py --count --topology=v5e:2x2 --tokens=256,1024,4096 # any machine

A row is a case (derivative, tokens, heads, type) by an implementation of `models.attention`:

- `derivative`: value; jvp, value and tangent; gradient, of all three inputs.
- `temp_bytes`: memory beside arguments and results, as the compiler says, and `temp_of_xla` as a
  ratio. `kernels`: calls of kernels that XLA did not write.
- `ms`, `of_xla`: the median of --rounds blocks of about --seconds each, all cases of the same shape
  in turns; the ratio is a median over rounds, below 1 where it is faster than XLA's.
- `error`: the largest relative norm of the difference to XLA's in float32 at the highest precision,
  over results.

--count compiles and runs nothing; with --topology, for one device that is not there, by the TPU's
compiler (pip install "jax[tpu]"). On CPUs `fused` is interpreted: its time says nothing there.
"""

import functools
import itertools
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Sharding, SingleDeviceSharding

from benchmarks import programs, timing
from models import attention
from utils import cli
from utils.cli import UserError

REVERSE = set(attention.REVERSE)
CAN = {"value": REVERSE | {"fused"}, "jvp": set(attention.FORWARD), "gradient": REVERSE}
HERE = {
    "cpu": {"xla", "fused"},
    "gpu": {"xla", "cudnn", "fused"},
    "tpu": {"xla", "splash", "fused"},
}

TOKENS = flags.DEFINE_list("tokens", ["256"], "Lengths of sequences.")
HEADS = flags.DEFINE_list("heads", ["12x64"], "As 12x64,16x72: their number, and their width.")
DTYPE = flags.DEFINE_list("dtype", ["bfloat16"], "Of float32, bfloat16.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Samples.", lower_bound=1)
DERIVATIVE = flags.DEFINE_list("derivative", list(CAN), f"Of {', '.join(CAN)}.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "In which all cases take turns.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.5, "That a block of calls lasts.", lower_bound=0.0)
COUNT = flags.DEFINE_boolean("count", False, "Compiles, and runs nothing.")
TOPOLOGY = flags.DEFINE_string("topology", "", "As v5e:2x2, with --count: a TPU not there.")
JSON = flags.DEFINE_string("json", "", "A file to which a JSON line per row is added.")

COLUMNS = ("derivative", "tokens", "heads", "d", "batch", "dtype", "attention", "kernels")
COLUMNS += ("temp_bytes", "temp_of_xla", "ms", "of_xla", "error", "compile_s")


class Case(NamedTuple):
    """What implementations are compared on."""

    derivative: str
    tokens: int
    heads: int
    d: int
    dtype: str

    def arrays(self, make: Callable) -> list:
        """q, k, v and their tangents, by `make(index, shape, dtype)`."""
        shape = BATCH_SIZE.value, self.tokens, self.heads, self.d
        return [make(i, shape, jnp.dtype(self.dtype)) for i in range(6)]


def main(_) -> None:
    """Measures and prints."""
    if TOPOLOGY.value and not COUNT.value:
        raise UserError(f"--topology={TOPOLOGY.value} has no devices to run on: add --count")
    timing.add_lines(JSON.value, [])  # mistakes before anything is measured
    jax.config.update("jax_enable_compilation_cache", False)  # compile_s would be the disk's
    cases, place, about = list(asked()), sharding(), timing.about()
    about |= {"topology": TOPOLOGY.value}
    print(f"\n{timing.told(about)}\n", flush=True)
    rows = []
    for case in cases:
        found = [row | about for row in measured(case, place)]
        timing.add_lines(JSON.value, found)
        rows += found
    table = [[*(shown(name, row[name]) for name in COLUMNS), row["note"]] for row in rows]
    print(timing.markdown((*COLUMNS, ""), table))


def shown(name: str, value: Any) -> str:
    """A cell of the table."""
    if name == "error" and value is not None:
        return f"{value:.1e}"
    if name == "temp_bytes" and value is not None:
        return f"{value / 2**20:.1f} MiB"
    return timing.cell(name, value)


def asked() -> Iterator[Case]:
    """The cases.

    Raises:
      UserError: a word that no option has.
    """
    for name, words, form in (
        ("tokens", TOKENS.value, r"[1-9]\d*"),
        ("heads", HEADS.value, r"[1-9]\d*x[1-9]\d*"),
        ("dtype", DTYPE.value, "float32|bfloat16"),
        ("derivative", DERIVATIVE.value, "|".join(CAN)),
    ):
        if not words or not all(re.fullmatch(form, word) for word in words):
            text = flags.FLAGS[name].help
            raise UserError(f"--{name}={','.join(words)}: {text[0].lower()}{text[1:].rstrip('.')}")
    for derivative, dtype, heads, tokens in itertools.product(
        DERIVATIVE.value, DTYPE.value, HEADS.value, TOKENS.value
    ):
        number, width = map(int, heads.split("x"))
        yield Case(derivative, int(tokens), number, width, dtype)


def sharding() -> Sharding:
    """One device: of those here, or of the topology.

    Raises:
      UserError: no such topology, or no compiler for it.
    """
    if not TOPOLOGY.value:
        return SingleDeviceSharding(jax.devices()[0])
    return SingleDeviceSharding(programs.tpu_devices(TOPOLOGY.value, "no --topology")[0])


def implementations(case: Case) -> list[str]:
    """Those that can do it on this platform, xla first."""
    platform = "tpu" if TOPOLOGY.value else jax.default_backend()
    can = (CAN[case.derivative] & HERE[platform]) - {"xla"}
    if case.dtype == "float32" or case.d % 8 or case.d > 128:
        can -= {"cudnn"}
    return ["xla", *sorted(can)]


def function(case: Case, name: str) -> Callable:
    """(q, k, v, and a tangent each) → a tuple of results."""
    by = functools.partial(attention.attention, implementation=name)
    return {
        "value": lambda *x: (by(*x[:3]),),
        "jvp": lambda *x: jax.jvp(by, x[:3], x[3:]),
        "gradient": lambda *x: jax.vjp(by, *x[:3])[1](x[3]),
    }[case.derivative]


def measured(case: Case, place: Sharding) -> list[dict[str, Any]]:
    """A row per implementation."""
    programs, rows = {}, {}
    for name in implementations(case):
        compile_s, compiled, note = build(case, name, place)
        row = case._asdict() | {"attention": name, "batch": BATCH_SIZE.value, "note": note}
        row |= dict.fromkeys(COLUMNS[COLUMNS.index("kernels") :]) | {"compile_s": compile_s}
        if compiled is not None:
            text, programs[name] = compiled.as_text(), compiled
            row["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            row["kernels"] = len(
                re.findall(r'custom_call_target="(tpu_custom|.*triton|.*fmha)', text)
            )
        rows[name] = row
    if not COUNT.value:
        run(case, programs, rows)
    kept = rows["xla"]["temp_bytes"]
    for row in rows.values():
        if kept and row["temp_bytes"] is not None:
            row["temp_of_xla"] = row["temp_bytes"] / kept
    return list(rows.values())


def build(case: Case, name: str, place: Sharding) -> tuple[float, Any, str]:
    """Seconds to compile, the program, or None and a note where it does not fit."""
    timing.say(f"compiling {name}: {case}")
    shapes = case.arrays(lambda i, *of: jax.ShapeDtypeStruct(*of, sharding=place))
    start = time.perf_counter()
    try:
        compiled, note = jax.jit(function(case, name)).lower(*shapes).compile(), ""
    except jax.errors.JaxRuntimeError as error:
        compiled, note = None, timing.out_of_memory(error)
    return time.perf_counter() - start, compiled, note


def run(case: Case, programs: dict[str, Any], rows: dict[str, dict]) -> None:
    """Adds times and errors."""
    arrays = case.arrays(drawn)
    times, failed = timing.interleaved(
        {name: functools.partial(program, *arrays) for name, program in programs.items()},
        ROUNDS.value,
        SECONDS.value,
    )
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(function(case, "xla"))(*(x.astype(jnp.float32) for x in arrays))
    for name, seconds in times.items():
        found = zip(programs[name](*arrays), exact, strict=True)
        rows[name] |= {
            "ms": 1e3 * statistics.median(seconds),
            "of_xla": timing.ratio(seconds, times["xla"]) if "xla" in times else None,
            "error": max(relative(x, y) for x, y in found),
        }
    for name, note in failed.items():
        rows[name]["note"] = note


def drawn(index: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """From N(0, 1)."""
    return jax.random.normal(jax.random.key(index), shape).astype(dtype)


def relative(x: jax.Array, y: jax.Array) -> float:
    """Norm of the difference over that of y."""
    found, wanted = (np.asarray(a, np.float32).ravel() for a in (x, y))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


if __name__ == "__main__":
    cli.run(main)
