"""Seconds from a command to its first step: imports, compiling, and what the disk remembers of it.

    python benchmarks/startup.py [--config=configs/digits.py] [--repeats=3] [--json=FILE]

Each command is a new process, and the least of --repeats is told, as what else the machine does can
only add to it. `--help` imports what reading the options needs, `imports` all that runs until the
first step. `first step, cold` starts with an empty folder of compiled programs and `warm` with what
the cold one left there; both end with the first row of metrics.jsonl, which waits for the step.
Everything is written to a temporary folder and removed.
"""

import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags

from benchmarks import timing
from utils import cli, compilation

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = flags.DEFINE_string("config", "configs/digits.py", "What is trained to its first step.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Processes of each kind.", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "A file to add a line per command to.")
TRAINS = ("train_flow", "train_meanflow")
IMPORTS = {name: f"{name}, pipelines.train" for name in TRAINS} | {
    "eval_fid": "eval_fid",
    "prepare_data": "prepare_data",
}
COLUMNS = ("--help", "imports", "first step, cold", "first step, warm")
LONGEST = 1800  # seconds until a first step


def main(_: Sequence[str]) -> None:
    """Measures all commands and prints the table."""
    timing.add_lines(JSON.value, [])
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(f"| seconds | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, modules in IMPORTS.items():
        row = {
            "--help": least([sys.executable, f"{name}.py", "--help"]),
            "imports": least([sys.executable, "-c", f"import {modules}"]),
        }
        row |= first_steps(name) if name in TRAINS else {}
        told = [f"{row[column]:.2f}" if column in row else "" for column in COLUMNS]
        print(f"| {name} | {' | '.join(told)} |", flush=True)
        timing.add_lines(JSON.value, [{"command": name, "config": CONFIG.value, **row}])


def least(command: Sequence[str]) -> float:
    """The least seconds of a command that ends."""
    return min(_timed(command) for _ in range(REPEATS.value))


def _timed(command: Sequence[str]) -> float:
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise cli.UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return time.monotonic() - start


def first_steps(name: str) -> dict[str, float]:
    """The least seconds to the first step, with no compiled programs and with those of before."""
    found: dict[str, list[float]] = {"first step, cold": [], "first step, warm": []}
    for _ in range(REPEATS.value):
        with tempfile.TemporaryDirectory() as folder:
            for column, seconds in found.items():
                seconds.append(_first_step(name, pathlib.Path(folder), column))
    return {column: min(seconds) for column, seconds in found.items()}


def _first_step(name: str, folder: pathlib.Path, run: str) -> float:
    """Starts a run of its own, and ends it when its first step is written."""
    rows = folder / run / "metrics.jsonl"
    command = [sys.executable, f"{name}.py", f"--config={CONFIG.value}", "--log_interval=1"]
    command += [f"--workdir={rows.parent}"]
    programs = {compilation.FOLDER: str(folder / "programs")}
    with (folder / "stderr").open("w+") as stderr:
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | programs, stderr=stderr, stdout=stderr
        )
        try:
            while not (rows.exists() and rows.stat().st_size):
                if process.poll() is not None or time.monotonic() - start > LONGEST:
                    stderr.seek(0)
                    raise cli.UserError(f"{name} has made no step: {stderr.read()[-500:]}")
                time.sleep(0.01)
            return time.monotonic() - start
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    cli.run(main)
