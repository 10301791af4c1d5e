"""Where the time of a program goes: a trace by JAX's profiler, read again by kind of kernel.

The trace is XLA's own (`.xplane.pb`, read by `jax.profiler.ProfileData`; the `.trace.json.gz`
beside it is for Perfetto). Kernels stand there by platform: on a GPU in lines called Stream, on a
TPU in one called XLA Ops, on a CPU in the lines of its threads, as events that name an `hlo_op`.
Loops stand around what they run and are left out; of events within others the inner ones count.
Which fusions hold a product of matrices is read in the compiled program.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import timing

# The first kind whose pattern is found in what the trace says of a kernel.
KINDS = {
    "collectives": r"all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective|nccl",
    "attention": r"fmha|flash|sdpa|attention|splash|pallas|mosaic|tpu_custom_call",
    "matmul": r"gemm|matmul|cutlass|cublas|nvjet|xmma|\bdot|_dot|conv(?!ert)|[wd]grad|onednn",
    "copies": r"memcpy|memset|\bcopy|copy\b|transpose|data formatting|\bslice\b|concatenate",
    "elementwise": r"fusion|reduce|wrapped|broadcast|convert|select|scatter|gather|rng|elementwise",
}
OTHER = "other"
CONTROL = re.compile(r"^(while|conditional|call|async)\b")
STEPS = 3
TOP = 8


class Part(NamedTuple):
    """Milliseconds of device time per call: by kind, and of the longest kernels by name."""

    name: str
    kinds: dict[str, float]
    longest: list[tuple[str, float]]


class Event(NamedTuple):
    """A kernel's run: nanoseconds, and all words that say what it is, its HLO's name first."""

    start: float
    duration: float
    name: str
    words: str


def profile(name: str, call: Callable[[], Any], folder: Path, hlo: str = "") -> Part:
    """Traces a few calls of what has been compiled and warmed up; `hlo` is its optimised text."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # thousands of events that say nothing of the device
    jax.block_until_ready(call())
    jax.profiler.start_trace(str(folder), profiler_options=options)
    try:
        timing.block(call, STEPS)
    finally:
        jax.profiler.stop_trace()
    return read(name, folder, STEPS, products(hlo))


def products(hlo: str) -> set[str]:
    """The names of a compiled program's fusions with a product of matrices or convolution inside.

    A computation's header is "%name (arguments) -> result {", and a fusion has calls=%name.
    """
    within, multiplying, callers = "", set(), []
    for line in hlo.splitlines():
        if header := re.match(r"%?([\w.\-]+) \(.*\{$", line):
            within = header[1]
        elif re.search(r" (dot|convolution)\(", line):
            multiplying.add(within)
        if caller := re.match(r" +(?:ROOT )?%?([\w.\-]+) = .* fusion\(.*calls=%?([\w.\-]+)", line):
            callers.append(caller.groups())
    return {name for name, called in callers if called in multiplying}


def read(name: str, folder: Path, calls: int, known: Collection[str] = ()) -> Part:
    """The newest trace in a folder.

    Args:
      calls: of the program, while it was traced.
      known: names of fusions that are products, whatever they are called.

    Raises:
      FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trace of JAX's profiler")
    newest = files[-1].parent
    by_name: Counter = Counter()
    by_kind: Counter = Counter()
    for file in newest.glob("*.xplane.pb"):
        for line in kernels(jax.profiler.ProfileData.from_file(str(file))):
            for event, own in alone(line):
                by_name[re.sub(r"[.\d]+$", "", event.name)] += own
                by_kind["matmul" if event.name in known else kind(event.words)] += own
    scale = 1e-6 / calls
    kinds = {name: by_kind[name] * scale for name in (*KINDS, OTHER)}
    return Part(name, kinds, [(name, ns * scale) for name, ns in by_name.most_common(TOP)])


def kernels(data: Any) -> Iterator[list[Event]]:
    """The kernels of each line of a trace, whichever platform made it."""
    for plane in data.planes:
        device = plane.name.startswith("/device:")
        for line in plane.lines:
            if not device or line.name == "XLA Ops" or line.name.startswith("Stream"):
                events = (event_of(event, device) for event in line.events)
                yield [event for event in events if event is not None]


def event_of(event: Any, device: bool) -> Event | None:
    """A kernel, or None for what is none: the host's work, markers, loops."""
    stats = {key: value for key, value in event.stats if isinstance(value, str)}
    name = stats.get("hlo_op", "") or (event.name.partition(" = ")[0].lstrip("%") if device else "")
    if not name or CONTROL.match(name) or not event.duration_ns:
        return None
    words = " ".join([name, event.name, stats.get("hlo_category", "")])
    return Event(event.start_ns, event.duration_ns, name, words.lower())


def alone(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Each event with the nanoseconds that none within it takes."""
    open_: list[tuple[Event, list[float]]] = []
    for event in sorted(events, key=lambda e: (e.start, -e.duration)):
        while open_ and open_[-1][0].start + open_[-1][0].duration <= event.start:
            outer, inner = open_.pop()
            yield outer, max(outer.duration - sum(inner), 0.0)
        if open_:
            open_[-1][1].append(event.duration)
        open_.append((event, []))
    for outer, inner in open_:
        yield outer, max(outer.duration - sum(inner), 0.0)


def kind(words: str) -> str:
    """The kind of a kernel, from what a trace says of it, in lower case."""
    for name, pattern in KINDS.items():
        if re.search(pattern, words):
            return name
    return OTHER


def tables(parts: list[Part]) -> str:
    """Milliseconds per call by kind, a row per program; below, its longest kernels."""
    head = ("ms of device time per step", *KINDS, OTHER)
    rows = [[part.name, *(shown(part, name) for name in (*KINDS, OTHER))] for part in parts]
    longest = [[part.name, listed(part)] for part in parts]
    return "\n\n".join(
        [timing.markdown(head, rows), timing.markdown(("", "longest kernels, ms"), longest)]
    )


def shown(part: Part, kind: str) -> str:
    """Milliseconds, and the share of all."""
    return f"{part.kinds[kind]:.2f} ({part.kinds[kind] / (sum(part.kinds.values()) or 1):.0%})"


def listed(part: Part) -> str:
    """The longest kernels in words."""
    return ", ".join(f"{name} {ms:.2f}" for name, ms in part.longest) or "none seen"
