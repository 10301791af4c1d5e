"""What benchmarks share: turns that are timed, the device's matrix rate, versions, tables.

Only ratios within one run compare: machines throttle, are shared, and drift. So cases take turns,
round after round, and a ratio is the median of the rounds' own.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from utils.cli import UserError

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
MOST_TURNS = 200  # of a block: that many steps may be in flight


def interleaved(
    cases: dict[Any, Callable[[], Any]],
    rounds: int,
    seconds: float,
    reset: Callable[[], None] = lambda: None,
) -> tuple[dict[Any, list[float]], dict[Any, str]]:
    """Seconds per call of each case, round by round, and what failed for lack of memory.

    Each round runs a block of calls of each case in turn; a block ends when its last result is
    there, and lasts about `seconds`.

    Args:
      cases: functions that start work on the devices and return what is to be waited for.
      reset: called where one failed, as what the cases share may be lost.
    """
    times: dict[Any, list[float]] = {name: [] for name in cases}
    failed: dict[Any, str] = {}
    counts: dict[Any, int] = {}
    for number in range(-1, rounds):
        for name in [name for name in cases if name not in failed]:
            try:
                if number < 0:
                    block(cases[name], 1)  # the first may load kernels
                    counts[name] = turns(block(cases[name], 1), seconds)
                else:
                    times[name].append(block(cases[name], counts[name]))
            except jax.errors.JaxRuntimeError as error:
                failed[name] = out_of_memory(error)
                reset()
    return {name: times[name] for name in cases if name not in failed}, failed


def turns(once: float, seconds: float) -> int:
    """Calls of a block."""
    return max(1, min(MOST_TURNS, round(seconds / once)))


def block(call: Callable[[], Any], count: int) -> float:
    """Seconds per call of `count` calls, one behind the other."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def out_of_memory(error: Exception) -> str:
    """A note for the table, where that is what is wrong; else the error goes on."""
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
        return "out of memory"
    raise error


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median over rounds of of / to."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def matrix_rate(dtype: str, side: int = 0, best_of: int = 5) -> float:
    """FLOP/s of the largest product of square matrices, the best of several, on one device.

    At the precision that `x @ y` has by default, as in the networks: on GPUs float32 is TF32.

    Args:
      side: of the matrices; 0: 16,384 in bfloat16 and 8,192 in float32, 1,024 on a CPU.
    """
    side = side or (1024 if jax.default_backend() == "cpu" else 8192 * (1 + (dtype == "bfloat16")))
    count = 4  # products between two waits
    device = jax.local_devices()[0]
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.device_put(jax.random.normal(k, (side, side)), device) for k in keys)
    x, y = x.astype(dtype), (y / side**0.5).astype(dtype)  # products stay of x's size
    product = jax.jit(lambda x, y: jax.lax.fori_loop(0, count, lambda _, x: x @ y, x))
    block(lambda: product(x, y), 1)
    seconds = min(block(lambda: product(x, y), 1) for _ in range(best_of))
    return 2 * side**3 * count / seconds


def about() -> dict[str, Any]:
    """What a line of results needs to be read later: device, versions, commit."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
    }


def processor() -> str:
    """The host's."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0]


def commit() -> str:
    """Of this checkout, with + where files differ from it; "" where there is no git."""
    try:
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def told(found: dict[str, Any]) -> str:
    """`about` as a line of text."""
    versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES)
    return (
        f"{found['processor']}, {found['cores']} cores; {found['devices']} × {found['device']}; "
        f"Python {found['python']}, {versions}; commit {found['commit'] or 'unknown'}"
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def add_lines(file: str, rows: Iterable[dict[str, Any]]) -> None:
    """Adds a JSON line per row to a file; "" for none. No rows: sees whether that can be done.

    Raises:
      UserError: it cannot be written to.
    """
    if not file:
        return
    try:
        with open(file, "a", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(
            f"--json={file}: {error.strerror}: name a file that can be written"
        ) from error


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


FORMATS: dict[str, Callable[[Any], str]] = {
    "flops": lambda n: f"{n / 1e12:.4g} T" if n > 1e11 else f"{n / 1e9:.4g} G",
    "temp_bytes": lambda n: f"{n / GIB:.3f} GiB",
    "ms": lambda x: f"{x:.4g}",
    "img_s": lambda x: f"{x:,.4g}" if x < 1000 else f"{x:,.0f}",
    "compile_s": lambda x: f"{x:.1f}",
    "spread": lambda x: f"{x:.2f}",
}


def cell(name: str, value: Any) -> str:
    """A value as a table shows it, by its column."""
    if value is None or value == "":
        return "–"
    if name in FORMATS:
        return FORMATS[name](value)
    if "share" in name:
        return f"{value:.1%}"
    if "_of_" in f"_{name}":
        return f"{value:.3f}"
    return f"{value:g}" if isinstance(value, float) else str(value)
