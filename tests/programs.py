"""Real processes that make one program on this machine, for tests of several hosts."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).parents[1]
LOST_AFTER = 10  # seconds, as `Program` passes it on
# Compiling takes most of the time of a short run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Program:
    """`count` processes of one command with `devices` virtual devices in all; use it as a context,
    which leaves none of them behind.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: pathlib.Path,
        count: int,
        devices: int = 2,
        surroundings: Sequence[dict[str, str]] = (),
    ):
        """Starts the processes; what they print goes to files in `folder`.

        Args:
          surroundings: variables for each process, which are to join them instead of flags.
        """
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count} {QUICK}",
            "PJRT_NPROC": "32",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax_hosts"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        port = free_port()
        self.errors = [folder / f"stderr_{index}" for index in range(count)]
        self.processes = []
        for index, path in enumerate(self.errors):
            flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
            flags += [f"--process_id={index}", f"--lost_after={LOST_AFTER}", "--join_timeout=60"]
            if surroundings or count == 1:
                flags = []
            with path.open("w") as stderr, path.with_name(f"stdout_{index}").open("w") as stdout:
                process = subprocess.Popen(
                    [sys.executable, *command, *flags],
                    cwd=ROOT,
                    env=environment | (surroundings[index] if surroundings else {}),
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            self.processes.append(process)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def until(self, reached: Callable[[], bool], seconds: float = 100) -> None:
        """Waits until something is so, while all processes run."""
        end = time.monotonic() + seconds
        while not reached():
            ended = [process.poll() is not None for process in self.processes]
            assert not any(ended), f"ended {ended}: {self.told()}"
            assert time.monotonic() < end, f"not in {seconds} s: {self.told()}"
            time.sleep(0.02)

    def ends(self, index: int, seconds: float = 100) -> int:
        """The exit status of a process that ends by itself in so many seconds."""
        return self.processes[index].wait(seconds)

    def stderr(self, index: int) -> str:
        """What a process has printed to standard error; redrawn progress lines are lines."""
        return self.errors[index].read_text().replace("\r", "\n")

    def told(self) -> str:
        """The end of what each process printed."""
        return "".join(f"\n[{i}] {self.stderr(i)[-2000:]}" for i in range(len(self.errors)))


def own_lines(text: str) -> list[str]:
    """The lines that are neither progress, nor blank, nor C++'s."""
    cpp = r"\s*$|\w+: +\d+%|[WEF]\d{4} |\*\*\* |    @ |=== |Additional GRPC|:UN|external/"
    return [line for line in text.splitlines() if not re.match(cpp, line)]
