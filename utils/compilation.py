"""Compiled programs: kept on disk for later runs, and made while other work is done.

JAX's own variables win over what is set here: JAX_COMPILATION_CACHE_DIR names another folder, which
may be gs://BUCKET/FOLDER, and JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import contextlib
import glob
import hashlib
import os
import pathlib
import platform
import re
import sys
import threading
import warnings
from typing import Any

LIMIT = 10 * 2**30  # bytes of all programs that are kept
WORTH = 0.2  # seconds; what compiles faster is not kept
FOLDER, SWITCH = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
_ours: list[str] = []  # the folder that `keep` chose, if it did
_OFF = ("0", "f", "false", "n", "no", "off")
_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
)


def keep() -> None:
    """Lets JAX keep the programs of this process, and find those of earlier ones.

    They lie under $XDG_CACHE_HOME, or ~/.cache, at most `LIMIT` bytes of them. A folder that cannot
    be written to is told in a line, and stops nothing. JAX is not imported for it.
    """
    if os.environ.get(SWITCH, "").lower() in _OFF or os.environ.get(FOLDER) == "":
        return
    _mend_what_jax_warns_of()
    _default("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", WORTH)
    if FOLDER in os.environ:
        return
    try:
        root = folder()
        place = root / processor()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is executed
        if not os.access(place, os.W_OK):
            raise PermissionError(f"{place} cannot be written to")
    except (OSError, RuntimeError) as error:
        os.environ[SWITCH] = "false"  # for the processes that this one starts, which would say so
        _tell(error)
        return
    _default(FOLDER, str(place))
    _ours.append(str(place))
    threading.Thread(target=prune, args=(root,), daemon=True).start()


def keep_none_at_home() -> None:
    """Undoes `keep` where the folder is not the user's choice: for several processes.

    Their homes need not be one. On GPUs, processes that find no program share the autotuning of a
    new one, and wait for ever for those that found theirs.
    """
    if os.environ.get(FOLDER) in _ours:
        del os.environ[FOLDER]
        os.environ[SWITCH] = "false"  # also of the processes that this one starts


def folder() -> pathlib.Path:
    """Where programs are kept unless the user says otherwise.

    Raises:
      RuntimeError: the user has no home.
    """
    given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is to be ignored
    return (given if given.is_absolute() else pathlib.Path.home() / ".cache") / "flow-meanflow"


def processor() -> str:
    """Names the instructions that this machine's processor knows.

    Programs for CPUs are made of them: on a home that several machines share, each kind of machine
    has a folder of its own.
    """
    known = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        known += next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}_{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def prune(root: pathlib.Path, limit: int = LIMIT) -> None:
    """Removes the programs used longest ago, until those under `root` have at most `limit` bytes.

    JAX's own limit takes a lock at each look-up, and fails for good where one process was killed
    between two files. The time of access, which most file systems keep to the day, serves as well.
    """
    found = []
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            about = path.stat()
            if path.is_file():
                found.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    excess = sum(size for _, size, _ in found) - limit
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):  # another process may be at it
            path.unlink()
            excess -= size


def _default(variable: str, value: str | float) -> None:
    """Sets a variable of JAX that the user left out, whether or not JAX has read them already."""
    if variable not in os.environ:
        os.environ[variable] = str(value)
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(variable.lower(), value)


def _mend_what_jax_warns_of() -> None:
    """Removes an entry that is cut short, so that what is compiled instead takes its place.

    JAX writes in place, and never writes over what is there: after a kill or on a full disk it
    would warn of the same entry, and compile, for ever.
    """
    show = warnings.showwarning
    told: set[str] = set()

    def mend(message: Any, *args: Any, **options: Any) -> None:
        trouble = _TROUBLE.match(str(message))
        if trouble is None:
            return show(message, *args, **options)
        kind, name, error = trouble.groups()
        removed = 0
        for path in pathlib.Path(os.environ[FOLDER]).glob(f"{glob.escape(name)}*-cache"):
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
        gone = "No such file" in error  # removed by another process, to make room
        if not told and (kind == "writing" or not (removed or gone)):
            told.add(error)
            _tell(error)
        return None

    warnings.filterwarnings("always", r"Error (reading|writing) persistent compilation cache")
    warnings.showwarning = mend


def _tell(error: object) -> None:
    line = " ".join(str(error).split())
    print(
        f"warning: compiled programs are not kept ({line}): name another folder by {FOLDER}, or "
        f"set {SWITCH}=false",
        file=sys.stderr,
    )


class Ahead:
    """A jitted function, whose programs can be compiled in threads before they are called for.

    What is wrong with a program is raised where it is called, as without: nothing is kept of a
    compilation that failed, and arguments that were not prepared for are compiled as ever.
    """

    def __init__(self, jitted: Any):
        """Takes `jax.jit` of a function."""
        self._jitted = jitted
        self._threads: list[threading.Thread] = []

    def prepare(self, *abstract: Any) -> None:
        """Starts to compile for arguments like these.

        It is traced at once, so that errors of tracing are raised here. What JAX keeps of the
        traced function is what a call finds; a test sees to it.

        Args:
          abstract: trees of `jax.ShapeDtypeStruct`s with shardings; static arguments as they are.
        """
        lowered = self._jitted.lower(*abstract)

        def compile() -> None:
            with contextlib.suppress(Exception):
                lowered.compile()

        # No daemon: an interpreter that ends while XLA compiles would crash.
        thread = threading.Thread(target=compile, name="compile")
        self._threads.append(thread)
        thread.start()

    def __call__(self, *args: Any) -> Any:
        """Calls the function once all that was prepared is compiled."""
        while self._threads:
            self._threads[-1].join()  # which signals may interrupt
            self._threads.pop()
        return self._jitted(*args)

    def lower(self, *args: Any) -> Any:
        """`jax.jit`'s own."""
        return self._jitted.lower(*args)
