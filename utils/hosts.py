"""Several processes as one program: how they start, are asked to stop, and end when one is lost.

With several processes each of them is two: a small parent, which waits, and the worker, a child of
the same command line. XLA ends a worker from its own threads when a peer or the coordinator is
lost; only a parent can say so in a line and give the exit status that scripts look at.
"""

import contextlib
import faulthandler
import importlib.util
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from absl import logging

from utils import cli, compilation
from utils.cli import UserError

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, the same command goes on
LOST = 76  # EX_PROTOCOL: another host stopped or was lost, the same command goes on
_SHUTDOWN = 3600  # seconds to wait at the end for those still at work; a lost one ends it before
_LINE = "FLOW_HOSTS_LINE"  # the worker's end of the line to its parent, a file descriptor
_parent: socket.socket | None = None  # that line, in a worker
_JOINING, _JOINED, _TOLD = b"j", b"J", b"T"  # what the worker says on it; then its status
_LOST = "another host stopped or was lost: the same command, on all hosts, goes on"
_BY_ANOTHER = re.compile(
    r"gloo|nccl|coordination|heartbeat|connection (reset|closed|refused)|socket closed|"
    r"UNAVAILABLE|barrier|peer",
    re.IGNORECASE,
)


class Hosts(NamedTuple):
    """How the processes of one program find each other; flags of every command.

    Attributes:
      coordinator: HOST:PORT of process 0, as all processes reach it; with --num_processes and
        --process_id, for several processes anywhere.
      num_processes: Processes that make one program.
      process_id: This process's number, from 0.
      distributed: auto finds TPU pods, SLURM (more than one task) and Open MPI; on asks JAX to find
        out; off is one process in any case.
      join_timeout: Seconds to wait for all processes to start.
      lost_after: Seconds without a sign of life after which a process counts as lost, and the
        others end.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    distributed: Literal["auto", "on", "off"] = "auto"
    join_timeout: int = 300
    lost_after: int = 20


class Preempted(Exception):
    """The run was asked to stop by SIGTERM, and has saved."""

    def __init__(self, step: int):
        """Keeps the step that was saved."""
        super().__init__(f"saved at step {step} after SIGTERM: the same command goes on")
        self.step = step


class Again(Exception):
    """What stops this process is not for ever: the same command goes on. The message is its line.

    Where it ends a command the line is printed, and the exit status is `LOST`, of one process as of
    several.
    """


class Preemption:
    """Notices SIGTERM; use it as a context, which restores the handler that was there.

    With several processes JAX's preemption service holds SIGTERM, and chooses a step that all of
    them reach together, whichever of them was told; and an error inside ends this process at once,
    so that nothing waits for those that wait for it.
    """

    def __enter__(self) -> "Preemption":
        import jax

        self._told = False
        self._alone = jax.process_count() == 1
        self._old: Any = None
        self._handles = self._alone and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._old = signal.signal(signal.SIGTERM, self._tell)
        if jax.process_index() > 0:
            _hush()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if error is not None and not self._alone and not isinstance(error, Preempted):
            fail(error, within=True)  # the contexts around this one may wait for the others
        if self._handles:  # a handler that is not Python's is None, and lost
            signal.signal(signal.SIGTERM, self._old or signal.SIG_DFL)

    def _tell(self, *_) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether to save after `step` and stop; all processes ask alike, at every step."""
        if self._alone:
            return self._told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


def join(options: Hosts, *, saves: bool = False) -> None:
    """Makes this process one of several, where flags or surroundings say so.

    To be called before any device is touched. In the parent it does not return.

    Args:
      saves: whether the command saves on SIGTERM, by `Preemption`; else SIGTERM ends it.

    Raises:
      UserError: half a set of flags, a coordinator that cannot be reached, or no cluster found.
    """
    found = arguments(options)
    if found is None:
        return
    compilation.keep_none_at_home()
    _attend(options)
    _say(_JOINING)
    import jax

    jax.config.update("jax_enable_preemption_service", saves)
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=options.join_timeout,
            heartbeat_timeout_seconds=options.lost_after,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(_unjoined(options, error)) from error
    _say(_JOINED)
    if _rank(options):
        _hush()


def first() -> bool:
    """Whether this process writes what is written once: it is alone, or number 0."""
    import jax

    return jax.process_index() == 0


def arguments(options: Hosts) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given; None: this process is alone.

    Raises:
      UserError: half a set of flags, or numbers that do not fit.
    """
    for name in ("join_timeout", "lost_after"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: seconds, at least 1")
    given = (options.coordinator, options.num_processes, options.process_id)
    if options.distributed == "off" and given != ("", 0, -1):
        raise UserError("--distributed=off is one process: leave --coordinator and the others out")
    if options.distributed == "off":
        return None
    if given != ("", 0, -1):
        return _explicit(*given)
    if options.distributed == "on":
        return {}
    slurm, mpi = _number("SLURM_STEP_NUM_TASKS"), _number("OMPI_COMM_WORLD_SIZE")
    if slurm > 1 and "SLURM_STEP_NODELIST" in os.environ:
        # JAX gives each task one device, which is right for several tasks on a node only; an
        # empty list leaves it all that it sees.
        alone = _number("SLURM_STEP_NUM_NODES") == slurm
        return {"local_device_ids": []} if alone else {}
    return {} if mpi > 1 or _on_tpu_pod() else None


def _explicit(coordinator: str, count: int, number: int) -> dict[str, Any]:
    host, colon, port = coordinator.rpartition(":")
    if not coordinator or count < 1 or number < 0:
        raise UserError(
            "--coordinator=HOST:PORT, --num_processes=N and --process_id=I go together: give all "
            "three, in each of the N processes"
        )
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator}: give HOST:PORT, as 10.0.0.1:8476")
    if number >= count:
        raise UserError(f"--process_id={number}: the {count} processes are 0 to {count - 1}")
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 0


def _rank(options: Hosts) -> int:
    """This process's number, as far as it is known without touching a device; else 0.

    Hosts of TPU pods may know theirs from Google's metadata alone; `Preemption` asks JAX.
    """
    variables = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
    return options.process_id if options.coordinator else max(map(_number, variables))


def _hush() -> None:
    """One process speaks; of the others only errors are heard."""
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.ERROR)


def _on_tpu_pod() -> bool:
    """Whether this machine has TPU chips and is not known to be the only host."""
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if (names and "," not in names) or os.environ.get("JAX_PLATFORMS", "tpu") == "cpu":
        return False
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _unjoined(options: Hosts, error: Exception) -> str:
    told = str(error).strip().splitlines()
    if options.coordinator:
        return _unreachable(options)
    return (
        f"no cluster that JAX knows ({told[0] if told else type(error).__name__}): give "
        "--coordinator, --num_processes and --process_id, or --distributed=off for one process"
    )


def _unreachable(options: Hosts) -> str:
    return (
        f"not all of the {options.num_processes or 'expected'} processes met at the coordinator "
        f"{options.coordinator} in {options.join_timeout} s: see that process 0 runs on that host, "
        "that the port is free and open, and that every --process_id is given once"
    ).replace("  ", " ")


# Parent and worker.


def _attend(options: Hosts) -> None:
    """Makes a process without a parent one; the worker ends when its parent does."""
    global _parent
    if _LINE not in os.environ:
        sys.exit(_wait_for_worker(options))
    if not os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.disable()  # absl's: pages of threads where XLA ends what lost its peers
    _parent = line = socket.socket(fileno=int(os.environ.pop(_LINE)))
    line.set_inheritable(False)  # to what the worker starts, nor the variable
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _Interrupted())

    def end_with_parent() -> None:
        with contextlib.suppress(OSError):
            line.recv(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()


class _Interrupted:
    """Takes SIGINT once where it comes twice: from the terminal, and by the parent."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def __call__(self, *_) -> None:
        before, self._last = self._last, time.monotonic()
        if self._last - before > 1:
            raise KeyboardInterrupt


def _wait_for_worker(options: Hosts) -> int:
    """Runs this command again as the worker, and returns the status to exit with."""
    ours, theirs = socket.socketpair()
    workers: list[subprocess.Popen] = []
    early: list[int] = []  # signals before there is a worker

    def forward(number: int, _) -> None:
        if not workers:
            early.append(number)
        for worker in workers:
            worker.send_signal(number)

    for kind in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(kind) != signal.SIG_IGN:  # as of what a script runs in the background
            signal.signal(kind, forward)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2")}
    worker = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, **quiet, _LINE: str(theirs.fileno())},
        pass_fds=(theirs.fileno(),),
    )
    theirs.close()
    workers.append(worker)
    for number in early:
        worker.send_signal(number)
    status = worker.wait()
    ours.setblocking(False)
    said = b""
    with ours, contextlib.suppress(BlockingIOError, ConnectionError):
        said = ours.recv(64)
    return _explained(options, status, said)


def _explained(options: Hosts, status: int, said: bytes) -> int:
    """The exit status for what became of the worker; with a line, where it could not say it."""
    _, told, final = said.partition(_TOLD)
    if status == 0 or told:
        return final[0] if final else status
    if status in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return 128 - status
    if status == -signal.SIGABRT and _JOINED in said:  # XLA's threads end a worker so
        line = f"this process was ended by SIGABRT, mostly because {_LOST}"
        print(f"\n{line}", file=sys.stderr)  # a bar of progress may stand in the line before
        return LOST
    if status in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS):
        name = signal.Signals(-status).name
        why = ", mostly for lack of memory" if status == -signal.SIGKILL else ""
        print(f"error: this process was ended by {name}{why}", file=sys.stderr)
        return 128 - status
    if _JOINING in said and _JOINED not in said:
        print(f"error: {_unreachable(options)}", file=sys.stderr)
        return 2
    return status if status > 0 else 128 - status


# How a process ends.


def ended(main: Callable[[], None]) -> None:
    """Calls `main()`; what stops it is told to the other processes, where there are any.

    Raises:
      SystemExit: with `PREEMPTED`, after a save, or with `LOST`, for `Again`.
    """
    try:
        main()
    except Preempted as stop:
        if _leave_together() == 0:
            print(stop, file=sys.stderr)
        _say(_TOLD + bytes([PREEMPTED]))
        raise SystemExit(PREEMPTED) from stop
    except Again as stop:
        fail(stop)
        print(stop, file=sys.stderr)
        raise SystemExit(LOST) from stop
    except BaseException as error:
        fail(error)
        raise
    _leave_together()


def fail(error: BaseException, within: bool = False) -> None:
    """Ends this process at once with a line, where it is one of several; else returns.

    Args:
      within: whether a bar of progress may stand in the line before.
    """
    if _parent is None or isinstance(error, SystemExit):
        return
    if within:
        print(file=sys.stderr)
    status = _reported(error)
    if status is None:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    status = 1 if status is None else status
    _say(_TOLD + bytes([status]))
    if status != LOST or isinstance(error, Again):
        time.sleep(1)  # others may be about to say the same, and without process 0 XLA ends them
    os._exit(status)


def _reported(error: BaseException) -> int | None:
    """Says in one line what ended this process, and returns its status; None for bugs."""
    if isinstance(error, Again):
        print(error, file=sys.stderr)
        return LOST
    if not isinstance(error, UserError) and _by_another(error):  # before report takes OSError
        print(_LOST, file=sys.stderr)
        return LOST
    return cli.report(error)


def _leave_together() -> int:
    """Waits until all processes are done; returns the number of this one."""
    if _parent is None:
        return 0
    import jax

    number = jax.process_index()
    jax.distributed.shutdown()
    return number


def _say(word: bytes) -> None:
    """Tells the parent, where there is one."""
    if _parent is not None:
        with contextlib.suppress(OSError):
            _parent.send(word)


def _by_another(error: BaseException | None) -> bool:
    """Whether an error is what a lost peer leaves: of XLA or of orbax, and about a connection."""
    while error is not None:
        kinds = RuntimeError | ValueError | TimeoutError | ConnectionError
        if isinstance(error, kinds) and _BY_ANOTHER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
